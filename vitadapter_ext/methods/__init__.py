"""Which methods are there? One file each; this table names them for the command line and for saved files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._text import unknown
from .adapter import Adapter
from .arc import Arc
from .base import Method
from .bitfit import BitFit
from .consolidator import Consolidator
from .full_fine_tune import FullFineTune
from .linear_probe import LinearProbe
from .mimi import Mimi

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Adapter, Arc, Mimi, Consolidator, LinearProbe, FullFineTune, BitFit)
}

__all__ = [
    "METHODS",
    "Adapter",
    "Arc",
    "BitFit",
    "Consolidator",
    "FullFineTune",
    "LinearProbe",
    "Method",
    "Mimi",
    "make_method",
]


def make_method(name: str, fields: Mapping[str, Any] | None = None) -> Method:
    """The method of this name with these fields, the others at their defaults.

    Raises:
        ValueError: an unknown name or field, with the nearest known one; a value that the method does not accept.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for field in fields or {}:
        if field not in known:
            raise unknown(f"field of method {name!r}", field, known)
    return METHODS[name](**(fields or {}))
