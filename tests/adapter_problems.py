"""Random problems for the tests of the `adapter` op, and what a user would write with torch.nn instead of it."""

import torch
import torch.nn.functional as F

from tests.problems import Op
from vitadapter_ext import reference
from vitadapter_ext.ops import adapter


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


def eager(x, down, up, down_bias, up_bias, scale, residual, activation="gelu", compute_dtype=None):
    """What a user would write with torch.nn: every product in the compute dtype."""
    compute = compute_dtype or x.dtype

    def cast(t):
        return None if t is None else t.to(compute)

    hidden = reference.ACTIVATIONS[activation](F.linear(cast(x), cast(down), cast(down_bias)))
    out = F.linear(hidden, cast(up), cast(up_bias)) * scale
    residual = x if residual is None else residual
    return (residual + out).to(torch.promote_types(x.dtype, residual.dtype))


ADAPTER = Op("adapter", adapter, reference.adapter, eager, make, ("dropout", "dropout_out", "drop_path"))
