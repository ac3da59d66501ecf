"""How do timm's data sets become ours? Those of torchvision, Hugging Face, TensorFlow Datasets and WebDataset.

    torch/image_folder, torch/cifar10, hfds/NAME      read in any order
    hfids/NAME, tfds/NAME, wds/ANY                    streams: read in their own order, each worker a share

Names and splits are those of `timm.data.create_dataset`. Nothing is downloaded, and no loading script is run.
"""

import contextlib
import importlib.util
import itertools
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .catalog import TIMM_PREFIXES
from .images import open_rgb, to_rgb
from .lists import read_names
from .samples import Data, existing_folder, held_out_note, hold_out_rows

# timm and torchvision open pictures themselves, and Pillow would run Ghostscript for one that is PostScript.
EpsImagePlugin.gs_binary = False

# A package that timm needs for a prefix, and what it is called where packages are installed from.
_PACKAGES = {
    "hfds/": ("datasets", "datasets"),
    "hfids/": ("datasets", "datasets"),
    "tfds/": ("tensorflow_datasets", "tensorflow-datasets and tensorflow"),
    "wds/": ("webdataset", "webdataset"),
}
_CACHED = ("hfds/", "hfids/", "tfds/")  # without a root their package's own cache is looked through


def read_timm(
    name: str,
    root: str | os.PathLike | None,
    train_split: str,
    val_split: str | None,
    test_split: str,
    batch_size: int = 1,
) -> Data:
    """A data set by timm's name for it, such as "torch/image_folder", from what is on this machine already.

    Streams give `IterableDataset`s with a length; that of train draws anew in each pass, by PyTorch's seed. Without
    `val_split` 15 % of train is held out, by row. Where a stream does not name its classes, classes.txt in `root` may.

    Args:
        batch_size: of the loader; with the loader's own a stream fills all batches of train but the last.
    Raises:
        MissingDataError: `root` is not there.
        ValueError: anything that timm or the package behind it says, or that is wrong with its labels and splits.
    """
    first, slash, _ = name.partition("/")
    prefix = first.lower() + slash
    if prefix not in TIMM_PREFIXES:
        raise ValueError(f"data set {name!r} is none of timm's, which begin with {', '.join(TIMM_PREFIXES)}")
    module, package = _PACKAGES.get(prefix, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{name} needs a package that is not installed: {package}")
    if root is None and prefix not in _CACHED:
        raise ValueError(f"{name} needs the folder that it lies in")
    # An absolute path cannot be mistaken for one of webdataset's `pipe:` commands.
    root = None if root is None else str(existing_folder(root).absolute())
    wanted = {"train": train_split, "val": val_split, "test": test_split}
    wanted = {split: text for split, text in wanted.items() if text is not None}
    found = {split: _open(name, root, text) for split, text in wanted.items()}
    for split, text in wanted.items():
        if not len(found[split]):
            raise ValueError(f"{name} has no images in its split {text!r}, or does not say how many")
        if _class_names(found[split]) != _class_names(found["train"]):
            raise ValueError(f"{name} has other classes in its split {text!r} than in {train_split!r}")
    _refuse_same(name, prefix, wanted, found)
    if isinstance(found["train"], IterableDataset):
        data = _streams(name, root, wanted, found, batch_size)
    else:
        data = _rows(name, wanted, found)
    if len(data.classes) < 2:
        raise ValueError(f"{name} has only one class ({data.classes[0]!r}): training a classifier needs at least two")
    return data


def _open(name: str, root: str | None, split: str, **options: Any) -> Any:
    """timm's data set, its pictures as they come; every error as one sentence."""
    try:
        with _offline():
            found = create_dataset(name, root=root, split=split, download=False, input_img_mode="", **options)
    except Exception as error:
        raise ValueError(f"timm cannot read {name}, split {split!r}: {_sentence(error)}") from error
    for shard in getattr(getattr(getattr(found, "reader", None), "split_info", None), "filenames", ()):
        path = os.path.normpath(shard)
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise ValueError(f"{name}, split {split!r}: {shard!r} leaves {root}: expected a file inside it")
    return found


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}…" if len(text) > 300 else text or type(error).__name__


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face's library neither downloads nor runs loading scripts: timm has no argument for that."""
    if importlib.util.find_spec("datasets") is None:
        yield
        return
    from datasets import config

    settings = {"HF_HUB_OFFLINE": True, "HF_DATASETS_OFFLINE": True, "HF_DATASETS_TRUST_REMOTE_CODE": False}
    before = {key: getattr(config, key) for key in settings if hasattr(config, key)}
    for key in before:
        setattr(config, key, settings[key])
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def _refuse_same(name: str, prefix: str, wanted: dict[str, str], found: dict[str, Any]) -> None:
    """Raises `ValueError` where two splits are the same images.

    torchvision's sets take any name but "train" for their test set, and a folder without folders for its splits as all
    of them.
    """
    for first, second in itertools.combinations(wanted, 2):
        same = wanted[first] == wanted[second]
        if prefix == "torch/" and not same:
            places = [
                [getattr(found[split], key, None) for key in ("root", "train", "split", "version")]
                for split in (first, second)
            ]
            same = places[0] == places[1]
        if same:
            raise ValueError(
                f"--{first}-split {wanted[first]!r} and --{second}-split {wanted[second]!r} are the same images of "
                f"{name}: expected different ones"
            )


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """What a data set of timm's says its classes are called, if it does."""
    names = getattr(dataset, "classes", None)
    if names is None:
        index = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
        by_label = {label: name for name, label in index.items()}
        names = [by_label.get(label, str(label)) for label in range(max(by_label, default=-1) + 1)]
    # ImageNet has several names for a class.
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names) or None


