"""Does a method come onto a model, and off again, without a trace?"""

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import vitadapter_ext as va
from tests.vits import (
    ARCHITECTURES,
    METHODS,
    assert_same_state,
    copied_state,
    images,
    make,
    randomise_trained,
    same_requires_grad,
    structure,
)
from vitadapter_ext.attachment import tensors_by_kind
from vitadapter_ext.methods import Method

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_attach_edits_in_place_and_returns_the_model():
    model = make()
    assert va.attach(model, va.Adapter()) is model
    assert va.detach(model) is model


@every_architecture
@every_method
def test_names_of_all_other_tensors_stay(architecture, method):
    model = make(architecture)
    before = copied_state(model)
    va.attach(model, method)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() - before.keys() == tensors_by_kind(model)["adapter"].keys()


@every_architecture
@every_method
def test_detach_leaves_no_trace(architecture, method):
    model = make(architecture)
    next(model.parameters()).requires_grad_(False)  # a flag of its own that must come back
    x = images(model)
    state, shape, logits = copied_state(model), structure(model), model(x)
    va.attach(model, method)
    randomise_trained(model)
    assert not torch.equal(model(x), logits)
    va.detach(model)
    assert torch.equal(model(x), logits)
    assert_same_state(model, state)
    assert structure(model) == shape


@pytest.mark.parametrize("architecture", ["vit", "deit_distilled"])
def test_detach_restores_the_size_of_the_head(architecture):
    model = make(architecture, num_classes=7)
    state, shape = copied_state(model), structure(model)
    va.attach(model, va.Adapter())
    model.reset_classifier(5)
    va.detach(model)
    assert_same_state(model, state)
    assert structure(model) == shape


@every_architecture
@every_method
@torch.no_grad()  # a relative position bias that asks for a gradient takes another path through attention
def test_disabled_is_the_frozen_backbone_under_the_present_head(architecture, method):
    model, frozen = make(architecture), make(architecture)
    va.attach(model, method)
    randomise_trained(model)
    state, shape = copied_state(model), structure(model)
    x = images(model)
    logits = model(x)
    frozen.load_state_dict({name: t for name, t in state.items() if name.startswith("head")}, strict=False)
    same_requires_grad(frozen, model)
    with va.disabled(model) as same:
        assert same is model
        assert torch.equal(model(x), frozen(x))
    assert torch.equal(model(x), logits)
    assert_same_state(model, state)
    assert structure(model) == shape


def test_disabled_ends_after_an_exception():
    model = va.attach(make(), va.Adapter(train_norms=True))
    randomise_trained(model)
    state, shape = copied_state(model), structure(model)
    with pytest.raises(KeyError), va.disabled(model):
        raise KeyError
    assert_same_state(model, state)
    assert structure(model) == shape


def test_what_is_written_inside_disabled_does_not_reach_the_originals():
    model = va.attach(make(), va.BitFit())
    before = model.norm.bias.detach().clone()
    with va.disabled(model):
        model.norm.bias.data.add_(1.0)
    assert torch.equal(va.detach(model).norm.bias, before)


def test_a_graph_from_before_disabled_has_its_backward_after_it():
    model = va.attach(make(), va.FullFineTune())
    loss = model(images(model)).sum()
    with va.disabled(model):
        model(images(model))
    loss.backward()


def test_inside_disabled_the_model_cannot_be_changed(tmp_path):
    model = va.attach(make(), va.BitFit())
    with va.disabled(model):
        for call in (
            lambda: va.detach(model),
            lambda: va.save(model, tmp_path / "file"),
            lambda: va.disabled(model).__enter__(),
        ):
            with pytest.raises(ValueError, match="inside `with disabled"):
                call()
    va.detach(model)


def test_attaching_twice_names_the_first_method():
    model = va.attach(make(), va.Adapter(rank=5))
    state, shape = copied_state(model), structure(model)
    with pytest.raises(ValueError, match=r"Adapter\(rank=5, .* is already attached to this model: detach"):
        va.attach(model, va.BitFit())
    assert_same_state(model, state)
    assert structure(model) == shape
    va.attach(va.detach(model), va.BitFit())


@pytest.mark.parametrize("call", [va.detach, va.summary, lambda m: va.disabled(m).__enter__()])
def test_nothing_attached(call):
    with pytest.raises(ValueError, match="no method is attached to this VisionTransformer: attach"):
        call(make())


@dataclass(frozen=True)
class Failing(Method):
    """Changes a bit of everything, then fails."""

    name = "failing"

    def overrides(self, model):
        return ["norm.weight"]

    def insert(self, model, shapes=None):
        model.blocks[0].adapter_mlp = nn.Linear(3, 3)
        model.blocks[0].join_mlp = "sum"
        model.scale = nn.Parameter(torch.ones(3))
        model.norm.__class__ = type("Other", (type(model.norm),), {})
        raise RuntimeError("out of something")


