"""Drop-in modules over the ops; timm is not needed for them."""

from .adapter import FusedAdapter

__all__ = ["FusedAdapter"]
