"""What is measured on a GPU? Each phase of `make gpu` that takes times, in a process of its own, so that neither a
kernel that hangs nor a context that broke takes the other phases along:

    python -m benchmarks.gpu_cells PHASE FILE SECONDS

writes a line of JSON for each cell, and at last whether it came to the end.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_plans
from benchmarks.gpu_problem import Function, Problem, mixes_of, named_size, problem_of
from benchmarks.gpu_timing import After, Work, gpu_times, host_times, kernels, peak_bytes, waits_for_gpu

RANKS = (8, 64, 128, 256)
LARGE = 131_072  # tokens: 201 MB at dim 768 in bfloat16
BATCH = 12_608  # tokens: 64 images for ViT-B/16

Measure = Callable[[Problem], dict[str, Any]]
PASSES = ("forward", "backward", "both")


def _rates(problem: Problem, times: dict[str, Any], copied: int) -> dict[str, Any]:
    """What the times of ours say beside that of a copy of so many bytes."""
    copy = copied / times["copy"]["median"] / 1e6
    row = {"copy_GB_per_s": round(copy), "GB_per_s": {}, "TFLOP_per_s": {}, "share": {}}
    for part, compulsory in problem.compulsory_bytes.items():
        took = times[f"{part} ours"]["median"]
        row["GB_per_s"][part] = round(compulsory / took / 1e6)
        row["TFLOP_per_s"][part] = float(f"{problem.flops[part] / took / 1e9:.3g}")
        row["share"][part] = round(compulsory / took / 1e6 / copy, 4)
    return row


def bandwidth(problem: Problem) -> dict[str, Any]:
    facts, (copy, copied) = problem.check(), problem.copy()
    works = problem.works({"ours": problem.functions["ours"]}, PASSES[:2])
    times = gpu_times(works | {"copy": copy}, rounds=25)
    return facts | {"ms": times} | _rates(problem, times, copied)


def branches(problem: Problem) -> dict[str, Any]:
    """Beside the authors' form and a copy."""
    facts, (copy, copied) = problem.check(), problem.copy()
    times = gpu_times(problem.works(problem.functions, PASSES) | {"copy": copy})
    return facts | {"ms": times} | _rates(problem, times, copied)


def layers(problem: Problem) -> dict[str, Any]:
    functions = problem.functions | {"plain": problem.plain}
    return problem.check() | {"auto": problem.auto, "ms": problem.times(functions, PASSES[2:])}


def ratios(problem: Problem) -> dict[str, Any]:
    functions = problem.functions | {"compile": torch.compile(problem.functions["eager"], dynamic=False)}
    return problem.check() | {"ms": problem.times(functions, PASSES)}


def autotune(problem: Problem) -> dict[str, Any]:
    tuned = torch.compile(problem.functions["eager"], mode="max-autotune-no-cudagraphs", dynamic=False)
    return {"ms": problem.times({"ours": problem.functions["ours"], "max-autotune": tuned}, PASSES[:1])}


def grid(problem: Problem) -> dict[str, Any]:
    def slower(times: dict[str, Any], part: str) -> bool:
        return times[f"{part} eager"]["median"] < 1.05 * times[f"{part} ours"]["median"]

    facts, parts = problem.check(), PASSES[:2]
    times = problem.times(problem.functions, parts, rounds=7, warm_up=0.0)
    if by_chance := tuple(part for part in parts if slower(times, part)):
        times |= problem.times(problem.functions, by_chance, rounds=30)
    return facts | {"ms": times}


def _calls(problem: Problem, function: Function) -> dict[str, Work]:
    """What a training loop calls."""
    return {part: work for part, work in problem.passes(function).items() if part != "backward"}


def host(problem: Problem) -> dict[str, Any]:
    works = {}
    for name, function in problem.functions.items():

        def forward(function: Function = function) -> Tensor:
            return function(*problem.inputs.values())

        works |= {f"forward {name}": forward, f"both {name}": lambda forward=forward: problem.backward(forward())}
    # A training step enters autocast once, for all of its layers: that is none of a layer's cost.
    with problem.autocast():
        return {"us": host_times(works)}


