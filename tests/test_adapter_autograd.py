"""Does the `adapter` op live well with autograd, torch.compile and autocast?"""

import copy

import pytest
import torch

from tests.adapter_problems import make
from tests.problems import LOW, short, tensors_of
from vitadapter_ext import FusedAdapter
from vitadapter_ext.ops import adapter


@pytest.mark.parametrize("scale", ["channel", "scalar", 0.7])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "identity"])
def test_gradcheck(plain_device, activation, scale):
    arguments = make((2, 3, 5), 4, device=plain_device, scale=scale)
    seed = torch.tensor([5], device=plain_device)

    def op(*tensors):
        named = dict(zip(tensors_of(arguments), tensors, strict=True))
        return adapter(**(arguments | named), activation=activation, dropout=0.3, drop_path=0.3, seed=seed)

    assert torch.autograd.gradcheck(op, tuple(tensors_of(arguments).values()))


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(plain_device, save):
    a = {k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in make(device=plain_device).items()}
    seed = torch.tensor([3], device=plain_device)
    settings = (1.0, 0, 0.1, 0.1, 0.1, torch.float32, False)
    operands = (a["down"], a["down_bias"], a["up"], a["up_bias"], a["scale"], seed)
    forward = (a["x"], a["residual"], *operands, *settings, save)
    torch.library.opcheck(torch.ops.vitadapter.adapter_forward.default, forward)
    _, hidden = torch.ops.vitadapter.adapter_forward.default(*forward[:-1], True)
    backward = (torch.randn_like(a["x"]), a["x"], hidden, *operands, False, *settings, 0b111111 if save else 0b010010)
    torch.library.opcheck(torch.ops.vitadapter.adapter_backward.default, backward)


def test_a_gradient_that_is_not_asked_for_comes_back_empty():
    a = make(bias=False, scale=2.0, residual=False)
    operands = (a["down"], None, a["up"], None, None, None)
    settings = (2.0, 0, 0.0, 0.0, 0.0, torch.float64, False)
    with torch.no_grad():
        _, hidden = torch.ops.vitadapter.adapter_forward.default(a["x"], None, *operands, *settings, True)
        grads = torch.ops.vitadapter.adapter_backward.default(
            torch.randn_like(a["x"]), a["x"], hidden, *operands, True, *settings, 0b001000
        )
    assert [g.numel() for g in grads] == [0, 0, 0, a["up"].numel(), 0, 0]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(plain_device, dropout, dynamic):
    module = FusedAdapter(24, 5, scale="channel", dropout=dropout, drop_path=dropout, init="bert").to(plain_device)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    x = torch.randn(3, 7, 24, device=plain_device)
    out = compiled(x)
    out.square().sum().backward()
    if dropout:
        # Eager and compiled draw different seeds; both keep some and drop some.
        assert out.shape == x.shape and not torch.equal(out, compiled(x))
        return
    expected = twin(x)
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("low", LOW, ids=short)
def test_autocast_gives_the_compute_dtype(device, low):
    module = FusedAdapter(24, 5, scale="channel", init="bert").to(device)
    x, branch = torch.randn(4, 24, device=device), torch.randn(4, 24, device=device).to(low)
    arguments = {"down": module.down.weight, "up": module.up.weight, "scale": module.scale}
    with torch.autocast(device, dtype=low):
        assert module(x).dtype == torch.float32
        assert module(branch).dtype == low
        mixed = module(branch, residual=x)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, adapter(branch, **arguments, residual=x, compute_dtype=low))
        assert module.double()(x.double()).dtype == torch.float64
