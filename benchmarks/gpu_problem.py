"""What is computed in one cell of `make gpu`? A mix of dtypes, a size, and an op, forward and backward: ours, and as
one writes it in plain PyTorch, against which ours is checked before anything is timed."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import consolidator
from benchmarks.gpu_timing import After, Work, gpu_times
from vitadapter_ext import ARCBasis, FusedAdapter, FusedARC, FusedConsolidator
from vitadapter_ext.ops import adapter, arc

Function = Callable[..., Tensor]


class Mix(NamedTuple):
    x: torch.dtype
    parameters: torch.dtype
    residual: torch.dtype | None = None  # None: x is the residual; of the consolidator, the base's
    autocast: bool = False  # to bfloat16
    tf32: bool = False
    op: str = "adapter"


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
    "ARC bfloat16": Mix(BF16, BF16, op="ARC"),
    "ARC float32 in bfloat16": Mix(F32, F32, autocast=True, op="ARC"),
    "consolidator bfloat16": Mix(BF16, BF16, residual=BF16, op="consolidator"),
    "consolidator float32 in bfloat16": Mix(F32, F32, residual=BF16, autocast=True, op="consolidator"),
    "consolidator float32": Mix(F32, F32, residual=F32, op="consolidator"),
    "consolidated linear bfloat16": Mix(BF16, BF16, op="consolidated linear"),
    "consolidated linear float32 in bfloat16": Mix(F32, F32, autocast=True, op="consolidated linear"),
    "consolidated linear float32": Mix(F32, F32, op="consolidated linear"),
}


def mixes_of(*ops: str) -> list[str]:
    return [name for name, mix in MIXES.items() if mix.op in ops]


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
    """Inputs of one cell and what is done with them. A kind of problem sets what is only declared here, and then calls
    `begin`."""

    inputs: dict[str, Tensor | None]  # of every function
    functions: dict[str, Function]  # the last one, eager, is what the others are checked against
    base: dict[str, Tensor]  # of "y" and "gradient of x": what the branch is added to
    y_dtype: torch.dtype
    # Forward and backward.
    compulsory_bytes: dict[str, int]
    flops: dict[str, int]

    def __init__(self, mix: str):
        self.mix = MIXES[mix]
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = self.mix.tf32
        torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes

    def tensor(self, *shape: int, spread: float, dtype: torch.dtype | None = None) -> Tensor:
        return (spread * torch.randn(*shape, device=DEVICE)).to(dtype or self.mix.parameters).requires_grad_()

    def begin(self, *y_shape: int) -> None:
        self.tensors = {name: t for name, t in self.inputs.items() if t is not None and t.requires_grad}
        self.grad = torch.randn(*y_shape, device=DEVICE).to(self.y_dtype)

    def module(self) -> tuple[nn.Module, Sequence[Tensor | None]]:
        """One that computes the same, and its inputs."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager:
        """Without its cache: every call converts its parameters once, as every layer does in a training step, however
        many calls are made under one autocast."""
        return torch.autocast(DEVICE, BF16, cache_enabled=False) if self.mix.autocast else contextlib.nullcontext()

    def forward(self, function: Function) -> Tensor:
        """As in training: with what the backward pass needs."""
        with self.autocast():
            return function(*self.inputs.values())

    def backward(self, y: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            y, list(self.tensors.values()), self.grad, retain_graph=retain_graph, allow_unused=True
        )

    def passes(self, function: Function) -> dict[str, Work]:
        def forward() -> Tensor:
            return self.forward(function)

        return {
            "forward": forward,
            "backward": After(forward, self.backward),
            "both": lambda: self.backward(forward()),
        }

    def copy(self) -> tuple[Work, int]:
        """Of the largest tensor, and the bytes that it moves."""
        source = max((tensor.detach() for tensor in self.tensors.values()), key=lambda tensor: tensor.nbytes)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes

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
        # One bias is a sum that may be near 0 by chance. Of the same terms, each times about 1, are its many weights.
        like = {"gradient of down_bias": "gradient of down"}
        parts = []
        for name, value in found.items():
            right = expected[name].float()
            apart = value.float() - right
            difference = size(apart)
            added = expected[like.get(name, name)].float()
            branch = size(added - self.base[name].float() if name in self.base else added)
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
        expected = self.results(self.functions["eager"])
        found = [self.compare(self.results(f), expected) for name, f in self.functions.items() if name != "eager"]
        return {"difference": float(f"{max(found):.2g}")}

    def works(self, functions: dict[str, Function], parts: Iterable[str]) -> dict[str, Work]:
        passes = {name: self.passes(function) for name, function in functions.items()}
        return {f"{part} {name}": passes[name][part] for part in parts for name in functions}

    def times(self, functions: dict[str, Function], parts: Iterable[str], **options: Any) -> dict[str, Any]:
        return gpu_times(self.works(functions, parts), **options)


