"""MiMi: how wide must each adapter be? Wide ones are trained, the least important neurons of all cut out, and so on.

Marouf, Tartaglione and Lathuilière, "Mini but Mighty: Finetuning ViTs with Mini Adapters", WACV 2024. The authors' code
masks the neurons that it prunes; here the tensors shrink, and a width of 0 takes the adapter away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._text import unknown
from ..folding import to_cpu
from ..nn._options import check_size
from ..nn.adapter import INITS, FusedAdapter
from .base import POSITIONS, Method, Shapes, beside, check_flags, check_positions, option

SCORES = ("paper", "paper-normalised", "random")


def select(down: Sequence[Tensor], up: Sequence[Tensor], keep: int, normalise: bool = False) -> list[Tensor]:
    """Which neurons survive where the `keep` most important ones of all adapters together do.

    The importance of neuron j of adapter i (MiMi, as in the authors' code) is
    I_ij = (Σ_k |down_i[j, k]| + Σ_k |up_i[k, j]|) / (d_in + d_out). Of equal ones the earlier adapter's, then the lower
    neuron survives.

    Args:
        down: of each adapter, (rank_i, d_in).
        up: of each adapter, (d_out, rank_i).
        keep: from 0 to Σ rank_i.
        normalise: divides each adapter's importances by its largest.
    Returns: of each adapter a boolean mask (rank_i,) on the CPU, True for what survives.
    Raises:
        ValueError: tensors that do not fit together or are not finite, or `keep` outside its range.
    """
    if len(down) != len(up):
        raise ValueError(f"there are {len(down)} down-projections and {len(up)} up-projections")
    scores = []
    for i, (rows, columns) in enumerate(zip(down, up, strict=True)):
        if rows.ndim != 2 or columns.ndim != 2 or len(rows) != columns.shape[1]:
            raise ValueError(
                f"adapter {i} has down {tuple(rows.shape)} and up {tuple(columns.shape)}; "
                "they must be (rank, d_in) and (d_out, rank)"
            )
        # There, for the same survivors on every device; some have no float64 either.
        total = to_cpu(rows).double().abs().sum(1) + to_cpu(columns).double().abs().sum(0)
        score = total / (rows.shape[1] + len(columns))
        if not score.isfinite().all():
            raise ValueError(f"the weights of adapter {i} are not all finite")
        if normalise and score.any():
            score = score / score.max()
        scores.append(score)
    return _highest(scores, keep)


def _highest(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """A mask of each of `scores` (CPU): the `keep` highest of all; of equal ones the first."""
    ranks = [len(score) for score in scores]
    if not 0 <= keep <= sum(ranks):
        raise ValueError(f"keep is {keep}; it must be from 0 to the {sum(ranks)} neurons that there are")
    if not ranks:
        return []
    survivors = torch.zeros(sum(ranks), dtype=torch.bool)
    survivors[torch.sort(torch.cat(list(scores)), descending=True, stable=True).indices[:keep]] = True
    return list(survivors.split(ranks))


@torch.no_grad()
def shrink(adapter: FusedAdapter, survivors: Tensor, optimizer: Optimizer | None = None) -> None:
    """Cuts neurons out of an adapter: rows of `down` and columns of `up`, which become new parameters.

    Args:
        survivors: boolean mask (rank,) of the neurons that stay.
        optimizer: gets the new parameters in place of the old ones. What it knows of a neuron (AdamW's moments) stays
            with it; where its state of a tensor is neither of the tensor's shape nor a number (Adafactor's), it starts
            anew.
    Raises:
        ValueError: a mask of another shape or dtype.
    """
    rank = adapter.down.out_features
    if survivors.dtype != torch.bool or survivors.shape != (rank,):
        raise ValueError(
            f"survivors are {survivors.dtype} {tuple(survivors.shape)}; a boolean mask of ({rank},) is needed"
        )
    index = survivors.nonzero().flatten()
    for layer, name, axis in ((adapter.down, "weight", 0), (adapter.down, "bias", 0), (adapter.up, "weight", 1)):
        old = getattr(layer, name)
        if old is None:
            continue
        # Without elements there is nothing to train: DistributedDataParallel would wait for its gradient.
        new = nn.Parameter(old.index_select(axis, index.to(old.device)), old.requires_grad and len(index) > 0)
        setattr(layer, name, new)
        if optimizer is not None:
            _follow(optimizer, old, new, axis, index)
    adapter.down.out_features = adapter.up.in_features = len(index)


def _follow(optimizer: Optimizer, old: Tensor, new: Tensor, axis: int, index: Tensor) -> None:
    """Gives `optimizer` the parameter `new`, which has the slices `index` of `old`, in place of that."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    cut = {}
    for key, known in state.items():
        if isinstance(known, Tensor) and known.shape == old.shape:
            cut[key] = known.index_select(axis, index.to(known.device))
        elif isinstance(known, (bool, int, float)) or (isinstance(known, Tensor) and known.ndim == 0):
            cut[key] = known
        else:
            return
    if cut:
        optimizer.state[new] = cut


@dataclass(frozen=True)
class Mimi(Method):
    """Adapters behind the attention and the MLP, b + up(gelu(down(b))) for a branch b, that begin wide and are trained
    and pruned in turn: the importance of neurons (`select`) decides across all layers how wide each becomes.

    Prune t leaves floor(N·(1 - prune)^t) of the N neurons at the start, computed exactly. It scores the weights as the
    last epoch of its phase left them, and training goes on from there; a prune at the end scores the best epoch's.

    Args:
        start_rank: width of every adapter at the start, at least 1; None: by `sigma`.
        sigma: without `start_rank` an adapter starts with width // sigma neurons for its block's width (in a Swin, as
            in the authors' code, 4·width // sigma).
        prune: in (0, 1), the share of the remaining neurons that each prune takes.
        phases: how many times it is trained, at least 1; the epochs are split among them, and each has a warm-up and a
            schedule of its own. Weights go on from where they are.
        score: "paper": `select`; "paper-normalised": with each adapter's importances over its largest; "random".
        final_training: whether training has the last word: there are `phases` - 1 prunes then, otherwise, as in the
            authors' code, `phases`.
        min_total: pruning never goes below this many neurons in all, at least 1.
        positions: "attn", "mlp" or both.
        init: as in `FusedAdapter`; the authors' ViT has "linear", their Swin "trunc_normal".
    Raises:
        ValueError: a field outside what is said here.
    """

    name: ClassVar[str] = "mimi"
    description: ClassVar[str] = "wide adapters, pruned in turns across all layers (WACV 2024)"

    start_rank: int | None = option(None, "width at the start [by --sigma]")
    sigma: int = option(16, "width at the start: the block's over it")
    prune: float = option(0.5, "share of the neurons that each prune takes")
    phases: int = option(4, "trainings, which share the epochs")
    score: str = option("paper", ", ".join(SCORES))
    final_training: bool = option(True, "train after the last prune")
    min_total: int | None = option(None, "fewest neurons that pruning leaves")
    positions: tuple[str, ...] = option(POSITIONS, "attn, mlp or both: attn,mlp")
    init: str = option("linear", ", ".join(INITS))

    def __post_init__(self) -> None:
        for field in ("start_rank", "min_total"):
            if getattr(self, field) is not None:
                check_size(field, getattr(self, field))
        check_size("sigma", self.sigma)
        prune = self.prune
        if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 < prune < 1:
            raise ValueError(f"prune is {prune!r}; it must be a share between 0 and 1, both excluded")
        check_size("phases", self.phases)
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        check_flags(self, "final_training")
        object.__setattr__(self, "positions", check_positions(self.positions))
        if self.init not in tuple(INITS):
            raise unknown("init", self.init, INITS)

    def insert(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        from ..sites import ADAPTED_BLOCKS, find_blocks  # here, so that naming a method need not wait for timm

        blocks = find_blocks(model)
        if shapes is None and (self.min_total or 0) > (total := self._start(blocks)):
            raise ValueError(f"min_total is {self.min_total}, but this model starts with {total:,} neurons")
        for name, block in blocks.items():
            where = beside(next(block.parameters()))
            block.__class__ = ADAPTED_BLOCKS[type(block)]
            for position in POSITIONS:
                adapter = None
                if position in self.positions:
                    saved = (shapes or {}).get(f"{name}.adapter_{position}.down.weight", ())
                    rank = saved[0] if len(saved) == 2 else self._start_rank(name, block)
                    adapter = FusedAdapter(block.width, rank or 1, bias=False, init=self.init, **where)
                    if rank == 0:
                        shrink(adapter, torch.tensor([False]))
                block.put(position, "branch", adapter)

    def check_mergeable(self) -> None:
        raise ValueError(f"{self} cannot be merged: its adapters have an activation inside")

    def training_phases(self, epochs: int) -> list[int]:
        if epochs < self.phases:
            raise ValueError(f"{self.phases} phases need as many epochs or more, got {epochs}")
        # The first ones have one more where it does not divide.
        return [epochs // self.phases + (phase < epochs % self.phases) for phase in range(self.phases)]

    def after_phase(self, model: nn.Module, optimizer: Optimizer, phase: int) -> bool:
        if phase == self.phases and self.final_training:
            return False
        self.cut(model, phase, optimizer)
        return True

    def widths(self, model: nn.Module) -> dict[str, int]:
        return {name: adapter.down.out_features for name, adapter in _adapters(model).items()}

    def neurons(self, start: int, prunes: int) -> int:
        """How many of `start` neurons so many prunes leave."""
        left = math.floor(start * (1 - Fraction(str(self.prune))) ** prunes)
        return max(left, min(start, self.min_total or 0))

    def cut(self, model: nn.Module, prunes: int, optimizer: Optimizer | None = None) -> None:
        """Prunes a model in place for the `prunes`-th time, from 1; `optimizer` as in `shrink`.

        Raises:
            ValueError: another method or none is attached to the model, or it has been done.
        """
        from ..attachment import attachment
        from ..sites import Joined

        check_size("prunes", prunes)
        if (method := attachment(model).method) != self:
            raise ValueError(f"{method} is attached to this model, not {self}")
        adapters = _adapters(model)
        blocks = {name: block for name, block in model.named_modules() if isinstance(block, Joined)}
        keep, ranks = self.neurons(self._start(blocks), prunes), list(self.widths(model).values())
        if keep > sum(ranks):
            raise ValueError(f"prune {prunes} leaves {keep:,} neurons, but there are only {sum(ranks):,}")
        if self.score == "random":
            masks = _highest(torch.randperm(sum(ranks)).split(ranks), keep)
        else:
            down = [adapter.down.weight for adapter in adapters.values()]
            up = [adapter.up.weight for adapter in adapters.values()]
            masks = select(down, up, keep, normalise=self.score == "paper-normalised")
        for (name, adapter), survivors in zip(adapters.items(), masks, strict=True):
            shrink(adapter, survivors, optimizer)
            if not survivors.any():
                block, _, position = name.rpartition(".adapter_")
                blocks[block].put(position, "plain", adapter)

    def _start(self, blocks: dict[str, nn.Module]) -> int:
        return len(self.positions) * sum(self._start_rank(name, block) for name, block in blocks.items())

    def _start_rank(self, name: str, block: nn.Module) -> int:
        if self.start_rank is not None:
            return self.start_rank
        from timm.models.swin_transformer import SwinTransformerBlock

        width = block.attn.proj.out_features * (4 if isinstance(block, SwinTransformerBlock) else 1)
        if self.sigma > width:
            raise ValueError(f"sigma is {self.sigma}, which leaves {name} no neuron: it must be {width} or less")
        return width // self.sigma


def _adapters(model: nn.Module) -> dict[str, FusedAdapter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedAdapter)}
