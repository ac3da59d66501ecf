"""Is the mathematics of the `adapter` op right? Against the float64 reference and plain PyTorch, on every device and at
every CPU level."""

import itertools

import numpy as np
import pytest
import torch

from tests.adapter_problems import LOW, converted, eager, make, run, short
from tests.conftest import assert_as_good_as_eager
from vitadapter_ext import reference
from vitadapter_ext.ops import adapter
from vitadapter_ext.ops.adapter import ACTIVATIONS


@pytest.mark.parametrize("shape", [(70, 33), (3, 50, 96), (2, 3, 11, 16), (257,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_blocks_of_rows_in_float64(plain_device, shape, activation):
    check_float64(plain_device, shape, 9, activation, True, "channel", True, (0.2, 0.1, 0.5), 7)


def check_float64(device, shape, rank, activation, bias, scale, residual, probabilities, seed):
    arguments = make(shape, rank, device=device, bias=bias, scale=scale, residual=residual)
    options = dict(zip(("dropout", "dropout_out", "drop_path"), probabilities, strict=True))
    options |= {"activation": activation, "seed": torch.tensor([seed], device=device)}
    grad = torch.randn(shape, dtype=torch.float64, device=device)
    ours, exact = run(adapter, arguments, grad, **options), run(reference.adapter, arguments, grad, **options)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        assert torch.equal(adapter(**arguments, **options), ours["y"]), "without gradients the same bits"


# (x, residual, parameters, compute): what autocast and half-precision models make, one low dtype at a time.
MIXES = [(torch.float32,) * 4] + [
    mix
    for low in LOW
    for mix in itertools.product((torch.float32, low), (torch.float32, low, None), (torch.float32, low), (low,))
]


def check_accuracy(shape, rank, device, dtypes=None, default=torch.float32, draws=1, residual=True, **options):
    """Ours, eager and float64 on the same numbers, each argument in its own dtype (`dtypes`, else `default`)."""
    results = [], [], []
    for _ in range(draws):
        arguments = {
            k: v.detach().to((dtypes or {}).get(k, default)).requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in make(shape, rank, device=device, residual=residual).items()
        }
        with torch.no_grad():
            grad = torch.randn(shape, device=device).to(reference.adapter(**arguments).dtype)
        wide = converted(arguments, torch.Tensor.double)
        exact_options = {k: v for k, v in options.items() if k != "compute_dtype"}
        results[0].append(run(adapter, arguments, grad, **options))
        results[1].append(run(eager, arguments, grad, **options))
        results[2].append(run(reference.adapter, wide, grad, **exact_options))
    assert_as_good_as_eager(*results)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(short, mix)))
@pytest.mark.parametrize(("shape", "rank"), [((3, 37, 96), 8), ((130, 45), 5), ((2, 65, 192), 64)])
def test_dtype_mixes_are_as_accurate_as_eager(device, mix, shape, rank):
    x, residual, parameters, compute = mix
    dtypes = {"x": x, "residual": residual}
    has_residual = residual is not None
    check_accuracy(shape, rank, device, dtypes, parameters, 10, residual=has_residual, compute_dtype=compute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=short)
def test_activations_are_as_accurate_as_eager(device, dtype, activation):
    check_accuracy((64, 80), 16, device, default=dtype, draws=10, activation=activation)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((20_000, 48), 4), ((256, 1536), 16), ((256, 3072), 8), ((64, 96), 768)],
    ids=["rows", "dim 1536", "dim 3072", "rank 768"],
)
def test_long_sums_lose_no_accuracy(device, shape, rank):
    check_accuracy(shape, rank, device, draws=4, residual=False)


def test_every_float16_and_bfloat16_is_read_and_written_exactly(device):
    bits = torch.from_numpy(np.arange(65536, dtype=np.uint16)).to(device)
    empty = {"down": torch.empty(0, 65536, device=device), "up": torch.empty(65536, 0, device=device)}
    for low in LOW:
        every = bits.view(low)
        finite_only = torch.where(every.isnan(), 0, every)
        read = adapter(torch.zeros(65536, device=device), **empty, residual=finite_only)
        assert torch.equal(read, finite_only.float())
        assert torch.equal(adapter(finite_only, **empty), finite_only)
        # Halfway between two neighbours, just below and just above it, and beyond the largest.
        wide = finite_only.float()
        for other in (wide * (1 + 2**-9), wide * (1 + 2**-12), wide * (1 + 2**-9 + 2**-20), wide * 0.75):
            written = adapter(torch.zeros(65536, dtype=low, device=device), **empty, up_bias=other)
            assert torch.equal(written, other.to(low))
