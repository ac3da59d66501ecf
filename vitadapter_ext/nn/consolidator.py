"""Consolidator as `nn.Module`s: the branches beside a linear layer, what a file holds of several, and the linear layer
that has them; the mathematics is `ops.consolidator`. Hao et al., "Consolidator: Mergeable Adapter with Grouped
Connections for Visual Adaptation", ICLR 2023."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..folding import Foldable, to_cpu
from ..ops import consolidated_linear, consolidator
from ..ops.consolidator import MAX_BRANCHES
from ._options import check_probability, check_size

# Of weights and biases at first, as in the authors' code.
INIT = 1e-3


def check_groups(groups: int | Sequence[int]) -> tuple[int, ...]:
    """The groups of each branch as a tuple; a `ValueError` that says what is wrong where they cannot be that."""
    groups = tuple(groups) if isinstance(groups, (tuple, list)) else (groups,)
    if not 1 <= len(groups) <= MAX_BRANCHES:
        raise ValueError(f"groups are {groups}; there must be from 1 to {MAX_BRANCHES}, one number for each branch")
    for g in groups:
        if not isinstance(g, int) or isinstance(g, bool) or g < 1:
            raise ValueError(f"groups are {groups}; each must be a whole number of at least 1")
    return groups


def check_division(in_features: int, out_features: int, groups: Sequence[int]) -> None:
    """Raises a `ValueError` that names the first of the groups that does not divide both sizes."""
    for g in groups:
        if in_features % g or out_features % g:
            raise ValueError(
                f"{g} groups do not fit {in_features} inputs and {out_features} outputs: they must divide both"
            )


# Where the weights of branches are in (out, in).


def _union(in_features: int, out_features: int, groups: Sequence[int], shuffle: bool) -> Tensor:
    """(out, in) bool: the entries that any branch has."""
    found = torch.zeros(out_features, in_features, dtype=torch.bool, device="cpu")
    for g in groups:
        found.scatter_(1, reference.branch_columns(in_features, out_features, g, shuffle), True)
    return found


def entries(in_features: int, out_features: int, groups: Sequence[int], shuffle: bool) -> Tensor:
    """(n,) int64: the entries that any branch has, by their places in the flattened (out, in), in ascending order."""
    return _union(in_features, out_features, groups, shuffle).flatten().nonzero().flatten()


def summed(weights: Sequence[Tensor], groups: Sequence[int], shuffle: bool) -> Tensor:
    """(n,): the sum of the branches' weights (out, in / g) at each of their `entries`, in the first one's dtype."""
    out_features, in_features = len(weights[0]), weights[0].shape[1] * groups[0]
    whole = weights[0].new_zeros(out_features, in_features, dtype=torch.float64)
    whole = reference.consolidated_weight(whole, weights, shuffle)
    places = entries(in_features, out_features, groups, shuffle)
    return whole.flatten()[places.to(whole.device)].to(weights[0].dtype)


class Branch(nn.Module):
    """The parameters of one branch: `weight` (out, in / groups), the rows of its blocks, and `bias` (out,)."""

    def __init__(self, out_features: int, width: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, width, **where))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **where)) if bias else None)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class _Consolidated(nn.Module):
    """What trained and stored branches share: sizes, and what they add to a linear layer."""

    def __init__(
        self, in_features: int, out_features: int, groups: int | Sequence[int], shuffle: bool, bias: bool
    ) -> None:
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        self.in_features, self.out_features, self.groups = in_features, out_features, check_groups(groups)
        check_division(in_features, out_features, self.groups)
        self.shuffle, self.has_bias = shuffle, bias

    def exact_delta(self) -> tuple[Tensor, Tensor]:
        """`delta` in float64 on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor]:
        """What it adds to a linear layer at inference: weight (out, in) and bias (out,), zeros where it has none.

        In the parameters' dtype, but at least float32.
        """
        own = next(self.parameters())
        dtype = torch.promote_types(own.dtype, torch.float32)
        weight, bias = (tensor.to(dtype).to(own.device) for tensor in self.exact_delta())
        return weight, bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}, "
            f"shuffle={self.shuffle}, bias={self.has_bias}"
        )


