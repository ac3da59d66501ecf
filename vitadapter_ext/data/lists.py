"""Which images and labels do lists name? `path label` lines, and what all data sets made of lists share.

FOLDER/train.txt, FOLDER/test.txt    lines such as `images/0001.jpg cat`, the path relative to FOLDER
FOLDER/val.txt                       without it 15 % of train is held out
FOLDER/classes.txt                   the names of the classes 0, 1, …, one a line; without it the labels name them
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .samples import (
    SPLITS,
    Data,
    ImageFiles,
    MissingDataError,
    Sample,
    drop_unreadable,
    existing_folder,
    held_out_note,
    hold_out_files,
    listed,
    require_two,
)

_WHOLE = re.compile(r"-?[0-9]{1,18}")


class Entry(NamedTuple):
    """An image that a list names.

    Attributes:
        where: the file and line that name it, for error messages.
        path: as the list has it.
        label: as the list has it.
    """

    where: str
    path: str
    label: str


def read_lists(folder: str | os.PathLike) -> Data:
    """The data set that train.txt, test.txt and perhaps val.txt and classes.txt in a folder describe.

    Labels are whole numbers or words. They become the classes in their order, unless classes.txt names the classes;
    labels then are numbers from 0 on. Every file is decoded once; those that cannot be are left out and named.

    Raises:
        MissingDataError: no such folder, or none of the lists in it.
        ValueError: for a list that is missing, empty or damaged; a path that leaves the folder or does not exist; a
            label that train lacks; fewer than two classes; too few images to hold some out; more than 5 % unreadable.
    """
    root = Path(folder)
    files = find_lists(root, {split: f"{split}.txt" for split in SPLITS}, optional="val")
    entries = {split: read_list(file) for split, file in files.items()}
    if (names := root / "classes.txt").exists():
        classes = read_names(names)
        labels = {split: numbered(found, len(classes)) for split, found in entries.items()}
        refuse_untrained(entries, labels)
    else:
        classes, labels = contiguous(entries)
    if len(classes) < 2:
        raise ValueError(f"{root} has only one class ({classes[0]!r}): training a classifier needs at least two")
    splits = {split: list(zip(locate(root, entries[split]), labels[split], strict=True)) for split in entries}
    return assemble(root.resolve().name, root, splits, classes, "val.txt")


def find_lists(folder: Path, names: Mapping[str, str], optional: str = "") -> dict[str, Path]:
    """split → list file, of those in `folder` that `names` (split → file name) asks for.

    Raises:
        MissingDataError: no such folder, or none of the files in it.
        ValueError: one is missing, and not that of the split `optional`.
    """
    existing_folder(folder)
    found = {split: folder / name for split, name in names.items() if (folder / name).exists()}
    if not found:
        raise MissingDataError(f"{folder} has none of the lists {', '.join(names.values())}")
    if missing := [name for split, name in names.items() if split not in found and split != optional]:
        there = " and ".join(file.name for file in found.values())
        raise ValueError(f"{folder} has {there} but no {' and no '.join(missing)}")
    return found


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; `ValueError` where it cannot be read."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def read_list(file: Path) -> list[Entry]:
    """The lines `path label` of a list, split at the last white space; `ValueError` for a line without a label."""
    entries = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        path, *label = line.strip().rsplit(None, 1) or [""]
        if label:
            entries.append(Entry(f"{file}, line {number}", path, label[0]))
        elif path:
            raise ValueError(f"{file}, line {number}: {shown(path)} has no label: expected a path, a space and a label")
    if not entries:
        raise ValueError(f"{file} lists no images: expected lines such as images/0001.jpg 5")
    return entries


def read_names(file: Path) -> tuple[str, ...]:
    """The names of the classes 0, 1, …, one a line; `ValueError` for an empty line between them and a name twice."""
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    for number, name in enumerate(names, 1):
        if not name.isprintable() or not name:
            raise ValueError(f"{file}, line {number}: {shown(name)} is no name of a class")
        if (first := names.index(name) + 1) != number:
            raise ValueError(f"{file}, line {number}: {name} is the name of a class in line {first} already")
    return tuple(names)


def locate(root: Path, entries: Sequence[Entry]) -> list[Path]:
    """The entries' files below `root`.

    Whether a path leaves `root` is judged by its text: a link inside it may lead where its owner wants.

    Raises:
        ValueError: for a path that is absolute, leaves `root`, or does not exist; the first is named.
    """
    paths = [root / _inside(root, entry) for entry in entries]
    missing = [entry for entry, path in zip(entries, paths, strict=True) if not os.path.isfile(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        problem = "is not a file" if (root / missing[0].path).exists() else "does not exist"
        raise ValueError(f"{missing[0].where}: {shown(missing[0].path)} {problem}{more}")
    return paths


def _inside(root: Path, entry: Entry) -> str:
    """The entry's path without `.` and `..`."""
    if "\0" in entry.path:
        raise ValueError(f"{entry.where}: {shown(entry.path)} has a NUL byte in it")
    if os.path.isabs(entry.path) or os.path.splitdrive(entry.path)[0]:
        raise ValueError(f"{entry.where}: {shown(entry.path)} is absolute: expected a path relative to {root}")
    path = os.path.normpath(entry.path)
    if path.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{entry.where}: {shown(entry.path)} leaves {root}: expected a path inside it")
    return path


