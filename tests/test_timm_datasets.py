"""Do timm's data sets become ours? torchvision's folders, readers, and streams."""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from tests.layouts import (
    labels_of,
    lengths,
    refused,
    save_picture,
)
from vitadapter_ext.data import timm_datasets
from vitadapter_ext.data.samples import MissingDataError
from vitadapter_ext.data.timm_datasets import read_timm


def write_folders(root: Path, names=("a", "b"), **counts: int) -> Path:
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(names):
            for index in range(count):
                save_picture(root / split / name / f"{index}.jpg", label, len(names), noise)
    return root


def write_mnist(root: Path, train: int = 20, test: int = 10) -> Path:
    """MNIST's own files; its images are one grey level, ten times the label."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None] * np.uint8(10), (count, 28, 28))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    return root


def test_torchvisions_folders(tmp_path):
    write_folders(tmp_path, train=20, val=5, test=6)
    data = read_timm("torch/image_folder", tmp_path, "train", "val", "test")
    assert (data.name, data.classes, data.notes) == ("torch/image_folder", ("a", "b"), [])
    assert lengths(data) == [40, 10, 12]
    picture, label = data.test[11]
    assert (picture.mode, type(label), label) == ("RGB", int, 1)


def test_without_a_val_split_some_of_train_is_held_out_by_row(tmp_path):
    write_folders(tmp_path, train=20, test=6)
    data = read_timm("torch/image_folder", str(tmp_path), "train", None, "test")
    assert lengths(data) == [34, 6, 12]
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(40))
    assert labels_of(data.val) == [0, 0, 0, 1, 1, 1]
    assert data.notes == ["no --val-split: 15% of train is held out to choose the best epoch"]


def test_grey_pictures_become_rgb(tmp_path):
    data = read_timm("torch/mnist", write_mnist(tmp_path), "train", None, "test")
    assert len(data.classes) == 10 and lengths(data) == [10, 10, 10]
    picture, label = data.test[7]
    assert (picture.mode, label, picture.getpixel((3, 3))) == ("RGB", 7, (70, 70, 70))


def test_two_splits_are_never_the_same_images(tmp_path):
    write_folders(tmp_path / "folders", train=4)
    write_mnist(tmp_path)
    same = "--val-split 'val' and --test-split 'test' are the same images of torch/mnist"
    refused(same, read_timm, "torch/mnist", tmp_path, "train", "val", "test")
    refused(
        "--train-split 'train' and --test-split 'train'", read_timm, "torch/mnist", tmp_path, "train", None, "train"
    )
    # Without folders for the splits torchvision takes the folder itself, for each of them.
    plain_folder = tmp_path / "folders" / "train"
    refused("are the same images", read_timm, "torch/image_folder", plain_folder, "train", None, "test")


def test_splits_with_other_classes_are_refused(tmp_path):
    write_folders(tmp_path, train=4)
    write_folders(tmp_path, names=("b", "c"), test=4)
    refused("other classes in its split 'test'", read_timm, "torch/image_folder", tmp_path, "train", None, "test")


def test_what_is_not_there_is_said_in_one_sentence(tmp_path, monkeypatch):
    refused("does not exist", read_timm, "torch/mnist", tmp_path / "x", "train", None, "test", kind=MissingDataError)
    refused("torch/mnist needs the folder", read_timm, "torch/mnist", None, "train", None, "test")
    refused(
        "cannot read torch/mnist, split 'train': .*not found", read_timm, "torch/mnist", tmp_path, "train", None, "test"
    )
    refused("Unknown torchvision", read_timm, "torch/nothing", tmp_path, "train", None, "test")
    for name in ("mnist", "torch"):
        refused("is none of timm's, which begin with torch/, hfds/", read_timm, name, tmp_path, "train", None, "test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("hfds/x", "datasets"), ("hfids/x", "datasets"), ("tfds/x", "tensorflow"), ("wds/x", "webd")):
        refused(f"{name} needs a package .*: {package}", read_timm, name, tmp_path, "train", "val", "test")


def test_one_class_is_refused(tmp_path):
    write_folders(tmp_path, names=["a"], train=4, test=4)
    refused("only one class", read_timm, "torch/image_folder", tmp_path, "train", None, "test")


class Reader:
    """Gives files like timm's reader of Hugging Face's data sets."""

    def __init__(self, samples, class_to_idx=None):
        self.samples = samples
        self.class_to_idx = class_to_idx or {}

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return path.open("rb"), label


class Wrapped:
    """timm's `ImageDataset`, of which only the reader matters."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)


