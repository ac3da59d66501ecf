"""How fast is ARC on this CPU, beside plain PyTorch and `torch.compile`?

`make bench OP=arc` measures everything into `benchmarks/results/arc-cpu.json` and `arc-cpu.md`; parts of it, and the
plain suite of pytest-benchmark, are as in bench_adapter.py. The cells have the paper's rank 50 too, without a target.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # python benchmarks/bench_arc.py
    sys.path[0] = str(Path(__file__).parents[1])

from torch import Tensor

from benchmarks import program, sandwich
from vitadapter_ext import reference
from vitadapter_ext.ops import arc


def eager(x: Tensor, basis: Tensor, rescale: Tensor, bias: Tensor) -> Tensor:
    return x + ((x @ basis) * rescale) @ basis.T + bias


def ours(x: Tensor, basis: Tensor, rescale: Tensor, bias: Tensor) -> Tensor:
    return arc(x, basis, rescale, bias=bias)


def exact(x: Tensor, basis: Tensor, rescale: Tensor, bias: Tensor) -> Tensor:
    return reference.arc(x, basis, rescale, bias=bias)


def parameters(tensor: Callable[..., Tensor], dim: int, rank: int) -> tuple[Tensor, ...]:
    return tensor(dim, rank, spread=dim**-0.5), tensor(rank, spread=1), tensor(dim, spread=0.1)


OP = sandwich.Op(ours, eager, exact, parameters)
CELLS = sandwich.CELLS + [(mix, dim, 50, tokens) for mix, dim, rank, tokens in sandwich.CELLS if rank == 64]
test_cell, test_avx2, test_host_cost, test_grid = sandwich.tests(OP, CELLS)

if __name__ == "__main__":
    sys.exit(program.main("arc", __doc__, functools.partial(sandwich.peak_memory_work, OP), sandwich.MEMORY))
