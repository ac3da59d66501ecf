"""Are parameters counted once, under the right kind and in the right block, and is the table a table?"""

import pytest
import timm
import torch
from torch import nn

import vitadapter_ext as va
from tests.vits import ARCHITECTURES, METHODS, PLACEMENTS, make


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
    assert summary.overrides == summary.norms == 38_400  # methods.md section 4: 25 norm layers of 2·768


def test_what_is_in_the_overrides_has_lines_of_its_own():
    summary = va.summary(va.attach(vit_base(), va.Consolidator()))
    assert summary.totals()[2:5] == [
        "overrides        121,344     0.141 %",
        "  norms           38,400     0.045 %",
        "  biases          82,944     0.096 %",
    ]
    summary = va.summary(va.attach(vit_base(), va.BitFit()))
    assert (summary.norms, summary.biases) == (38_400 // 2, 82_944 + 768)  # the patch embedding's too
    summary = va.summary(va.attach(vit_base(), va.FullFineTune()))
    assert (summary.norms, summary.biases) == (38_400, 82_944 + 768)
    assert summary.overrides + summary.head == summary.total


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
    first, second = summary.blocks
    assert first.total - second.total == model.blocks[0].mlp.fc1.weight.numel()  # in the first place it appears


def test_buffers_do_not_count():
    model = make()
    once = count(model.parameters())
    model.blocks[0].register_buffer("positions", torch.zeros(7))
    summary = va.summary(va.attach(model, va.LinearProbe()))
    assert summary.total == once
    assert summary.blocks[0].total == summary.blocks[1].total


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_blocks(architecture, method):
    model = va.attach(make(architecture), method)
    summary = va.summary(model)
    blocks = {name: module for name, module in model.named_modules() if "Block" in type(module).__name__}
    assert [row.name for row in summary.blocks] == list(blocks) and len(blocks) > 1
    for row, block in zip(summary.blocks, blocks.values(), strict=True):
        kinds = (va.FusedAdapter, va.FusedARC, va.FusedConsolidator)
        adapters = [m for m in block.modules() if isinstance(m, kinds)]
        assert row.adapter == sum(count(m.parameters()) for m in adapters)
        assert row.adapter + row.overrides == count(p for p in block.parameters() if p.requires_grad)
        assert row.total == count(block.parameters())
    heads = tuple(name for name, module in model.named_modules() if module in as_tuple(model.get_classifier()))
    outside = [(name, p) for name, p in model.named_parameters() if not name.startswith((*blocks, *heads))]
    bases = [p for name, p in outside if name.startswith("arc_basis.")]
    assert summary.elsewhere.adapter == count(bases)
    assert summary.elsewhere.overrides == count(p for _, p in outside if p.requires_grad) - count(bases)
    assert summary.elsewhere.total == count(p for _, p in outside)


def as_tuple(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_a_row_says_of_the_method(placement):
    summary = va.summary(va.attach(make(), va.Adapter(rank=5, placement=placement)))
    assert {row.method for row in summary.blocks} == {
        {
            "pre": "adapter_attn 5",
            "houlsby": "adapter_attn 5, adapter_mlp 5",
            "inner": "mlp.adapter_inner 5",
            "houlsby-inner": "adapter_attn 5, mlp.adapter_inner 5",
        }.get(placement, "adapter_mlp 5")
    }


def test_ranks_are_read_from_the_modules():
    model = va.attach(make(), va.Adapter(rank=5))
    model.blocks[1].adapter_mlp = va.FusedAdapter(48, 2)
    assert [row.method for row in va.summary(model).blocks] == ["adapter_mlp 5", "adapter_mlp 2"]


def test_a_merged_model_has_the_same_rows():
    model = va.attach(make(), va.Adapter(rank=5, placement="inner", activation="identity"))
    before = va.summary(model)
    after = va.summary(va.merge(model))
    assert after.blocks == before.blocks and after.blocks[0].method == "mlp.adapter_inner 5"
    assert after.elsewhere == before.elsewhere


class OuterBlock(nn.Module):
    """Of a class that no adapter attaches to, with a block inside."""

    def __init__(self, inside: type[nn.Module]):
        super().__init__()
        self.inner = inside(4, 4)


class LinearBlock(nn.Linear):
    pass


class Strange(nn.Module):
    num_classes = 3

    def __init__(self, layer: type[nn.Module]):
        super().__init__()
        self.first, self.second, self.head = layer(LinearBlock), layer(LinearBlock), nn.Linear(4, 3)

    def get_classifier(self) -> nn.Module:
        return self.head


def test_unsupported_blocks_have_rows_and_the_outer_ones_count():
    summary = va.summary(va.attach(Strange(OuterBlock), va.BitFit()))
    rows = [("first", "", 0, 4, 20), ("second", "", 0, 4, 20)]
    assert [(row.name, row.method, row.adapter, row.overrides, row.total) for row in summary.blocks] == rows


def test_a_model_without_blocks_has_no_rows():
    summary = va.summary(va.attach(Strange(lambda _: nn.Linear(4, 4)), va.BitFit()))
    assert summary.blocks == ()
    assert (summary.elsewhere.overrides, summary.elsewhere.total, summary.total) == (8, 40, 55)
    assert "elsewhere" in str(summary)


def table(summary) -> tuple[str, list[list[str]], list[list[str]]]:
    method, *blocks_and_totals = str(summary).split("\n\n")
    return method, *([line.split() for line in part.splitlines()] for part in blocks_and_totals)


def test_the_table():
    summary = va.summary(va.attach(vit_base(), va.Adapter(rank=8)))
    assert str(summary) == repr(summary)
    method, blocks, totals = table(summary)
    assert method.startswith("Adapter(rank=8, ")
    assert blocks[0] == ["block", "method", "adapter", "overrides", "total"]
    assert blocks[1] == ["blocks.0", "adapter_mlp", "8", "13,832", "0", "7,101,704"]
    assert [row[0] for row in blocks[1:]] == [f"blocks.{i}" for i in range(12)] + ["elsewhere", "head"]
    assert [row[0] for row in totals] == ["adapter", "head", "overrides", "trainable", "total"]
    assert totals[0] == ["adapter", "165,984", "0.193", "%"]
    assert totals[-1][2] == "100.000"
    assert "\n".join(summary.totals()) == str(summary).split("\n\n")[2]
    for column, name in ((-3, "adapter"), (-2, "overrides"), (-1, "total")):
        assert sum(int(row[column].replace(",", "")) for row in blocks[1:]) == getattr(summary, name)


@pytest.mark.parametrize("method", [va.Adapter(rank=256, placement="houlsby-inner"), va.FullFineTune(), va.BitFit()])
def test_the_table_has_at_most_100_columns(method):
    with torch.device("meta"):
        models = [timm.create_model(name) for name in ("vit_large_patch16_224", "swin_base_patch4_window7_224")]
    for model in models:
        text = str(va.summary(va.attach(model, method)))
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text


def test_words_too_long_for_the_table_are_cut_there_alone():
    model = va.attach(make(), va.Adapter(rank=3))
    for number in range(4):
        model.blocks[0].mlp.add_module(f"another_adapter_{number}", va.FusedAdapter(48, 3))
    summary = va.summary(model)
    assert max(map(len, str(summary).splitlines())) <= 100 and "…" in str(summary)
    assert summary.blocks[0].method.endswith("mlp.another_adapter_3 3")


def test_a_bare_model_has_no_summary():
    with pytest.raises(ValueError, match="no method is attached to this VisionTransformer"):
        va.summary(make())
