"""The training driver: config → data → backbone → attach → loop → files.

from vitadapter_ext.train import configure, fit
result = fit(configure(data="flowers", model="vit_base_patch16_224", pretrained=True, rank=16))
"""

from .config import Config, configure

__all__ = ["Config", "configure", "fit"]


def __getattr__(name: str):
    if name != "fit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pipeline import fit  # here, so that a command's --help need not wait for timm

    return fit
