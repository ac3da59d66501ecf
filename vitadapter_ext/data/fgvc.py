"""Which images and labels has a task of FGVC? Five folders of fine-grained images, each with its splits as JSON.

    ROOT/CUB_200_2011/train.json, val.json, test.json    {"001.Albatross/0001.jpg": 1, …}, image → class id

Paths are relative to the task's folder, or to `images` or `Images` in it. Without val.json 15 % of train is held out.
The splits: M. Jia et al., "Visual Prompt Tuning", ECCV 2022.
"""

import json
import os
from pathlib import Path

from .lists import Entry, assemble, contiguous, find_lists, locate, read_text, shown
from .samples import SPLITS, Data, Task, find_folder, find_task

TASKS = {
    task.name: task
    for task in (
        Task("cub200", 200, ("CUB_200_2011", "CUB_200", "CUB")),
        Task("nabirds", 555, ("NABird",)),
        Task("flowers102", 102, ("OxfordFlower", "OxfordFlowers", "OxfordFlowers102", "Flowers")),
        Task("dogs120", 120, ("Stanford-dogs", "Stanford-dogs120", "Dogs")),
        Task("cars196", 196, ("Stanford-cars", "Stanford-cars196", "Cars")),
    )
}


def read_fgvc(root: str | os.PathLike, task: str) -> Data:
    """A task of FGVC; its class ids, in their order, are the classes.

    `task` is a name in `TASKS` or one that its folder may have.

    Raises:
        MissingDataError: no folder for the task in `root`, or none of its JSON files.
        ValueError: an unknown task, or anything else wrong with its files and images, in one sentence.
    """
    found = find_task("FGVC", task, TASKS)
    folder = find_folder(root, found)
    files = find_lists(folder, {split: f"{split}.json" for split in SPLITS}, optional="val")
    entries = {split: _read_json(file) for split, file in files.items()}
    classes, labels = contiguous(entries)
    if len(classes) < 2:
        raise ValueError(f"{files['train']} has only one class: training a classifier needs at least two")
    notes = []
    if len(classes) != found.classes:
        notes.append(f"{files['train']} has {len(classes)} classes, not {found.classes}")
    images = _images(folder, entries["train"][0])
    splits = {split: list(zip(locate(images, entries[split]), labels[split], strict=True)) for split in entries}
    return assemble(f"fgvc/{found.name}", folder, splits, classes, "val.json", notes)


def _read_json(file: Path) -> list[Entry]:
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{file} is no mapping of images to class ids: expected {{"images/0001.jpg": 1, …}}')
    for path, label in found.items():
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{file}: the class id of {shown(path)} is neither a whole number nor a text")
    return [Entry(str(file), path, str(label)) for path, label in found.items()]


def _images(folder: Path, first: Entry) -> Path:
    """The folder that the paths are relative to: the one where the first image is."""
    for base in (folder, folder / "images", folder / "Images"):
        if os.path.isfile(base / first.path):
            return base
    return folder
