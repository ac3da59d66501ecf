"""The bottleneck adapter as an `nn.Module`: parameters and their initialisation; the mathematics is `ops.adapter`."""

import math

import torch
from torch import Tensor, nn

from .._text import unknown
from ..folding import LinearMap, to_cpu
from ..ops import adapter
from ..ops.adapter import ACTIVATIONS
from ._options import check_probability, check_size


def _init_houlsby(down: Tensor, up: Tensor) -> None:
    for weight in (down, up):
        nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)


def _init_lora(down: Tensor, up: Tensor) -> None:
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    nn.init.zeros_(up)


def _init_bert(down: Tensor, up: Tensor) -> None:
    for weight in (down, up):
        nn.init.normal_(weight, std=0.02)


def _init_zero(down: Tensor, up: Tensor) -> None:
    nn.init.xavier_uniform_(down)
    nn.init.zeros_(up)


def _init_trunc_normal(down: Tensor, up: Tensor) -> None:
    for weight in (down, up):
        nn.init.trunc_normal_(weight, std=0.02)


def _init_linear(down: Tensor, up: Tensor) -> None:
    for weight in (down, up):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # PyTorch's of a linear layer


# Biases are 0 and learned scales 1 in all of them. "lora" and "zero" leave the backbone's function unchanged at first.
INITS = {
    "houlsby": _init_houlsby,
    "lora": _init_lora,
    "bert": _init_bert,
    "zero": _init_zero,
    "linear": _init_linear,
    "trunc_normal": _init_trunc_normal,
}


def check_adapter_options(
    rank: int,
    activation: str,
    scale: float | str,
    dropout: float,
    dropout_out: float,
    drop_path: float,
    init: str,
) -> None:
    """Raises a `ValueError` that names the first option a bottleneck adapter cannot have."""
    check_size("rank", rank)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if isinstance(scale, str):
        if scale not in ("scalar", "channel"):
            raise ValueError(f"scale is {scale!r}; it must be a number, 'scalar' or 'channel'")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite number, 'scalar' or 'channel'")
    for name, p in (("dropout", dropout), ("dropout_out", dropout_out), ("drop_path", drop_path)):
        check_probability(name, p)
    if init not in tuple(INITS):
        raise unknown("init", init, INITS)


class FusedAdapter(nn.Module):
    """residual + drop_path(scale ∘ drop_out(up(drop(activation(down(x)))))) in one kernel each way.

    Houlsby et al. 2019, section 2.1; the channel scale is Adapter+'s (Steitz and Roth, CVPR 2024).

    Args:
        dim: width of x.
        rank: width of the bottleneck, at least 1.
        activation: "gelu", "gelu_tanh", "relu", "leaky_relu" (slope 0.01), "silu" or "identity".
        scale: a constant, or "scalar" (one learned number) or "channel" (one for each of `dim`), both starting at 1.
        bias: whether both linear maps have a bias.
        dropout, dropout_out, drop_path: while training, probabilities in [0, 1) of dropping a hidden element, an
            element of the up-projection, and a sample (an index of x's first dimension).
        init: "houlsby", "lora", "bert", "zero", "linear" or "trunc_normal".
    Raises:
        ValueError: an option outside what is said here.

    Example:
        >>> FusedAdapter(768, 8)(torch.randn(2, 197, 768)).shape
        torch.Size([2, 197, 768])
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        activation: str = "gelu",
        scale: float | str = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        dropout_out: float = 0.0,
        drop_path: float = 0.0,
        init: str = "houlsby",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        check_adapter_options(rank, activation, scale, dropout, dropout_out, drop_path, init)
        self.activation, self.init = activation, init
        self.dropout, self.dropout_out, self.drop_path = float(dropout), float(dropout_out), float(drop_path)
        # float32 also where the default dtype or the backbone is a low one: the kernels read any mix.
        where = {"device": device, "dtype": dtype or torch.float32}
        self.down = nn.Linear(dim, rank, bias=bias, **where)
        self.up = nn.Linear(rank, dim, bias=bias, **where)
        if isinstance(scale, str):
            self.scale = nn.Parameter(torch.empty(1 if scale == "scalar" else dim, **where))
        else:
            self.scale = float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew by `init`; biases become 0 and a learned scale 1."""
        INITS[self.init](self.down.weight, self.up.weight)
        for linear in (self.down, self.up):
            if linear.bias is not None:
                linear.bias.zero_()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (..., dim); residual: the same shape, x itself by default. Returns (..., dim)."""
        dropout, dropout_out, drop_path = 0.0, 0.0, 0.0
        if self.training:
            dropout, dropout_out, drop_path = self.dropout, self.dropout_out, self.drop_path
        return adapter(
            x,
            self.down.weight,
            self.up.weight,
            down_bias=self.down.bias,
            up_bias=self.up.bias,
            scale=self.scale,
            residual=residual,
            activation=self.activation,
            dropout=dropout,
            dropout_out=dropout_out,
            drop_path=drop_path,
        )

    @torch.no_grad()
    def linear_map(self) -> LinearMap:
        """What it does to x at inference when it has no activation: x + (x·downᵀ)·(scale ∘ up)ᵀ + its constant.

        Raises:
            ValueError: there is an activation.
        """
        if self.activation != "identity":
            raise ValueError(f"an adapter with the activation {self.activation!r} is no linear map")
        down, up = (to_cpu(linear.weight).double() for linear in (self.down, self.up))
        scale = to_cpu(self.scale).double() if isinstance(self.scale, Tensor) else self.scale
        shift = up.new_zeros(len(up))
        if self.down.bias is not None:
            shift = up @ to_cpu(self.down.bias).double() + to_cpu(self.up.bias).double()
        return LinearMap(down.T, up.T * scale, shift * scale)

    def extra_repr(self) -> str:
        scale = f"learned {tuple(self.scale.shape)}" if isinstance(self.scale, Tensor) else self.scale
        return (
            f"activation={self.activation}, scale={scale}, dropout={self.dropout}, "
            f"dropout_out={self.dropout_out}, drop_path={self.drop_path}, init={self.init}"
        )
