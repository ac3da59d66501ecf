"""Random problems for the tests of the `arc` op, and what a user would write instead of it."""

import torch

from tests.problems import Op
from vitadapter_ext import reference
from vitadapter_ext.ops import arc


def make(shape=(2, 5, 24), rank=3, *, dtype=torch.float64, device="cpu", bias=True, rescale=1.0):
    """Fresh random arguments for the op; all tensors require gradients. `rescale` is the spread of its elements."""
    dim = shape[-1]

    def tensor(*size, spread=1.0):
        return (spread * torch.randn(*size, dtype=torch.float64)).to(device, dtype).requires_grad_()

    return {
        "x": tensor(*shape),
        "basis": tensor(dim, rank, spread=dim**-0.5),
        "rescale": tensor(rank, spread=rescale),
        "bias": tensor(dim) if bias else None,
    }


def eager(x, basis, rescale, bias, compute_dtype=None):
    """The paper's formula: products in the compute dtype, the rest as PyTorch promotes it."""
    compute = compute_dtype or x.dtype
    shared = basis.to(compute)
    hidden = ((x.to(compute) @ shared) * rescale).to(compute)
    out = x + hidden @ shared.T
    return (out if bias is None else out + bias).to(x.dtype)


ARC = Op("arc", arc, reference.arc, eager, make, ("dropout",))
