"""The `consolidator` op: argument handling, fake kernels and autograd around the kernels in `csrc/*/consolidator.*`;
and the linear layer that has the branches beside it or in its weight, `consolidated_linear`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _common

_forward = torch.ops.vitadapter.consolidator_forward.default
_backward = torch.ops.vitadapter.consolidator_backward.default
_weight = torch.ops.vitadapter.consolidator_weight.default

MAX_BRANCHES = 16
# The bits of the backward op.
_X, _WEIGHTS, _BIASES, _SUM = 1, 2, 4, 8


def consolidator(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    base: Tensor | None = None,
    shuffle: bool = True,
    drop_path: float = 0.0,
    samples: int | None = None,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """base + Σ_i keep_i ∘ (G_i·shuffle_i(x) + bias_i), all branches in one pass over x and base: Hao et al.,
    "Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation", ICLR 2023, section 3.2.

    G_i is block-diagonal with g_i = in / weights[i].shape[1] blocks; shuffle_i sees x's (in,) as (g_i, in / g_i) and
    transposes it. All tensors are each float32 or one low dtype (bfloat16 or float16), in any mix, or all float64. The
    products' operands are read in the compute dtype, sums are float32 (float64). The gradients of all tensors but
    `seed` are defined once (no double backward).

    Args:
        x: (..., in).
        weights: of each branch (out, in / g_i), the rows of its blocks; any g_i that divides in and out.
        biases: of each branch (out,), or none.
        base: (..., out); 0 by default.
        drop_path: probability in [0, 1) of dropping a branch for a sample; what is kept is scaled by 1/(1-p).
        samples: how many samples the rows of x are, one after the other; by default an index of x's first dimension is
            one.
        seed: (1,) int64 on x's device; drawn from PyTorch's generator where it is needed and not given.
        compute_dtype: by default autocast's dtype, outside autocast x's.
    Returns: (..., out) in base's dtype, without base in x's.
    Raises:
        RuntimeError: shapes, dtypes, devices, a number of branches or a probability that do not fit, saying what was
            given.
    """
    if compute_dtype is None:
        compute_dtype = _common.default_compute_dtype(x)
    if seed is None and drop_path:
        seed = _common.draw_seed(x)
    weights, biases = list(weights), list(biases)
    settings = (shuffle, float(drop_path), samples, compute_dtype)
    if _common.kernels_serve(x.device) and _common.needs_function((x, base, *weights, *biases)):
        return _Consolidator.apply(x, base, seed, len(weights), settings, *weights, *biases)
    return _added(x, base, weights, biases, seed, settings)


def _added(x, base, weights, biases, seed, settings):
    """base + the branches, by the kernels or, on a device without, by the reference."""
    if _common.kernels_serve(x.device):
        return _forward(x, base, weights, biases, seed, *settings)
    shuffle, drop_path, samples, compute_dtype = settings
    _check(x, weights, biases, drop_path, samples, base=base)
    with _common.without_autocast(x.device):
        return reference.consolidator(
            x, weights, biases, base=base, shuffle=shuffle, drop_path=drop_path, samples=samples, seed=seed,
            compute_dtype=compute_dtype,
        )  # fmt: skip


class _Consolidator(torch.autograd.Function):
    """The two raw ops as one differentiable function."""

    @staticmethod
    def forward(ctx, x, base, seed, branches, settings, *parameters):
        ctx.save_for_backward(x, seed, *parameters)
        ctx.branches, ctx.settings = branches, settings
        return _forward(x, base, parameters[:branches], parameters[branches:], seed, *settings)

    @staticmethod
    def backward(ctx, grad):
        x, seed, *parameters = ctx.saved_tensors
        needs_x, needs_base, *_ = ctx.needs_input_grad
        needs_parameters = ctx.needs_input_grad[5:]
        gx, _, grads = _gradients(
            grad, x, None, parameters, ctx.branches, seed, ctx.settings, needs_x, needs_parameters, False
        )
        return gx, grad if needs_base else None, None, None, None, *grads


def _gradients(grad, x, x_grad_base, parameters, branches, seed, settings, needs_x, needs_parameters, needs_sum):
    """(x's gradient, Σ grad, those of the parameters), None where not asked for."""
    weights, biases = parameters[:branches], parameters[branches:]
    needs = _X * needs_x + _WEIGHTS * any(needs_parameters[:branches]) + _BIASES * any(needs_parameters[branches:])
    needs += _SUM * needs_sum
    if not needs:
        return None, None, [None] * len(parameters)
    gx, total, *grads = _common.once(
        "consolidator", _backward, grad, x, x_grad_base, weights, biases, seed, *settings, needs
    )
    grads = [found if need else None for found, need in zip(grads, needs_parameters, strict=True)]
    return gx if needs_x else None, total if needs_sum else None, grads


def consolidated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    shuffle: bool = True,
    drop_path: float = 0.0,
    samples: int | None = None,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    in_weight: bool | str = "auto",
) -> Tensor:
    """x·weightᵀ + bias + the branches of `consolidator` (ICLR 2023), in one of two ways that agree up to rounding.

    Beside the layer, the branches are added to its output in one pass; in its weight (no drop-path), they are added to
    a copy of the weight, and there is nothing but one matrix product. Either way g and x are read once for the
    parameters' gradients, and Σ g, the gradient of `bias`, comes with them. In the weight, a low compute dtype rounds
    the sum of weight and branch, as it does in a merged model.

    Args:
        x: (..., in).
        weight: (out, in); bias: (out,).
        weights, biases, shuffle, drop_path, samples, seed, compute_dtype: as in `consolidator`.
        in_weight: True or False, or "auto": in the weight where gradients are needed, there is no drop-path and there
            are rows enough that it should be the faster way (`in_weight_is_faster`). The sum is made anew in each call,
            and is kept for the backward pass where x needs a gradient: as much memory as the weight.
    Returns: (..., out) in the compute dtype.
    Raises:
        ValueError: in_weight=True with drop-path, or another in_weight.
        RuntimeError: as `consolidator`, or weight of another shape.
    """
    if in_weight != "auto" and not isinstance(in_weight, bool):
        raise ValueError(f"consolidator: in_weight is {in_weight!r}; it must be 'auto', True or False")
    if in_weight is True and drop_path:
        raise ValueError(
            "consolidator: in_weight=True needs drop_path=0: in a weight, no sample's branch can be dropped"
        )
    if compute_dtype is None:
        compute_dtype = _common.default_compute_dtype(x)
    weights, biases = list(weights), list(biases)
    _common.check_rows("consolidator", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        shape = tuple(weight.shape)
        raise RuntimeError(f"consolidator: weight has shape {shape}; expected (out, in) with in = {x.shape[-1]}")
    _check_weights(weights, x.shape[-1])
    if len(weights[0]) != len(weight):
        shapes = f"{tuple(weight.shape)} and a branch's weight {tuple(weights[0].shape)}"
        raise RuntimeError(f"consolidator: weight has shape {shapes}; expected as many outputs")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"consolidator: bias has shape {tuple(bias.shape)}; expected ({len(weight)},)")
    trains = _common.needs_function((x, weight, bias, *weights, *biases))
    inside = in_weight is True
    if in_weight == "auto" and trains and not drop_path and not torch.compiler.is_exporting():
        inside = in_weight_is_faster(x, weight)
    if seed is None and drop_path:
        seed = _common.draw_seed(x)
    settings = (shuffle, float(drop_path), samples, compute_dtype)
    if inside:
        _check(x, weights, biases, drop_path, samples)
    if _common.kernels_serve(x.device) and trains:
        return _ConsolidatedLinear.apply(x, weight, bias, seed, inside, len(weights), settings, *weights, *biases)
    with _common.without_autocast(x.device):
        return _layer(x.to(compute_dtype), weight, bias, weights, biases, seed, inside, settings)[0]


