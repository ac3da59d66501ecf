"""The linear probe: a baseline that trains the head alone, on the frozen backbone's features."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class LinearProbe(Method):
    """Trains the classifier and nothing else."""

    name: ClassVar[str] = "linear-probe"
    description: ClassVar[str] = "the classifier alone, on frozen features"
