"""How fast is the consolidator on this CPU, beside the authors' grouped convolution and a dense product?

`make bench OP=consolidator` measures everything into `benchmarks/results/consolidator-cpu.json` and
`consolidator-cpu.md`; parts of it, and the plain suite of pytest-benchmark, are as in bench_adapter.py.

What no kernel can do without: forward, branches read x and base and write y; backward, they read y's gradient and x and
write x's gradient, for base has y's gradient itself.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # python benchmarks/bench_consolidator.py
    sys.path[0] = str(Path(__file__).parents[1])

import pytest
import torch

from benchmarks import consolidator, problem, program, rates, report
from benchmarks.interleaved import budget, record
from benchmarks.memory import MALLOC, malloc_state
from benchmarks.problem import Problem, measure
from benchmarks.report import judged
from benchmarks.sandwich import host_verdicts

# A size is (mix, layer, groups of each branch, tokens), and "unshuffled" where it is as the authors trained. One batch
# of 8 images for ViT-B/16 and one of 64.
MIXES, VIT_B, FEW, MANY = ("float32", "bfloat16"), ("qkv", "proj", "fc1", "fc2"), 1_576, 12_608
CELLS = [(mix, layer, (g,), n) for mix in MIXES for n in (FEW, MANY) for layer in VIT_B for g in (384, 96, 12)]
CELLS += [(mix, layer, g, FEW) for mix in MIXES for layer in VIT_B for g in ((384, 96), (384, 192, 96, 48))]
CELLS += [(mix, "qkv", (384,), n, "unshuffled") for mix in MIXES for n in (FEW, MANY)]
LAYERS = [(mix, layer, (384,), tokens) for mix in MIXES for tokens in (FEW, MANY) for layer in VIT_B]
MEMORY = [
    {"mix": "float32", "layer": "qkv", "groups": (384,), "tokens": MANY},
    {"mix": "bfloat16", "layer": "fc2", "groups": (384, 96), "tokens": FEW},
]

CONV_TARGET = 4.0  # times the convolution's speed, forward + backward of qkv's one branch with 384 groups
AUTO_TARGET = 1.03  # of the faster way's time, forward + backward of the layer

# In which there are dense products that are worth a comparison.
DENSE_MIXES = [mix for mix in MIXES if problem.MIXES[mix].x in rates.GEMM_DTYPES]


class BranchProblem(Problem):
    """base + the branches; all inputs have gradients, that of base is the given one itself."""

    def __init__(self, mix: str, layer: str, groups: Sequence[int], tokens: int, shuffle: str = ""):
        super().__init__(
            mix, layer=layer, groups=list(groups), tokens=tokens, **({"shuffle": shuffle} if shuffle else {})
        )
        self.functions, self.exact = consolidator.branches(not shuffle), consolidator.exact_branches(not shuffle)
        images, (width, out) = consolidator.samples(tokens), consolidator.LAYERS[layer]
        # What a layer gives, autocast's dtype under autocast.
        base = torch.bfloat16 if self.mix.autocast else self.mix.x
        self.inputs = (
            self.tensor(*images, width, spread=1, dtype=self.mix.x),
            self.tensor(*images, out, spread=1, dtype=base),
            *consolidator.parameters(self.tensor, layer, groups),
        )
        self.grad = torch.randn(*images, out).to(base)


class LayerProblem(Problem):
    """The whole layer: x and the branches' parameters have gradients, its own weight and bias are frozen."""

    def __init__(self, mix: str, layer: str, groups: Sequence[int], tokens: int):
        super().__init__(mix, layer=layer, groups=list(groups), tokens=tokens)
        self.all_functions = consolidator.layers()
        self.functions = {name: f for name, f in self.all_functions.items() if name != "plain"}
        self.exact = consolidator.exact_layer
        images, (width, out) = consolidator.samples(tokens), consolidator.LAYERS[layer]
        self.inputs = (
            self.tensor(*images, width, spread=1, dtype=self.mix.x),
            self.tensor(out, width, spread=width**-0.5).detach(),
            self.tensor(out, spread=0.1).detach(),
            *consolidator.parameters(self.tensor, layer, groups),
        )
        self.grad = torch.randn(*images, out).to(torch.bfloat16 if self.mix.autocast else self.mix.x)
        self.row["auto"] = consolidator.auto(*self.inputs[:2])


def cell_facts(cell: BranchProblem, row: dict[str, Any], machine: dict[str, float]) -> dict[str, Any]:
    """What stands beside the times of a cell, with the verdict."""
    cost = rates.consolidator(row["tokens"], *consolidator.LAYERS[row["layer"]], row["groups"], cell.mix.x)
    verdicts = {}
    if (row["layer"], row["groups"]) == ("qkv", [384]):
        verdicts["both over conv"] = judged(row["ratio"]["both"]["conv"], CONV_TARGET)
    return cell.cell_facts(row, machine, cost) | {"judged": verdicts}