def _rows(name: str, wanted: dict[str, str], found: dict[str, Any]) -> Data:
    """The data set from those of timm's that give any image asked for."""
    wheres = {split: f"{name}, split {text!r}" for split, text in wanted.items()}
    labels = {split: _carried_labels(dataset) for split, dataset in found.items()}
    classes = _class_names(found["train"])
    if labels["train"] is None and (classes is None or "val" not in found):
        labels["train"] = _decoded_labels(found["train"], wheres["train"])
    if classes is None:
        classes = tuple(str(label) for label in range(max(_label(name, label) for label in labels["train"]) + 1))
    for split, carried in labels.items():
        if carried is not None:
            where = wheres[split]
            labels[split] = [_label(f"{where}, image {row}", label, len(classes)) for row, label in enumerate(carried)]
    splits = {split: Rows(dataset, wheres[split], len(classes)) for split, dataset in found.items()}
    notes = []
    if "val" not in splits:
        splits["train"], splits["val"] = hold_out_rows(name, splits["train"], labels["train"], classes)
        notes.append(held_out_note("--val-split"))
    return Data(name, classes, **splits, notes=notes)


def _source(dataset: Any) -> Any:
    """What gives (picture or file, label) for a row.

    timm's own wrapper hands out the next image where one cannot be decoded; the reader in it does not.
    """
    return getattr(dataset, "reader", dataset)


