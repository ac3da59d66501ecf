"""Which images and labels does a folder hold? A folder for each class, with or without train, val and test above.

    FOLDER/train/cat/1.jpg, FOLDER/val/…, FOLDER/test/…     the folders are the splits
    FOLDER/train/cat/1.jpg, FOLDER/test/… (or val/…)        it is the test set; 15 % of train is held out as val
    FOLDER/cat/1.jpg                                        15 % is held out as test and 15 % as val, class by class

What is held out depends on the file names only, never on a seed, so every run on the folder has the same test set.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .images import EXTENSIONS
from .samples import (
    HELD_OUT,
    SPLITS,
    Data,
    ImageFiles,
    Sample,
    drop_unreadable,
    existing_folder,
    few,
    hold_out_files,
    listed,
)

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def read_folder(folder: str | os.PathLike) -> Data:
    """The data set in a folder, with a note of what was held out and what was left out.

    Every file is decoded once; those that cannot be are left out and named.

    Raises:
        ValueError: for a folder that is missing, empty, or holds one class; a class that train lacks, or with too few
            images to hold some out; more than 5 % unreadable images.
    """
    root = existing_folder(folder)
    found = _find_splits(root)
    classes = sorted(found["train"])
    for name in classes:
        if not name.isprintable() or name.encode(errors="ignore").decode() != name:
            raise ValueError(f"the class folder {name!a} in {root} has a name that is no printable text: rename it")
    if not any(files for split in found.values() for files in split.values()):
        raise ValueError(f"{root} has no images: expected a folder for each class with files such as cat/1.jpg in it")
    if len(classes) == 1:
        raise ValueError(
            f"{root} has only one class ({classes[0]!r}): training a classifier needs at least two folders"
        )
    for name, split in found.items():
        if extra := sorted(set(split) - set(classes)):
            raise ValueError(
                f"{listed(extra)} in the {name} folder of {root}, but not in its train folder: {_remedy(extra)}"
            )
    index = {label: row for row, label in enumerate(classes)}
    splits: dict[str, list[Sample]] = {
        name: [(path, index[label]) for label, files in sorted(split.items()) for path in files]
        for name, split in found.items()
    }
    notes = drop_unreadable(root, splits)
    if empty := few((label for _, label in splits["train"]), classes, 1):
        raise ValueError(f"{listed(empty)} in {root} without any readable training image: {_remedy(empty)}")
    notes += _hold_out(root, splits, classes)
    for name in SPLITS:
        if not splits[name]:
            raise ValueError(f"the {name} folder of {root} has no readable images")
    datasets = {name: ImageFiles(splits[name]) for name in SPLITS}
    return Data(root.resolve().name, tuple(classes), **datasets, notes=notes)


def _find_splits(root: Path) -> dict[str, dict[str, list[Path]]]:
    """split → class → sorted files; everything is "train" where there is no train folder."""
    folders = _folders(root)
    named = {}
    for folder in folders:
        name = _SPLIT_NAMES.get(folder.name.lower())
        # A folder with images of its own is a class, whatever it is called (DomainNet has a class "train").
        if name is None or not _folders(folder) or any(map(_is_image, folder.iterdir())):
            continue
        if name in named:
            raise ValueError(
                f"{root} has two folders for {name}: {named[name].name} and {folder.name}; keep one of them"
            )
        named[name] = folder
    if "train" in named:
        return {name: _classes(named[name]) for name in SPLITS if name in named}
    if named:
        raise ValueError(f"{root} has {' and '.join(sorted(named))} but no train folder")
    return {"train": _classes(root)}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(folder: Path) -> dict[str, list[Path]]:
    return {path.name: _images(path) for path in _folders(folder)}


def _images(folder: Path) -> list[Path]:
    """All images at any depth, sorted; hidden files and folders are left alone."""
    files = []
    for where, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        files += [path for path in (Path(where, name) for name in names) if _is_image(path)]
    return sorted(files)


def _is_image(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower().endswith(EXTENSIONS)


def _hold_out(root: Path, splits: dict[str, list[Sample]], classes: Sequence[str]) -> list[str]:
    """Fills in the splits that have no folder with a share of each class's training images, and says how."""
    held_out = [name for name in splits if name != "train"]
    if len(held_out) == 2:
        return []
    if held_out:
        splits["test"] = splits.pop(held_out[0])
        missing = ["val"]
        note = f"the {held_out[0]} folder is the test set; {HELD_OUT:.0%} of train is held out to choose the best epoch"
    else:
        missing = ["test", "val"]
        note = f"no test folder: {HELD_OUT:.0%} of each class is the test set, {HELD_OUT:.0%} chooses the best epoch"
    least = len(missing) + 1
    if scarce := few((label for _, label in splits["train"]), classes, least):
        raise ValueError(
            f"{listed(scarce)} in {root} with too few images to hold some out: each class needs at least {least}, "
            "or there must be the folders train, val and test"
        )
    splits["train"], *parts = hold_out_files(root, splits["train"], len(missing))
    splits.update(zip(missing, parts, strict=True))
    return [note]


def _remedy(names: Sequence[str]) -> str:
    return "add images to train or remove the folder" + ("s" if len(names) > 1 else "")