def layer_verdicts(row: dict[str, Any]) -> dict[str, Any]:
    ratio = row["ratio"]["both"]
    faster = min(ratio["in-weight"], ratio["beside"])
    return {"auto over the faster way": judged(ratio[row["auto"]] / faster, AUTO_TARGET, at_most=True)}


def id_of(size: tuple) -> str:
    """For example float32-qkv-g384-n1576."""
    mix, layer, groups, tokens, *shuffle = size
    return "-".join([mix, layer, f"g{'+'.join(map(str, groups))}", f"n{tokens}", *shuffle])


def each(sizes: list[tuple]) -> Callable:
    return pytest.mark.parametrize("size", sizes, ids=map(id_of, sizes))


@each(CELLS)
def test_cell(benchmark, pytestconfig, size):
    mix, layer, groups, tokens, *unshuffled = size
    if malloc_state() == "all-fault" and 384 not in groups:
        pytest.skip("the pages that it takes do not depend on the groups")
    if tokens == MANY and mix not in DENSE_MIXES:
        pytest.skip("the convolution would take ten seconds a call in this dtype here")
    torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes
    cell = BranchProblem(*size)
    functions = dict(cell.functions)
    # What is compiled around the convolution is the same for any groups.
    if groups == (384,) or (layer == "qkv" and tokens == FEW):
        functions["compile"] = torch.compile(functions["conv"], dynamic=False)
    if tokens == FEW and mix in DENSE_MIXES:  # 8 times the tokens take 8 times as long
        functions["masked"] = consolidator.masked(layer, groups, shuffle=not unshuffled)
    machine = rates.machine_rates(*budget(pytestconfig))
    times, row = measure(cell, cell.works(functions), *budget(pytestconfig), warm_up_rounds=1)
    record(benchmark, times, row | cell_facts(cell, row, machine))


@each(LAYERS)
def test_layer(benchmark, pytestconfig, size):
    if size[0] not in DENSE_MIXES:
        pytest.skip("there is no fast product in this dtype here")
    layer = LayerProblem(*size)
    works = {name: work for name, work in layer.works(layer.all_functions).items() if name.startswith("both")}
    times, row = measure(layer, works, *budget(pytestconfig), warm_up_rounds=1, to="plain")
    record(benchmark, times, row | layer.accuracy() | {"judged": layer_verdicts(row)})


@each([("float32", "tiny", (8,), 4)])
def test_host_cost(benchmark, pytestconfig, size):
    """So small a tensor that all the time is what calling costs; many calls in a row, as layers make them."""
    cell = BranchProblem(*size)
    times, row = measure(cell, cell.works(cell.functions), *budget(pytestconfig), calls=100)
    record(benchmark, times, row | {"judged": host_verdicts(row, "conv")})


def peak_memory_work(name: str, size: dict[str, Any]) -> Callable[[], Any]:
    """Forward + backward once, after a small problem has loaded what the libraries load."""
    small = BranchProblem(**size | {"tokens": 8})
    small.both(small.functions[name])
    cell = BranchProblem(**size)
    return lambda: cell.outputs(cell.functions[name])


def cells_table(rows: list[dict[str, Any]]) -> str:
    ratios, slower = report.ratios(rows, "ours"), report.slower(rows, ["conv", "masked"])
    return "\n\n".join((report.times(rows), ratios, report.targets(rows), slower, report.floors(rows)))


def layers_table(rows: list[dict[str, Any]]) -> str:
    ratios = report.ratios(rows, "plain")
    chosen = report.table(["size", "auto is"], [[report.size(row), row["auto"]] for row in rows])
    return "\n\n".join((report.times(rows), ratios, chosen, report.targets(rows), report.accuracy(rows)))


CELL_TITLE = "Branches added to a base: ours, the grouped convolution, torch.compile of it, and a dense masked product"
LAYER_TITLE = "The whole frozen layer: ours in both ways, the layer alone, and with the grouped convolution beside it"
PARTS = {
    "cells": program.Part(CELL_TITLE, "test_cell", list(MALLOC.values()), 5, 0.4, cells_table),
    "layers": program.Part(LAYER_TITLE, "test_layer", [program.NO_FAULT], 5, 0.4, layers_table),
    "host": program.HOST,
}

if __name__ == "__main__":
    sys.exit(program.main("consolidator", __doc__, peak_memory_work, MEMORY, PARTS, other="conv"))
