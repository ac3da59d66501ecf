"""Drop-in modules over the ops; timm is not needed for them."""

from .adapter import FusedAdapter
from .arc import ARCBasis, FusedARC
from .consolidator import FusedConsolidator

__all__ = ["ARCBasis", "FusedARC", "FusedAdapter", "FusedConsolidator"]
