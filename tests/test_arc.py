"""Is the mathematics of the `arc` op right? Against the float64 reference and plain PyTorch, on every device and at
every CPU level."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arc_problems import ARC, make
from tests.conftest import rms
from tests.problems import LOW, check_accuracy, check_float64, detached, run, short
from vitadapter_ext.ops import adapter, arc


@pytest.mark.parametrize(("shape", "rank"), [((70, 33), 9), ((3, 50, 96), 50), ((2, 3, 11, 16), 1), ((257,), 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_of_rows_in_float64(plain_device, shape, rank, bias, dropout):
    seed = torch.tensor([7], device=plain_device)
    check_float64(ARC, make(shape, rank, device=plain_device, bias=bias), dropout=dropout, seed=seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=2),
    dim=st.integers(1, 67),
    rank=st.integers(0, 21),
    bias=st.booleans(),
    rescale=st.sampled_from([1.0, 0.0, 1e-6]),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_option_in_float64(shape, dim, rank, bias, rescale, dropout, seed):
    arguments = make((*shape, dim), rank, bias=bias, rescale=rescale)
    check_float64(ARC, arguments, dropout=dropout, seed=torch.tensor([seed]))


# (x, parameters, compute): what autocast and half-precision models make, one low dtype at a time.
F32 = torch.float32
MIXES = [(F32, F32, F32)] + [
    (x, parameters, compute)
    for low in LOW
    for x, parameters, compute in ((low, low, low), (low, F32, low), (F32, F32, low), (F32, low, low), (F32, low, F32))
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(short, mix)))
@pytest.mark.parametrize(("shape", "rank"), [((3, 37, 96), 8), ((130, 45), 5), ((2, 65, 192), 50)])
def test_dtype_mixes_are_as_accurate_as_eager(device, mix, shape, rank):
    x, parameters, compute = mix
    draw = functools.partial(make, shape, rank, device=device)
    check_accuracy(ARC, draw, {"x": x}, parameters, 10, compute_dtype=compute)


@pytest.mark.parametrize("dtype", [F32, *LOW], ids=short)
def test_each_parameter_in_a_dtype_of_its_own(device, dtype):
    for alone in ("basis", "rescale", "bias"):
        draw = functools.partial(make, (60, 40), 6, device=device)
        check_accuracy(ARC, draw, {"x": dtype, alone: dtype}, F32, 10, compute_dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((20_000, 48), 4), ((256, 1536), 16), ((256, 3072), 8), ((64, 96), 96)],
    ids=["rows", "dim 1536", "dim 3072", "rank 96"],
)
def test_long_sums_lose_no_accuracy(device, shape, rank):
    check_accuracy(ARC, functools.partial(make, shape, rank, device=device), draws=4)


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("mix", [m for m in MIXES if m[1] == F32], ids=lambda mix: "-".join(map(short, mix)))
def test_a_tiny_rescale_is_as_accurate_as_in_eager(device, mix, spread):
    # It starts at 0, and at 1e-6 diag(rescale)·basisᵀ is below what float16 can hold: the basis' gradient shows it.
    x, parameters, compute = mix
    draw = functools.partial(make, (3, 37, 96), 8, device=device, rescale=spread, bias=False)
    check_accuracy(ARC, draw, {"x": x}, parameters, 10, compute_dtype=compute)


@pytest.mark.parametrize("dtype", [F32, *LOW], ids=short)
def test_a_rescale_of_zero_adds_nothing_and_gets_a_gradient(device, dtype):
    arguments = make((50, 64), 10, dtype=dtype, device=device, rescale=0.0)
    grad = torch.randn(50, 64, device=device).to(dtype)
    found = run(arc, arguments, grad)
    a = detached(arguments)
    assert torch.equal(found["y"], (a["x"].float() + a["bias"].float()).to(dtype))
    assert torch.equal(found["x"], grad) and not found["basis"].any()
    x, basis, g = (t.double() for t in (a["x"], a["basis"], grad))
    expected = ((x @ basis) * (g @ basis)).sum(0)
    assert rms(found["rescale"].double() - expected) <= 4 * torch.finfo(dtype).eps * rms(expected)


def test_it_is_the_adapter_without_an_activation_and_draws_the_same_mask(plain_device):
    a = detached(make((9, 40), 12, device=plain_device))
    seed = torch.tensor([3], device=plain_device)
    found = arc(**a, dropout=0.4, seed=seed)
    down = (a["basis"] * a["rescale"]).T
    same = adapter(a["x"], down, a["basis"], up_bias=a["bias"], activation="identity", dropout=0.4, seed=seed)
    torch.testing.assert_close(found, same, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, arc(**a))
