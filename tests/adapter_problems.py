"""Random problems for the tests of the `adapter` op, and what a user would write with torch.nn instead of it."""

import torch
import torch.nn.functional as F

from vitadapter_ext import reference

LOW = (torch.bfloat16, torch.float16)

TENSORS = ("x", "down", "up", "down_bias", "up_bias", "scale", "residual")


def make(shape=(2, 5, 24), rank=3, *, dtype=torch.float64, device="cpu", bias=True, scale="channel", residual=True):
    """Fresh random arguments for the op; all tensors require gradients."""
    dim = shape[-1]

    def tensor(*size, spread=1.0):
        return (spread * torch.randn(*size, dtype=torch.float64)).to(device, dtype).requires_grad_()

    return {
        "x": tensor(*shape),
        "down": tensor(rank, dim, spread=dim**-0.5),
        "up": tensor(dim, rank, spread=max(rank, 1) ** -0.5),
        "down_bias": tensor(rank) if bias else None,
        "up_bias": tensor(dim) if bias else None,
        "scale": {"channel": lambda: tensor(dim), "scalar": lambda: tensor(1)}.get(scale, lambda: scale)(),
        "residual": tensor(*shape) if residual else None,
    }


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: arguments[name] for name in TENSORS if isinstance(arguments[name], torch.Tensor)}


def converted(arguments: dict, convert) -> dict:
    """The same arguments with every tensor replaced by a fresh leaf."""
    return {
        k: convert(v.detach()).clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }


def run(op, arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of all tensors, by name."""
    y = op(**arguments, **options)
    names, tensors = zip(*tensors_of(arguments).items(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, tensors, grad.to(y.dtype)), strict=True))}


def eager(x, down, up, down_bias, up_bias, scale, residual, activation="gelu", compute_dtype=None):
    """What a user would write with torch.nn: every product in the compute dtype."""
    compute = compute_dtype or x.dtype

    def cast(t):
        return None if t is None else t.to(compute)

    hidden = reference.ACTIVATIONS[activation](F.linear(cast(x), cast(down), cast(down_bias)))
    out = F.linear(hidden, cast(up), cast(up_bias)) * scale
    residual = x if residual is None else residual
    return (residual + out).to(torch.promote_types(x.dtype, residual.dtype))


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")
