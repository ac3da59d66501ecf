"""Which suite of tasks needs no download? MiniTAB: eight small tasks in VTAB's three groups, rendered by this package.

Each has 800 training, 200 validation and 1,000 test images (`digits` 797), RGB, 32 by 32. A picture depends on the name
of its task, its split and its place in it alone; `HASHES` says what came out where the published numbers were made.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.random import RandomState
from PIL import Image
from torch.utils.data import Dataset

from .._text import unknown
from . import minitab_tasks as tasks
from .digits import Digits
from .samples import SPLITS, Data

IMAGES = {"train": 800, "val": 200, "test": 1000}  # of a rendered task


class Task(NamedTuple):
    """What a task is.

    Attributes:
        group: "natural", "specialized" or "structured", as in VTAB.
        classes: what the labels 0, 1, … are called.
        question: what has to be told from a picture, in one line.
    """

    group: str
    classes: tuple[str, ...]
    question: str


TASKS = {
    "digits": Task("natural", tuple("0123456789"), "Which digit did a person write?"),
    "greek": Task("natural", tuple(tasks.GREEK), "Which small Greek letter is it?"),
    "cyrillic": Task("natural", tuple(tasks.CYRILLIC), "Which small Cyrillic letter is it?"),
    "scans": Task("specialized", tuple(tasks.CAPITALS), "Which capital letter is on the bad scan?"),
    "blackletter": Task("specialized", tuple(tasks.SMALL), "Which letter is it in Fraktur or double-struck type?"),
    "orientation": Task(
        "structured",
        tuple(f"{360 * turn // tasks.DIRECTIONS}°" for turn in range(tasks.DIRECTIONS)),
        "How far is the sign turned clockwise?",
    ),
    # Not "1" to "8": the embedded backbone has classes of these names, and they are no counts.
    "counting": Task(
        "structured",
        tuple(f"{count} letter{'s' if count > 1 else ''}" for count in range(1, tasks.MOST + 1)),
        "How many letters are there?",
    ),
    "position": Task(
        "structured",
        tuple(f"row {row + 1}, column {column + 1}" for row in range(tasks.CELLS) for column in range(tasks.CELLS)),
        "In which cell of a 4 by 4 grid is the letter's centre?",
    ),
}

# By `fingerprint`, with Pillow 13.0 (its FreeType 2.14.3), the fonts of matplotlib 3.11 and scikit-learn 1.9.
HASHES = {
    "digits": "920d2542c22442593a838eb804522afbed53f07a637c7c8f1850c0944d101d15",
    "greek": "92c4a68b02398d309592e3b166d80718b88bfccd5ea09436ecad9b7d572a50ca",
    "cyrillic": "dbf36b981e859526f51b796003b8a5263acae51d53e7ff91c8f22cd7e7b8d959",
    "scans": "55ab2c969ef1835a730448fd8190250fd09ab342447977e8b79adfe695ce4c8f",
    "blackletter": "11b380e4c22184db3ea88d8571bdcfbbeedc852b4cbc24a86d6cd75a950858cd",
    "orientation": "30c3a9d8f87c9126702b2299f74225def729e4360c939e752efac9cef8c787f9",
    "counting": "62233b01fa381ce78e0a510cf8d6b4439af63f3fdddd70d3143286490a93cd63",
    "position": "b1b749c9f7f714ee762071037a647847f50e520a215590b7d6d1462ce05bfe4b",
}

_DIFFERENT = (
    "its pictures differ from those of the published table: another version of FreeType, Pillow, matplotlib or "
    "scikit-learn"
)


class Pictures(Dataset):
    """(picture, label) pairs: RGB `PIL.Image` and int, from grey pixels uint8 (N, 32, 32) and labels int64 (N,)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


def read_minitab(task: str) -> Data:
    """The three splits of a task, one of `TASKS`, with a note where its pictures are not those of `HASHES`.

    They are rendered at the first call, which takes about a second, and shared by all later ones.

    Raises:
        ValueError: for a task that nobody knows.
    """
    if task not in TASKS:
        raise unknown("MiniTAB task", task, TASKS)
    notes = [] if fingerprint(task) == HASHES[task] else [_DIFFERENT]
    return Data(f"minitab/{task}", TASKS[task].classes, **_splits(task), notes=notes)


@functools.cache
def fingerprint(task: str) -> str:
    """SHA-256 over the pixels, then the labels (little-endian int64), of train, val and test in turn."""
    found = hashlib.sha256()
    for pictures in _splits(task).values():
        found.update(pictures.pixels.tobytes())
        found.update(pictures.labels.astype("<i8").tobytes())
    return found.hexdigest()


@functools.cache
def _splits(task: str) -> dict[str, Pictures]:
    splits = _digits() if task == "digits" else {split: _letters(task, split) for split in SPLITS}
    for pictures in splits.values():
        pictures.pixels.setflags(write=False)  # every caller sees the same ones
        pictures.labels.setflags(write=False)
    return splits


def _letters(task: str, split: str) -> Pictures:
    """One split of a task that draws letters: each class as often as the others, to one image, in random order."""
    labels = _start(RandomState(), task, split).permutation(np.arange(IMAGES[split]) % len(TASKS[task].classes))
    draw = functools.partial(tasks.DRAW[task], tasks.GLYPHS[task])
    return Pictures(_render(task, split, draw, labels.tolist()), labels)


def _digits() -> dict[str, Pictures]:
    """All of scikit-learn's digits: of each class 80 to train with and 20 to validate, and the others to test."""
    items = [item for split in ("train", "val", "test") for item in Digits(split)]
    pictures = np.stack([np.asarray(picture.convert("L")) for picture, _ in items])
    labels = np.array([label for _, label in items])
    rank = np.empty_like(labels)  # of an image among those of its class
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = {"train": rank < 80, "val": (rank >= 80) & (rank < 100), "test": rank >= 100}
    return {
        split: Pictures(_render("digits", split, tasks.handwritten, pictures[rows]), labels[rows])
        for split, rows in chosen.items()
    }


def _render(task: str, split: str, draw: Callable[[Any, RandomState], np.ndarray], items: Iterable) -> np.ndarray:
    """A picture for each item, each from a stream of its own."""
    random = RandomState()  # one for all: making it takes longer than starting it anew
    return np.stack([draw(item, _start(random, task, split, str(index))) for index, item in enumerate(items)])


def _start(random: RandomState, *names: str) -> RandomState:
    """The same object at the start of the stream of these names. The streams are frozen for good (NumPy NEP 19)."""
    random.seed(np.frombuffer(hashlib.sha256("/".join(names).encode()).digest(), "<u4"))
    return random