class SandwichProblem(Problem):
    """An adapter or ARC."""

    def __init__(self, mix: str, dim: int, rank: int, tokens: int):
        super().__init__(mix)
        self.dim, self.rank = dim, rank
        x, is_arc = self.mix.x, self.mix.op == "ARC"
        self.inputs = {"x": self.tensor(tokens, dim, spread=1, dtype=x)}
        if is_arc:
            self.inputs |= {
                "basis": self.tensor(dim, rank, spread=dim**-0.5),
                "rescale": self.tensor(rank, spread=1),
                "bias": self.tensor(dim, spread=0.1),
            }
        else:
            residual = self.mix.residual and self.tensor(tokens, dim, spread=1, dtype=self.mix.residual)
            self.inputs |= {
                "residual": residual,
                "down": self.tensor(rank, dim, spread=dim**-0.5),
                "down_bias": self.tensor(rank, spread=0.1),
                "up": self.tensor(dim, rank, spread=rank**-0.5),
                "up_bias": self.tensor(dim, spread=0.1),
            }
        self.functions = {"ours": arc_ours, "eager": arc_eager} if is_arc else {"ours": ours, "eager": eager}
        self.y_dtype = torch.promote_types(x, self.mix.residual or x)
        self.begin(tokens, dim)
        self.base = {"y": self.inputs["x" if self.mix.residual is None else "residual"].detach()}
        if self.mix.residual is None:
            self.base["gradient of x"] = self.grad
        # Forward, x and a residual of its own read, y and the hidden layer (float32) written; backward, dy and x read
        # and the gradient of x written, three streams: from x, a hidden layer could be computed again.
        elements, residual_size = tokens * dim, self.mix.residual.itemsize if self.mix.residual else 0
        self.compulsory_bytes = {
            "forward": elements * (x.itemsize + residual_size + self.y_dtype.itemsize) + 4 * tokens * rank,
            "backward": elements * (2 * x.itemsize + self.y_dtype.itemsize),
        }
        self.flops = {"forward": 4 * elements * rank, "backward": 8 * elements * rank}

    def module(self) -> tuple[nn.Module, Sequence[Tensor | None]]:
        to = {"device": DEVICE, "dtype": self.mix.parameters}
        if self.mix.op == "ARC":
            return FusedARC(ARCBasis(self.dim, self.rank, **to), **to), (self.inputs["x"],)
        inputs = (self.inputs["x"], self.inputs["residual"])
        return FusedAdapter(self.dim, self.rank, init="bert", **to), inputs


class ConsolidatorProblem(Problem):
    """Branches that are added to a base; eager is the authors' grouped convolution."""

    def __init__(self, mix: str, layer: str, groups: Sequence[int], tokens: int):
        super().__init__(mix)
        self.layer, self.groups = layer, groups
        (width, out), images = consolidator.LAYERS[layer], consolidator.samples(tokens)
        parameters = consolidator.parameters(self.tensor, layer, groups)
        self.y_dtype = self.mix.residual
        self.inputs = {
            "x": self.tensor(*images, width, spread=1, dtype=self.mix.x),
            "base": self.tensor(*images, out, spread=1, dtype=self.y_dtype),
            **_numbered(parameters),
        }
        branches = consolidator.branches()
        self.functions = {"ours": branches["ours"], "eager": branches["conv"]}
        self.base = {"y": self.inputs["base"].detach()}
        self.begin(*images, out)
        # Forward, x and base read and y written; backward, dy and x read and the gradient of x written.
        x, y = (self.inputs[name].nbytes for name in ("x", "base"))
        self.compulsory_bytes = {"forward": x + 2 * y, "backward": 2 * x + y}
        product = sum(2 * tokens * width * out // g for g in groups)
        self.flops = {"forward": product, "backward": 2 * product}

    def module(self) -> tuple[nn.Module, Sequence[Tensor | None]]:
        to = {"device": DEVICE, "dtype": self.mix.parameters}
        module = FusedConsolidator(*consolidator.LAYERS[self.layer], self.groups, **to)
        return module, (self.inputs["x"], self.inputs["base"])


class ConsolidatedLinearProblem(Problem):
    """A frozen layer with branches: ours in each of its ways; eager has the convolution beside it."""

    def __init__(self, mix: str, layer: str, groups: Sequence[int], tokens: int):
        super().__init__(mix)
        (width, out), images = consolidator.LAYERS[layer], consolidator.samples(tokens)
        parameters = consolidator.parameters(self.tensor, layer, groups)
        self.y_dtype = BF16 if self.mix.autocast else self.mix.x
        self.inputs = {
            "x": self.tensor(*images, width, spread=1, dtype=self.mix.x),
            "weight": self.tensor(out, width, spread=width**-0.5).detach(),
            "bias": self.tensor(out, spread=0.1).detach(),
            **_numbered(parameters),
        }
        layers = consolidator.layers()
        self.plain = layers.pop("plain")  # without branches, and so with no gradients of theirs
        convolution = layers.pop("conv")
        self.functions = layers | {"eager": convolution}
        self.auto = consolidator.auto(self.inputs["x"], self.inputs["weight"])
        self.base = {}
        self.begin(*images, out)


def _numbered(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    weights, biases = consolidator.halves(parameters)
    return {f"weight {i}": weight for i, weight in enumerate(weights)} | {
        f"bias {i}": bias for i, bias in enumerate(biases)
    }


KINDS: dict[str, tuple[type[Problem], tuple[str, ...]]] = {
    "adapter": (SandwichProblem, ("dim", "rank", "tokens")),
    "ARC": (SandwichProblem, ("dim", "rank", "tokens")),
    "consolidator": (ConsolidatorProblem, ("layer", "groups", "tokens")),
    "consolidated linear": (ConsolidatedLinearProblem, ("layer", "groups", "tokens")),
}


def named_size(mix: str, *size: Any) -> dict[str, Any]:
    """A mix and a size of its op as the beginning of a row."""
    _, names = KINDS[MIXES[mix].op]
    return {"mix": mix, **dict(zip(names, size, strict=True))}


def problem_of(mix: str, *size: Any) -> Problem:
    kind, _ = KINDS[MIXES[mix].op]
    return kind(mix, *size)
