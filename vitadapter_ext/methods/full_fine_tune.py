"""Full fine-tuning: the baseline that trains everything, and whose file is as large as the backbone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Method


@dataclass(frozen=True)
class FullFineTune(Method):
    """Trains every parameter of the model."""

    name: ClassVar[str] = "full"
    description: ClassVar[str] = "every parameter of the backbone"

    def overrides(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]
