"""ARC as `nn.Module`s: the basis that many places share, and what each place has of its own; the mathematics is
`ops.arc`. Dong et al., "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", NeurIPS 2023."""

import torch
from torch import Tensor, nn

from .._text import unknown
from ..folding import LinearMap, to_cpu
from ..ops import arc
from ._options import check_probability, check_size


def _init_zero(rescale: Tensor) -> None:
    nn.init.zeros_(rescale)


def _init_xavier(rescale: Tensor) -> None:
    nn.init.xavier_uniform_(rescale[None])  # of shape (1, rank), as in the authors' code


# The authors' code starts with "zero" before the attention and with "xavier" before the MLP.
RESCALE_INITS = {"zero": _init_zero, "xavier": _init_xavier}


def check_arc_options(dropout: float, rescale_init: str) -> None:
    """Raises a `ValueError` that names the first option that ARC cannot have."""
    check_probability("dropout", dropout)
    if rescale_init not in tuple(RESCALE_INITS):
        raise unknown("rescale_init", rescale_init, RESCALE_INITS)


class ARCBasis(nn.Module):
    """The projection that `FusedARC`s share, down and, transposed, up: `weight` (dim, rank), Xavier-uniform at first.

    Args:
        dim: width of x, at least 1.
        rank: width of the bottleneck, at least 1.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, dim: int, rank: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        check_size("rank", rank)
        # float32 also where the default dtype or the backbone is a low one: the kernels read any mix.
        self.weight = nn.Parameter(torch.empty(dim, rank, device=device, dtype=dtype or torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew."""
        nn.init.xavier_uniform_(self.weight)

    def extra_repr(self) -> str:
        dim, rank = self.weight.shape
        return f"dim={dim}, rank={rank}"


class FusedARC(nn.Module):
    """x + drop((x·U) ∘ rescale)·Uᵀ + bias over a shared basis U, with the kernels of `ops.arc`.

    Args:
        basis: where U is; any number of FusedARCs may share it.
        dropout: while training, the probability in [0, 1) of dropping an element of the bottleneck.
        bias: whether there is one.
        rescale_init: "zero", where x + bias is returned at first, or "xavier".
        register_basis: whether the basis is a child of this module, so that it is in its parameters and state dict.
            Without, another module owns the basis: a model that holds it once for many FusedARCs, and through which
            it is moved and cast.
        device, dtype: of `rescale` and `bias`; by default the basis' device and float32, or float64 where it is.
    Raises:
        ValueError: an option outside what is said here.

    Example:
        >>> basis = ARCBasis(768, 50)
        >>> FusedARC(basis)(torch.randn(2, 197, 768)).shape
        torch.Size([2, 197, 768])
    """

    def __init__(
        self,
        basis: ARCBasis,
        dropout: float = 0.0,
        bias: bool = True,
        rescale_init: str = "zero",
        register_basis: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(basis, ARCBasis):
            raise ValueError(f"basis is of type {type(basis).__name__}; it must be an ARCBasis")
        check_arc_options(dropout, rescale_init)
        self.dropout, self.rescale_init = float(dropout), rescale_init
        if register_basis:
            self.basis = basis
        else:
            # Past nn.Module's registry. The module and not its parameter, which moving or casting may replace.
            object.__setattr__(self, "basis", basis)
        dim, rank = basis.weight.shape
        wide = torch.promote_types(basis.weight.dtype, torch.float32)
        where = {"device": device or basis.weight.device, "dtype": dtype or wide}
        self.rescale = nn.Parameter(torch.empty(rank, **where))
        self.register_parameter("bias", nn.Parameter(torch.empty(dim, **where)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws `rescale` anew by `rescale_init`, and the bias becomes 0. The basis, which is shared, stays."""
        RESCALE_INITS[self.rescale_init](self.rescale)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim). Returns (..., dim)."""
        dropout = self.dropout if self.training else 0.0
        return arc(x, self.basis.weight, self.rescale, bias=self.bias, dropout=dropout)

    @torch.no_grad()
    def linear_map(self) -> LinearMap:
        """What it does to x at inference: x + (x·U)·(rescale ∘ Uᵀ) + bias."""
        basis, rescale = to_cpu(self.basis.weight).double(), to_cpu(self.rescale).double()
        shift = basis.new_zeros(len(basis)) if self.bias is None else to_cpu(self.bias).double()
        return LinearMap(basis, rescale[:, None] * basis.T, shift)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, bias={self.bias is not None}, rescale_init={self.rescale_init}"