def _layer(x, weight, bias, weights, biases, seed, inside, settings):
    """What the layer returns for x in the compute dtype, and the weight that x was multiplied with."""
    shuffle, *_, dtype = settings
    if inside:
        if _common.kernels_serve(x.device):
            multiplied = _weight(weight, weights, shuffle, dtype)
        else:
            multiplied = reference.consolidated_weight(weight, weights, shuffle).to(dtype)
        return F.linear(x, multiplied, _whole_bias(bias, biases, dtype)), multiplied
    multiplied = weight.to(dtype)
    base = F.linear(x, multiplied, None if bias is None else bias.to(dtype))
    return _added(x, base, weights, biases, seed, settings), multiplied


def in_weight_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether, in training, making a weight with the branches in it moves fewer bytes than adding them to this layer's
    output and to x's gradient."""
    out, width = weight.shape
    rows = x.numel() // width
    # Beside: base is read and y written once more, x read; backward gx read and written once more. In the weight: the
    # old one is read and the new one written, twice as dear for the places to be found.
    return rows * (3 * width + 2 * out) > 4 * width * out


def _whole_bias(bias, biases, dtype):
    """That of the layer with the branches in it, in `dtype`."""
    terms = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (bias, *biases) if t is not None]
    return sum(terms[1:], terms[0]).to(dtype) if terms else None


def _product(grad, multiplied):
    return [grad @ multiplied]


