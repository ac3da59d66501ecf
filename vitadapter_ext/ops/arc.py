"""The `arc` op: argument handling, fake kernels and autograd around the kernels in `csrc/*/arc.*`."""

import torch
from torch import Tensor

from .. import reference
from . import _common

_forward = torch.ops.vitadapter.arc_forward.default
_backward = torch.ops.vitadapter.arc_backward.default


def arc(
    x: Tensor,
    basis: Tensor,
    rescale: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x + drop((x·basis) ∘ rescale)·basisᵀ + bias: Dong et al., "Efficient Adaptation of Large Vision Transformer via
    Adapter Re-Composing", NeurIPS 2023.

    x and the parameters are each float32 or one low dtype (bfloat16 or float16), in any mix, or all float64. The
    products' operands are read in the compute dtype (at least), sums and what stands between them are float32
    (float64). The gradients of all tensors but `seed` are defined once (no double backward).

    Args:
        x: (..., dim).
        basis: (dim, rank), used in both directions; rank 0 leaves x + bias.
        rescale: (rank,).
        bias: (dim,).
        dropout: probability in [0, 1) of dropping an element between the two products; what is kept is scaled by
            1/(1-p).
        seed: (1,) int64 on x's device; drawn from PyTorch's generator where it is needed and not given. Equal seeds
            give equal masks, those that `ops.adapter` has after its activation.
        compute_dtype: by default autocast's dtype, outside autocast x's.
    Returns: (..., dim) in x's dtype.
    Raises:
        RuntimeError: shapes, dtypes, devices or a probability that do not fit, saying what was given.
    """
    if compute_dtype is None:
        compute_dtype = _common.default_compute_dtype(x)
    if seed is None and dropout:
        seed = _common.draw_seed(x)
    if not _common.kernels_serve(x.device):
        _check(x, basis, rescale, bias, dropout)
        with _common.without_autocast(x.device):
            return reference.arc(x, basis, rescale, bias=bias, dropout=dropout, seed=seed, compute_dtype=compute_dtype)
    tensors = (x, basis, rescale, bias, seed)
    settings = (dropout, compute_dtype, _common.allow_tf32(x.device))
    if _common.needs_function(tensors):
        return _Arc.apply(*tensors, settings)
    return _forward(*tensors, *settings, False)[0]


class _Arc(torch.autograd.Function):
    """The two raw ops as one differentiable function."""

    @staticmethod
    def forward(ctx, x, basis, rescale, bias, seed, settings):
        y, hidden = _forward(x, basis, rescale, bias, seed, *settings, True)
        ctx.save_for_backward(x, hidden, basis, rescale, bias, seed)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:4]
        grads = _common.gradients("arc", _backward, needs, grad, *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None


def _check(x, basis, rescale, bias, dropout) -> None:
    """What the kernels check (csrc/bind/arc.h), for where none runs: fake tensors, and devices without kernels."""
    _common.check_matrix("arc", "basis", basis, x, "(dim, rank)")
    rank, dim = basis.shape[1], x.shape[-1]
    _common.check_tensors(
        "arc", x, {"basis": (basis, (dim, rank)), "rescale": (rescale, (rank,)), "bias": (bias, (dim,))}
    )
    _common.check_probabilities("arc", {"dropout": dropout})


@torch.library.register_fake("vitadapter::arc_forward")
def _(x, basis, rescale, bias, seed, dropout, compute_dtype, allow_tf32, save_hidden):
    _check(x, basis, rescale, bias, dropout)
    return x.new_empty(x.shape), _common.fake_hidden(x, basis.shape[1], save_hidden)


@torch.library.register_fake("vitadapter::arc_backward")
def _(grad, x, hidden, basis, rescale, bias, seed, dropout, compute_dtype, allow_tf32, needs):
    return _common.fake_gradients(x, (x, basis, rescale, bias), needs)
