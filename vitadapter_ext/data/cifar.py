"""How are CIFAR's Python pickles read without running them? 10 or 100 classes, pictures of 32 by 32 pixels.

    ROOT/cifar-10-batches-py/data_batch_1 … data_batch_5, test_batch, batches.meta      or the same files in ROOT
    ROOT/cifar-100-python/train, test, meta

A pickle is a program that builds what it holds: it may call anything that the one who reads it lets it have. These get
stand-ins in place of the few parts of NumPy that the format uses; they note what they are called with, and the
pixels are taken from those notes and checked. 15 % of train is held out as val.

The data: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import os
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .._text import unknown
from .samples import Data, MissingDataError, existing_folder, held_out_note, hold_out_rows, plain

SIZE = 32  # pixels of a picture, both ways

_ROW = 3 * SIZE * SIZE  # bytes: the red plane, the green one, the blue one


class _Layout(NamedTuple):
    classes: int
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str  # the key of the labels, and in `meta` that of the classes' names
    names: str


_LAYOUTS = {
    "cifar10": _Layout(
        10,
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": _Layout(100, "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
}


class Rows(Dataset):
    """(picture, label) pairs: RGB `PIL.Image` and int, from pixels uint8 (N, 3072), three planes to a row."""

    def __init__(self, pixels: np.ndarray, labels: list[int]):
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        planes = self.pixels[index].reshape(3, SIZE, SIZE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))), self.labels[index]


def read_cifar(root: str | os.PathLike, name: str) -> Data:
    """CIFAR-10 ("cifar10") or CIFAR-100 ("cifar100", its fine labels) from the files in `root`, or in their own folder
    in it. Of data_batch_1 to data_batch_5 those that are there are read.

    Raises:
        MissingDataError: none of the files there.
        ValueError: an unknown name; a file that is missing, damaged, or no plain CIFAR pickle.
    """
    known = {plain(key): key for key in _LAYOUTS}
    if plain(name) not in known:
        raise unknown("CIFAR data set", name, _LAYOUTS)
    name = known[plain(name)]
    layout = _LAYOUTS[name]
    folder = _find(existing_folder(root), layout)
    if not (folder / layout.test).exists():
        raise ValueError(f"{folder} has training images but no {layout.test}")
    batches = [_read_rows(folder / file, layout) for file in layout.train if (folder / file).exists()]
    labels = [label for rows in batches for label in rows.labels]
    whole = Rows(np.concatenate([rows.pixels for rows in batches]), labels)
    notes = [held_out_note("val images")]
    if len(batches) < len(layout.train):
        notes.append(f"{folder} has {len(batches)} of {len(layout.train)} files of training images")
    if (meta := folder / layout.meta).exists():
        classes = _read_names(meta, layout)
    else:
        classes = tuple(str(label) for label in range(layout.classes))
        notes.append(f"no {layout.meta}: the classes are called by their numbers")
    train, val = hold_out_rows(str(folder), whole, labels, classes)
    return Data(name, classes, train, val, _read_rows(folder / layout.test, layout), notes)


def _find(root: Path, layout: _Layout) -> Path:
    """The folder that holds training files."""
    for folder in (root, root / layout.folder):
        if any((folder / file).is_file() for file in layout.train):
            return folder
    files = " to ".join(dict.fromkeys((layout.train[0], layout.train[-1])))
    raise MissingDataError(f"neither {root} nor {root / layout.folder} has the training images, {files}")


def _read_names(file: Path, layout: _Layout) -> tuple[str, ...]:
    names = _load(file).get(layout.names)
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise ValueError(f"{file} has no list {layout.names} of names")
    names = tuple(name if isinstance(name, str) else name.decode("latin1") for name in names)
    if len(set(names)) != layout.classes or not all(name.isprintable() for name in names):
        raise ValueError(f"{file}: {layout.names} is not {layout.classes} different printable names")
    return names


def _read_rows(file: Path, layout: _Layout) -> Rows:
    found = _load(file)
    pixels, labels = _pixels(file, found.get("data")), found.get(layout.labels)
    if not isinstance(labels, list):
        raise ValueError(f"{file} has no list {layout.labels}")
    if len(labels) != len(pixels):
        raise ValueError(f"{file} has {len(pixels)} images but {len(labels)} labels")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < layout.classes:
            # A label that is not even a number may be a whole tree of things.
            what = f"label {label}" if type(label) is int else f"a label of type {type(label).__name__}"
            raise ValueError(f"{file}, image {row}: {what} is not from 0 to {layout.classes - 1}")
    return Rows(pixels, labels)


def _pixels(file: Path, data: Any) -> np.ndarray:
    """uint8 (N, 3072) from what NumPy was to be called with."""
    try:
        if data.name == "_reconstruct":  # protocols up to 4: an empty array, whose state is set afterwards
            _, shape, dtype, fortran, content = data.state
        else:
            content, dtype, shape, order = data.args
            fortran = {"C": False, "F": True}[order]
        rows, columns = shape
        kind = dtype.args[0]
        kind = kind.decode() if isinstance(kind, bytes) else kind
        sizes = type(rows) is int and type(columns) is int and columns == _ROW
        whole = sizes and isinstance(content, bytes) and len(content) == rows * columns
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has no array of pixels (N, {_ROW}) under the key data") from error
    if kind not in ("u1", "|u1", "uint8", "B") or not whole or not rows:
        raise ValueError(f"{file}: data is not an array of bytes (N, {_ROW})")
    return np.frombuffer(content, np.uint8).reshape(rows, _ROW, order="F" if fortran else "C")


def _load(file: Path) -> Mapping[str, Any]:
    """The dictionary in a pickle, its keys as text."""
    try:
        with file.open("rb") as stream:
            # Python 2 wrote these files: what was text to it is bytes now.
            found = _Unpickler(io.BytesIO(stream.read()), encoding="bytes").load()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except _RefusedError as error:
        raise ValueError(f"{file} wants to run {error}, which no CIFAR file needs: refused") from error
    except Exception as error:  # damaged pickles raise nearly anything
        problem = " ".join(ascii(str(error))[1:-1].split()) or "it ends too early"
        raise ValueError(f"{file} is cut short or no pickle: {problem}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}


class _RefusedError(Exception):
    """A pickle asked for something that is none of `_STAND_INS`."""


class _Call:
    """What came of calling a stand-in: its name, what it was called with, and the state set afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple):
        self.name = name
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _StandIn:
    """Takes the place of a part of NumPy. Without a `__dict__`, so that a pickle can put nothing into it."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> _Call:
        return _Call(self.name, args)


class _Latin1:
    """Takes the place of `codecs.encode`, by which Python 3 puts bytes into pickles for Python 2."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding != "latin1":
            wanted = ascii(encoding) if type(encoding) is str and len(encoding) < 40 else "no encoding"
            raise _RefusedError(f"_codecs.encode with {wanted}")
        return str.encode(text, "latin1")


_STAND_INS = {
    # NumPy 2 moved numpy.core to numpy._core.
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: its memo is a dictionary, so that a small file cannot ask for a large one, and what it does
    for each opcode can be narrowed."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Latin1()
        if (module, name) not in _STAND_INS:
            raise _RefusedError(ascii(f"{module}.{name}")[1:-1])
        return _StandIn(name)

    def _load_keyed(self, load: Callable[["_Unpickler"], None], keys: list) -> None:
        # The hash of nested tuples can take for ever, or all of the stack.
        if not all(isinstance(key, (str, bytes)) for key in keys):
            raise ValueError("a key that is no text")
        load(self)

    def load_setitem(self) -> None:
        self._load_keyed(pickle._Unpickler.load_setitem, self.stack[-2:-1])

    def load_setitems(self) -> None:
        self._load_keyed(pickle._Unpickler.load_setitems, self.stack[::2])

    def load_dict(self) -> None:
        self._load_keyed(pickle._Unpickler.load_dict, self.stack[::2])

    def load_bytearray8(self) -> None:
        # Read before there is room for it: a length may be any number.
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(count, sys.maxsize)))

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    for opcode in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[opcode[0]]
