"""The `adapter` op: argument handling, fake kernels and autograd around the kernels in `csrc/*/adapter.*`."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from .._library import has_kernels, warn_without_kernels
from .._text import unknown

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
        compute_dtype = _compute_dtype(x)
    if seed is None and (dropout or dropout_out or drop_path):
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    device = x.device.type
    if not has_kernels(x.device):
        if not torch.compiler.is_compiling():
            warn_without_kernels(x.device)
        _check(x, residual, down, down_bias, up, up_bias, scale, (dropout, dropout_out, drop_path))
        with torch.autocast(device, enabled=False):
            return reference.adapter(
                x, down, up, down_bias=down_bias, up_bias=up_bias, scale=scale, residual=residual,
                activation=activation, dropout=dropout, dropout_out=dropout_out, drop_path=drop_path, seed=seed,
                compute_dtype=compute_dtype,
            )  # fmt: skip
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    tensors = (x, residual, down, down_bias, up, up_bias, scale, seed)
    allow_tf32 = device == "cuda" and _allow_tf32()
    settings = (
        scale_value, ACTIVATIONS.index(activation), dropout, dropout_out, drop_path, compute_dtype, allow_tf32
    )  # fmt: skip
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # Forward-mode differentiation goes the same way: there is none, and the Function says so where the op would not.
    if needs_grad or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0):
        return _Adapter.apply(*tensors, settings)
    return _forward(*tensors, *settings, False)[0]


def _allow_tf32() -> bool:
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # it was set through torch's newer name for it, which torch.compile cannot read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    # Autocast leaves float64 alone, and knows no meta device.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


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
        needs_x, needs_residual, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale, _, _ = (
            ctx.needs_input_grad
        )
        needs = (needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_scale)
        mask = sum(need << bit for bit, need in enumerate(needs))
        grads = [None] * 6
        if mask:
            # Gradients are on here only under create_graph=True (a traced backward pass is AOTAutograd's to guard).
            run = _AdapterGrad.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else _backward
            residual_is_x = ctx.residual_dtype is None
            results = run(grad, *ctx.saved_tensors, residual_is_x, *ctx.settings, mask)
            grads = [result if need else None for need, result in zip(needs, results, strict=True)]
        grad_residual = grad.to(ctx.residual_dtype) if needs_residual else None
        return grads[0], grad_residual, *grads[1:], None, None


class _AdapterGrad(torch.autograd.Function):
    """The backward op as a node that cannot be differentiated, so that no second derivative is silently left out."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "adapter: the fused op has no double backward pass; "
            "use vitadapter_ext.reference.adapter for second derivatives"
        )


def _check(x, residual, down, down_bias, up, up_bias, scale, probabilities) -> None:
    """What the kernels check (csrc/bind/adapter.h), for where none runs: fake tensors, and devices without kernels."""
    rank, dim = down.shape[0], x.shape[-1]
    expected = {
        "down": (down, (rank, dim)), "up": (up, (dim, rank)), "down_bias": (down_bias, (rank,)),
        "up_bias": (up_bias, (dim,)), "residual": (residual, tuple(x.shape)),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RuntimeError(f"adapter: {name} has shape {tuple(tensor.shape)}; expected {shape}")
    if isinstance(scale, Tensor) and tuple(scale.shape) not in ((1,), (dim,)):
        raise RuntimeError(f"adapter: scale has shape {tuple(scale.shape)}; expected (1,) or {(dim,)}")
    for p in probabilities:
        if not 0 <= p < 1:
            raise RuntimeError(f"adapter: a dropout probability is {p}; it must be in [0, 1)")


@torch.library.register_fake("vitadapter::adapter_forward")
def _(x, residual, down, down_bias, up, up_bias, scale, seed, scale_value, activation, dropout, dropout_out, drop_path,
      compute_dtype, allow_tf32, save_hidden):  # fmt: skip
    _check(x, residual, down, down_bias, up, up_bias, scale, (dropout, dropout_out, drop_path))
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    hidden_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden_shape = (*x.shape[:-1], down.shape[0]) if save_hidden else (0,)
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(hidden_shape, dtype=hidden_dtype)


@torch.library.register_fake("vitadapter::adapter_backward")
def _(grad, x, hidden, down, down_bias, up, up_bias, scale, seed, residual_is_x, scale_value, activation, dropout,
      dropout_out, drop_path, compute_dtype, allow_tf32, needs):  # fmt: skip
    operands = (x, down, down_bias, up, up_bias, scale)
    return tuple(x.new_empty(0) if not needs >> bit & 1 else t.new_empty(t.shape) for bit, t in enumerate(operands))
