"""What is a data set here? `Data`, its three splits; and what sets of image files share: reading, and holding out."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset, Subset

from .._text import unknown
from .images import MOST_UNREADABLE, open_rgb, unreadable

HELD_OUT = 0.15  # of a class's images, for each split that a data set does not bring

SPLITS = ("train", "val", "test")

Sample = tuple[Path, int]  # a file, and the index of its class


class MissingDataError(ValueError):
    """There is no such data set in that place at all; a suite names it and runs its other tasks."""


@dataclass
class Data:
    """A data set: for each split a `Dataset` of (RGB `PIL.Image`, label) pairs, and what one should know of them.

    Attributes:
        name: for people, such as "vtab1k/cifar100".
        classes: what the labels 0, 1, … are called.
        notes: sentences for the terminal, such as what was left out.
    """

    name: str
    classes: tuple[str, ...]
    train: Dataset
    val: Dataset
    test: Dataset
    notes: list[str] = field(default_factory=list)


class ImageFiles(Dataset):
    """(picture, label) pairs from files: RGB `PIL.Image`, and an int."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return open_rgb(path), label
        except Exception as error:  # it could be read when the data set was
            raise OSError(f"{path} cannot be read any more: {error}") from error


def drop_unreadable(root: Path, splits: dict[str, list[Sample]]) -> list[str]:
    """Decodes every file once and takes those out of `splits` that cannot be; returns a note that names them.

    Raises:
        ValueError: more than 5 % cannot be read.
    """
    paths = [path for samples in splits.values() for path, _ in samples]
    bad = unreadable(paths)
    if not bad:
        return []
    names = [f"{os.path.relpath(path, root)} ({problem})" for path, problem in list(bad.items())[:10]]
    problems = ", ".join(names) + (", …" if len(bad) > len(names) else "")
    count = f"{len(bad)} of {len(paths)} images in {root} cannot be read"
    if len(bad) > MOST_UNREADABLE * len(paths):
        raise ValueError(f"{count}, which is more than {MOST_UNREADABLE:.0%}: {problems}")
    for name, samples in splits.items():
        splits[name] = [sample for sample in samples if sample[0] not in bad]
    return [f"{count} and are left out: {problems}"]


def hold_out(keys: Sequence[str], labels: Sequence[int], count: int) -> list[list[int]]:
    """Splits images into those to train with and `count` held-out parts with 15 % of each class, one at least.

    A hash of an image's key shuffles them, the same way everywhere.

    Args:
        keys: a name for each image that never changes, such as its path below the root.
        labels: the class of each image; every class needs `count` + 1 images (else `few` names it).
    Returns: rows of the images to train with, then of each held-out part, all in ascending order.
    """
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    parts: list[list[int]] = [[] for _ in range(count + 1)]
    for rows in by_class.values():
        rows.sort(key=lambda row: hashlib.sha256(keys[row].encode(errors="surrogateescape")).digest())
        share = max(1, round(HELD_OUT * len(rows)))
        for part in parts[1:]:
            part += rows[:share]
            rows = rows[share:]
        parts[0] += rows
    return [sorted(part) for part in parts]


def hold_out_files(root: Path, samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """`hold_out` for files, by their paths below `root`."""
    keys = [path.relative_to(root).as_posix() for path, _ in samples]
    parts = hold_out(keys, [label for _, label in samples], count)
    return [[samples[row] for row in rows] for rows in parts]


def few(labels: Iterable[int], classes: Sequence[str], least: int) -> list[str]:
    """The classes with fewer than `least` images among `labels`, those with none included."""
    counts = dict.fromkeys(range(len(classes)), 0)
    for label in labels:
        counts[label] += 1
    return [classes[label] for label, images in counts.items() if images < least]


def listed(names: Sequence[str]) -> str:
    """The classes of these names, as an error message says it."""
    shown = ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{'class' if len(names) == 1 else f'{len(names)} classes'} {shown}"


def require_two(source: str, labels: Iterable[int], classes: Sequence[str]) -> None:
    """Raises `ValueError` where a class has one image among `labels`, too few to hold one out; none at all is fine."""
    labels = list(labels)
    absent = few(labels, classes, 1)
    if scarce := [name for name in few(labels, classes, 2) if name not in absent]:
        raise ValueError(f"{listed(scarce)} in {source} with one training image, too few to hold one out for val")


def hold_out_rows(source: str, dataset: Dataset, labels: Sequence[int], classes: Sequence[str]) -> list[Subset]:
    """`dataset` without the val part, and the val part, for data whose rows are all the name that its images have."""
    require_two(source, labels, classes)
    return [Subset(dataset, rows) for rows in hold_out([str(row) for row in range(len(labels))], labels, 1)]


def held_out_note(missing: str) -> str:
    """Says that val was held out of train because `missing` is not there."""
    return f"no {missing}: {HELD_OUT:.0%} of train is held out to choose the best epoch"


def existing_folder(folder: str | os.PathLike) -> Path:
    """The folder as a path; `MissingDataError` where there is none."""
    path = Path(folder)
    if not path.is_dir():
        raise MissingDataError(f"the data folder {path} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


class Task(NamedTuple):
    """A task of a suite of data sets.

    Attributes:
        name: what it is called here.
        classes: how many it has.
        folders: what else its folder is called on people's disks.
        group: of tasks, in a suite that has groups.
    """

    name: str
    classes: int
    folders: tuple[str, ...] = ()
    group: str = ""

    @property
    def names(self) -> set[str]:
        """All its names, as `plain` has them."""
        return {plain(name) for name in (self.name, *self.folders)}

    def is_called(self, name: str) -> bool:
        """Whether it goes by this name, also with its number of classes behind it, such as dtd_47."""
        return plain(name) in self.names or plain(re.sub(r"_\d+$", "", name)) in self.names


def plain(name: str) -> str:
    """The name without what people write differently: capitals, `-` and `_`."""
    return name.lower().replace("-", "").replace("_", "")


def find_task(suite: str, name: str, tasks: Mapping[str, Task]) -> Task:
    """The task that has this name, or a folder of this name; `ValueError` with the nearest one where none has."""
    for task in tasks.values():
        if task.is_called(name):
            return task
    raise unknown(f"{suite} task", name, tasks)


def find_folder(root: str | os.PathLike, task: Task) -> Path:
    """The task's folder in `root`.

    Raises:
        MissingDataError: there is none.
        ValueError: there are several, and they are not links to one.
    """
    root = existing_folder(root)
    found = sorted(path for path in root.iterdir() if task.is_called(path.name) and path.is_dir())
    if not found:
        names = ", ".join(dict.fromkeys((task.name, *task.folders)))
        raise MissingDataError(f"{root} has no folder for the task {task.name}: expected one of {names}")
    if len({path.resolve() for path in found}) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{root} has {len(found)} folders for the task {task.name}: {names}; keep one of them")
    return found[0]