def module_step(problem: Problem) -> Work:
    """Forward and backward of the module, with the gradients of x and of all its parameters."""
    module, inputs = problem.module()
    wanted = [problem.inputs["x"], *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        with problem.autocast():
            y = module(*inputs)
        return torch.autograd.grad(y, wanted, problem.grad)

    return step


def memory(problem: Problem, function: Function) -> dict[str, int]:
    """Bytes that the forward pass keeps for the backward pass beside its inputs, and that the backward pass takes at
    most beside its results."""
    inputs = {t.untyped_storage().data_ptr() for t in problem.tensors.values()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = problem.forward(function)
    workspace = peak_bytes(lambda: problem.backward(y, retain_graph=True))
    return {"saved": sum(size for at, size in saved.items() if at not in inputs), "workspace": workspace}


def launches(problem: Problem) -> dict[str, Any]:
    """Not beside `host`: a process that has profiled launches more slowly from then on."""
    row = {"waits": {part: waits_for_gpu(work) for part, work in _calls(problem, problem.functions["ours"]).items()}}
    row["bytes"] = {name: memory(problem, function) for name, function in problem.functions.items()}
    names = {
        name: {part: kernels(work) for part, work in _calls(problem, function).items()}
        for name, function in problem.functions.items()
    }
    row["kernels"] = {name: {part: len(of_part) for part, of_part in parts.items()} for name, parts in names.items()}
    row["kernel_names"] = names["ours"]
    row["foreign"] = [name for name in kernels(module_step(problem)) if "vitadapter" not in name]
    return row


def _forward_plans(problem: Problem, expected: dict[str, Tensor]) -> dict[str, Work | None]:
    """The forward pass under each plan, None where it does not fit; what is timed is right."""
    works = {}
    for plan in (gpu_plans.AUTOMATIC, gpu_plans.SIMPLE, *gpu_plans.FAST):

        def work(plan: gpu_plans.Plan = plan) -> Tensor | None:
            return gpu_plans.result_under(plan, lambda: problem.forward(problem.functions["ours"]))

        y = work()
        if y is not None:
            problem.compare({"y": y.detach()}, expected)
        works[f"forward {plan}"] = None if y is None else work
    return works


def _backward_plans(problem: Problem, expected: dict[str, Tensor]) -> dict[str, Work | None]:
    """The same for the backward pass; the simple kernels would take too long."""
    works = {}
    for plan in (gpu_plans.AUTOMATIC, *gpu_plans.FAST, *gpu_plans.SLICED):

        def then(y: Tensor, plan: gpu_plans.Plan = plan) -> tuple[Tensor, ...] | None:
            return gpu_plans.result_under(plan, lambda: problem.backward(y))

        work = After(lambda: problem.forward(problem.functions["ours"]), then)
        gradients = work()
        if gradients is not None:
            problem.compare(problem.named(gradients), expected)
        works[f"backward {plan}"] = None if gradients is None else work
    return works


def sweep(problem: Problem) -> dict[str, Any]:
    expected = problem.results(problem.functions["eager"])
    works = _forward_plans(problem, expected) | _backward_plans(problem, expected)
    unfit = [name for name, work in works.items() if work is None]
    return {"ms": gpu_times({name: work for name, work in works.items() if work}, rounds=7), "unfit": unfit}


def _grid_sizes() -> Iterator[tuple]:
    dims, ranks, tokens = (768, 192, 384, 1_280), (8, 64, 1, 3, 16, 128, 256), (BATCH, 8, 197, 1_576, 100_864)
    mixes = mixes_of("adapter", "ARC")
    for i, (rank, n) in enumerate((rank, n) for rank in ranks for n in tokens):
        # bfloat16 everywhere; the others thinned, so that every two of mix, dim, rank and tokens still meet.
        yield from (("bfloat16", dim, rank, n) for dim in dims)
        yield from ((mix, dims[(i + j) % len(dims)], rank, n) for j, mix in enumerate(mixes[1:]))


ADAPTER, ARC, CONSOLIDATOR, LINEAR = map(mixes_of, ("adapter", "ARC", "consolidator", "consolidated linear"))
RATIO_MIXES = ADAPTER[:4]
SWEPT = ("bfloat16", "float32 in bfloat16", "float32 in TF32", "float32")
VIT_B = ("qkv", "proj", "fc1", "fc2")
BRANCHES = [(layer, (384,)) for layer in VIT_B] + [("qkv", groups) for groups in ((384, 96), (384, 192, 96, 48))]
# Phase: what is done, and with which mix and size of its op, the most important first.
PHASES: dict[str, tuple[Measure, list[tuple]]] = {
    "bandwidth": (bandwidth, [(mix, 768, rank, LARGE) for mix in ADAPTER[:2] for rank in RANKS]),
    "ratios": (ratios, [(mix, 768, rank, LARGE) for mix in RATIO_MIXES for rank in (64, 8)]
               + [(mix, 768, rank, LARGE) for mix in ARC for rank in (50, 64)]
               + [(mix, 768, rank, BATCH) for mix in RATIO_MIXES for rank in (64, 8)]),
    "branches": (branches, [(mix, *of, BATCH) for mix in CONSOLIDATOR for of in BRANCHES]),
    "layers": (layers, [(mix, layer, (384,), BATCH) for mix in LINEAR for layer in VIT_B]),
    "host": (host, [(mix, 64, 8, 16) for mix in RATIO_MIXES + ARC]
             + [(mix, "tiny", (8,), 16) for mix in CONSOLIDATOR]),
    "launches": (launches, [(mix, 768, 64, BATCH) for mix in RATIO_MIXES + ARC]
                 + [(mix, "qkv", groups, BATCH) for mix in CONSOLIDATOR for groups in ((384,), (384, 192, 96, 48))]),
    "grid": (grid, list(_grid_sizes())),
    "sweep": (sweep, [(mix, 768, r, n) for mix in SWEPT for n in (LARGE, BATCH, 1_576) for r in RANKS]),
    "autotune": (autotune, [(mix, 768, rank, LARGE) for mix in ADAPTER[:2] for rank in (64, 8)]),
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
        row = named_size(*size)
        try:
            write(row | measure_one(problem_of(*size)))
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
