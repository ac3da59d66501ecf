"""Random problems for the tests of the `consolidator` op, and what a user would write instead of it. Tests of all ops
want tensors by name: here a branch's are `weights[i]` and `biases[i]`."""

import torch

from tests.problems import Op
from vitadapter_ext import reference
from vitadapter_ext.ops import consolidator


def make_branches(width, out, groups, shape, *, dtype=torch.float64, device="cpu", bias=True, base=True):
    """Fresh random arguments of `width` inputs and `out` outputs; all tensors require gradients."""

    def tensor(*size, spread=1.0):
        return (spread * torch.randn(*size, dtype=torch.float64)).to(device, dtype).requires_grad_()

    arguments = {"x": tensor(*shape, width), "base": tensor(*shape, out) if base else None}
    for i, g in enumerate(groups):
        arguments[f"weights[{i}]"] = tensor(out, width // g, spread=(g / width) ** 0.5)
        if bias:
            arguments[f"biases[{i}]"] = tensor(out)
    return arguments


def make(shape=(2, 5, 24), rank=3, *, dtype=torch.float64, device="cpu"):
    """As many outputs as inputs, and two branches: the second of at most `rank` groups."""
    *batch, dim = shape
    divisors = [d for d in range(1, dim + 1) if dim % d == 0]
    groups = divisors[len(divisors) // 2], max(d for d in divisors if d <= rank)
    return make_branches(dim, dim, groups, batch, dtype=dtype, device=device)


def listed(op):
    """`op` with its lists by name."""

    def function(x, base=None, seed=None, compute_dtype=None, shuffle=True, drop_path=0.0, samples=None, **branches):
        weights = [tensor for name, tensor in branches.items() if name.startswith("weights[")]
        biases = [tensor for name, tensor in branches.items() if name.startswith("biases[")]
        return op(
            x, weights, biases, base=base, seed=seed, compute_dtype=compute_dtype, shuffle=shuffle,
            drop_path=drop_path, samples=samples,
        )  # fmt: skip

    return function


@listed
def eager(x, weights, biases, *, base, compute_dtype, shuffle, **_):
    """The authors' formula, without drop-path: what a branch computes in the compute dtype, the rest promoted."""
    compute = compute_dtype or x.dtype
    out, rows = weights[0].shape[0], x.to(compute).flatten(0, -2) if x.dim() > 1 else x.to(compute)[None]
    y = torch.zeros((), dtype=x.dtype, device=x.device) if base is None else base
    for i, weight in enumerate(weights):
        groups = x.shape[-1] // weight.shape[1]
        grouped = (reference.shuffled(rows, groups) if shuffle else rows).unflatten(1, (groups, -1)).transpose(0, 1)
        blocks = weight.to(compute).reshape(groups, out // groups, -1)
        branch = (grouped @ blocks.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], out)
        y = y + (branch + biases[i].to(compute) if biases else branch)
    return y.to(x.dtype if base is None else base.dtype)


CONSOLIDATOR = Op("consolidator", listed(consolidator), listed(reference.consolidator), eager, make, ("drop_path",))
