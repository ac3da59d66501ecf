"""Is the mathematics of the `adapter` op right? Against the float64 reference and plain PyTorch, on every device and at
every CPU level."""

import functools
import itertools

import numpy as np
import pytest
import torch

from tests.adapter_problems import ADAPTER, make
from tests.problems import LOW, check_accuracy, check_float64, short
from vitadapter_ext.ops import adapter
from vitadapter_ext.ops.adapter import ACTIVATIONS


@pytest.mark.parametrize("shape", [(70, 33), (3, 50, 96), (2, 3, 11, 16), (257,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_blocks_of_rows_in_float64(plain_device, shape, activation):
    check_options(plain_device, shape, 9, activation, True, "channel", True, (0.2, 0.1, 0.5), 7)


def check_options(device, shape, rank, activation, bias, scale, residual, probabilities, seed):
    arguments = make(shape, rank, device=device, bias=bias, scale=scale, residual=residual)
    options = dict(zip(ADAPTER.probabilities, probabilities, strict=True))
    check_float64(ADAPTER, arguments, activation=activation, seed=torch.tensor([seed], device=device), **options)


# (x, residual, parameters, compute): what autocast and half-precision models make, one low dtype at a time.
MIXES = [(torch.float32,) * 4] + [
    mix
    for low in LOW
    for mix in itertools.product((torch.float32, low), (torch.float32, low, None), (torch.float32, low), (low,))
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(short, mix)))
@pytest.mark.parametrize(("shape", "rank"), [((3, 37, 96), 8), ((130, 45), 5), ((2, 65, 192), 64)])
def test_dtype_mixes_are_as_accurate_as_eager(device, mix, shape, rank):
    x, residual, parameters, compute = mix
    dtypes = {"x": x, "residual": residual}
    has_residual = residual is not None
    draw = functools.partial(make, shape, rank, device=device, residual=has_residual)
    check_accuracy(ADAPTER, draw, dtypes, parameters, 10, compute_dtype=compute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=short)
def test_activations_are_as_accurate_as_eager(device, dtype, activation):
    draw = functools.partial(make, (64, 80), 16, device=device)
    check_accuracy(ADAPTER, draw, default=dtype, draws=10, activation=activation)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((20_000, 48), 4), ((256, 1536), 16), ((256, 3072), 8), ((64, 96), 768)],
    ids=["rows", "dim 1536", "dim 3072", "rank 768"],
)
def test_long_sums_lose_no_accuracy(device, shape, rank):
    check_accuracy(ADAPTER, functools.partial(make, shape, rank, device=device, residual=False), draws=4)


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
