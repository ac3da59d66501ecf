"""Are parameters counted once, and under the right kind?"""

import pytest
import timm
import torch

import vitadapter_ext as va
from tests.vits import METHODS, make


def vit_base(name="vit_base_patch16_224", num_classes=100):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=num_classes)


def test_vit_base_with_rank_8():
    model = vit_base()
    frozen = sum(p.numel() for p in model.parameters())
    summary = va.summary(va.attach(model, va.Adapter(rank=8)))
    assert (summary.adapter, summary.head, summary.overrides) == (165_984, 76_900, 0)
    assert summary.trainable == 165_984 + 76_900
    assert summary.total == frozen + 165_984
    assert summary.merged is False


def test_norm_layers_of_vit_base():
    summary = va.summary(va.attach(vit_base(), va.Adapter(train_norms=True)))
    assert summary.overrides == 38_400  # methods.md section 4: 25 norm layers of 2·768


def test_both_heads_of_a_distilled_deit():
    summary = va.summary(va.attach(vit_base("deit_base_distilled_patch16_224", 10), va.LinearProbe()))
    assert (summary.adapter, summary.head) == (0, 2 * (768 * 10 + 10))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_trainable_is_what_asks_for_gradients(method):
    model = va.attach(make("deit_distilled"), method)
    assert va.summary(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_full_fine_tuning_trains_the_total():
    summary = va.summary(va.attach(make(), va.FullFineTune()))
    assert summary.trainable == summary.total
    assert summary.adapter == 0


def test_a_shared_tensor_counts_once():
    model = make()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    once = sum(p.numel() for p in model.parameters())
    summary = va.summary(va.attach(model, va.FullFineTune()))
    assert summary.total == summary.trainable == once


def test_the_table():
    text = str(va.summary(va.attach(vit_base(), va.Adapter(rank=8))))
    assert text == repr(va.summary(va.attach(vit_base(), va.Adapter(rank=8))))
    assert "rank=8" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert list(rows) == ["adapter", "head", "overrides", "trainable", "total"]
    assert rows["adapter"] == ["165,984", "0.193", "%"]
    assert rows["total"][1] == "100.000"


def test_a_bare_model_has_no_summary():
    with pytest.raises(ValueError, match="no method is attached to this VisionTransformer"):
        va.summary(make())
