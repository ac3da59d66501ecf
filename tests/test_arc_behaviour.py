"""What does the `arc` op do besides the mathematics? Seeds, rank 0, NaN, refusals. What it shares with other ops is in
test_ops.py."""

import pytest
import torch

from tests.arc_problems import make
from tests.conftest import no_gpu
from tests.problems import detached, run
from vitadapter_ext import reference
from vitadapter_ext.ops import _common, arc


def test_seeds_come_from_the_generator(device):
    a = detached(make((64, 24), 6, dtype=torch.float32, device=device))
    torch.manual_seed(1)
    first, second = arc(**a, dropout=0.5), arc(**a, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(arc(**a, dropout=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(arc(**a), arc(**a)) and torch.equal(torch.get_rng_state(), state), "nothing is drawn"


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_leaves_x_and_bias(device, bias):
    arguments = make((3, 8), 0, dtype=torch.float32, device=device, bias=bias)
    grad = torch.randn(3, 8, device=device)
    found = run(arc, arguments, grad)
    x = arguments["x"].detach()
    assert torch.equal(found["y"], x + arguments["bias"] if bias else x)
    assert torch.equal(found["x"], grad) and found["basis"].shape == (8, 0) and found["rescale"].shape == (0,)
    if bias:
        torch.testing.assert_close(found["bias"], grad.sum(0))


def test_nan_and_infinity_stay_in_their_rows(device):
    a = detached(make((5, 16), 4, dtype=torch.float32, device=device))
    a["x"][1, 3], a["x"][3, 0] = float("nan"), float("inf")
    y = arc(**a)
    assert y[1].isnan().all() and not y[3].isfinite().any() and y[[0, 2, 4]].isfinite().all()


def changed(**changes):
    return lambda a: a | changes


BAD = {
    r"basis has shape \(23, 3\); expected \(dim, rank\) = \(24, 3\)": changed(basis=torch.ones(23, 3).double()),
    r"basis has shape \(24,\); expected \(dim, rank\)": changed(basis=torch.ones(24).double()),
    r"rescale has shape \(4,\); expected \(rank,\) = \(3,\)": changed(rescale=torch.ones(4).double()),
    r"rescale has shape \(1, 3\); expected \(rank,\) = \(3,\)": changed(rescale=torch.ones(1, 3).double()),
    r"bias has shape \(3,\); expected \(dim,\) = \(24,\)": changed(bias=torch.ones(3).double()),
    r"x has shape \(\); expected \(..., dim\)": changed(x=torch.ones(()).double()),
    "rescale is float32 and x is float64; float64 cannot be mixed": changed(rescale=torch.ones(3)),
    "bias is int64; float32, bfloat16, float16 and float64 are accepted": changed(bias=torch.ones(24).long()),
    r"dropout is 1; it must be a probability in \[0, 1\)": changed(dropout=1.0),
    r"dropout is -0.5": changed(dropout=-0.5),
    r"seed is int64 of shape \(2,\); expected int64 of shape \(1,\)": changed(dropout=0.5, seed=torch.zeros(2).long()),
    "seed is float32 of shape": changed(dropout=0.5, seed=torch.zeros(1)),
    "the compute dtype is bfloat16 and x is float64": changed(compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_say_what_was_given_and_what_is_accepted(message):
    with pytest.raises(RuntimeError, match=f"^arc: {message}"):
        arc(**BAD[message](make()))


def test_the_backward_op_refuses_what_no_forward_pass_made():
    x, *operands = detached(make((7, 24), 5)).values()
    settings = (None, 0.0, torch.float64, False)
    _, hidden = torch.ops.vitadapter.arc_forward.default(x, *operands, *settings, True)
    backward = torch.ops.vitadapter.arc_backward.default
    with pytest.raises(RuntimeError, match=r"arc: grad has shape \(6, 24\) and hidden float64 \(7, 5\)"):
        backward(x[:6], x, hidden, *operands, *settings, 15)
    with pytest.raises(RuntimeError, match=r"hidden float64 \(7, 4\); expected those of the forward pass"):
        backward(x, x, hidden[:, :4].contiguous(), *operands, *settings, 15)


def test_without_kernels_the_op_still_compiles_and_checks(monkeypatch):
    monkeypatch.setattr(_common, "has_kernels", lambda device: False)
    a = detached(make())
    compiled = torch.compile(lambda: arc(**a), fullgraph=True)
    torch.testing.assert_close(compiled(), reference.arc(**a))
    with pytest.raises(RuntimeError, match=r"arc: bias has shape \(3,\); expected \(24,\)"):
        arc(**a | {"bias": torch.ones(3).double()})
    with pytest.raises(RuntimeError, match="arc: basis has shape"):
        arc(**a | {"basis": torch.ones(23, 3).double()})
    with pytest.raises(RuntimeError, match="arc: dropout is 1; it must be a probability"):
        arc(**a, dropout=1)


@pytest.mark.cuda
@no_gpu
def test_a_parameter_on_another_device_is_refused():
    a = detached(make(dtype=torch.float32, device="cuda"))
    with pytest.raises(RuntimeError, match="arc: basis is on cpu and x on cuda:0; all tensors"):
        arc(**a | {"basis": a["basis"].cpu()})
