"""Which images and labels does a folder hold? A folder for each class, with or without train, val and test above.

    FOLDER/train/cat/1.jpg, FOLDER/val/…, FOLDER/test/…     the folders are the splits
    FOLDER/train/cat/1.jpg, FOLDER/test/… (or val/…)        it is the test set; 15 % of train is held out as val
    FOLDER/cat/1.jpg                                        15 % is held out as test and 15 % as val, class by class

What is held out depends on the file names only, never on a seed, so every run on the folder has the same test set.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from .images import EXTENSIONS, MOST_UNREADABLE, open_rgb, unreadable

HELD_OUT = 0.15  # of a class's images, for each split that has no folder of its own

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

Sample = tuple[Path, int]  # a file, and the index of its class


class ImageFiles(Dataset):
    """(picture, label) pairs from files: RGB `PIL.Image`, and an int that is an index into `classes`."""

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str]):
        self.samples = list(samples)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return open_rgb(path), label
        except Exception as error:  # it could be read when the folder was
            raise OSError(f"{path} cannot be read any more: {error}") from error


def read_folder(folder: str | os.PathLike) -> tuple[dict[str, ImageFiles], list[str]]:
    """The splits "train", "val" and "test" of a folder, and what a person should know about them, in sentences.

    Every file is decoded once; those that cannot be are left out and named.

    Raises:
        ValueError: for a folder that is missing, empty, or holds one class; a class that train lacks, or with too few
            images to hold some out; more than 5 % unreadable images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"the data folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
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
                f"{_listed(extra)} in the {name} folder of {root}, but not in its train folder: {_remedy(extra)}"
            )
    notes = _drop_unreadable(root, found)
    if empty := [name for name in classes if not found["train"][name]]:
        raise ValueError(f"{_listed(empty)} in {root} without any readable training image: {_remedy(empty)}")
    notes += _hold_out(root, found)
    splits = {}
    for name in ("train", "val", "test"):
        samples = [(path, classes.index(label)) for label, files in sorted(found[name].items()) for path in files]
        if not samples:
            raise ValueError(f"the {name} folder of {root} has no readable images")
        splits[name] = ImageFiles(samples, classes)
    return splits, notes


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
        return {name: _classes(named[name]) for name in ("train", "val", "test") if name in named}
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


def _drop_unreadable(root: Path, found: dict[str, dict[str, list[Path]]]) -> list[str]:
    paths = [path for split in found.values() for files in split.values() for path in files]
    bad = unreadable(paths)
    if not bad:
        return []
    names = [f"{path.relative_to(root)} ({problem})" for path, problem in list(bad.items())[:10]]
    listed = ", ".join(names) + (", …" if len(bad) > len(names) else "")
    count = f"{len(bad)} of {len(paths)} images in {root} cannot be read"
    if len(bad) > MOST_UNREADABLE * len(paths):
        raise ValueError(f"{count}, which is more than {MOST_UNREADABLE:.0%}: {listed}")
    for split in found.values():
        for label, files in split.items():
            split[label] = [path for path in files if path not in bad]
    return [f"{count} and are left out: {listed}"]


def _hold_out(root: Path, found: dict[str, dict[str, list[Path]]]) -> list[str]:
    """Fills in the splits that have no folder with a share of each class's training images, and says how."""
    held_out = [name for name in found if name != "train"]
    if len(held_out) == 2:
        return []
    if held_out:
        found["test"] = found.pop(held_out[0])
        missing = ["val"]
        note = f"the {held_out[0]} folder is the test set; {HELD_OUT:.0%} of train is held out to choose the best epoch"
    else:
        missing = ["test", "val"]
        note = f"no test folder: {HELD_OUT:.0%} of each class is the test set, {HELD_OUT:.0%} chooses the best epoch"
    least = len(missing) + 1
    if few := [label for label, files in found["train"].items() if len(files) < least]:
        raise ValueError(
            f"{_listed(few)} in {root} with too few images to hold some out: each class needs at least {least}, "
            "or there must be the folders train, val and test"
        )
    found.update({name: {} for name in missing})
    for label, files in found["train"].items():
        # A hash of the name shuffles the same way everywhere, and a new image moves no other one.
        files = sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
        share = max(1, round(HELD_OUT * len(files)))
        for name in missing:
            found[name][label], files = sorted(files[:share]), files[share:]
        found["train"][label] = sorted(files)
    return [note]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{'class' if len(names) == 1 else f'{len(names)} classes'} {shown}"


def _remedy(names: Sequence[str]) -> str:
    return "add images to train or remove the folder" + ("s" if len(names) > 1 else "")
