"""Does each method add, train and compute what its formula says?"""

import dataclasses

import pytest
import timm
import torch

import vitadapter_ext as va
from tests.vits import ARCHITECTURES, METHODS, PLACEMENTS, images, make, randomise_trained
from vitadapter_ext.methods import METHODS as METHOD_CLASSES
from vitadapter_ext.methods import make_method


def test_the_table_names_every_method():
    assert {name: cls.__name__ for name, cls in METHOD_CLASSES.items()} == {
        "adapter": "Adapter",
        "arc": "Arc",
        "mimi": "Mimi",
        "consolidator": "Consolidator",
        "linear-probe": "LinearProbe",
        "full": "FullFineTune",
        "bitfit": "BitFit",
    }
    for name, cls in METHOD_CLASSES.items():
        assert cls.name == name
        assert cls.description
        assert make_method(name) == cls()


def test_make_method_from_fields():
    assert make_method("adapter", {"rank": 4, "placement": "pre"}) == va.Adapter(rank=4, placement="pre")
    method = va.Adapter(rank=5, scale=0.5, train_norms=True)
    assert make_method(method.name, dataclasses.asdict(method)) == method


def test_a_method_has_one_phase_and_cannot_be_changed():
    assert va.Adapter().training_phases(7) == [7]
    with pytest.raises(dataclasses.FrozenInstanceError):
        va.Adapter().rank = 4


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make_method("adaptor"), "unknown method 'adaptor': did you mean 'adapter'"),
        (lambda: make_method("adapter", {"rnak": 3}), "unknown field of method 'adapter' 'rnak': did you mean 'rank'"),
        (lambda: make_method("bitfit", {"rank": 3}), "unknown field of method 'bitfit' 'rank'"),
        (lambda: va.Adapter(placement="houlsbi"), "unknown placement 'houlsbi': did you mean 'houlsby'"),
        (lambda: va.Adapter(placement=["post"]), "unknown placement"),
        (lambda: va.Adapter(rank=0), "rank is 0; it must be a whole number of at least 1"),
        (lambda: va.Adapter(rank=-3), "rank is -3"),
        (lambda: va.Adapter(rank=2.0), "rank is 2.0"),
        (lambda: va.Adapter(activation="gellu"), "unknown activation 'gellu': did you mean 'gelu'"),
        (lambda: va.Adapter(scale="chanel"), "scale is 'chanel'"),
        (lambda: va.Adapter(dropout=1.0), "dropout is 1.0"),
        (lambda: va.Adapter(dropout_out=-0.1), "dropout_out is -0.1"),
        (lambda: va.Adapter(drop_path="x"), "drop_path is 'x'"),
        (lambda: va.Adapter(init="houlsbi"), "unknown init 'houlsbi': did you mean 'houlsby'"),
        (lambda: va.Adapter(bias=1), "bias is 1; it must be True or False"),
        (lambda: va.Adapter(train_norms="yes"), "train_norms is 'yes'"),
        (lambda: va.Adapter(train_biases=None), "train_biases is None"),
    ],
)
def test_bad_settings_are_refused_by_name(make_it, message):
    with pytest.raises(ValueError) as error:
        make_it()
    assert message in str(error.value)


# methods.md section 1: twelve blocks of 2·dim·r + r + 2·dim; inside the MLP the dim is 3072; pfeiffer's norm is 2·768.
ONE = {8: 165_984, 16: 313_536}
INNER = {8: 12 * (2 * 3072 * 8 + 8 + 2 * 3072), 16: 12 * (2 * 3072 * 16 + 16 + 2 * 3072)}


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_counts_on_vit_base(placement, rank):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    va.attach(model, va.Adapter(rank=rank, placement=placement))
    assert va.summary(model).adapter == {
        "houlsby": 2 * ONE[rank],
        "pfeiffer": ONE[rank] + 12 * 2 * 768,
        "inner": INNER[rank],
        "houlsby-inner": ONE[rank] + INNER[rank],
    }.get(placement, ONE[rank])


def test_adapter_options_reach_the_modules():
    model = va.attach(
        make(), va.Adapter(5, "houlsby", "silu", 0.25, False, dropout=0.1, dropout_out=0.2, drop_path=0.3, init="lora")
    )
    for block in model.blocks:
        for adapter in (block.adapter_attn, block.adapter_mlp):
            assert isinstance(adapter, va.FusedAdapter)
            assert (adapter.activation, adapter.scale, adapter.init) == ("silu", 0.25, "lora")
            assert (adapter.dropout, adapter.dropout_out, adapter.drop_path) == (0.1, 0.2, 0.3)
            assert adapter.down.weight.shape == (5, 48)
            assert adapter.down.bias is None
            assert not adapter.up.weight.any()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_children_where_the_placement_has_them(placement):
    model = va.attach(make(), va.Adapter(placement=placement))
    block = model.blocks[0]
    assert {name for name, module in block.named_modules() if isinstance(module, va.FusedAdapter)} == {
        "houlsby": {"adapter_attn", "adapter_mlp"},
        "pre": {"adapter_attn"},
        "inner": {"mlp.adapter_inner"},
        "houlsby-inner": {"adapter_attn", "mlp.adapter_inner"},
    }.get(placement, {"adapter_mlp"})


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_overrides_by_name():
    def overrides(method, architecture="dinov2", **changes):
        model = make(architecture, **changes)
        before = {name for name, _ in model.named_parameters()} - {"head.weight", "head.bias"}
        return trained_names(va.attach(model, method)) & before

    norms = {f"blocks.{i}.norm{j}.{kind}" for i in (0, 1) for j in (1, 2) for kind in ("weight", "bias")}
    q_and_k = {f"blocks.{i}.attn.{q}_norm.{kind}" for i in (0, 1) for q in "qk" for kind in ("weight", "bias")}
    biases = {f"blocks.{i}.{linear}.bias" for i in (0, 1) for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    every_bias = biases | {name for name in norms if name.endswith("bias")} | {"norm.bias", "patch_embed.proj.bias"}
    assert overrides(va.Adapter()) == set()
    assert overrides(va.Adapter(train_norms=True)) == norms | {"norm.weight", "norm.bias"}
    assert overrides(va.Adapter(train_norms=True), qk_norm=True, global_pool="avg") == (
        norms | q_and_k | {"fc_norm.weight", "fc_norm.bias"}
    )
    assert overrides(va.Adapter(train_biases=True)) == biases
    assert overrides(va.Adapter(placement="pfeiffer")) == set()
    assert overrides(va.BitFit()) == every_bias
    assert overrides(va.LinearProbe()) == set()
    q_and_v = {f"blocks.{i}.attn.{q}_bias" for i in (0, 1) for q in "qv"}  # without a linear layer that holds them
    assert overrides(va.Adapter(train_biases=True), "eva02") == q_and_v | {b for b in biases if "qkv" not in b}
    everything = {name for name, _ in make("dinov2").named_parameters()}
    assert overrides(va.FullFineTune()) == everything - {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_trained_tensor_gets_a_gradient_and_no_other(architecture, method):
    model = va.attach(make(architecture), method).train()
    randomise_trained(model)
    logits = model(images(model))
    (logits * torch.randn_like(logits)).sum().backward()
    trained = trained_names(model)
    assert any("head" in name for name in trained)
    for name, p in model.named_parameters():
        if name not in trained:
            assert p.grad is None, name
        elif name.endswith("qkv.bias"):  # the keys' part has no effect on a softmax
            assert p.grad.view(3, -1)[[0, 2]].count_nonzero() == 2 * p.numel() // 3, name
        else:
            assert p.grad.count_nonzero() > 0, name
