"""The functional twins of the modules: each op goes to a hand-written kernel, or to `vitadapter_ext.reference` on a
device that has none."""

from .adapter import adapter
from .arc import arc
from .consolidator import consolidated_linear, consolidator

__all__ = ["adapter", "arc", "consolidated_linear", "consolidator"]
