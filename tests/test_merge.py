"""Does a method fold into plain timm weights, exactly, and out again without a trace?"""

import copy
import itertools
import pickle

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import vitadapter_ext as va
from tests.vits import (
    ARCHITECTURES,
    assert_same_state,
    copied_state,
    images,
    make,
    randomise,
    randomise_trained,
    same_requires_grad,
    structure,
)
from vitadapter_ext import folding
from vitadapter_ext.folding import Foldable
from vitadapter_ext.nn.consolidator import ConsolidatedLinear
from vitadapter_ext.sites import WithArc, WithInnerAdapter

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
ONE_OF_EACH_MLP = ("vit", "dinov2_giant", "eva02_large")
LINEAR = va.Adapter(rank=3, placement="inner", activation="identity", scale=0.5)
INNER = {
    "constant scale": LINEAR,
    "scalar scale": va.Adapter(rank=3, placement="inner", activation="identity", scale="scalar"),
    "channel scale": va.Adapter(rank=3, placement="inner", activation="identity", scale="channel"),
    "no bias": va.Adapter(rank=3, placement="inner", activation="identity", scale=0.5, bias=False),
    "dropped out": va.Adapter(rank=3, placement="inner", activation="identity", dropout=0.5, drop_path=0.5),
    "overrides": va.Adapter(rank=3, placement="inner", activation="identity", train_biases=True, train_norms=True),
}
ARC = {
    "arc": va.Arc(rank=3),
    "arc before attention": va.Arc(rank=3, positions=("attn",)),
    "arc before mlp": va.Arc(rank=3, positions=("mlp",), rescale_init="zero"),
    "arc without bias": va.Arc(rank=50, bias=False, dropout=0.0),
}
CONSOLIDATOR = {
    "consolidator": va.Consolidator(groups=(8,), in_weight=False, drop_path=0.5),
    "consolidators": va.Consolidator(groups=(8, 4), in_weight=False, shuffle=False, train_biases=False),
    "consolidator without bias": va.Consolidator(groups=(8,), in_weight=False, bias=False, targets=("qkv", "fc1")),
}
OPTIONS = {**INNER, **ARC, **CONSOLIDATOR}
ONE_OF_EACH_KIND = pytest.mark.parametrize(
    "method", [LINEAR, ARC["arc"], CONSOLIDATOR["consolidators"]], ids=["inner", "arc", "consolidators"]
)
every_option = pytest.mark.parametrize("method", OPTIONS.values(), ids=OPTIONS)
BASELINES = {"linear-probe": va.LinearProbe(), "full": va.FullFineTune(), "bitfit": va.BitFit()}


def attached(architecture="vit", method=LINEAR, **changes):
    model = va.attach(make(architecture, **changes), method)
    randomise_trained(model)
    return model


def all_of(model):
    """Everything that a refused or undone merge must leave as it was."""
    return copied_state(model), structure(model)


def assert_all_of(model, before):
    assert_same_state(model, before[0])
    assert structure(model) == before[1]


# What merging computes


@pytest.mark.parametrize("method", INNER.values(), ids=INNER)
@every_architecture
def test_the_merged_weights_are_the_formula(architecture, method):
    model = attached(architecture, method).double()
    merged = va.merge(copy.deepcopy(model))
    for name, mlp in model.named_modules():
        if not isinstance(mlp, Foldable):
            continue
        adapter, fc2, new = mlp.adapter_inner, mlp.fc2, merged.get_submodule(name).fc2
        s = adapter.scale.diag() if torch.is_tensor(adapter.scale) and len(adapter.scale) > 1 else adapter.scale
        s = s if torch.is_tensor(s) and s.dim() == 2 else s * torch.eye(fc2.in_features, dtype=torch.float64)
        image = torch.eye(fc2.in_features) + s @ adapter.up.weight @ adapter.down.weight
        torch.testing.assert_close(new.weight, fc2.weight @ image, rtol=1e-12, atol=1e-12)
        shift = 0.0
        if method.bias:
            shift = fc2.weight @ s @ (adapter.up.weight @ adapter.down.bias + adapter.up.bias)
        torch.testing.assert_close(new.bias, fc2.bias + shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ARC.values(), ids=ARC)