def numbered(entries: Sequence[Entry], count: int) -> list[int]:
    """The entries' labels as numbers; `ValueError` for one that is not from 0 to `count` - 1."""
    for entry in entries:
        if not _WHOLE.fullmatch(entry.label) or not 0 <= int(entry.label) < count:
            raise ValueError(f"{entry.where}: label {shown(entry.label)} is not from 0 to {count - 1}")
    return [int(entry.label) for entry in entries]


def contiguous(entries: Mapping[str, Sequence[Entry]]) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The labels of train in their order as classes, and split → an index into them for each entry.

    The order is that of numbers if all of train's labels are whole ones (01 is 1 then), and of text otherwise.

    Raises:
        ValueError: for a label that is no printable text, or that train lacks.
    """
    for entry in entries["train"]:
        if not entry.label.isprintable() or not entry.label:
            raise ValueError(f"{entry.where}: label {entry.label!a} of {shown(entry.path)} is no name of a class")
    whole = all(_WHOLE.fullmatch(entry.label) for entry in entries["train"])

    def key(label: str) -> int | str:
        return int(label) if whole and _WHOLE.fullmatch(label) else label

    names = {key(entry.label): entry.label for entry in reversed(entries["train"])}
    index = {label: row for row, label in enumerate(sorted(names))}
    labels = {split: [index.get(key(entry.label), -1) for entry in found] for split, found in entries.items()}
    refuse_untrained(entries, labels)
    return tuple(names[label] for label in index), labels


def refuse_untrained(entries: Mapping[str, Sequence[Entry]], labels: Mapping[str, Sequence[int]]) -> None:
    """Raises `ValueError` for the first entry whose label is not among those of train."""
    trained = set(labels["train"])
    for split, found in entries.items():
        for entry, label in zip(found, labels[split], strict=True):
            if label not in trained:
                raise ValueError(
                    f"{entry.where}: no training image has the label {shown(entry.label)} of {shown(entry.path)}"
                )


def assemble(
    name: str,
    root: Path,
    splits: dict[str, list[Sample]],
    classes: Sequence[str],
    val_list: str,
    notes: Sequence[str] = (),
) -> Data:
    """The data set of these samples: unreadable images are left out, and val out of train where there is no `val_list`.

    Raises:
        ValueError: more than 5 % unreadable images; nothing readable in a split or of a class in train; one image in a
            class that val is to be held out of.
    """
    trained = {label for _, label in splits["train"]}
    notes = [*notes, *_once(root, splits), *_shared(splits), *drop_unreadable(root, splits)]
    for split, samples in splits.items():
        if not samples:
            raise ValueError(f"{root} has no readable image for {split}")
    if lost := sorted(trained - {label for _, label in splits["train"]}):
        names = listed([classes[label] for label in lost])
        raise ValueError(f"{names} in {root} without any readable training image")
    if "val" not in splits:
        require_two(str(root), (label for _, label in splits["train"]), classes)
        splits["train"], splits["val"] = hold_out_files(root, splits["train"], 1)
        notes.append(held_out_note(val_list))
    return Data(name, tuple(classes), **{split: ImageFiles(splits[split]) for split in SPLITS}, notes=notes)


def _once(root: Path, splits: dict[str, list[Sample]]) -> list[str]:
    """Takes out of each split what it lists again, and says so.

    Raises:
        ValueError: a split lists an image with two labels.
    """
    notes = []
    for split, samples in splits.items():
        labels: dict[Path, int] = {}
        for path, label in samples:
            if labels.setdefault(path, label) != label:
                raise ValueError(f"{root}: {split} lists {shown(os.path.relpath(path, root))} with two labels")
        if len(labels) < len(samples):
            notes.append(f"images that {split} lists again are left out: {len(samples) - len(labels)}")
            splits[split] = list(labels.items())
    return notes


def _shared(splits: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Notes for images that two splits list."""
    paths = {split: {path for path, _ in samples} for split, samples in splits.items()}
    pairs = [(other, split) for split, other in itertools.combinations(paths, 2)]
    counts = {pair: len(paths[pair[0]] & paths[pair[1]]) for pair in pairs}
    return [f"images of {other} that are in {split} too: {count}" for (other, split), count in counts.items() if count]


def shown(text: str) -> str:
    """The text as an error message can hold it."""
    return text if text.isprintable() else ascii(text)
