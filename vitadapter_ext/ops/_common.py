"""What does every op do around its kernels? Dtypes, seeds, checks, the way to autograd, and devices without kernels."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._library import has_kernels, warn_without_kernels


def default_compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, outside autocast x's."""
    device = x.device.type
    # Autocast leaves float64 alone, and knows no meta device.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside it autocast is off; it knows no meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def draw_seed(x: Tensor) -> Tensor:
    """(1,) int64 on x's device, from PyTorch's generator."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def kernels_serve(device: torch.device) -> bool:
    """Whether the op's kernels run there; the first time that they do not, a warning says that the reference will."""
    if has_kernels(device):
        return True
    if not torch.compiler.is_compiling():
        warn_without_kernels(device)
    return False


def allow_tf32(device: torch.device) -> bool:
    """Whether float32 products may round their operands to TF32, by PyTorch's own setting."""
    if device.type != "cuda":
        return False
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # it was set through torch's newer name for it, which torch.compile cannot read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def needs_function(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call must go through its autograd Function; the op alone is cheaper."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    # Forward-mode differentiation goes the same way: there is none, and the Function says so where the op would not.
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def gradients(op: str, backward: Callable, needs: tuple[bool, ...], *arguments) -> list[Tensor | None]:
    """What the raw op `backward` says of those that are needed; None for the others.

    Args:
        op: the name of the function in `reference` that has second derivatives.
        needs: by the op's bits, the lowest first.
    """
    mask = sum(need << bit for bit, need in enumerate(needs))
    if not mask:
        return [None] * len(needs)
    results = once(op, backward, *arguments, mask)
    return [result if need else None for need, result in zip(needs, results, strict=True)]


def once(op: str, backward: Callable, *arguments):
    """What the raw op `backward` returns, refusing to be differentiated itself; `op` as in `gradients`."""
    # Gradients are on here only under create_graph=True (a traced backward pass is AOTAutograd's to guard).
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _DifferentiatedOnce.apply(op, backward, *arguments)
    return backward(*arguments)


class _DifferentiatedOnce(torch.autograd.Function):
    """A backward op as a node that cannot be differentiated, so that no second derivative is silently left out."""

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        ctx.op = op
        return tuple(backward(*arguments))

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op}: the fused op has no double backward pass; "
            f"use vitadapter_ext.reference.{ctx.op} for second derivatives"
        )


# ---- where no kernel runs: fake tensors, and devices without kernels


def check_tensors(op: str, x: Tensor, expected: dict[str, tuple[Tensor | None, tuple]]) -> None:
    """Raises a `RuntimeError` for the first tensor that is there with another shape or on another device than x."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {shape}")
        # One tensor on the meta device brings the whole call here, and the others' memory would come back unwritten.
        if tensor.device != x.device:
            raise RuntimeError(
                f"{op}: {name} is on {tensor.device} and x on {x.device}; all tensors of a call must be on one device"
            )


def check_rows(op: str, x: Tensor) -> None:
    """Raises a `RuntimeError` where x is no rows."""
    if x.dim() < 1 or x.shape[-1] < 1:
        raise RuntimeError(f"{op}: x has shape {tuple(x.shape)}; expected (..., dim) with dim of at least 1")


def check_matrix(op: str, name: str, matrix: Tensor, x: Tensor, meaning: str) -> None:
    """Raises a `RuntimeError` where x is no rows, or the first operand no matrix: their sizes are read next."""
    check_rows(op, x)
    if matrix.dim() != 2:
        raise RuntimeError(f"{op}: {name} has shape {tuple(matrix.shape)}; expected {meaning}")


def check_probabilities(op: str, probabilities: Mapping[str, float]) -> None:
    """Raises a `RuntimeError` that names the first that is none."""
    for name, p in probabilities.items():
        if not 0 <= p < 1:
            raise RuntimeError(f"{op}: {name} is {p:g}; it must be a probability in [0, 1)")


def fake_hidden(x: Tensor, rank: int, save: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*x.shape[:-1], rank) if save else (0,), dtype=dtype)


def fake_gradients(x: Tensor, operands: Iterable[Tensor | None], needs: int) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(0) if t is None or not needs >> bit & 1 else t.new_empty(t.shape) for bit, t in enumerate(operands)
    )
