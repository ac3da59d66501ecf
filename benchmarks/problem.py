"""What is done in one cell of a benchmark on the CPU? Inputs of one size go forward and backward through several
functions, which are timed in quiet turns; beside the times stand errors, page faults and the machine's floor."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.interleaved import Times, Works, summarised, take_quiet_turns, warm_up
from benchmarks.memory import malloc_state, page_faults
from benchmarks.rates import Cost, floor_ms, gemm_rate

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


class Problem:
    """Inputs of one size, some with gradients, and what is done with them. A kind of problem sets what is only declared
    here."""

    functions: Functions  # ours and others that are held against `exact`; all take the inputs
    exact: Callable[..., Tensor]  # the same for float64
    inputs: tuple[Tensor, ...]
    grad: Tensor

    def __init__(self, mix: str, **size: Any):
        self.row = {"state": malloc_state(), "mix": mix, **size}
        self.mix = MIXES[mix]
        torch.manual_seed(0)

    def tensor(self, *shape: int, spread: float, dtype: torch.dtype | None = None) -> Tensor:
        return (spread * torch.randn(*shape)).to(dtype or self.mix.parameters).requires_grad_()

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """As in training: with what the backward pass needs."""
        with torch.autocast("cpu", torch.bfloat16) if self.mix.autocast else contextlib.nullcontext():
            return function(*self.inputs)

    def both(self, function: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that have some; None where the function does not use one."""
        return self.outputs(function)[1:]

    def outputs(self, function: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
        """y, and the gradients as `both` gives them."""
        y = self.forward(function)
        return y, *_gradients(y, self.inputs, self.grad)

    def works(self, functions: Functions) -> Works:
        forward = {f"forward {name}": lambda f=function: self.forward(f) for name, function in functions.items()}
        return forward | {f"both {name}": lambda f=function: self.both(f) for name, function in functions.items()}

    def errors(self) -> dict[str, dict[str, float]]:
        """RMS error over RMS, of y and of the worst gradient, against the same inputs in float64."""
        wide = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in self.inputs)
        y = self.exact(*wide)
        gradients = _gradients(y, wide, self.grad.double())
        errors = {}
        for name, function in self.functions.items():
            worst = max(map(_relative_error, self.both(function), gradients))
            errors[name] = {"y": _relative_error(self.forward(function), y), "gradient": worst}
        return errors

    def accuracy(self) -> dict[str, Any]:
        """Errors, and the page faults that show the state of malloc."""
        faults = {name: page_faults(lambda f=function: self.both(f)) for name, function in self.functions.items()}
        return {"error": self.errors(), "page_faults": faults}

    def cell_facts(self, row: dict[str, Any], rates: dict[str, float], cost: Cost) -> dict[str, Any]:
        """What stands beside the times of a cell in which ours runs at a rate of the machine."""
        achieved = cost.flops["both"] / row["both_ms"]["ours"]["median"] / 1e6
        return self.accuracy() | {
            "floor_ms": floor_ms(cost, self.mix.x, rates),
            "GFLOP_per_s": float(f"{achieved:.4g}"),
            "share_of_gemm": round(achieved / gemm_rate(self.mix.x, rates), 4),
            "rates": rates,
        }


def _gradients(y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(y, [tensor for tensor in inputs if tensor.requires_grad], grad, allow_unused=True)


def _relative_error(found: Tensor, right: Tensor) -> float:
    return float(f"{((found.double() - right).square().mean() / right.square().mean()).sqrt().item():.3g}")


def repeated(work: Callable[[], object], calls: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(calls):
            work()

    return work if calls == 1 else run


def measure(
    problem: Problem,
    works: Works,
    rounds: int,
    seconds: float,
    calls: int = 1,
    warm_up_rounds: int = 3,
    to: str = "ours",
) -> tuple[Times, dict[str, Any]]:
    """Times of a call in quiet turns of so many calls, and the row that says them."""
    works = {name: repeated(work, calls) for name, work in works.items()}
    warm_up(works, warm_up_rounds)
    times, others_cores = take_quiet_turns(works, rounds, seconds)
    times = {name: [turn / calls for turn in turns] for name, turns in times.items()}
    return times, problem.row | summarised(times, others_cores, to)