@every_architecture
def test_arcs_merged_weights_are_the_formula(architecture, method):
    """methods.md section 2: W(I + UΛUᵀ) and b + W·b_arc, for all layers that read the place."""
    model = attached(architecture, method).double()
    merged = va.merge(copy.deepcopy(model)).state_dict()
    changed = set()
    for name, place in model.named_modules():
        if not isinstance(place, WithArc):
            continue
        basis, rescale, bias = place.arc.basis.weight, place.arc.rescale, place.arc.bias
        image = torch.eye(len(basis)) + basis @ rescale.diag() @ basis.T
        for reader in ("qkv", "q_proj", "k_proj", "v_proj", "gate", "fc1", "fc1_g", "fc1_x"):
            linear = getattr(place, reader, None)
            if linear is not None:
                changed |= {f"{name}.{reader}.weight", f"{name}.{reader}.bias"} & merged.keys()
                expected = linear.weight @ image
                torch.testing.assert_close(merged[f"{name}.{reader}.weight"], expected, rtol=1e-12, atol=1e-12)
                assert bias is None or linear.bias is not None
                if linear.bias is not None:
                    shift = 0.0 if bias is None else linear.weight @ bias
                    torch.testing.assert_close(merged[f"{name}.{reader}.bias"], linear.bias + shift)
    assert changed
    assert all(
        torch.equal(merged[name], t) for name, t in model.state_dict().items() if name in merged.keys() - changed
    )


@pytest.mark.parametrize("method", CONSOLIDATOR.values(), ids=CONSOLIDATOR)
@every_architecture
def test_consolidators_merged_weights_are_the_formula(architecture, method):
    """methods.md section 4: W + S and b + Σc, and nothing else."""
    model = attached(architecture, method).double()
    merged = va.merge(copy.deepcopy(model)).state_dict()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name in merged}
    for name, layer in model.named_modules():
        if isinstance(layer, ConsolidatedLinear):
            weight, bias = layer.consolidator.delta()
            wanted[f"{name}.weight"] = layer.weight + weight
            if layer.bias is not None:
                wanted[f"{name}.bias"] = layer.bias + bias
    changed = [name for name in merged if not torch.equal(wanted[name], model.state_dict()[name])]
    assert len(changed) >= 4
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-12 if name in changed else 0, atol=1e-12)


def test_arc_folds_into_the_gate_of_an_attention_too():
    model = make("eva02")
    for block in model.blocks:
        block.attn.gate = nn.Linear(48, 48)
    va.attach(model, va.Arc(rank=3))
    randomise_trained(model)
    x = images(model)
    logits = model(x)
    torch.testing.assert_close(va.merge(model)(x), logits, rtol=1e-4, atol=1e-5)


@every_option
@every_architecture
def test_a_merged_model_is_a_plain_timm_model_with_the_same_logits(architecture, method):
    model = attached(architecture, method)
    x = images(model, 3)
    logits = model(x)
    assert va.merge(model) is model
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    plain = make(architecture, num_classes=3)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in plain.state_dict().items()
    }
    classes = {name: type(m) for name, m in model.named_modules() if name != "arc_basis"}  # which is empty
    assert classes == {name: type(m) for name, m in plain.named_modules()}
    with torch.no_grad():
        for p in plain.parameters():
            p.fill_(torch.nan)
    plain.load_state_dict(model.state_dict())
    same_requires_grad(plain, model)
    with torch.no_grad():  # a relative position bias that asks for a gradient takes another path through attention
        assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ONE_OF_EACH_KIND
@pytest.mark.parametrize("architecture", ONE_OF_EACH_MLP)
def test_low_precision_within_its_rounding(architecture, method, dtype, plain_device):
    exact = attached(architecture, method).double()
    model = copy.deepcopy(exact).to(plain_device, dtype)
    exact.load_state_dict({name: tensor.cpu().double() for name, tensor in model.state_dict().items()})
    values = {name: tensor.double() for name, tensor in va.merge(exact).state_dict().items()}
    for name, tensor in va.merge(model).state_dict().items():
        assert tensor.dtype == dtype and tensor.device.type == plain_device
        assert torch.equal(tensor.cpu(), values[name].to(dtype)), name  # rounded once


# Undoing it


@every_option
@every_architecture
def test_unmerging_leaves_no_trace(architecture, method):
    model = attached(architecture, method)
    x, before = images(model), all_of(model)
    logits = model(x)
    va.merge(model)
    assert not torch.equal(model(x), logits)
    assert va.unmerge(model) is model
    assert_all_of(model, before)
    assert torch.equal(model(x), logits)


@every_option
@pytest.mark.parametrize("architecture", ONE_OF_EACH_MLP)
def test_detach_of_a_merged_model_leaves_no_trace(architecture, method):
    model = make(architecture)
    before = all_of(model)
    va.attach(model, method)
    randomise_trained(model)
    va.merge(model)
    va.detach(model)
    assert_all_of(model, before)


