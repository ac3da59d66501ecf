"""Do `ARCBasis` and `FusedARC` share what they should, whatever is done with the model that holds them?"""

import copy
import io

import pytest
import torch
from torch import nn

from tests.conftest import rms
from vitadapter_ext import ARCBasis, FusedARC, reference


class TwoPlaces(nn.Module):
    """Two FusedARCs that refer to one basis, which the model owns, as `attach` will make it."""

    def __init__(self, dim: int = 24, rank: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.arc_basis = ARCBasis(dim, rank)
        options = {"dropout": dropout, "rescale_init": "xavier", "register_basis": False}
        self.first, self.second = FusedARC(self.arc_basis, **options), FusedARC(self.arc_basis, **options)
        self.between = nn.Linear(dim, dim)

    def forward(self, x):
        return self.second(self.between(self.first(x)))

    def by_reference(self, x):
        first, second = (
            lambda t, place=place: reference.arc(t, self.arc_basis.weight, place.rescale, bias=place.bias)
            for place in (self.first, self.second)
        )
        return second(self.between(first(x)))


NAMES = [
    "arc_basis.weight", "first.rescale", "first.bias", "second.rescale", "second.bias", "between.weight",
    "between.bias",
]  # fmt: skip


def check_sharing(model: TwoPlaces) -> None:
    """One basis, named once, which both places use and to whose gradient both contribute."""
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == NAMES
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == NAMES
    assert model.first.basis is model.second.basis is model.arc_basis
    weight = model.arc_basis.weight
    x = torch.randn(7, 24, device=weight.device).to(weight.dtype)
    grads = []
    for forward in (model, model.by_reference):
        model.zero_grad()
        forward(x).float().square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for name, ours, theirs in zip(NAMES, *grads, strict=True):
        tolerance = 10 * torch.finfo(weight.dtype).eps
        assert rms(ours.double() - theirs.double()) <= tolerance * rms(theirs), name
    with torch.no_grad():
        before = model(x)
        weight.mul_(2)
        assert not torch.equal(model(x), before)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        copy.deepcopy,
        pickled,
        lambda model: copy.deepcopy(model).half(),
        lambda model: copy.deepcopy(model).bfloat16(),
        lambda model: model.to(torch.float64),
        lambda model: model.to("meta").to_empty(device="cpu"),
    ],
    ids=["as it is", "deepcopy", "pickle", "half", "bfloat16", "float64", "to_empty"],
)
def test_sharing_survives(change):
    model = change(TwoPlaces())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    check_sharing(model)


def test_a_copy_has_a_basis_of_its_own():
    model = TwoPlaces()
    twin = copy.deepcopy(model)
    assert twin.arc_basis.weight is not model.arc_basis.weight
    with torch.no_grad():
        twin.arc_basis.weight.zero_()
    assert model.first.basis.weight.any() and not twin.first.basis.weight.any()


def test_moving_follows_where_parameters_are_replaced(plain_device):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = TwoPlaces()
        old = model.arc_basis.weight
        model = model.to(plain_device, torch.float64)
        assert model.arc_basis.weight is not old
        check_sharing(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_a_state_dict_fills_another_model():
    model, other = TwoPlaces(), TwoPlaces()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(other(x), model(x))


def test_standing_alone_it_registers_its_basis():
    module = FusedARC(ARCBasis(24, 5))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "basis.weight": (24, 5), "rescale": (5,), "bias": (24,)
    }  # fmt: skip
    assert list(FusedARC(ARCBasis(24, 5), bias=False).state_dict()) == ["rescale", "basis.weight"]
    twin = copy.deepcopy(module).half()
    assert twin.basis.weight.dtype == torch.float16 and module.basis.weight.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_without_a_graph_break(plain_device, dropout, dynamic):
    torch._dynamo.reset()
    model = TwoPlaces(dropout=dropout).to(plain_device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    x = torch.randn(3, 7, 24, device=plain_device)
    out = compiled(x)
    out.square().sum().backward()
    if dropout:
        # Eager and compiled draw different seeds; both keep some and drop some.
        assert out.shape == x.shape and not torch.equal(out, compiled(x))
        return
    expected = twin(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_exports(plain_device):
    model = TwoPlaces().to(plain_device).eval()
    x = torch.randn(3, 24, device=plain_device)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))
    assert sorted(program.state_dict) == sorted(NAMES)


def test_checkpointing_draws_the_same_mask_again():
    model = TwoPlaces(dropout=0.5)
    x = torch.randn(40, 24, requires_grad=True)
    grads = []
    for forward in (model, lambda t: torch.utils.checkpoint.checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(forward(x).square().sum(), [x, *model.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_it_drops_in_training_only(device):
    module = FusedARC(ARCBasis(24, 5), dropout=0.5, rescale_init="xavier").to(device)
    x = torch.randn(6, 24, device=device)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_initial_values():
    basis = ARCBasis(300, 50)
    bound = (6 / 350) ** 0.5
    assert basis.weight.abs().max() <= bound and abs(basis.weight.std() / (bound / 3**0.5) - 1) < 0.05
    zero, xavier = FusedARC(basis), FusedARC(basis, rescale_init="xavier")
    assert not zero.rescale.any() and not zero.bias.any() and not xavier.bias.any()
    bound = (6 / 51) ** 0.5
    assert xavier.rescale.abs().max() <= bound and xavier.rescale.std() > bound / 3
    x = torch.randn(4, 300)
    assert torch.equal(zero(x), x)


def test_parameters_are_float32_unless_asked_otherwise():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = FusedARC(ARCBasis(8, 2))
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    where = {"device": "meta", "dtype": torch.float64}
    module = FusedARC(ARCBasis(8, 2, **where), **where)
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float64, "meta")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ARCBasis(0, 4), "dim is 0; it must be a whole number of at least 1"),
        (lambda: ARCBasis(8, 0), "rank is 0; it must be a whole number of at least 1"),
        (lambda: ARCBasis(8, 2.0), "rank is 2.0; it must be a whole number"),
        (lambda: FusedARC(nn.Linear(2, 8)), "basis is of type Linear; it must be an ARCBasis"),
        (lambda: FusedARC(torch.ones(8, 2)), "basis is of type Tensor; it must be an ARCBasis"),
        (lambda: FusedARC(ARCBasis(8, 2), dropout=1.0), r"dropout is 1.0; it must be a probability in \[0, 1\)"),
        (lambda: FusedARC(ARCBasis(8, 2), rescale_init="xavierr"), "rescale_init 'xavierr': did you mean 'xavier'"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_x_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match=r"^arc: basis has shape \(24, 5\); expected \(dim, rank\) = \(25, 5\)$"):
        FusedARC(ARCBasis(24, 5))(torch.ones(2, 25))
