"""Which images and labels has a task of VTAB-1k? Nineteen folders of images, each with its lists.

    ROOT/cifar/train800.txt, val200.txt, test.txt    lines `images/train800/000000.jpg 17`, relative to ROOT/cifar

The suite: X. Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark",
2019.
"""

import os

from .lists import assemble, find_lists, locate, numbered, read_list
from .samples import Data, Task, find_folder, find_task

_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
_SIZES = {"train": 800, "val": 200}

# In the order in which tables show them. The names of folders: those of the published dump and of TensorFlow Datasets.
_TASKS = {
    "natural": {
        "caltech101": (102, "caltech_101"),
        "cifar100": (100, "cifar", "cifar_100"),
        "dtd": (47, "describable_textures"),
        "flowers102": (102, "oxford_flowers102", "oxford_flowers", "flowers"),
        "pets": (37, "oxford_iiit_pet", "oxford_iiit_pets", "oxford_pet", "oxford_pets", "pet"),
        "sun397": (397, "sun"),
        "svhn": (10, "svhn_cropped"),
    },
    "specialized": {
        "camelyon": (2, "patch_camelyon", "pcam"),
        "eurosat": (10, "eurosat_rgb"),
        "resisc45": (45, "resisc", "nwpu_resisc45"),
        "retinopathy": (5, "diabetic_retinopathy", "diabetic_retinopathy_detection"),
    },
    "structured": {
        "clevr_count": (8, "clevr_count_all"),
        "clevr_dist": (6, "clevr_closest_object_distance", "clevr_distance"),
        "dmlab": (6, "deepmind_lab"),
        "dsprites_loc": (16, "dsprites_label_x_position", "dsprites_x_position", "dsprites_location"),
        "dsprites_ori": (16, "dsprites_label_orientation", "dsprites_orientation"),
        "kitti": (4, "kitti_closest_vehicle_distance", "kitti_distance", "kitti_dist"),
        "smallnorb_azi": (18, "smallnorb_label_azimuth", "smallnorb_azimuth"),
        "smallnorb_ele": (9, "smallnorb_label_elevation", "smallnorb_elevation"),
    },
}

TASKS = {
    name: Task(name, classes, tuple(folders), group)
    for group, tasks in _TASKS.items()
    for name, (classes, *folders) in tasks.items()
}


def read_vtab1k(root: str | os.PathLike, task: str) -> Data:
    """A task of VTAB-1k: `train` is train800, `val` val200; the classes are called by their numbers.

    `task` is a name in `TASKS` or one that its folder may have.

    Raises:
        MissingDataError: no folder for the task in `root`, or none of its lists.
        ValueError: an unknown task, or anything else wrong with its lists and images, in one sentence.
    """
    found = find_task("VTAB-1k", task, TASKS)
    folder = find_folder(root, found)
    entries = {split: read_list(file) for split, file in find_lists(folder, _LISTS).items()}
    notes = [
        f"{folder / _LISTS[split]} lists {len(entries[split])} images, not {size}"
        for split, size in _SIZES.items()
        if len(entries[split]) != size
    ]
    splits = {
        split: list(zip(locate(folder, lines), numbered(lines, found.classes), strict=True))
        for split, lines in entries.items()
    }
    classes = [str(label) for label in range(found.classes)]
    return assemble(f"vtab1k/{found.name}", folder, splits, classes, _LISTS["val"], notes)
