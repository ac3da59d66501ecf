"""Which ways have the fast CUDA kernels to cut a problem up, and how is one of them forced?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Plan(NamedTuple):
    """tile_rows: 0 automatic, -1 the simple kernels, else rows of a tile; keep: -1 automatic, 0 x, in the
    backward pass dy, is read twice (it is streamed), 1 it stays in shared memory for the residual; slices: 0 automatic,
    else in how many parts the backward pass sums the rows for the weights' gradients, as far as there are rows for
    them; parts whose sums take more than 16 MB do not fit."""

    tile_rows: int
    keep: int = -1
    slices: int = 0

    def __str__(self) -> str:
        if self.tile_rows < 0:
            return "simple"
        words = [f"{self.tile_rows} rows {'kept' if self.keep else 'streamed'}"] if self.tile_rows else []
        words += [f"{self.slices} slices"] if self.slices else []
        return ", ".join(words) or "automatic"


AUTOMATIC, SIMPLE = Plan(0), Plan(-1)
# Every plan that a kernel may have; which of them fit depends on the problem and on the GPU.
FAST = [Plan(rows, keep) for rows in (32, 64, 128) for keep in (0, 1)]
# For the backward pass alone; these give other bits.
SLICED = [Plan(0, slices=slices) for slices in (4, 8, 16, 24, 32, 40)]


@contextlib.contextmanager
def using(plan: Plan) -> Iterator[None]:
    """The CUDA kernels of this process follow the plan, and afterwards choose for themselves again."""
    torch.ops.vitadapter.use_cuda_plan(*plan)
    try:
        yield
    finally:
        torch.ops.vitadapter.use_cuda_plan(*AUTOMATIC)


def result_under(plan: Plan, work: Callable[[], Any]) -> Any:
    """What the work returns under the plan; None where the plan does not fit. Any other error is raised."""
    try:
        with using(plan):
            return work()
    except RuntimeError as error:
        if "no fast kernel serves this" not in str(error):  # csrc/bind/adapter_cuda.cpp
            raise
        return None
