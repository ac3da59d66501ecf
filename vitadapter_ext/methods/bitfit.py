"""BitFit: a baseline that trains the biases alone (Ben Zaken et al., ACL 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Method


@dataclass(frozen=True)
class BitFit(Method):
    """Trains every bias of the backbone, those of normalisation layers and of the patch embedding included."""

    name: ClassVar[str] = "bitfit"
    description: ClassVar[str] = "every bias of the backbone (Ben Zaken et al., ACL 2022)"

    def overrides(self, model: nn.Module) -> list[str]:
        # Not only ".bias": some of timm's attentions hold a bare `q_bias`.
        return [name for name, _ in model.named_parameters() if name.endswith("bias")]
