"""The bottleneck adapter: where it goes in a block, and what is trained beside it.

Placements are those of Houlsby et al. 2019, AdapterFusion (Pfeiffer et al., EACL 2021), AdaptFormer (Chen et al.,
NeurIPS 2022), MiMi (Marouf et al., WACV 2024) and Adapter+ (Steitz and Roth, CVPR 2024); the defaults are Adapter+'s,
whose recipe is "adapter-plus". There is an activation inside, so nothing merges; only the linear adapter behind the
MLP's own activation does, placement "inner" with activation "identity".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .._text import unknown
from ..nn.adapter import ACTIVATIONS, INITS, FusedAdapter, check_adapter_options
from .base import Method, Shapes, beside, check_flags, norms_and_biases, option

# placement: how the attention and the MLP join the stream (`sites.JOINS`), and whether there is one inside the MLP
PLACEMENTS = {
    "post": ("plain", "sum", False),
    "houlsby": ("branch", "branch", False),
    "intermediate": ("plain", "branch", False),
    "pfeiffer": ("plain", "normed", False),
    "parallel": ("plain", "input", False),
    "pre": ("sum", "plain", False),
    "inner": ("plain", "plain", True),
    "houlsby-inner": ("branch", "plain", True),
}


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters in every block; options as in `FusedAdapter`.

    With h = x + attn(LN x) and out = h + mlp(LN h), the adapter's branch A is added as follows:

    Args:
        rank: width of the bottleneck, at least 1.
        placement: "post": out + A(out); "houlsby": both branches b become b + A(b); "intermediate": the MLP's branch
            does; "pfeiffer": out + A(LN_a(out)), with a LayerNorm of the adapter's own; "parallel": out + A(h);
            "pre": h + A(h), before the MLP; "inner": x + A(x) for the input x of the MLP's last linear layer;
            "houlsby-inner": that, and the attention's branch b becomes b + A(b).
        train_norms: also trains every normalisation layer.
        train_biases: also trains the biases of the linear layers inside the blocks.
    Raises:
        ValueError: a field outside what is said here and in `FusedAdapter`.
    """

    name: ClassVar[str] = "adapter"
    description: ClassVar[str] = "bottleneck adapters in every block (Houlsby 2019, Adapter+)"

    rank: int = option(8, "width of the bottleneck")
    placement: str = option("post", ", ".join(PLACEMENTS))
    activation: str = option("gelu", ", ".join(ACTIVATIONS))
    scale: float | str = option("channel", "a number, scalar or channel")
    bias: bool = option(True, "whether there are biases")
    dropout: float = option(0.0, "of the bottleneck")
    dropout_out: float = option(0.0, "after the up-projection")
    drop_path: float = option(0.0, "of what the method adds, by image")
    init: str = option("houlsby", ", ".join(INITS))
    train_norms: bool = option(False, "train the norms too")
    train_biases: bool = option(False, "train the linear biases too")

    def __post_init__(self) -> None:
        if self.placement not in tuple(PLACEMENTS):
            raise unknown("placement", self.placement, PLACEMENTS)
        check_adapter_options(
            self.rank, self.activation, self.scale, self.dropout, self.dropout_out, self.drop_path, self.init
        )
        check_flags(self, "bias", "train_norms", "train_biases")

    def insert(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        # Here, so that naming a method need not wait for timm.
        from ..sites import ADAPTED_BLOCKS, ADAPTED_MLPS, find_blocks, find_parts

        join_attn, join_mlp, inner = PLACEMENTS[self.placement]
        blocks = find_blocks(model) if {join_attn, join_mlp} != {"plain"} else {}
        mlps = find_parts(model, "mlp", ADAPTED_MLPS) if inner else {}
        for name, block in blocks.items():
            block.__class__ = ADAPTED_BLOCKS[type(block)]
            for branch, join in (("attn", join_attn), ("mlp", join_mlp)):
                adapter = None
                if join != "plain":
                    adapter = self._adapter(block, block.width, f"{name}.adapter_{branch}", shapes)
                if join == "normed":
                    weight = adapter.down.weight
                    adapter.norm = nn.LayerNorm(block.width, device=weight.device, dtype=weight.dtype)
                block.put(branch, join, adapter)
        for name, mlp in mlps.items():
            mlp.__class__, mlp.adapted = ADAPTED_MLPS[type(mlp)], True
            mlp.adapter_inner = self._adapter(mlp, mlp.fc2.in_features, f"{name}.adapter_inner", shapes)

    def _adapter(self, owner: nn.Module, dim: int, name: str, shapes: Shapes | None) -> FusedAdapter:
        weight = next(owner.parameters())
        down = (shapes or {}).get(f"{name}.down.weight", ())
        return FusedAdapter(
            dim,
            down[0] if len(down) == 2 else self.rank,
            activation=self.activation,
            scale=self.scale,
            bias=self.bias,
            dropout=self.dropout,
            dropout_out=self.dropout_out,
            drop_path=self.drop_path,
            init=self.init,
            **beside(weight),
        )

    def check_mergeable(self) -> None:
        if self.placement != "inner" or self.activation != "identity":
            raise ValueError(
                f"{self} cannot be merged: placement {self.placement!r} with activation {self.activation!r} is no part "
                "of a linear layer; placement 'inner' with activation 'identity' is"
            )

    def overrides(self, model: nn.Module) -> list[str]:
        return norms_and_biases(model, self.train_norms, self.train_biases)
