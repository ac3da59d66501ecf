"""ARC: where its places are, how many bases they share, and which of them have a bias.

Dong et al., "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", NeurIPS 2023. As in the
authors' code each place is the input of an attention or an MLP, behind the norm, where it can be merged. In Swin's
blocks their code puts the MLP's before the norm, which cannot: here it is behind the norm there too. The recipes are
"arc-vtab" and "arc-fgvc".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .._text import unknown
from ..folding import Foldable
from ..nn._options import check_probability, check_size
from ..nn.arc import ARCBasis, FusedARC
from .base import POSITIONS, Method, Shapes, beside, check_positions, option

RESCALE_INITS = ("paper", "zero")


class ArcBases(Foldable, nn.ModuleDict):
    """The model's bases by stage and position, each registered here alone: `arc_basis.<stage>.<position>.weight`.

    Folding leaves it empty rather than away, so that the way back has a place.
    """

    def of_stage(self, stage: str) -> nn.ModuleDict:
        """A stage's bases by position."""
        if stage not in self:
            self[stage] = nn.ModuleDict()
        return self[stage]

    @property
    def added(self) -> list[str]:
        return list(self._modules)

    def folded(self) -> dict:
        return {}  # what uses them brings their weights along


@dataclass(frozen=True)
class Arc(Method):
    """ARC before the attention and the MLP of every block: x + drop((x·U) ∘ rescale)·Uᵀ + bias, merged by `merge`.

    One basis U for each position is shared by all blocks (stage "all"); where their widths differ, as in Swin, by those
    of a width (stages "0", "1", ...). Each place has a `rescale` and a `bias` of its own. Not for `nn.DataParallel`.

    Args:
        rank: of the bases, at least 1.
        positions: "attn", "mlp" or both; "attn" alone is the paper's ARC_att.
        dropout: in [0, 1), on the r-vector while training.
        rescale_init: "paper": 0 before the attention, Xavier-uniform before the MLP; "zero": 0, the backbone's own
            function at the start.
        bias: "auto": at a position where every layer that reads it has a saved bias, so that it can be merged; True:
            everywhere, and merging refuses where there is none; False: nowhere.
    Raises:
        ValueError: a field outside what is said here.
    """

    name: ClassVar[str] = "arc"
    description: ClassVar[str] = "one projection for all layers, re-scaled in each (NeurIPS 2023)"

    rank: int = option(50, "width of the bottleneck")
    positions: tuple[str, ...] = option(POSITIONS, "attn, mlp or both: attn,mlp")
    dropout: float = option(0.1, "of the bottleneck")
    rescale_init: str = option("paper", ", ".join(RESCALE_INITS))
    bias: str | bool = option("auto", "whether there are biases")

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        object.__setattr__(self, "positions", check_positions(self.positions))
        check_probability("dropout", self.dropout)
        if self.rescale_init not in RESCALE_INITS:
            raise unknown("rescale_init", self.rescale_init, RESCALE_INITS)
        if self.bias != "auto" and not isinstance(self.bias, bool):
            raise ValueError(f"bias is {self.bias!r}; it must be 'auto', True or False")

    def insert(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        # Here, so that naming a method need not wait for timm.
        from ..sites import ARC_PLACES, find_parts, readers

        places = {position: find_parts(model, position, ARC_PLACES[position]) for position in self.positions}
        layers = {
            position: [_checked(readers(place), name) for name, place in found.items()]
            for position, found in places.items()
        }
        widths = list(dict.fromkeys(_width(found) for of_position in layers.values() for found in of_position))
        bases = ArcBases()
        for position, found in places.items():
            bias = self.bias
            if bias == "auto":
                bias = all(layer.bias is not None for read in layers[position] for layer in read.values())
            for place, read in zip(found.values(), layers[position], strict=True):
                where = beside(next(iter(read.values())).weight)
                stage = "all" if len(widths) == 1 else str(widths.index(_width(read)))
                of_stage = bases.of_stage(stage)
                if position not in of_stage:
                    saved = (shapes or {}).get(f"arc_basis.{stage}.{position}.weight", ())
                    of_stage[position] = ARCBasis(_width(read), saved[1] if len(saved) == 2 else self.rank, **where)
                place.__class__, place.adapted = ARC_PLACES[position][type(place)], True
                place.arc = FusedARC(
                    of_stage[position],
                    dropout=self.dropout,
                    bias=bias,
                    rescale_init="xavier" if (self.rescale_init, position) == ("paper", "mlp") else "zero",
                    register_basis=False,
                    **where,
                )
        model.arc_basis = bases


def _checked(read: dict[str, nn.Module], name: str) -> dict[str, nn.Linear]:
    for own, layer in read.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name}.{own} is a {type(layer).__name__}; ARC needs an nn.Linear there")
    return read


def _width(read: dict[str, nn.Linear]) -> int:
    return next(iter(read.values())).in_features
