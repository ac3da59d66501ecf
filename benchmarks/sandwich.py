"""How is an op of the low-rank sandwich (the adapter, ARC) timed on the CPU? Its sizes, mixes of dtypes and targets,
the inputs of one size, and the tests of pytest-benchmark that each op's suite, `bench_<op>.py`, takes from here."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vitadapter_ext
from benchmarks.interleaved import Times, Works, budget, record, summarised, take_quiet_turns, take_turns, warm_up
from benchmarks.memory import malloc_state, page_faults
from benchmarks.rates import floor_ms, flops, machine_rates
from benchmarks.report import PASSES, judged

Functions = dict[str, Callable[..., Tensor]]


class Mix(NamedTuple):
    x: torch.dtype
    parameters: torch.dtype
    autocast: bool = False


MIXES = {
    "float32": Mix(torch.float32, torch.float32),
    "bfloat16": Mix(torch.bfloat16, torch.bfloat16),
    "float16": Mix(torch.float16, torch.float16),
    "autocast-float32": Mix(torch.float32, torch.float32, autocast=True),
    "autocast-bfloat16": Mix(torch.bfloat16, torch.float32, autocast=True),
}

# A size is (mix, dim, rank, tokens). One batch of 8 images for ViT-B/16 and one of 64, a narrow and a wide bottleneck.
CELLS = [(mix, 768, rank, tokens) for mix in ("float32", "bfloat16") for tokens in (1_576, 12_608) for rank in (8, 64)]
DIMS, RANKS, TOKENS = (192, 384, 768, 1_280), (1, 3, 8, 16, 64, 256), (1, 8, 64, 197, 1_576, 12_608)
GRID = [(mix, dim, rank, n) for mix in ("float32", "bfloat16") for dim in DIMS for rank in RANKS for n in TOKENS]
GRID += [(mix, dim, rank, 100_000) for mix in ("float32", "bfloat16") for dim in (192, 768) for rank in (1, 16, 256)]
# The other mixes are thinned so that every two of dim, rank and tokens still meet.
GRID += [
    (mix, DIMS[(i + j) % len(DIMS)], rank, tokens)
    for mix in ("float16", "autocast-float32", "autocast-bfloat16")
    for i, rank in enumerate(RANKS)
    for j, tokens in enumerate(TOKENS)
]
MEMORY = [("float32", 768, 64, 12_608), ("bfloat16", 768, 8, 1_576), ("float32", 1_280, 256, 197)]

# Forward + backward, {(state, mix, tokens, rank): (times eager's speed, times that of the better compile mode)}.
TARGETS = {
    ("no-fault", "float32", 1_576, 8): (3.0, 2.8),
    ("no-fault", "float32", 1_576, 64): (1.25, 1.15),
    ("no-fault", "float32", 12_608, 8): (5.0, 4.5),
    ("no-fault", "float32", 12_608, 64): (1.5, 1.4),
    ("no-fault", "bfloat16", 1_576, 8): (2.4, 2.3),
    ("no-fault", "bfloat16", 1_576, 64): (1.25, 1.2),
    ("no-fault", "bfloat16", 12_608, 8): (3.3, 3.0),
    ("no-fault", "bfloat16", 12_608, 64): (1.5, 1.35),
    ("all-fault", "float32", 1_576, 8): (2.0, 1.4),
    ("all-fault", "float32", 1_576, 64): (1.4, 1.1),
    ("all-fault", "float32", 12_608, 8): (5.0, 4.0),
    ("all-fault", "float32", 12_608, 64): (2.0, 1.5),
    ("all-fault", "bfloat16", 1_576, 8): (2.0, 1.4),
    ("all-fault", "bfloat16", 1_576, 64): (1.5, 1.15),
    ("all-fault", "bfloat16", 12_608, 8): (4.0, 2.8),
    ("all-fault", "bfloat16", 12_608, 64): (2.0, 1.5),
}
FORWARD_TARGET = 1.25  # times eager's speed, forward alone
AVX2_TARGET = 1.2  # times eager's speed, forward + backward, both with AVX2 alone
GEMM_TARGETS = {"float32": 0.95, "bfloat16": 0.90}  # of the rate of a product, at rank 64 and with warm outputs
HOST_TARGETS_US = {"forward": 15, "both": 70}


class Op(NamedTuple):
    """What is timed; all of its functions take x (tokens, dim) and the parameters."""

    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]  # what a user would write
    exact: Callable[..., Tensor]  # the same for float64
    # Of (tensor, dim, rank): tensor(*shape, spread=) makes a random one.
    parameters: Callable[..., tuple[Tensor, ...]]

    @property
    def functions(self) -> Functions:
        return {"ours": self.ours, "eager": self.eager}


class Problem:
    """Inputs of one size, all with gradients, and what is done with them."""

    def __init__(self, op: Op, mix: str, dim: int, rank: int, tokens: int):
        self.op = op
        self.row = {"state": malloc_state(), "mix": mix, "dim": dim, "rank": rank, "tokens": tokens}
        self.mix = MIXES[mix]
        torch.manual_seed(0)

        def tensor(*shape: int, spread: float, dtype: torch.dtype = self.mix.parameters) -> Tensor:
            return (spread * torch.randn(*shape)).to(dtype).requires_grad_()

        self.inputs = (tensor(tokens, dim, spread=1, dtype=self.mix.x), *op.parameters(tensor, dim, rank))
        self.grad = torch.randn(tokens, dim).to(self.mix.x)

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """As in training: with what the backward pass needs."""
        with torch.autocast("cpu", torch.bfloat16) if self.mix.autocast else contextlib.nullcontext():
            return function(*self.inputs)

    def both(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(function), self.inputs, self.grad)

    def works(self, functions: Functions) -> Works:
        forward = {f"forward {name}": lambda f=function: self.forward(f) for name, function in functions.items()}
        return forward | {f"both {name}": lambda f=function: self.both(f) for name, function in functions.items()}

    def errors(self) -> dict[str, dict[str, float]]:
        """RMS error over RMS, of y and of the worst gradient, against the same inputs in float64."""
        wide = tuple(tensor.detach().double().requires_grad_() for tensor in self.inputs)
        y = self.op.exact(*wide)
        gradients = torch.autograd.grad(y, wide, self.grad.double())
        errors = {}
        for name, function in self.op.functions.items():
            worst = max(map(_relative_error, self.both(function), gradients))
            errors[name] = {"y": _relative_error(self.forward(function), y), "gradient": worst}
        return errors


def _relative_error(found: Tensor, right: Tensor) -> float:
    return float(f"{((found.double() - right).square().mean() / right.square().mean()).sqrt().item():.3g}")


def repeated(work: Callable[[], object], calls: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(calls):
            work()

    return work if calls == 1 else run


def measure(
    problem: Problem, functions: Functions, rounds: int, seconds: float, calls: int = 1
) -> tuple[Times, dict[str, Any]]:
    """Times of a call in quiet turns of so many calls, and the row that says them."""
    works = {name: repeated(work, calls) for name, work in problem.works(functions).items()}
    warm_up(works)
    times, others_cores = take_quiet_turns(works, rounds, seconds)
    times = {name: [turn / calls for turn in turns] for name, turns in times.items()}
    return times, problem.row | summarised(times, others_cores)


def cell_facts(problem: Problem, row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """What stands beside the times of a cell: errors, page faults, the machine's floor, and the verdicts."""
    state, mix, dim, rank, tokens = problem.row.values()
    achieved = flops(tokens, dim, rank)["both"] / row["both_ms"]["ours"]["median"] / 1e6
    share = achieved / rates[f"gemm_{mix}_GFLOP_per_s"]
    ratio = row["ratio"]
    verdicts = {"forward over eager": judged(ratio["forward"]["eager"], FORWARD_TARGET)}
    if (state, mix, tokens, rank) in TARGETS:
        over_eager, over_compile = TARGETS[state, mix, tokens, rank]
        verdicts["both over eager"] = judged(ratio["both"]["eager"], over_eager)
        better = min(ratio["both"]["compile"], ratio["both"]["max-autotune"])
        verdicts["both over compile"] = judged(better, over_compile)
    if (state, rank) == ("no-fault", 64):
        verdicts["share of gemm"] = judged(share, GEMM_TARGETS[mix])
    return {
        "error": problem.errors(),
        "page_faults": {name: page_faults(lambda f=f: problem.both(f)) for name, f in problem.op.functions.items()},
        "floor_ms": floor_ms(tokens, dim, rank, problem.mix.x, rates),
        "GFLOP_per_s": float(f"{achieved:.4g}"),
        "share_of_gemm": round(share, 4),
        "rates": rates,
        "judged": verdicts,
    }