def _carried_labels(dataset: Any) -> list[Any] | None:
    """The labels, if there is a way to them that decodes no picture."""
    source, count = _source(dataset), len(dataset)
    ways = (
        lambda: torch.as_tensor(dataset.targets).tolist(),  # torchvision's
        lambda: [label for label, _ in dataset.index],  # its INaturalist
        lambda: list(source.iter_targets()),  # timm's readers
    )
    for way in ways:
        # Whatever a data set has under such a name: QMNIST's targets and INaturalist's index can be more, or other
        # things, than the labels that it gives.
        with contextlib.suppress(Exception):
            labels = way()
            if len(labels) == count and all(labels[row] == source[row][1] for row in {0, count // 2, count - 1}):
                return labels
    return None


def _decoded_labels(dataset: Any, where: str) -> list[Any]:
    source = _source(dataset)
    try:
        return [source[row][1] for row in range(len(source))]
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {_sentence(error)}") from error


def _label(where: str, label: Any, classes: int | None = None) -> int:
    """The label as an int; `ValueError` where it is none, or none of a class."""
    try:
        number = operator.index(label)
    except TypeError as error:
        raise ValueError(f"{where}: a label of type {type(label).__name__} is not a whole number") from error
    if classes is not None and not 0 <= number < classes:
        raise ValueError(f"{where}: label {number} is not from 0 to {classes - 1}")
    return number


def _rgb(picture: Any) -> Image.Image:
    """RGB from what timm's data sets give: Pillow's images, TensorFlow's arrays, open files."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return to_rgb(ImageOps.exif_transpose(picture))
    with picture:
        return open_rgb(picture)


class Rows(Dataset):
    """(RGB picture, int) pairs of a data set of timm's."""

    def __init__(self, dataset: Any, where: str, classes: int):
        self.source = _source(dataset)
        self.where = where
        self.classes = classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = f"{self.where}, image {index}"
        try:
            picture, label = self.source[index]
            picture = _rgb(picture)
        except Exception as error:
            raise OSError(f"{where} cannot be read: {_sentence(error)}") from error
        return picture, _label(where, label, self.classes)


def _streams(name: str, root: str | None, wanted: dict[str, str], found: dict[str, Any], batch_size: int) -> Data:
    """The data set from those of timm's that give images in their own order."""
    if "val" not in wanted:
        raise ValueError(
            f"--val-split must name a split of {name}, such as 'validation': val cannot be held out of a stream"
        )
    classes = _class_names(found["train"])
    if classes is None:
        file = None if root is None else Path(root) / "classes.txt"
        if file is None or not file.exists():
            raise ValueError(
                f"{name} does not say what its classes are: expected classes.txt in its folder, a name a line"
            )
        classes = read_names(file)
    streams = {
        split: Stream(name, root, text, len(found[split]), len(classes), batch_size if split == "train" else None)
        for split, text in wanted.items()
    }
    return Data(name, classes, **streams)


class Stream(IterableDataset):
    """(RGB picture, int) pairs of a stream of timm's, opened anew for each pass and in each worker.

    Opened once it would stay bound to the worker that first read it, and to the order of that pass.

    Args:
        length: images in it; workers together give as many.
        batch_size: None gives each image once, in order; a number shuffles, and deals whole batches to the workers.
    """

    def __init__(self, name: str, root: str | None, split: str, length: int, classes: int, batch_size: int | None):
        self.name = name
        self.root = root
        self.split = split
        self.length = length
        self.classes = classes
        self.batch_size = batch_size
        self._passes = 0  # of this copy; a worker that is kept from one epoch to the next keeps its PyTorch seed too

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        worker = get_worker_info()
        options, count = {}, None
        if self.batch_size is not None:
            # All workers shuffle by one seed, for each takes its share of what was shuffled.
            seed = torch.randint(2**31, ()).item() if worker is None else worker.seed - worker.id + self._passes
            options = {"is_training": True, "batch_size": self.batch_size, "seed": seed % 2**31}
            count = self._share(0, 1) if worker is None else self._share(worker.id, worker.num_workers)
            self._passes += 1
        where = f"{self.name}, split {self.split!r}"
        stream = _open(self.name, self.root, self.split, **options) if count != 0 else ()
        try:
            for picture, label in itertools.islice(stream, count):
                yield _rgb(picture), _label(where, label, self.classes)
        except ValueError:
            raise
        except Exception as error:
            raise OSError(f"{where} cannot be read: {_sentence(error)}") from error

    def _share(self, worker: int, workers: int) -> int:
        """How many images a worker gives: batch b is that of worker b % workers, and the last one may be smaller."""
        batches = -(-self.length // self.batch_size)
        last = self.length - (batches - 1) * self.batch_size
        mine = len(range(worker, batches, workers))
        ends = mine > 0 and (batches - 1) % workers == worker
        return mine * self.batch_size - (self.batch_size - last if ends else 0)
