"""What is measured on a GPU? Each phase of `make gpu` that takes times, in a process of its own, so that neither a
kernel that hangs nor a context that broke takes the other phases along:

    python -m benchmarks.gpu_cells PHASE FILE SECONDS

writes a line of JSON for each cell, and at last whether it came to the end.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_plans
from benchmarks.gpu_timing import gpu_times, host_times, kernels, waits_for_gpu
from vitadapter_ext.ops import adapter


class Mix(NamedTuple):
    x: torch.dtype
    parameters: torch.dtype
    residual: torch.dtype | None = None  # None: x is the residual
    autocast: bool = False  # to bfloat16
    tf32: bool = False


DEVICE = "cuda"  # for the tests, another one
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MIXES = {
    "bfloat16": Mix(BF16, BF16),
    "bfloat16, residual": Mix(BF16, BF16, residual=BF16),
    "float32 in bfloat16": Mix(F32, F32, autocast=True),
    "bfloat16, residual float32": Mix(BF16, F32, residual=F32, autocast=True),
    "float16": Mix(F16, F16),
    "float32": Mix(F32, F32),
    "float32 in TF32": Mix(F32, F32, tf32=True),
}
RANKS = (8, 64, 128, 256)
LARGE = 131_072  # tokens: 201 MB at dim 768 in bfloat16
BATCH = 12_608  # tokens: 64 images for ViT-B/16


def eager(x, residual, down, down_bias, up, up_bias):
    return (x if residual is None else residual) + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def ours(x, residual, down, down_bias, up, up_bias):
    return adapter(x, down, up, down_bias=down_bias, up_bias=up_bias, residual=residual)


class Problem:
    """Inputs of one cell, all with gradients, and what is done with them."""

    def __init__(self, mix: str, dim: int, rank: int, tokens: int):
        self.mix = MIXES[mix]
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = self.mix.tf32
        torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes

        def tensor(*shape: int, spread: float, dtype: torch.dtype = self.mix.parameters) -> Tensor:
            return (spread * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()

        self.inputs = (
            tensor(tokens, dim, spread=1, dtype=self.mix.x),
            None if self.mix.residual is None else tensor(tokens, dim, spread=1, dtype=self.mix.residual),
            tensor(rank, dim, spread=dim**-0.5),
            tensor(rank, spread=0.1),
            tensor(dim, rank, spread=rank**-0.5),
            tensor(dim, spread=0.1),
        )
        self.y_dtype = torch.promote_types(self.mix.x, self.mix.residual or self.mix.x)
        self.grad = torch.randn(tokens, dim, device=DEVICE).to(self.y_dtype)
        self.elements, self.rows_by_rank = tokens * dim, tokens * rank

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """As in training: with what the backward pass needs."""
        with torch.autocast(DEVICE, BF16) if self.mix.autocast else contextlib.nullcontext():
            return function(*self.inputs)

    def both(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(function), [t for t in self.inputs if t is not None], self.grad)

    def copy(self) -> Callable[[], Tensor]:
        source, target = self.inputs[0].detach(), torch.empty_like(self.inputs[0])
        return lambda: target.copy_(source)

    def compulsory_bytes(self) -> int:
        """x and a residual of its own read, y and the hidden layer (float32) written."""
        streams = self.mix.x.itemsize + self.y_dtype.itemsize
        streams += self.mix.residual.itemsize if self.mix.residual else 0
        return streams * self.elements + 4 * self.rows_by_rank

    def check(self) -> dict[str, float]:
        """How far ours is from eager, in parts of what the branch adds; raises where that is more than rounding."""
        with torch.no_grad():
            base = self.inputs[0] if self.inputs[1] is None else self.inputs[1]
            found, expected = self.forward(ours).float(), self.forward(eager).float()
            branch, difference, whole = (
                t.square().mean().sqrt().item() for t in (expected - base.float(), found - expected, expected)
            )
        of_branch = 0.03 if self.mix.autocast or self.mix.x != F32 else 0.01
        # Written so that a NaN fails.
        if not difference <= of_branch * branch + torch.finfo(self.y_dtype).eps * whole:
            raise ArithmeticError(f"the output differs from eager's by {difference / branch:.2g} of the branch")
        return {"difference": float(f"{difference / branch:.2g}")}

    def times(self, functions: dict[str, Callable[..., Tensor]], **options: Any) -> dict[str, Any]:
        return gpu_times({name: lambda f=f: self.forward(f) for name, f in functions.items()}, **options)


Measure = Callable[[Problem], dict[str, Any]]
EAGER_AND_OURS = {"ours": ours, "eager": eager}


def bandwidth(problem: Problem) -> dict[str, Any]:
    works = {"ours": lambda: problem.forward(ours), "copy": problem.copy()}
    facts = problem.check()
    times = gpu_times(works, rounds=25)
    copy = 2 * problem.elements * problem.mix.x.itemsize / times["copy"]["median"] / 1e6
    rate = problem.compulsory_bytes() / times["ours"]["median"] / 1e6
    arithmetic = 4 * problem.elements * problem.inputs[2].shape[0] / times["ours"]["median"] / 1e9
    rates = {"GB_per_s": round(rate), "copy_GB_per_s": round(copy), "TFLOP_per_s": float(f"{arithmetic:.3g}")}
    return facts | {"ms": times} | rates | {"share": round(rate / copy, 4)}


def ratios(problem: Problem) -> dict[str, Any]:
    facts = problem.check()
    return facts | {"ms": problem.times(EAGER_AND_OURS | {"compile": torch.compile(eager, dynamic=False)})}


def autotune(problem: Problem) -> dict[str, Any]:
    tuned = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    return {"ms": problem.times({"ours": ours, "max-autotune": tuned})}


def grid(problem: Problem) -> dict[str, Any]:
    facts = problem.check()
    times = problem.times(EAGER_AND_OURS, rounds=7, warm_up=0.0)
    if times["eager"]["median"] < 1.05 * times["ours"]["median"]:  # perhaps by chance
        times = problem.times(EAGER_AND_OURS, rounds=30)
    return facts | {"ms": times}


def _both_passes(problem: Problem, function: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    return {"forward": lambda: problem.forward(function), "both": lambda: problem.both(function)}


def host(problem: Problem) -> dict[str, Any]:
    works = {f"{part} {name}": w for name, f in EAGER_AND_OURS.items() for part, w in _both_passes(problem, f).items()}
    return {"us": host_times(works)}


def launches(problem: Problem) -> dict[str, Any]:
    """Not beside `host`: a process that has profiled launches more slowly from then on."""
    row = {"waits": {part: waits_for_gpu(work) for part, work in _both_passes(problem, ours).items()}}
    row["kernel_names"] = {part: kernels(work) for part, work in _both_passes(problem, ours).items()}
    row["kernels"] = {
        name: {part: len(kernels(work)) for part, work in _both_passes(problem, function).items()}
        for name, function in EAGER_AND_OURS.items()
    }
    return row


def sweep(problem: Problem) -> dict[str, Any]:
    works, unfit = {}, []

    def under(plan: gpu_plans.Plan) -> Tensor | None:
        return gpu_plans.result_under(plan, lambda: problem.forward(ours))

    expected = problem.forward(eager).float()
    for plan in (gpu_plans.AUTOMATIC, gpu_plans.SIMPLE, *gpu_plans.FAST):
        y = under(plan)
        if y is None:
            unfit.append(str(plan))
            continue
        if not (y.float() - expected).square().mean() <= 1e-4 * expected.square().mean():
            raise ArithmeticError(f"the output under the plan {plan!s} is not eager's")
        works[str(plan)] = lambda plan=plan: under(plan)
    del expected, y
    return {"ms": gpu_times(works, rounds=7), "unfit": unfit}


def _grid_sizes() -> Iterator[tuple]:
    dims, ranks, tokens = (768, 192, 384, 1_280), (8, 64, 1, 3, 16, 128, 256), (BATCH, 8, 197, 1_576, 100_864)
    mixes = list(MIXES)
    for i, (rank, n) in enumerate((rank, n) for rank in ranks for n in tokens):
        # bfloat16 everywhere; the others thinned, so that every two of mix, dim, rank and tokens still meet.
        yield from (("bfloat16", dim, rank, n) for dim in dims)
        yield from ((mix, dims[(i + j) % len(dims)], rank, n) for j, mix in enumerate(mixes[1:]))


RATIO_MIXES, SWEPT = list(MIXES)[:4], ("bfloat16", "float32 in bfloat16", "float32 in TF32", "float32")
# Phase: what is done, and with which (mix, dim, rank, tokens), the most important first.
PHASES: dict[str, tuple[Measure, list[tuple]]] = {
    "bandwidth": (bandwidth, [(mix, 768, rank, LARGE) for mix in list(MIXES)[:2] for rank in RANKS]),
    "ratios": (ratios, [(mix, 768, rank, n) for n in (LARGE, BATCH) for mix in RATIO_MIXES for rank in (64, 8)]),
    "host": (host, [(mix, 64, 8, 16) for mix in RATIO_MIXES]),
    "launches": (launches, [(mix, 768, 64, BATCH) for mix in RATIO_MIXES]),
    "grid": (grid, list(_grid_sizes())),
    "sweep": (sweep, [(mix, 768, r, n) for mix in SWEPT for n in (LARGE, BATCH, 1_576) for r in RANKS]),
    "autotune": (autotune, [(mix, 768, rank, LARGE) for mix in list(MIXES)[:2] for rank in (64, 8)]),
}  # fmt: skip


def measure(sizes: list[tuple], measure_one: Measure, seconds: float, write: Callable[[dict], None]) -> None:
    """Writes a row for every size, and {"end": "complete"}; {"end": "out of time"} as soon as another size would come
    too late. What fails is a row with "error"; errors of CUDA itself also end the phase: nothing after them is true."""
    begin, last = time.monotonic(), 0.0
    for size in sizes:
        started = time.monotonic()
        if started - begin + last > seconds:
            write({"end": "out of time"})
            return
        row = dict(zip(("mix", "dim", "rank", "tokens"), size, strict=True))
        try:
            write(row | measure_one(Problem(*size)))
        except Exception as error:
            write(row | {"error": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"})
            if isinstance(error, torch.AcceleratorError):
                raise
        last = time.monotonic() - started
    write({"end": "complete"})


def main(phase: str, file: str, seconds: str) -> None:
    measure_one, sizes = PHASES[phase]
    with open(file, "a") as rows:

        def write(row: dict) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        measure(sizes, measure_one, float(seconds), write)


if __name__ == "__main__":
    main(*sys.argv[1:])
