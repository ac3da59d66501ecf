"""Fused kernels and a training driver for parameter-efficient fine-tuning of Vision Transformers.

import timm, vitadapter_ext as va
model = timm.create_model("vit_base_patch16_224", num_classes=100)
va.attach(model, va.Adapter(rank=8))
"""

import importlib

from ._library import build_info
from .nn import ARCBasis, FusedAdapter, FusedARC, FusedConsolidator

__version__ = "0.1.0"

# What needs timm is imported when it is first asked for.
_LAZY = {
    "attach": "attachment",
    "detach": "attachment",
    "disabled": "attachment",
    "merge": "merging",
    "unmerge": "merging",
    "summary": "parameters",
    "save": "files",
    "load": "files",
    "Adapter": "methods",
    "Arc": "methods",
    "Mimi": "methods",
    "Consolidator": "methods",
    "LinearProbe": "methods",
    "FullFineTune": "methods",
    "BitFit": "methods",
}

__all__ = ["ARCBasis", "FusedARC", "FusedAdapter", "FusedConsolidator", "build_info", "nn", "ops", "reference", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