@pytest.fixture
def serve(monkeypatch):
    """Makes timm's factory return a given data set for each split; returns what it was called with."""
    asked = []

    def serve(make):
        def create_dataset(name, root, split, **options):
            asked.append({"name": name, "root": root, "split": split, **options})
            return make(split, **options)

        monkeypatch.setattr(timm_datasets, "create_dataset", create_dataset)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(timm_datasets, "_offline", contextlib.nullcontext)
        return asked

    return serve


def files_of(root: Path, labels) -> list:
    noise = np.random.default_rng(0)
    for index, label in enumerate(labels):
        save_picture(root / f"{index}.png", label if isinstance(label, int) else 0, 300, noise)
    return [(root / f"{index}.png", label) for index, label in enumerate(labels)]


def test_readers_files_become_pictures_and_nothing_is_downloaded(tmp_path, serve):
    samples = files_of(tmp_path, [0, 1, 2] * 4)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(samples[5][0])
    asked = serve(lambda split, **_: Wrapped(Reader(samples, {"b": 1, "a": 0, "c": 2})))
    data = read_timm("hfds/birds", None, "train", None, "test")
    assert data.classes == ("a", "b", "c") and lengths(data) == [9, 3, 12]
    picture, label = data.test[5]
    assert (picture.mode, picture.getpixel((0, 0)), label) == ("RGB", (255, 255, 255), 2)
    assert [(call["name"], call["root"], call["split"]) for call in asked] == [
        ("hfds/birds", None, split) for split in ("train", "test")
    ]
    # timm would make it RGB without a thought for what is transparent.
    assert all(call["download"] is False and call["input_img_mode"] == "" for call in asked)


def test_hugging_faces_library_is_offline_while_timm_asks_it(monkeypatch):
    library = types.ModuleType("datasets")
    library.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    library.config = types.SimpleNamespace(HF_HUB_OFFLINE=False, HF_DATASETS_TRUST_REMOTE_CODE=True)
    monkeypatch.setitem(sys.modules, "datasets", library)

    def create_dataset(*args, **options):
        raise RuntimeError(f"offline {library.config.HF_HUB_OFFLINE}, {library.config.HF_DATASETS_TRUST_REMOTE_CODE}")

    monkeypatch.setattr(timm_datasets, "create_dataset", create_dataset)
    refused("cannot read hfds/x, split 'train': offline True, False", read_timm, "hfds/x", None, "train", None, "test")
    assert vars(library.config) == {"HF_HUB_OFFLINE": False, "HF_DATASETS_TRUST_REMOTE_CODE": True}


def test_targets_that_are_not_the_labels_are_not_used(tmp_path, serve):
    class Odd(Wrapped):
        targets = [0, 0, 0, 0, 0, 0, 0, 0, 9]

    serve(lambda split, **_: Odd(Reader(files_of(tmp_path, [0, 1, 2] * 3))))
    assert read_timm("hfds/birds", None, "train", None, "test").classes == ("0", "1", "2")


def test_a_picture_that_cannot_be_decoded_is_not_replaced(tmp_path, serve):
    samples = files_of(tmp_path, [0, 1] * 4)
    serve(lambda split, **_: Wrapped(Reader(samples, {"a": 0, "b": 1})))
    data = read_timm("hfds/birds", None, "train", None, "test")
    samples[3][0].write_bytes(b"junk")
    with pytest.raises(OSError, match="hfds/birds, split 'test', image 3 cannot be read"):
        data.test[3]


def test_without_names_the_largest_label_counts(tmp_path, serve):
    serve(lambda split, **_: Wrapped(Reader(files_of(tmp_path, [0, 4] * 4))))
    assert read_timm("hfds/birds", None, "train", None, "test").classes == tuple("01234")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, "label -1 is not from 0 to 1"),
        (2, "label 2 is not from"),
        ("a", "type str is not a"),
        (None, "type NoneType"),
    ],
)
def test_labels_that_are_none_of_a_class_are_refused(tmp_path, serve, label, message):
    good, bad = files_of(tmp_path, [0, 1] * 4), files_of(tmp_path, [0, label])
    serve(lambda split, **_: Wrapped(Reader(good if split == "train" else bad, {"a": 0, "b": 1})))
    data = read_timm("hfds/birds", None, "train", None, "test")
    refused(f"split 'test', image 1: .*{message}", data.test.__getitem__, 1)