class _ConsolidatedLinear(torch.autograd.Function):
    """A linear layer and its branches as one function, so that each gradient is made once and g read once for all."""

    @staticmethod
    def forward(ctx, x, weight, bias, seed, inside, branches, settings, *parameters):
        low = x.to(settings[-1])  # which is what the kernels would read of it, in fewer bytes
        with _common.without_autocast(x.device):
            y, multiplied = _layer(
                low, weight, bias, parameters[:branches], parameters[branches:], seed, inside, settings
            )
        # Kept where it is needed: to make it again costs as much as the branches.
        ctx.save_for_backward(low, multiplied if ctx.needs_input_grad[0] else None, seed, *parameters)
        ctx.inside, ctx.branches, ctx.settings = inside, branches, settings
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        x, multiplied, seed, *parameters = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        gx = gw = None
        with _common.without_autocast(x.device):
            if needs_x:
                (gx,) = _common.once("consolidator", _product, grad, multiplied)
            if needs_weight:
                gw = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        # In the weight, gx is whole already; beside it, the branches add theirs.
        adds_to_gx = needs_x and not ctx.inside
        added, total, grads = _gradients(
            grad, x, gx if adds_to_gx else None, parameters, ctx.branches, seed, ctx.settings, adds_to_gx,
            ctx.needs_input_grad[7:], needs_bias,
        )  # fmt: skip
        gx = added if adds_to_gx else gx
        return (
            gx.to(x_dtype) if needs_x else None,
            gw.to(weight_dtype) if needs_weight else None,
            total.to(bias_dtype) if needs_bias else None,
            *[None] * 4,
            *grads,
        )


def _check(x, weights, biases, drop_path, samples=None, **others) -> None:
    """What the kernels check (csrc/bind/consolidator.h), for where none runs: fake tensors, and devices without."""
    _common.check_rows("consolidator", x)
    width = x.shape[-1]
    _check_weights(weights, width)
    out = weights[0].shape[0]
    if biases and len(biases) != len(weights):
        raise RuntimeError(
            f"consolidator: there are {len(biases)} biases; expected none, or one for each of {len(weights)} branches"
        )
    _common.check_tensors("consolidator", x, {
        **{f"weights[{i}]": (weight, tuple(weight.shape)) for i, weight in enumerate(weights)},
        **{f"biases[{i}]": (bias, (out,)) for i, bias in enumerate(biases)},
        **{name: (tensor, (*x.shape[:-1], out)) for name, tensor in others.items()},
    })  # fmt: skip
    _common.check_probabilities("consolidator", {"drop_path": drop_path})
    rows = x.numel() // width
    if samples is not None and (samples < 1 or rows % samples):
        raise RuntimeError(f"consolidator: samples is {samples}; it must divide the {rows} rows of x")


def _check_weights(weights, width) -> None:
    if width < 1:
        raise RuntimeError("consolidator: there are no inputs; expected at least 1")
    if not 1 <= len(weights) <= MAX_BRANCHES:
        raise RuntimeError(f"consolidator: there are {len(weights)} branches; from 1 to {MAX_BRANCHES} are accepted")
    for weight in weights:
        shape = tuple(weight.shape)
        is_matrix = len(shape) == 2 and min(shape) > 0
        fits = is_matrix and shape[0] == weights[0].shape[0] and width % shape[1] == 0
        if not fits or shape[0] % (width // shape[1]):
            outputs = f" and {weights[0].shape[0]} outputs" if is_matrix else ""
            raise RuntimeError(
                f"consolidator: a weight has shape {shape} for {width} inputs{outputs}; expected (out, in / groups), "
                "with groups that divide in and out"
            )


@torch.library.register_fake("vitadapter::consolidator_forward")
def _(x, base, weights, biases, seed, shuffle, drop_path, samples, compute_dtype):
    _check(x, weights, biases, drop_path, samples, base=base)
    return x.new_empty((*x.shape[:-1], weights[0].shape[0]), dtype=x.dtype if base is None else base.dtype)


@torch.library.register_fake("vitadapter::consolidator_backward")
def _(grad, x, x_grad_base, weights, biases, seed, shuffle, drop_path, samples, compute_dtype, needs):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gx = x.new_empty(x.shape if needs & _X else 0)
    total = x.new_empty(weights[0].shape[0] if needs & _SUM else 0, dtype=wide)
    grads = [(t, _WEIGHTS) for t in weights] + [(t, _BIASES) for t in biases]
    return [gx, total, *(t.new_empty(t.shape) if needs & bit else x.new_empty(0) for t, bit in grads)]


@torch.library.register_fake("vitadapter::consolidator_weight")
def _(weight, weights, shuffle, dtype):
    _check_weights(weights, weight.shape[1])
    return weight.new_empty(weight.shape, dtype=dtype)