class FusedConsolidator(_Consolidated):
    """base + Σ_i drop_path(G_i·shuffle_i(x) + c_i), all branches in one kernel each way; see `ops.consolidator`.

    Args:
        in_features, out_features: widths of x and of what is returned.
        groups: blocks of each branch's weight, each a divisor of both widths; a branch has out·in / groups weights.
        shuffle: whether a branch's inputs are shuffled among its groups: without, a block of outputs sees a run of
            neighbouring inputs.
        bias: whether the branches have biases.
        drop_path: while training, the probability in [0, 1) of dropping a branch for a sample.
        device, dtype: of the parameters, by default float32.
    Attributes:
        samples: how many samples the rows of x are, one after the other, for who knows better; by default an index of
            x's first dimension is one.
    Raises:
        ValueError: an option outside what is said here.

    Example:
        >>> FusedConsolidator(768, 2304)(torch.randn(2, 197, 768)).shape
        torch.Size([2, 197, 2304])
    """

    samples: int | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int | Sequence[int] = (384,),
        shuffle: bool = True,
        bias: bool = True,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, groups, shuffle, bias)
        check_probability("drop_path", drop_path)
        self.drop_path, self.samples = float(drop_path), None
        # float32 also where the default dtype or the backbone is a low one: the kernels read any mix.
        where = {"device": device, "dtype": dtype or torch.float32}
        self.branches = nn.ModuleList(Branch(out_features, in_features // g, bias, **where) for g in self.groups)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew, uniformly from [-1e-3, 1e-3)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INIT, INIT)

    def weights(self) -> list[Tensor]:
        """Those of each branch, (out, in / groups)."""
        return [branch.weight for branch in self.branches]

    def biases(self) -> list[Tensor]:
        """Those of each branch, (out,), or none."""
        return [branch.bias for branch in self.branches] if self.has_bias else []

    def options(self) -> dict[str, Any]:
        """What the op is told beside the tensors; nothing is dropped outside of training."""
        dropped = {"drop_path": self.drop_path, "samples": self.samples} if self.training else {}
        return {"shuffle": self.shuffle, **dropped}

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """x: (..., in); base: (..., out), 0 by default. Returns (..., out)."""
        return consolidator(x, self.weights(), self.biases(), base=base, **self.options())

    @torch.no_grad()
    def exact_delta(self) -> tuple[Tensor, Tensor]:
        weights, biases = ([to_cpu(t).double() for t in found] for found in (self.weights(), self.biases()))
        zeros = weights[0].new_zeros(self.out_features, self.in_features)
        weight = reference.consolidated_weight(zeros, weights, self.shuffle)
        return weight, sum(biases, zeros[:, 0].clone())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop_path={self.drop_path}"


class StoredConsolidator(_Consolidated):
    """What a file holds of several branches that have entries in common: the sums; for inference and for merging, they
    get no gradients.

    Arguments are those of the `FusedConsolidator` whose function it has, but for drop_path. Parameters are `weight`
    (n,), the sums at the branches' `entries`, and `bias` (out,).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int | Sequence[int],
        shuffle: bool = True,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, groups, shuffle, bias)
        where = {"device": device, "dtype": dtype or torch.float32}
        union = _union(in_features, out_features, self.groups, shuffle)
        number = int(union.sum())
        self.weight = nn.Parameter(torch.zeros(number, **where), requires_grad=False)
        constant = nn.Parameter(torch.zeros(out_features, **where), requires_grad=False) if bias else None
        self.register_parameter("bias", constant)
        # The first branch that has an entry gets its sum, the others the 0 that stands behind the sums.
        free = union
        numbers = (union.flatten().cumsum(0) - 1).reshape(union.shape)
        self.distinct_groups = tuple(dict.fromkeys(self.groups))
        for i, g in enumerate(self.distinct_groups):
            its = reference.branch_columns(in_features, out_features, g, shuffle)
            source = numbers.gather(1, its).where(free.gather(1, its), number)
            free.scatter_(1, its, False)
            self.register_buffer(f"source_{i}", source.to(device), persistent=False)

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """x: (..., in); base: (..., out), 0 by default. Returns (..., out).

        Raises:
            RuntimeError: in training mode with gradients on.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this consolidator cannot be trained: its branches were added up when the file was written, so they "
                "can no longer be dropped or trained one by one; train from the run's last.ckpt, attach anew, or call "
                "eval()"
            )
        padded = F.pad(self.weight, (0, 1))
        weights = [padded[getattr(self, f"source_{i}")] for i in range(len(self.distinct_groups))]
        # One bias for all branches: it goes with the first.
        biases = [] if self.bias is None else [self.bias, *[torch.zeros_like(self.bias)] * (len(weights) - 1)]
        return consolidator(x, weights, biases, base=base, shuffle=self.shuffle)

    @torch.no_grad()
    def exact_delta(self) -> tuple[Tensor, Tensor]:
        values = to_cpu(self.weight).double()
        places = entries(self.in_features, self.out_features, self.groups, self.shuffle).to(values.device)
        weight = values.new_zeros(self.out_features * self.in_features).index_put((places,), values)
        bias = values.new_zeros(self.out_features) if self.bias is None else to_cpu(self.bias).double()
        return weight.reshape(self.out_features, self.in_features), bias


class ConsolidatedLinear(Foldable, nn.Linear):
    """A linear layer with branches beside it, or while training in its weight: x·Wᵀ + b + what `consolidator` adds.

    `linear.__class__ = ConsolidatedLinear` makes one of a plain layer that has got two attributes.

    Attributes:
        consolidator: a `FusedConsolidator` or a `StoredConsolidator`.
        in_weight: of `ops.consolidated_linear`.
    """

    added = ("consolidator",)

    def forward(self, x: Tensor) -> Tensor:
        branches, in_weight = self.consolidator, self.in_weight
        if isinstance(branches, StoredConsolidator):
            return branches(x, base=F.linear(x, self.weight, self.bias))
        return consolidated_linear(
            x, self.weight, self.bias, branches.weights(), branches.biases(), in_weight=in_weight, **branches.options()
        )

    def folded(self) -> dict[str, Tensor]:
        weight, bias = self.consolidator.exact_delta()
        values = {"weight": to_cpu(self.weight).double() + weight}
        if self.bias is not None:
            values["bias"] = to_cpu(self.bias).double() + bias
        elif self.consolidator.has_bias and bias.any():
            raise ValueError("it has no bias, and its consolidator adds a constant that has to go there")
        return values
