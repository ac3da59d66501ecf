"""Which images and labels has a domain of DomainNet? Two lists for each of six domains, 345 classes in each.

    ROOT/clipart_train.txt, ROOT/clipart_test.txt    lines `clipart/zebra/clipart_344_000001.jpg 344`, relative to ROOT
    ROOT/clipart_val.txt                             one's own; without it 15 % of train is held out

The lists may lie in ROOT/txt or ROOT/splits. The data: X. Peng et al., "Moment Matching for Multi-Source Domain
Adaptation", ICCV 2019.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from .lists import Entry, assemble, find_lists, locate, numbered, read_list, shown
from .samples import SPLITS, Data, Sample, Task, find_task

CLASSES = 345

TASKS = {name: Task(name, CLASSES) for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")}


def read_domainnet(root: str | os.PathLike, domain: str) -> Data:
    """A domain of DomainNet; classes are called by the folders of their images, or by number where there are none.

    Raises:
        MissingDataError: no such folder, or none of the domain's lists in it.
        ValueError: an unknown domain, or anything else wrong with its lists and images, in one sentence.
    """
    name = find_task("DomainNet", domain, TASKS).name
    root = Path(root)
    names = {split: f"{name}_{split}.txt" for split in SPLITS}
    places = (root, root / "txt", root / "splits")
    folder = next((place for place in places if any((place / file).exists() for file in names.values())), root)
    files = find_lists(folder, names, optional="val")
    entries = {split: read_list(file) for split, file in files.items()}
    splits = {
        split: list(zip(locate(root, lines), numbered(lines, CLASSES), strict=True)) for split, lines in entries.items()
    }
    classes = _class_names(root, entries, splits)
    return assemble(f"domainnet/{name}", root, splits, classes, f"{name}_val.txt")


def _class_names(root: Path, entries: Mapping[str, list[Entry]], splits: Mapping[str, list[Sample]]) -> list[str]:
    """What the 345 classes are called; `ValueError` where one folder has two labels, or two folders one."""
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for split, samples in splits.items():
        for entry, (path, label) in zip(entries[split], samples, strict=True):
            folders = path.relative_to(root).parts
            folder = folders[-2] if len(folders) > 2 else ""
            if not folder or not folder.isprintable():
                raise ValueError(f"{entry.where}: {shown(entry.path)} is not of the form domain/class/file.jpg")
            name, first = names.setdefault(label, folder), labels.setdefault(folder, label)
            if (name, first) != (folder, label):
                raise ValueError(
                    f"{entry.where}: label {label} for {folder}, but earlier "
                    + (f"label {label} is {name}" if name != folder else f"{folder} has label {first}")
                )
    return [names.get(label, str(label)) for label in range(CLASSES)]