@every_option
@torch.no_grad()
def test_disabled_on_a_merged_model_is_the_frozen_backbone(method):
    model, frozen = attached(method=method), make()
    va.merge(model)
    before, x = all_of(model), images(model)
    logits = model(x)
    frozen.load_state_dict({name: t for name, t in before[0].items() if name.startswith("head")}, strict=False)
    with va.disabled(model):
        assert torch.equal(model(x), frozen(x))
        for call in (va.merge, va.unmerge):
            with pytest.raises(ValueError, match="inside `with disabled"):
                call(model)
    assert torch.equal(model(x), logits)
    assert_all_of(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@ONE_OF_EACH_KIND
def test_unmerging_casts_to_what_the_model_has_become(method, dtype, plain_device):
    model = attached(method=method)
    wanted = copy.deepcopy(model).to(plain_device, dtype).train()
    va.merge(model)
    va.unmerge(model.to(plain_device, dtype).train())
    assert_all_of(model, all_of(wanted))
    assert all(module.training for module in model.modules())
    model.eval()(images(model).to(plain_device, dtype))
    assert all(p.device.type == plain_device for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ONE_OF_EACH_KIND
def test_the_methods_float32_beside_a_low_precision_backbone_is_kept(method, dtype):
    model = va.attach(make().to(dtype), method)
    randomise_trained(model)
    before = all_of(model)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.float32}
    assert_all_of(va.unmerge(va.merge(model)), before)


@ONE_OF_EACH_KIND
def test_merging_in_inference_mode_leaves_a_model_that_can_be_trained(method):
    model = attached(method=method)
    before, x = all_of(model), images(model)
    with torch.inference_mode():
        va.merge(model)
        merged = model(x)
        va.unmerge(model)
    assert_all_of(model, before)
    model(x).sum().backward()
    with torch.inference_mode():
        va.merge(model, keep=False)
    model.requires_grad_(True)(x).sum().backward()
    torch.testing.assert_close(model(x), merged)


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_unmerge_can_be_ended(monkeypatch, moment):
    """Also after the model has moved: the bases have gone where the layers are."""
    model = attached(method=ARC["arc"])
    wanted = all_of(copy.deepcopy(model).double())
    va.merge(model).double()
    steps = itertools.count()
    unfold = folding._unfold

    def interrupted(*arguments):
        if next(steps) == moment:
            raise KeyboardInterrupt
        unfold(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folding, "_unfold", interrupted)
        if moment < 5:  # two attentions, two MLPs, the bases
            with pytest.raises(KeyboardInterrupt):
                va.unmerge(model)
        else:
            va.unmerge(model)
            return assert_all_of(model, wanted)
    assert_all_of(va.unmerge(model), wanted)


def test_a_merged_weight_is_frozen_until_it_is_unmerged():
    model = attached(method=OPTIONS["overrides"])
    model(images(model)).sum().backward()
    va.merge(model)
    fc2 = model.blocks[0].mlp.fc2
    assert not fc2.bias.requires_grad and fc2.bias.grad is None  # or an optimizer would still change it
    assert model.blocks[0].mlp.fc1.bias.requires_grad and model.head.weight.requires_grad
    va.unmerge(model)
    assert model.blocks[0].mlp.fc2.bias.requires_grad and not model.blocks[0].mlp.fc2.weight.requires_grad


def test_the_adapters_go_on_training_after_unmerging():
    """The optimizer still has the same parameters."""
    model = attached()
    adapter = model.blocks[0].mlp.adapter_inner
    before = list(adapter.parameters())
    va.unmerge(va.merge(model))
    assert model.blocks[0].mlp.adapter_inner is adapter
    assert all(now is then for now, then in zip(adapter.parameters(), before, strict=True))
    model(images(model)).sum().backward()
    assert all(p.grad is not None for p in before)


# What goes on working


@every_option
def test_a_merged_model_saves_the_same_file(tmp_path, method):
    model = attached(method=method)
    x = images(model)
    logits = model(x)
    va.save(model, tmp_path / "attached")
    va.save(va.merge(model), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "attached").read_bytes()
    loaded = va.load(make(), tmp_path / "merged")(x)
    # Whose files hold sums.
    exact = not isinstance(method, va.Consolidator)
    torch.testing.assert_close(loaded, logits, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@every_option
def test_a_merged_model_counts_the_same_parameters(method):
    model = attached(method=method)
    before = va.summary(model)
    after = va.summary(va.merge(model))
    assert (before.merged, after.merged) == (False, True)
    for kind in ("adapter", "head", "overrides", "trainable", "total", "blocks"):
        assert getattr(after, kind) == getattr(before, kind), kind
    assert "(merged)" in str(after) and "(merged)" not in str(before)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
@ONE_OF_EACH_KIND
def test_a_copy_can_be_unmerged(method, copy_of):
    model = attached(method=method)
    before, x = all_of(model), images(model)
    va.merge(model)
    merged = all_of(model)
    twin = copy_of(model)
    assert torch.equal(twin(x), model(x))
    assert_all_of(va.unmerge(twin), before)
    assert_all_of(model, merged)


@pytest.mark.parametrize("architecture", ["vit", "eva02", "eva02_large", "beit", "swin"])
@ONE_OF_EACH_KIND
@torch.no_grad()
def test_a_compiled_model_sees_it(architecture, method):
    torch._dynamo.reset()
    model = attached(architecture, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model)
    logits = model(x)
    torch.testing.assert_close(compiled(x), logits)
    va.merge(model)
    randomise([model.get_classifier().weight])
    torch.testing.assert_close(compiled(x), model(x))
    va.unmerge(model)
    torch.testing.assert_close(compiled(x), model(x))


# keep=False


@every_option
@pytest.mark.parametrize("at_once", [True, False])
def test_without_keeping_the_method_is_gone(at_once, method):
    model = make()
    next(model.parameters()).requires_grad_(False)
    shape = structure(model)
    va.attach(model, method)
    randomise_trained(model)
    x = images(model)
    if not at_once:
        va.merge(model)
    merged = va.merge(copy.deepcopy(model)).state_dict() if at_once else copied_state(model)
    va.merge(model, keep=False)
    assert_same_state(model, merged)
    assert structure(model) == shape
    for call in (va.unmerge, va.merge, va.summary):
        with pytest.raises(ValueError, match="no method is attached"):
            call(model)
    logits = model(x)
    va.attach(model, va.Adapter(rank=2, init="zero"))  # and another one may come
    torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)
def test_baselines_are_in_the_weights_already(method):
    model = attached(method=method)
    before = all_of(model)
    assert_all_of(va.unmerge(va.merge(model)), before)
    assert not va.summary(model).merged
    va.merge(model, keep=False)
    assert_same_state(model, before[0])
    assert structure(model) == structure(make())


# timm's reparameterize_model


@pytest.mark.parametrize("inplace", [False, True])
@ONE_OF_EACH_KIND
@every_architecture
def test_reparameterizing_is_merging(architecture, method, inplace):
    model = attached(architecture, method)
    before = all_of(model)
    merged = all_of(va.merge(copy.deepcopy(model)))
    fused = reparameterize_model(model, inplace=inplace)
    assert (fused is model) == inplace
    assert_all_of(fused, merged)
    assert va.summary(fused).merged
    if not inplace:
        assert_all_of(model, before)
    assert_all_of(va.unmerge(fused), before)


def test_what_timm_has_folded_in_part_is_no_merged_model():
    model = attached(method=va.Adapter(rank=3, placement="houlsby-inner", activation="identity"))
    before, x = all_of(model), images(model)
    logits = model(x)
    reparameterize_model(model, inplace=True)
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    partly = all_of(model)
    for keep in (True, False):
        with pytest.raises(ValueError, match="cannot be merged: placement 'houlsby-inner'"):
            va.merge(model, keep=keep)
    assert_all_of(model, partly)
    assert_all_of(va.unmerge(model), before)


@pytest.mark.parametrize("keep", [True, False])
def test_merging_ends_what_timm_has_begun(keep):
    model = attached(method=ARC["arc"])
    wanted = all_of(va.merge(copy.deepcopy(model), keep=keep))
    reparameterize_model(model.blocks[0], inplace=True)
    assert_all_of(va.merge(model, keep=keep), wanted)


def test_what_timm_has_begun_stays_where_the_rest_is_refused():
    model = va.attach(without_bias(make()), LINEAR)
    randomise_trained(model)
    reparameterize_model(model.blocks[0], inplace=True)
    before = all_of(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp cannot be merged: fc2 has no bias"):
        va.merge(model)
    assert_all_of(model, before)


@pytest.mark.parametrize("placement", ["post", "houlsby-inner", "inner"])
def test_reparameterizing_leaves_what_has_an_activation(placement):
    model = attached(method=va.Adapter(rank=3, placement=placement))
    before = all_of(model)
    assert_all_of(reparameterize_model(model), before)


# What is refused


@pytest.mark.parametrize(
    "method",
    [
        va.Adapter(rank=3),
        va.Adapter(rank=3, activation="identity"),
        va.Adapter(rank=3, placement="inner"),
        va.Adapter(rank=3, placement="houlsby-inner", activation="identity"),
    ],
)
def test_what_is_not_linear_is_refused(method):
    model = attached(method=method)
    before = all_of(model)
    with pytest.raises(ValueError) as error:
        va.merge(model)
    assert str(error.value).startswith(f"{method} cannot be merged: placement {method.placement!r} with activation")
    assert_all_of(model, before)


def test_merging_twice_and_unmerging_what_was_not_merged():
    model = attached()
    before = all_of(model)
    with pytest.raises(ValueError, match=r"Adapter\(rank=3.* is not merged into this model: merge"):
        va.unmerge(model)
    assert_all_of(model, before)
    merged = all_of(va.merge(model))
    with pytest.raises(ValueError, match=r"Adapter\(rank=3.* is already merged into this model: unmerge"):
        va.merge(model)
    assert_all_of(model, merged)
    with pytest.raises(ValueError, match=r"Adapter\(rank=3.* is already attached to this model: detach"):
        va.attach(model, va.Adapter())
    assert_all_of(model, merged)


@pytest.mark.parametrize("call", [va.merge, va.unmerge])
def test_models_that_cannot_be_used(call):
    with pytest.raises(ValueError, match="no method is attached to this VisionTransformer: attach"):
        call(make())
    with pytest.raises(ValueError, match="wrapped by torch.compile"):
        call(torch.compile(attached()))


def without_bias(model):
    for block in model.blocks[1:]:  # the first has one: what is folded already must come out again
        block.mlp.fc2.bias = None
    return model


def test_a_constant_needs_a_bias_to_go_to():
    model = va.attach(without_bias(make()), LINEAR)
    randomise_trained(model)
    before = all_of(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp cannot be merged: fc2 has no bias"):
        va.merge(model)
    assert_all_of(model, before)


def test_only_plain_linear_layers_are_given_new_weights():
    model = make()
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc2)
    va.attach(model, LINEAR)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp cannot be merged: fc2 is a ParametrizedLinear"):
        va.merge(model)
    assert_same_state(model, before)


def test_no_constant_needs_no_bias():
    model = va.attach(without_bias(make()), OPTIONS["no bias"])
    randomise_trained(model)
    x = images(model)
    logits = model(x)
    torch.testing.assert_close(va.merge(model)(x), logits, rtol=1e-4, atol=1e-5)


def test_a_shared_weight_is_refused():
    model = make()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    va.attach(model, LINEAR)
    randomise_trained(model)
    before = all_of(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2\.weight cannot be merged: it is shared"):
        va.merge(model)
    assert_all_of(model, before)


@pytest.mark.parametrize("architecture", ["eva02", "eva02_large", "dinov3", "beit"])
def test_a_bias_of_arc_needs_one_in_every_layer_that_reads_it(architecture):
    """Where k has no saved bias: "auto" leaves ARC's away before the attention, and only there."""
    model = attached(architecture, va.Arc(rank=3))
    biases = {name for name, _ in model.named_parameters() if name.endswith("arc.bias")}
    assert biases == {f"blocks.{number}.mlp.arc.bias" for number in range(2)}
    model = attached(architecture, va.Arc(rank=3, bias=True))
    before = all_of(model)
    with pytest.raises(ValueError, match="attn cannot be merged: .* has no bias"):
        va.merge(model)
    assert_all_of(model, before)


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_merge_changes_nothing(monkeypatch, moment):
    """Two MLPs of three steps each: folding, taking the adapter away, changing the class."""
    model = attached()
    before = all_of(model)
    steps = itertools.count()

    def interrupted(function):
        def call(module, *args):
            if isinstance(module, timm.layers.Mlp) and next(steps) == moment:
                raise KeyboardInterrupt
            return function(module, *args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(WithInnerAdapter, "folded", interrupted(WithInnerAdapter.folded))
        for name in ("__delattr__", "__setattr__"):
            patch.setattr(nn.Module, name, interrupted(getattr(nn.Module, name)))
        with pytest.raises(KeyboardInterrupt):
            va.merge(model)
    assert_all_of(model, before)


def test_meta_tensors():
    """`load` tries a file on a model without storage."""
    model = va.attach(make().to("meta"), LINEAR)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    va.unmerge(va.merge(model))
    assert {name: t.shape for name, t in model.state_dict().items()} == shapes
