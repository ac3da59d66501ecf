"""The `adapter` op: argument handling, fake kernels and autograd around the kernels in `csrc/*/adapter.*`."""

import torch
from torch import Tensor

from .. import reference
from .._text import unknown
from . import _common

# The kernels know an activation by its place in this tuple (csrc/common/activation.h).
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "leaky_relu", "silu", "identity")

_forward = torch.ops.vitadapter.adapter_forward.default
_backward = torch.ops.vitadapter.adapter_backward.default


def adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    dropout_out: float = 0.0,
    drop_path: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + keep ∘ scale ∘ drop_out(drop(act(x·downᵀ + down_bias))·upᵀ + up_bias): Houlsby et al. 2019,
    "Parameter-Efficient Transfer Learning for NLP", section 2.1, with Adapter+'s channel scale (CVPR 2024, eq. 5).

    x, residual and the parameters are each float32 or one low dtype (bfloat16 or float16), in any mix, or all float64.
    The products' operands are read in the compute dtype, sums and what stands between them are float32 (float64). The
    gradients of all tensors but `seed` are defined once (no double backward).

    Args:
        x: (..., dim); a sample is an index of its first dimension.
        down: (rank, dim); rank 0 leaves residual + keep ∘ scale ∘ up_bias.
        up: (dim, rank).
        down_bias: (rank,); up_bias: (dim,).
        scale: a constant, or a tensor of shape (1,) or (dim,).
        residual: shape of x; x itself by default.
        activation: one of `ACTIVATIONS`.
        dropout, dropout_out, drop_path: probabilities in [0, 1) of dropping an element after the activation, an
            element of the up-projection, and a whole sample; what is kept is scaled by 1/(1-p).
        seed: (1,) int64 on x's device; drawn from PyTorch's generator where it is needed and not given. Equal seeds
            give equal masks.
        compute_dtype: by default autocast's dtype, outside autocast x's.
    Returns: (..., dim) in the promoted dtype of x and residual.
    Raises:
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes, devices or probabilities that do not fit, saying what was given.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if compute_dtype is None:
        compute_dtype = _common.default_compute_dtype(x)
    if seed is None and (dropout or dropout_out or drop_path):
        seed = _common.draw_seed(x)
    if not _common.kernels_serve(x.device):
        _check(x, residual, down, down_bias, up, up_bias, scale, (dropout, dropout_out, drop_path))
        with _common.without_autocast(x.device):
            return reference.adapter(
                x, down, up, down_bias=down_bias, up_bias=up_bias, scale=scale, residual=residual,
                activation=activation, dropout=dropout, dropout_out=dropout_out, drop_path=drop_path, seed=seed,
                compute_dtype=compute_dtype,
            )  # fmt: skip
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    tensors = (x, residual, down, down_bias, up, up_bias, scale, seed)
    settings = (
        scale_value, ACTIVATIONS.index(activation), dropout, dropout_out, drop_path, compute_dtype,
        _common.allow_tf32(x.device),
    )  # fmt: skip
    if _common.needs_function(tensors):
        return _Adapter.apply(*tensors, settings)
    return _forward(*tensors, *settings, False)[0]


class _Adapter(torch.autograd.Function):
    """The two raw ops as one differentiable function; a Function costs half of what `register_autograd` does."""

    @staticmethod
    def forward(ctx, x, residual, down, down_bias, up, up_bias, scale, seed, settings):
        y, hidden = _forward(x, residual, down, down_bias, up, up_bias, scale, seed, *settings, True)
        ctx.save_for_backward(x, hidden, down, down_bias, up, up_bias, scale, seed)
        ctx.settings = settings
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        needs_x, needs_residual, *needs_parameters, _, _ = ctx.needs_input_grad
        residual_is_x = ctx.residual_dtype is None
        arguments = (grad, *ctx.saved_tensors, residual_is_x, *ctx.settings)
        grad_x, *grads = _common.gradients("adapter", _backward, (needs_x, *needs_parameters), *arguments)
        grad_residual = grad.to(ctx.residual_dtype) if needs_residual else None
        return grad_x, grad_residual, *grads, None, None


def _check(x, residual, down, down_bias, up, up_bias, scale, probabilities) -> None:
    """What the kernels check (csrc/bind/adapter.h), for where none runs: fake tensors, and devices without kernels."""
    _common.check_matrix("adapter", "down", down, x, "(rank, dim)")
    rank, dim = down.shape[0], x.shape[-1]
    scale = scale if isinstance(scale, Tensor) else None
    if scale is not None and tuple(scale.shape) not in ((1,), (dim,)):
        raise RuntimeError(f"adapter: scale has shape {tuple(scale.shape)}; expected (1,) or {(dim,)}")
    _common.check_tensors("adapter", x, {
        "down": (down, (rank, dim)), "up": (up, (dim, rank)), "down_bias": (down_bias, (rank,)),
        "up_bias": (up_bias, (dim,)), "residual": (residual, tuple(x.shape)),
        "scale": (scale, () if scale is None else tuple(scale.shape)),
    })  # fmt: skip
    names = ("dropout", "dropout_out", "drop_path")
    _common.check_probabilities("adapter", dict(zip(names, probabilities, strict=True)))


@torch.library.register_fake("vitadapter::adapter_forward")
def _(x, residual, down, down_bias, up, up_bias, scale, seed, scale_value, activation, dropout, dropout_out, drop_path,
      compute_dtype, allow_tf32, save_hidden):  # fmt: skip
    _check(x, residual, down, down_bias, up, up_bias, scale, (dropout, dropout_out, drop_path))
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=y_dtype), _common.fake_hidden(x, down.shape[0], save_hidden)


@torch.library.register_fake("vitadapter::adapter_backward")
def _(grad, x, hidden, down, down_bias, up, up_bias, scale, seed, residual_is_x, scale_value, activation, dropout,
      dropout_out, drop_path, compute_dtype, allow_tf32, needs):  # fmt: skip
    return _common.fake_gradients(x, (x, down, down_bias, up, up_bias, scale), needs)