def test_labels_at_hand_are_checked_before_training(tmp_path, serve):
    class Listed(Reader):
        def iter_targets(self):
            return (label for _, label in self.samples)

    good, bad = files_of(tmp_path, [0, 1] * 4), files_of(tmp_path, [0, 1, -1, 1])
    serve(lambda split, **_: Wrapped(Listed(good if split == "train" else bad, {"a": 0, "b": 1})))
    refused("split 'test', image 2: label -1 is not from 0 to 1", read_timm, "hfds/birds", None, "train", None, "test")


class Streamed(IterableDataset):
    """Behaves like timm's streams: workers share the images; training goes round in a seeded order until it stops."""

    def __init__(self, count, class_to_idx, is_training=False, batch_size=1, seed=42, **_):
        self.reader = self
        self.class_to_idx = class_to_idx
        self.count = count
        self.training, self.batch_size, self.seed = is_training, batch_size, seed

    def __len__(self):
        return self.count

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rank, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = np.random.default_rng(self.seed).permutation(self.count) if self.training else np.arange(self.count)
        mine = order[rank::workers]
        if self.training:
            batches = -(-self.count // (workers * self.batch_size))
            mine = np.resize(mine, batches * self.batch_size)
        for index in mine:
            yield np.full((4, 4, 3), index, np.uint8), np.int64(index % 3)


def together(pairs) -> torch.Tensor:
    """(N, 2): what tells a picture from others, and its label."""
    return torch.tensor([(picture.getpixel((0, 0))[0], label) for picture, label in pairs])


COUNTS = {"train": 50, "val": 7, "test": 9}
NAMES = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_in_workers(serve, workers):
    asked = serve(lambda split, **options: Streamed(COUNTS[split], NAMES, **options))
    data = read_timm("tfds/birds", None, "train", "val", "test", batch_size=8)
    assert isinstance(data.train, IterableDataset)
    assert data.classes == ("a", "b", "c") and lengths(data) == [50, 7, 9]
    assert all(call["download"] is False for call in asked)
    train = DataLoader(data.train, 8, num_workers=workers, collate_fn=together, persistent_workers=workers > 0)
    passes = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        batches = list(train)
        assert sorted(len(found) for found in batches) == [2] + [8] * (len(train) - 1)
        passes.append(torch.cat(batches))
    assert (passes[0][:, 0] % 3 == passes[0][:, 1]).all()
    assert not torch.equal(*passes) and not torch.equal(passes[0][:, 0].sort().values, passes[0][:, 0])
    # Of two workers, each with half of the images, one is asked for 26 and the other for 24.
    assert len(passes[0][:, 0].unique()) == (49 if workers == 2 else 50)
    for _ in range(2):
        test = torch.cat(list(DataLoader(data.test, 8, num_workers=workers, collate_fn=together)))
        assert sorted(test[:, 0].tolist()) == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_drawn_by_pytorchs_seed(serve, workers):
    serve(lambda split, **options: Streamed(COUNTS[split], NAMES, **options))
    found = []
    for seed in (5, 5, 6):
        data = read_timm("tfds/birds", None, "train", "val", "test", batch_size=8)
        train = DataLoader(data.train, 8, num_workers=workers, collate_fn=together, persistent_workers=workers > 0)
        torch.manual_seed(seed)
        found.append([torch.cat(list(train)) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])  # the second pass, with the workers of the first


def test_streams_without_what_they_need_are_refused(tmp_path, serve):
    serve(lambda split, **options: Streamed(COUNTS[split], {}, **options))
    refused("--val-split must name a split of tfds/x", read_timm, "tfds/x", tmp_path, "train", None, "test")
    refused("tfds/x does not say what its classes are", read_timm, "tfds/x", tmp_path, "train", "val", "test")
    refused("does not say what its classes are", read_timm, "tfds/x", None, "train", "val", "test")
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    data = read_timm("tfds/x", tmp_path, "train", "val", "test")
    assert data.classes == ("x", "y", "z")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    refused("label 2 is not from 0 to 1", list, read_timm("tfds/x", tmp_path, "train", "val", "test").test)
    serve(lambda split, **options: Streamed(0, NAMES, **options))
    refused("tfds/x has no images in its split 'train'", read_timm, "tfds/x", None, "train", "val", "test")


def test_a_stream_that_breaks_says_so_in_one_sentence(serve):
    class Breaking(Streamed):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 2)
            raise RuntimeError("two\nlines")

    serve(lambda split, **options: Breaking(COUNTS[split], NAMES, **options))
    data = read_timm("tfds/x", None, "train", "val", "test")
    with pytest.raises(OSError, match="tfds/x, split 'test' cannot be read: two lines"):
        list(data.test)
