"""What is computed in one cell of `make gpu`? A mix of dtypes, a size, and an adapter or ARC, forward and backward:
ours, and as one writes it in plain PyTorch, against which ours is checked before anything is timed."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import After, Work, gpu_times
from vitadapter_ext.ops import adapter, arc

Function = Callable[..., Tensor]


class Mix(NamedTuple):
    x: torch.dtype
    parameters: torch.dtype
    residual: torch.dtype | None = None  # None: x is the residual
    autocast: bool = False  # to bfloat16
    tf32: bool = False
    arc: bool = False  # in place of an adapter


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
    "ARC bfloat16": Mix(BF16, BF16, arc=True),
    "ARC float32 in bfloat16": Mix(F32, F32, autocast=True, arc=True),
}


# How many times as far as all rows together a row may be from eager's: the largest of many, with large numbers in it.
ROW = 4


def eager(x, residual, down, down_bias, up, up_bias):
    return (x if residual is None else residual) + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def ours(x, residual, down, down_bias, up, up_bias):
    return adapter(x, down, up, down_bias=down_bias, up_bias=up_bias, residual=residual)


def arc_eager(x, basis, rescale, bias):
    return x + ((x @ basis) * rescale) @ basis.T + bias


def arc_ours(x, basis, rescale, bias):
    return arc(x, basis, rescale, bias=bias)


class Problem:
    """Inputs of one cell, all with gradients, and what is done with them."""

    def __init__(self, mix: str, dim: int, rank: int, tokens: int):
        self.mix, self.dim, self.rank, self.tokens = MIXES[mix], dim, rank, tokens
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = self.mix.tf32
        torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes

        def tensor(*shape: int, spread: float, dtype: torch.dtype = self.mix.parameters) -> Tensor:
            return (spread * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_()

        self.inputs = {"x": tensor(tokens, dim, spread=1, dtype=self.mix.x)}
        if self.mix.arc:
            self.inputs |= {
                "basis": tensor(dim, rank, spread=dim**-0.5),
                "rescale": tensor(rank, spread=1),
                "bias": tensor(dim, spread=0.1),
            }
        else:
            residual = self.mix.residual and tensor(tokens, dim, spread=1, dtype=self.mix.residual)
            self.inputs |= {
                "residual": residual,
                "down": tensor(rank, dim, spread=dim**-0.5),
                "down_bias": tensor(rank, spread=0.1),
                "up": tensor(dim, rank, spread=rank**-0.5),
                "up_bias": tensor(dim, spread=0.1),
            }
        self.functions: dict[str, Function] = (
            {"ours": arc_ours, "eager": arc_eager} if self.mix.arc else {"ours": ours, "eager": eager}
        )
        self.tensors = {name: tensor for name, tensor in self.inputs.items() if tensor is not None}
        self.y_dtype = torch.promote_types(self.mix.x, self.mix.residual or self.mix.x)
        self.grad = torch.randn(tokens, dim, device=DEVICE).to(self.y_dtype)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Without its cache: every call converts its parameters once, as every layer does in a training step, however
        many calls are made under one autocast."""
        return torch.autocast(DEVICE, BF16, cache_enabled=False) if self.mix.autocast else contextlib.nullcontext()

    def forward(self, function: Function) -> Tensor:
        """As in training: with what the backward pass needs."""
        with self.autocast():
            return function(*self.inputs.values())

    def backward(self, y: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(self.tensors.values()), self.grad, retain_graph=retain_graph)

    def passes(self, function: Function) -> dict[str, Work]:
        def forward() -> Tensor:
            return self.forward(function)

        return {
            "forward": forward,
            "backward": After(forward, self.backward),
            "both": lambda: self.backward(forward()),
        }

    def copy(self) -> Work:
        source, target = self.inputs["x"].detach(), torch.empty_like(self.inputs["x"])
        return lambda: target.copy_(source)

    def compulsory_bytes(self) -> dict[str, int]:
        """Forward, x and a residual of its own read, y and the hidden layer (float32) written; backward, dy and x read
        and the gradient of x written, three streams: from x, a hidden layer could be computed again."""
        x, y = self.mix.x.itemsize, self.y_dtype.itemsize
        residual = self.mix.residual.itemsize if self.mix.residual else 0
        of_token = {"forward": (x + residual + y) * self.dim + 4 * self.rank, "backward": (2 * x + y) * self.dim}
        return {part: self.tokens * each for part, each in of_token.items()}

    def results(self, function: Function) -> dict[str, Tensor]:
        """y and every gradient."""
        y = self.forward(function)
        return {"y": y.detach(), **self.named(self.backward(y))}

    def named(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {f"gradient of {name}": t for name, t in zip(self.tensors, gradients, strict=True)}

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
        """How far the results are from eager's at most, in parts of what the branch adds to each; raises where that is
        more than rounding, of all rows together or of any one of them: a few rows of many hardly change a mean."""

        def size(tensor: Tensor) -> float:
            return tensor.square().mean().sqrt().item()

        def size_of_worst_row(tensor: Tensor) -> float:
            return tensor.square().mean(-1).max().sqrt().item()

        of_branch = 0.03 if self.mix.autocast or self.mix.x != F32 else 0.01
        base = {"y": self.inputs["x" if self.mix.residual is None else "residual"].detach()}
        if self.mix.residual is None:
            base["gradient of x"] = self.grad
        # One bias is a sum that may be near 0 by chance. Of the same terms, each times about 1, are its many weights.
        like = {"gradient of down_bias": "gradient of down"}
        parts = []
        for name, value in found.items():
            right = expected[name].float()
            apart = value.float() - right
            difference = size(apart)
            added = expected[like.get(name, name)].float()
            branch = size(added - base[name].float() if name in base else added)
            bound = of_branch * branch + torch.finfo(value.dtype).eps * size(right)
            # Written so that a NaN fails.
            if not difference <= bound:
                raise ArithmeticError(f"{name} differs from eager's by {difference / branch:.2g} of the branch")
            worst = size_of_worst_row(apart) if name in ("y", "gradient of x") else 0.0
            if not worst <= ROW * bound:
                raise ArithmeticError(f"a row of {name} differs from eager's by {worst / branch:.2g} of the branch")
            parts.append(difference / branch)
        return max(parts)

    def check(self) -> dict[str, float]:
        found, expected = (self.results(function) for function in self.functions.values())
        return {"difference": float(f"{self.compare(found, expected):.2g}")}

    def times(self, functions: dict[str, Function], parts: tuple[str, ...], **options: Any) -> dict[str, Any]:
        passes = {name: self.passes(function) for name, function in functions.items()}
        return gpu_times({f"{part} {name}": passes[name][part] for part in parts for name in functions}, **options)
