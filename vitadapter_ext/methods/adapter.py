"""The bottleneck adapter: where it goes in a block, and what is trained beside it.

Placements are those of Houlsby et al. 2019, AdaptFormer (Chen et al., NeurIPS 2022), MiMi (Marouf et al., WACV 2024)
and Adapter+ (Steitz and Roth, CVPR 2024); the defaults are Adapter+'s, whose recipe is "adapter-plus". Nothing merges:
there is an activation inside.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .._text import unknown
from ..nn.adapter import ACTIVATIONS, INITS, FusedAdapter, check_adapter_options
from .base import Method, Shapes, check_flags, option

# placement: how each branch of a block joins the stream (`sites.JOINS`), after the attention and after the MLP
PLACEMENTS = {
    "post": ("plain", "sum"),
    "houlsby": ("branch", "branch"),
    "intermediate": ("plain", "branch"),
    "parallel": ("plain", "input"),
    "pre": ("sum", "plain"),
}


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters in every block; options as in `FusedAdapter`.

    With h = x + attn(LN x) and out = h + mlp(LN h), the adapter's branch A is added as follows:

    Args:
        rank: width of the bottleneck, at least 1.
        placement: "post": out + A(out); "houlsby": both branches b become b + A(b); "intermediate": the MLP's branch
            does; "parallel": out + A(h); "pre": h + A(h), before the MLP.
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
    bias: bool = option(True, "of both linear maps")
    dropout: float = option(0.0, "after the activation")
    dropout_out: float = option(0.0, "after the up-projection")
    drop_path: float = option(0.0, "of the adapter's output, by image")
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
        from ..sites import ADAPTED_BLOCKS, find_blocks  # here, so that naming a method need not wait for timm

        for block_name, block in find_blocks(model).items():
            block.__class__ = ADAPTED_BLOCKS[type(block)]
            for branch, join in zip(("attn", "mlp"), PLACEMENTS[self.placement], strict=True):
                adapter = None
                if join != "plain":
                    down = (shapes or {}).get(f"{block_name}.adapter_{branch}.down.weight", ())
                    adapter = self._adapter(block, rank=down[0] if len(down) == 2 else self.rank)
                block.register_module(f"adapter_{branch}", adapter)
                setattr(block, f"join_{branch}", join)

    def _adapter(self, block: nn.Module, rank: int) -> FusedAdapter:
        weight = next(block.parameters())
        return FusedAdapter(
            block.dim,
            rank,
            activation=self.activation,
            scale=self.scale,
            bias=self.bias,
            dropout=self.dropout,
            dropout_out=self.dropout_out,
            drop_path=self.drop_path,
            init=self.init,
            device=weight.device,
            # The kernels mix float32 with low dtypes, but not with float64.
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )

    def overrides(self, model: nn.Module) -> list[str]:
        from ..sites import find_blocks

        names = []
        if self.train_norms:
            # By the class's name: timm has its own norm classes, fused and not, which share no base.
            norms = ((name, m) for name, m in model.named_modules() if "norm" in type(m).__name__.lower())
            names += [f"{prefix}.{name}" for prefix, norm in norms for name, _ in norm.named_parameters(recurse=False)]
        if self.train_biases:
            for block_name, block in find_blocks(model).items():
                linears = ((name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear))
                names += [f"{block_name}.{name}.bias" for name, linear in linears if linear.bias is not None]
        return names