def slower_than_eager(row: dict[str, Any]) -> list[str]:
    """The passes in which ours is slower than eager, by more than 3 % and by more than either spreads."""
    return [
        part
        for part in PASSES
        if row["ratio"][part]["eager"] < 0.97 and row[f"{part}_ms"]["ours"]["p20"] > row[f"{part}_ms"]["eager"]["p80"]
    ]


def each(sizes: list[tuple]) -> Callable:
    """One test for each size, called for example float32-768-r8-n1576."""
    return pytest.mark.parametrize("size", sizes, ids=[f"{mix}-{dim}-r{rank}-n{n}" for mix, dim, rank, n in sizes])


def tests(op: Op, cells: list[tuple] = CELLS) -> tuple[Callable, ...]:
    """test_cell, test_avx2, test_host_cost and test_grid of an op's suite."""

    @each(cells)
    def test_cell(benchmark, pytestconfig, size):
        torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes
        compiled = {
            "compile": torch.compile(op.eager, dynamic=False),
            "max-autotune": torch.compile(op.eager, mode="max-autotune", dynamic=False),
        }
        rates = machine_rates(*budget(pytestconfig))
        problem = Problem(op, *size)
        times, row = measure(problem, op.functions | compiled, *budget(pytestconfig))
        record(benchmark, times, row | cell_facts(problem, row, rates))

    @pytest.mark.skipif(vitadapter_ext.build_info()["cpu_level"] != "avx2", reason="wants VITADAPTER_CPU=avx2")
    @each(cells)
    def test_avx2(benchmark, pytestconfig, size):
        times, row = measure(Problem(op, *size), op.functions, *budget(pytestconfig))
        row["judged"] = {"both over eager": judged(row["ratio"]["both"]["eager"], AVX2_TARGET)}
        record(benchmark, times, row)

    @each([("float32", 16, 2, 4)])
    def test_host_cost(benchmark, pytestconfig, size):
        """So small a tensor that all the time is what calling costs; many calls in a row, as layers make them."""
        times, row = measure(Problem(op, *size), op.functions, *budget(pytestconfig), calls=100)
        row["judged"] = {}
        for part, target in HOST_TARGETS_US.items():
            cost = 1000 * row[f"{part}_ms"]["ours"]["median"]
            row["judged"][f"{part} (µs)"] = judged(cost, target, at_most=True)
            row["judged"][f"{part} over eager"] = judged(row["ratio"][part]["eager"], 1.0)
        record(benchmark, times, row)

    @each(GRID)
    def test_grid(benchmark, pytestconfig, size):
        problem, (rounds, seconds) = Problem(op, *size), budget(pytestconfig)
        works = problem.works(op.functions)
        warm_up(works, 1)
        times = take_turns(works, rounds, seconds)
        row = problem.row | summarised(times)
        if slower_than_eager(row):  # perhaps by chance
            times, row = measure(problem, op.functions, 3 * rounds, 5 * seconds)
        record(benchmark, times, row | {"slower": slower_than_eager(row)})

    return test_cell, test_avx2, test_host_cost, test_grid


def peak_memory_work(op: Op, name: str, *size) -> Callable[[], Any]:
    """Forward + backward once, after a small problem has loaded what the libraries load."""
    function, (mix, dim, rank, _) = op.functions[name], size
    Problem(op, mix, dim, rank, 8).both(function)
    problem = Problem(op, *size)
    return lambda: problem.both(function)
