"""Which data set does a name mean, and which of them make a suite? `check`, `SUITES`, and `read`, which reads one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._text import unknown
from . import domainnet, fgvc, vtab1k
from .samples import Data, find_task

# Settings of the VTAB protocol: the last epoch of a training on all 1,000 images, of whole pictures, and nothing that
# would change what a task asks for, such as where an object is or how it is turned.
_VTAB = {"retrain": True, "select": "last", "augmentation": "none", "squash": True}


@dataclass(frozen=True)
class Suite:
    """Tasks that are run and tabled together.

    Attributes:
        groups: of each task; a suite of one group has only one mean.
        protocol: settings that hold for its tasks unless a recipe or the caller says otherwise.
    """

    groups: dict[str, str]
    protocol: dict[str, Any]


SUITES = {
    "vtab1k": Suite({name: task.group for name, task in vtab1k.TASKS.items()}, _VTAB),
    "fgvc": Suite(dict.fromkeys(fgvc.TASKS, "fine-grained"), {}),
    "domainnet": Suite(dict.fromkeys(domainnet.TASKS, "domains"), {}),
    # Written out, for importing its module takes a second.
    "minitab": Suite(
        {
            **dict.fromkeys(("digits", "greek", "cyrillic"), "natural"),
            **dict.fromkeys(("scans", "blackletter"), "specialized"),
            **dict.fromkeys(("orientation", "counting", "position"), "structured"),
        },
        _VTAB,
    ),
}
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # how names begin that timm's `create_dataset` reads

_TASKS = {"vtab1k": vtab1k.TASKS, "fgvc": fgvc.TASKS, "domainnet": domainnet.TASKS}
_CIFAR = ("cifar10", "cifar100")
_IN_THE_PACKAGE = ("digits", "minitab")


def is_timms(name: str | None) -> bool:
    """Whether a name is one of timm's, such as "torch/image_folder" or "hfds/user/birds"."""
    return name is not None and name.startswith(TIMM_PREFIXES)


def check(name: str | None, root: str | None) -> None:
    """Raises a `ValueError` for a data set that nobody knows, or whose root is missing or has no use."""
    if name is None or is_timms(name):
        return
    family, _, task = name.partition("/")
    if family in _TASKS:
        find_task(family, task, _TASKS[family])
    elif family in SUITES:
        if task not in SUITES[family].groups:
            raise unknown(f"{family} task", task, SUITES[family].groups)
    elif name not in ("digits", *_CIFAR):
        families = [f"{suite}/TASK" for suite in SUITES] + [f"{prefix}NAME" for prefix in TIMM_PREFIXES]
        raise unknown("dataset", name, ["digits", *_CIFAR, *families])
    if family in _IN_THE_PACKAGE and root is not None:
        raise ValueError(f"--dataset {name} is in the package and takes no --data, got {root}")
    if family not in _IN_THE_PACKAGE and root is None:
        raise ValueError(f"--dataset {name} needs --data: the folder that holds it")


def protocol(name: str | None) -> dict[str, Any]:
    """The settings that a data set brings, unless a recipe or the caller says otherwise."""
    suite = SUITES.get((name or "").partition("/")[0])
    return dict(suite.protocol) if suite else {}


def name_of(dataset: str | None, root: str | os.PathLike | None) -> str:
    """A short name of a data set, for people and for folders."""
    return dataset or ("digits" if root is None else Path(root).resolve().name)


def read(dataset: str | None, root: str | os.PathLike | None, **options: Any) -> Data:
    """The data set of this name under the root; without a name the folder itself, without both scikit-learn's digits.

    Args:
        options: of `timm_datasets.read_timm`, for timm's data sets.
    Raises:
        MissingDataError: there is no such data set under the root.
        ValueError: it is there but cannot be used; one sentence says why.
    """
    check(dataset, root)
    # Imported where they are used: together these take three seconds.
    family, _, task = (dataset or "").partition("/")
    if dataset == "digits" or (dataset is None and root is None):
        from .digits import read_digits

        return read_digits()
    if dataset is None:
        from .folder import read_folder
        from .lists import read_lists

        return read_lists(root) if (Path(root) / "train.txt").is_file() else read_folder(root)
    if is_timms(dataset):
        from .timm_datasets import read_timm

        return read_timm(dataset, root, **options)
    if dataset in _CIFAR:
        from .cifar import read_cifar

        return read_cifar(root, dataset)
    if family == "minitab":
        from .minitab import read_minitab

        return read_minitab(task)
    readers = {"vtab1k": vtab1k.read_vtab1k, "fgvc": fgvc.read_fgvc, "domainnet": domainnet.read_domainnet}
    return readers[family](root, task)
