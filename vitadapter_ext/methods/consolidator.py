"""Consolidator: which linear layers get branches, what is trained beside them, and what a file holds of it all.

Hao et al., "Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation", ICLR 2023. The recipe is
"consolidator-vtab". Its two stages: `save` adds up the branches and takes the trained biases into theirs; `merge` adds
the sums to the layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .._text import unknown
from ..nn._options import check_probability
from ..nn.consolidator import ConsolidatedLinear, FusedConsolidator, StoredConsolidator, check_groups, summed
from .base import Method, Shapes, beside, check_flags, norms_and_biases, option

# target: where its layers are in a block, which has them as one or in parts
TARGETS = {
    "qkv": ("attn", ("qkv", "q_proj", "k_proj", "v_proj")),
    "proj": ("attn", ("proj",)),
    "fc1": ("mlp", ("fc1", "fc1_g", "fc1_x")),
    "fc2": ("mlp", ("fc2",)),
}


@dataclass(frozen=True)
class Consolidator(Method):
    """Branches of grouped weights beside the linear layers of every block: W·x + b + Σ_i drop_path(G_i·x + c_i).

    `merge` adds them to the layers. A file holds one branch as it is, and of several, which have entries in common, the
    sums: it is loaded for inference and merging. The trained bias of a layer goes into c there, so that who trains on
    from a file drops it with the branch.

    Args:
        groups: for each branch, in how many blocks its weight is divided; a number that divides both sizes of each
            layer. A branch has out·in / groups weights.
        shuffle: whether a branch's inputs are shuffled among its groups.
        drop_path: while training, the probability in [0, 1) of dropping a branch for an image.
        targets: some of "qkv", "proj", "fc1" and "fc2"; where a ViT has one of them in parts, each of them.
        train_norms: also trains every normalisation layer.
        train_biases: also trains the biases of the linear layers inside the blocks.
        bias: of the branches, c. "auto": where the layer has a saved bias of its own, so that it can be merged; True:
            everywhere, and merging refuses where there is none; False: nowhere.
        in_weight: whether to train inside a copy of the weight, without drop-path; "auto" where it is the faster way.
    Raises:
        ValueError: a field outside what is said here.
    """

    name: ClassVar[str] = "consolidator"
    description: ClassVar[str] = "grouped weights beside the linear layers (ICLR 2023)"

    groups: tuple[int, ...] = option((384,), "blocks of a branch's weight: 384, or 384,96")
    shuffle: bool = option(True, "shuffle a branch's inputs")
    drop_path: float = option(0.5, "of a branch, by image")
    targets: tuple[str, ...] = option(tuple(TARGETS), "of " + ",".join(TARGETS))
    train_norms: bool = option(True, "train the norms too")
    train_biases: bool = option(True, "train the linear biases too")
    bias: str | bool = option("auto", "whether there are biases")
    in_weight: str | bool = option("auto", "train inside the weight; no drop-path")

    def __post_init__(self) -> None:
        targets = self.targets if isinstance(self.targets, (tuple, list)) else (self.targets,)
        for target in targets:
            if target not in tuple(TARGETS):
                raise unknown("target", target, TARGETS)
        if not targets or len(set(targets)) < len(targets):
            raise ValueError(f"targets are {tuple(targets)}; they must be some of {', '.join(TARGETS)}, each once")
        # Lists where they come from a file.
        object.__setattr__(self, "targets", tuple(targets))
        object.__setattr__(self, "groups", check_groups(self.groups))
        check_probability("drop_path", self.drop_path)
        check_flags(self, "shuffle", "train_norms", "train_biases")
        for name in ("bias", "in_weight"):
            if getattr(self, name) != "auto" and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be 'auto', True or False")
        if self.in_weight is True and self.drop_path > 0:
            raise ValueError(
                f"in_weight is True and drop_path {self.drop_path}: in a weight no image's branch can be dropped, so "
                "give drop_path=0, or in_weight='auto'"
            )

    def insert(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        # Here, so that naming a method need not wait for timm.
        from ..sites import ADAPTED_MLPS, ARC_PLACES, CONSOLIDATED, find_blocks, find_parts

        tables = {"attn": ARC_PLACES["attn"], "mlp": ADAPTED_MLPS}  # which of timm's classes have layers of these names
        layers = {}
        for target in self.targets:
            part, names = TARGETS[target]
            for name, place in find_parts(model, part, tables[part]).items():
                found = {f"{name}.{own}": getattr(place, own, None) for own in names}
                layers |= {own: layer for own, layer in found.items() if layer is not None}
        added = {name: self._beside(layer, name, shapes or {}) for name, layer in layers.items()}

        for name, layer in layers.items():
            layer.__class__, layer.in_weight, layer.consolidator = ConsolidatedLinear, self.in_weight, added[name]
        around = []
        if "qkv" in self.targets:
            around += [block.attn for block in find_blocks(model).values()]
        if any(TARGETS[target][0] == "attn" for target in self.targets):
            around += find_blocks(model).values()
        for module in around:
            if type(module) in CONSOLIDATED:
                module.__class__ = CONSOLIDATED[type(module)]

    def _beside(self, layer: nn.Module, name: str, shapes: Shapes) -> FusedConsolidator | StoredConsolidator:
        """What the layer gets: what the shapes of a file speak of, else what the fields do."""
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}; Consolidator needs a plain nn.Linear there")
        groups = self.groups
        saved = shapes.get(f"{name}.consolidator.branches.0.weight", ())
        if len(saved) == 2 and saved[1] > 0 and layer.in_features % saved[1] == 0:
            groups = (layer.in_features // saved[1],)
        options = {
            "shuffle": self.shuffle,
            "bias": layer.bias is not None if self.bias == "auto" else self.bias,
            **beside(layer.weight),
        }
        kind = StoredConsolidator
        if f"{name}.consolidator.weight" not in shapes:
            kind, options["drop_path"] = FusedConsolidator, self.drop_path
        try:
            return kind(layer.in_features, layer.out_features, groups, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def overrides(self, model: nn.Module) -> list[str]:
        return norms_and_biases(model, self.train_norms, self.train_biases)

    def stored(self, tensors: dict[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(tensors)
        # Without its last part, the name of a file's tensor that belongs to the branches of a layer.
        found = [re.fullmatch(r"adapter\.(.+)\.consolidator(\.branches\.\d+)?\.weight", name) for name in tensors]
        branches: dict[str, list[str]] = {}
        for match in filter(None, found):
            branches.setdefault(match[1], []).append(match[0].removesuffix(".weight"))
        for layer, names in branches.items():
            biases = [tensors.pop(f"{name}.bias") for name in names if f"{name}.bias" in tensors]
            whole = f"adapter.{layer}.consolidator" if len(names) > 1 else names[0]
            if len(names) > 1:
                weights = [tensors.pop(f"{name}.weight") for name in names]
                tensors[f"{whole}.weight"] = summed(weights, self.groups, self.shuffle)
            if biases:
                total = sum(bias.double() for bias in biases)
                if (trained := tensors.pop(f"override.{layer}.bias", None)) is not None:
                    total += trained.double() - originals[f"{layer}.bias"].double()
                tensors[f"{whole}.bias"] = total.to(biases[0].dtype)
        return tensors
