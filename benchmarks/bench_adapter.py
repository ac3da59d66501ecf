"""How fast is the adapter on this CPU, beside plain PyTorch and `torch.compile`?

`make bench` measures everything into `benchmarks/results/adapter-cpu.json` and `adapter-cpu.md`, and for example
`make bench ARGS="--cells -k bfloat16"` a part. It is also a plain suite of pytest-benchmark, with malloc as it is:

    pytest benchmarks/bench_adapter.py --benchmark-only --benchmark-max-time=0.5 -k "test_cell and bfloat16 and n1576"
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # python benchmarks/bench_adapter.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch.nn.functional as F
from torch import Tensor

from benchmarks import program, sandwich
from vitadapter_ext import reference
from vitadapter_ext.ops import adapter


def eager(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def ours(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return adapter(x, down, up, down_bias=down_bias, up_bias=up_bias)


def exact(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return reference.adapter(x, down, up, down_bias=down_bias, up_bias=up_bias)


def parameters(tensor: Callable[..., Tensor], dim: int, rank: int) -> tuple[Tensor, ...]:
    down, down_bias = tensor(rank, dim, spread=dim**-0.5), tensor(rank, spread=0.1)
    return down, down_bias, tensor(dim, rank, spread=rank**-0.5), tensor(dim, spread=0.1)


OP = sandwich.Op(ours, eager, exact, parameters)
test_cell, test_avx2, test_host_cost, test_grid = sandwich.tests(OP)

if __name__ == "__main__":
    sys.exit(program.main("adapter", __doc__, functools.partial(sandwich.peak_memory_work, OP), sandwich.MEMORY))
