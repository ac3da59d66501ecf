"""How is an op of the low-rank sandwich (the adapter, ARC) timed on the CPU? Its sizes, mixes of dtypes and targets,
the inputs of one size, and the tests of pytest-benchmark that each op's suite, `bench_<op>.py`, takes from here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vitadapter_ext
from benchmarks import rates
from benchmarks.interleaved import budget, record, summarised, take_turns, warm_up
from benchmarks.problem import Functions, Problem, measure
from benchmarks.report import judged, slower_than

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
MEMORY = [
    {"mix": "float32", "dim": 768, "rank": 64, "tokens": 12_608},
    {"mix": "bfloat16", "dim": 768, "rank": 8, "tokens": 1_576},
    {"mix": "float32", "dim": 1_280, "rank": 256, "tokens": 197},
]

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


class SandwichProblem(Problem):
    """Inputs of one size, all with gradients."""

    def __init__(self, op: Op, mix: str, dim: int, rank: int, tokens: int):
        super().__init__(mix, dim=dim, rank=rank, tokens=tokens)
        self.functions, self.exact = op.functions, op.exact
        self.inputs = (
            self.tensor(tokens, dim, spread=1, dtype=self.mix.x),
            *op.parameters(self.tensor, dim, rank),
        )
        self.grad = torch.randn(tokens, dim).to(self.mix.x)


def cell_facts(problem: SandwichProblem, row: dict[str, Any], machine: dict[str, float]) -> dict[str, Any]:
    """What stands beside the times of a cell, with the verdicts."""
    state, mix, dim, rank, tokens = problem.row.values()
    facts = problem.cell_facts(row, machine, rates.sandwich(tokens, dim, rank, problem.mix.x))
    ratio = row["ratio"]
    verdicts = {"forward over eager": judged(ratio["forward"]["eager"], FORWARD_TARGET)}
    if (state, mix, tokens, rank) in TARGETS:
        over_eager, over_compile = TARGETS[state, mix, tokens, rank]
        verdicts["both over eager"] = judged(ratio["both"]["eager"], over_eager)
        better = min(ratio["both"]["compile"], ratio["both"]["max-autotune"])
        verdicts["both over compile"] = judged(better, over_compile)
    if (state, rank) == ("no-fault", 64):
        verdicts["share of gemm"] = judged(facts["share_of_gemm"], GEMM_TARGETS[mix])
    return facts | {"judged": verdicts}


def host_verdicts(row: dict[str, Any], other: str) -> dict[str, Any]:
    """Of the cost of a call, which should be no more than the other function's either."""
    verdicts = {}
    for part, target in HOST_TARGETS_US.items():
        cost = 1000 * row[f"{part}_ms"]["ours"]["median"]
        verdicts[f"{part} (µs)"] = judged(cost, target, at_most=True)
        verdicts[f"{part} over {other}"] = judged(row["ratio"][part][other], 1.0)
    return verdicts


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
        machine = rates.machine_rates(*budget(pytestconfig))
        problem = SandwichProblem(op, *size)
        times, row = measure(problem, problem.works(op.functions | compiled), *budget(pytestconfig))
        record(benchmark, times, row | cell_facts(problem, row, machine))

    @pytest.mark.skipif(vitadapter_ext.build_info()["cpu_level"] != "avx2", reason="wants VITADAPTER_CPU=avx2")
    @each(cells)
    def test_avx2(benchmark, pytestconfig, size):
        problem = SandwichProblem(op, *size)
        times, row = measure(problem, problem.works(op.functions), *budget(pytestconfig))
        row["judged"] = {"both over eager": judged(row["ratio"]["both"]["eager"], AVX2_TARGET)}
        record(benchmark, times, row)

    @each([("float32", 16, 2, 4)])
    def test_host_cost(benchmark, pytestconfig, size):
        """So small a tensor that all the time is what calling costs; many calls in a row, as layers make them."""
        problem = SandwichProblem(op, *size)
        times, row = measure(problem, problem.works(op.functions), *budget(pytestconfig), calls=100)
        record(benchmark, times, row | {"judged": host_verdicts(row, "eager")})

    @each(GRID)
    def test_grid(benchmark, pytestconfig, size):
        problem, (rounds, seconds) = SandwichProblem(op, *size), budget(pytestconfig)
        works = problem.works(op.functions)
        warm_up(works, 1)
        times = take_turns(works, rounds, seconds)
        row = problem.row | summarised(times)
        if slower_than(row, "eager"):  # perhaps by chance
            times, row = measure(problem, works, 3 * rounds, 5 * seconds)
        record(benchmark, times, row | {"slower": slower_than(row, "eager")})

    return test_cell, test_avx2, test_host_cost, test_grid


def peak_memory_work(op: Op, name: str, size: dict[str, Any]) -> Callable[[], Any]:
    """Forward + backward once, after a small problem has loaded what the libraries load."""
    function = op.functions[name]
    SandwichProblem(op, **size | {"tokens": 8}).both(function)
    problem = SandwichProblem(op, **size)
    return lambda: problem.outputs(function)