def test_a_failed_attach_changes_nothing():
    model = make()
    model.norm.weight.requires_grad_(False)
    state, shape = copied_state(model), structure(model)
    with pytest.raises(RuntimeError, match="out of something"):
        va.attach(model, Failing())
    assert_same_state(model, state)
    assert structure(model) == shape


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (lambda: make(num_classes=0), va.Adapter(), "no classifier: create it with num_classes=N"),
        (lambda: make("deit_distilled", num_classes=0), va.BitFit(), "no classifier: create it with num_classes=N"),
        (lambda: nn.Linear(3, 3), va.BitFit(), "this Linear has no get_classifier"),
        (lambda: "vit_base", va.BitFit(), "model is a str"),
        (make, va.Adapter, "it must be an instance such as Adapter"),
        (make, "adapter", "method is 'adapter'"),
        (lambda: torch.compile(make()), va.Adapter(), "wrapped by torch.compile: pass the model itself"),
        (lambda: timm.create_model("test_resnet"), va.LinearProbe(), "keeps batch statistics"),
    ],
)
def test_models_and_methods_that_cannot_be_used(model, method, message):
    with pytest.raises(ValueError) as error:
        va.attach(model(), method)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel", "inner"])
def test_adapters_are_float32_on_a_low_precision_backbone(placement, dtype, plain_device):
    model = make().to(plain_device, dtype)
    before = {name: p.dtype for name, p in model.named_parameters()}
    va.attach(model, va.Adapter(rank=3, placement=placement))
    wanted = torch.promote_types(dtype, torch.float32)
    for name, p in model.named_parameters():
        assert p.dtype == before.get(name, wanted), name
    logits = model(images(model).to(plain_device))
    logits.float().sum().backward()
    assert logits.dtype == dtype
    assert {p.grad.dtype for name, p in model.named_parameters() if name not in before} == {wanted}


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_follow_the_mode(training):
    model = va.attach(make().train(training), va.Adapter(placement="houlsby"))
    assert all(module.training is training for module in model.modules())


def test_new_modules_follow_the_device(plain_device):
    model = va.attach(make().to(plain_device), va.Adapter())
    assert {p.device.type for p in model.parameters()} == {plain_device}
    model(images(model).to(plain_device)).sum().backward()
    with va.disabled(model):
        model(images(model).to(plain_device))
    va.detach(model)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@every_method
def test_a_copy_is_whole_and_its_own(method, copy_of):
    model = make()
    frozen, x = copied_state(model), images(model)
    va.attach(model, method)
    randomise_trained(model)
    trained, logits = copied_state(model), model(x)
    twin = copy_of(model)
    assert torch.equal(twin(x), logits)
    with va.disabled(twin):
        assert not torch.equal(twin.state_dict()["head.bias"], frozen["head.bias"])
    va.detach(twin)
    assert_same_state(twin, frozen)
    assert_same_state(model, trained)
    assert torch.equal(model(x), logits)


def test_state_dict_round_trip():
    model, other = (va.attach(make(), va.Adapter(rank=3, train_norms=True)) for _ in range(2))
    randomise_trained(model)
    x = images(model)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_half_after_attach():
    model = make()
    frozen = model.state_dict()["norm.weight"].clone()
    va.attach(model, va.Adapter(rank=3, train_norms=True))
    randomise_trained(model)
    x = images(model)
    logits = model(x)
    model.half()
    torch.testing.assert_close(model(x.half()).float(), logits, rtol=0.05, atol=0.05)
    with va.disabled(model):
        assert torch.equal(model.norm.weight, frozen.half())
    va.detach(model)
    assert torch.equal(model.norm.weight, frozen.half())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_autocast_and_checkpointing(checkpointing):
    model = va.attach(make(), va.Adapter(rank=3, dropout=0.5, drop_path=0.5)).train()
    randomise_trained(model)
    x = images(model)
    gradients = []
    for use in (False, checkpointing):
        model.set_grad_checkpointing(use)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        gradients.append(model.blocks[0].adapter_mlp.down.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("way", ["wrapper", "in place"])
def test_a_compiled_model_sees_attach_and_disabled(way):
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if way == "in place":
        compiled = model
        model.compile(fullgraph=True, backend="aot_eager")
    x = images(model)
    with torch.no_grad():
        compiled(x)
        va.attach(model, va.Adapter(rank=3, placement="houlsby", train_norms=True))
        randomise_trained(model)
        torch.testing.assert_close(compiled(x), model.forward(x))
        with va.disabled(model):
            torch.testing.assert_close(compiled(x), model.forward(x))
        torch.testing.assert_close(compiled(x), model.forward(x))


def test_inductor_trains_it_in_one_graph():
    model = va.attach(make(depth=1), va.Adapter(rank=3))
    randomise_trained(model)
    x = images(model)
    model(x).sum().backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-4)


def test_export():
    model = va.attach(make(), va.Adapter(rank=3))
    randomise_trained(model)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_timm_is_imported_only_where_it_is_needed():
    code = "import sys, vitadapter_ext; assert 'timm' not in sys.modules; vitadapter_ext.Adapter; 'timm' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
