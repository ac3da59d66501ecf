"""How do data sets lie on people's disks? Small ones of each layout, with real pictures, a colour for each class.

Every writer returns the folder to read from. Counts are images of a split; its labels are 0, 1, …, 0, 1, … in turn.
"""

import colorsys
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def pixels(label: int, classes: int, noise: np.random.Generator, size: int = 24) -> np.ndarray:
    """Noise around the class's hue, uint8 (size, size, 3)."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(label / classes, 0.7, 0.8))
    return noise.normal(colour, 40, (size, size, 3)).clip(0, 255).astype(np.uint8)


def save_picture(file: Path, label: int, classes: int, noise: np.random.Generator) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, classes, noise)).save(file)


def write_list(
    root: Path, file: str, folder: str, names: Sequence[str], count: int, noise: np.random.Generator
) -> None:
    """`file` in `root`, lines `path label`, and the pictures that it names, in `folder` below `root`."""
    lines = []
    for index in range(count):
        label = index % len(names)
        path = f"{folder}/{index:06}.jpg"
        save_picture(root / path, label, len(names), noise)
        lines.append(f"{path} {names[label]}\n")
    (root / file).write_text("".join(lines))


def write_lists(root: Path, names: Sequence[str], train: int = 40, val: int = 8, test: int = 12) -> Path:
    """train.txt, val.txt (unless `val` is 0) and test.txt with these labels."""
    noise = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val), ("test", test)):
        if count:
            write_list(root, f"{split}.txt", f"images/{split}", names, count, noise)
    return root


def write_vtab1k_task(
    root: Path, folder: str, classes: int, train: int = 40, val: int = 8, test: int = 12, used: int | None = None
) -> Path:
    """train800.txt, val200.txt and test.txt in a task's folder; `used`: of its classes, those that have images."""
    noise = np.random.default_rng(0)
    (root / folder).mkdir(parents=True)
    names = [str(label) for label in range(used or classes)]
    for split, count in (("train800", train), ("val200", val), ("test", test)):
        write_list(root / folder, f"{split}.txt", f"images/{split}", names, count, noise)
    return root


def write_fgvc_task(
    root: Path,
    folder: str,
    ids: Sequence[int | str],
    train: int = 40,
    val: int = 8,
    test: int = 12,
    images: str = "images",
) -> Path:
    """train.json, val.json (unless `val` is 0) and test.json with these class ids, the pictures in `images`."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val), ("test", test)):
        found = {}
        for index in range(count):
            label = index % len(ids)
            path = f"{ids[label]}/{split}_{index:04}.jpg"
            save_picture(root / folder / images / path, label, len(ids), noise)
            found[path] = ids[label]
        if found:
            (root / folder / f"{split}.json").write_text(json.dumps(found))
    return root


def write_domainnet(root: Path, domain: str, names: dict[int, str], train: int = 40, test: int = 12) -> Path:
    """A domain's two lists, with those of the 345 classes that `names` (label → folder) has."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        lines = []
        for index in range(count):
            label = list(names)[index % len(names)]
            path = f"{domain}/{names[label]}/{domain}_{label:03}_{split}{index:04}.jpg"
            save_picture(root / path, index % len(names), len(names), noise)
            lines.append(f"{path} {label}\n")
        (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return root


def planar(labels: Sequence[int], classes: int, noise: np.random.Generator) -> np.ndarray:
    """Pictures as CIFAR keeps them: uint8 (N, 3072), each row three planes of 32 by 32."""
    pictures = np.array([pixels(label, classes, noise, 32) for label in labels])
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2).reshape(len(labels), 3072))


def python2_pickle(found: dict[bytes, Any]) -> bytes:
    """What Python 2 and its NumPy wrote: the real files are such pickles."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def write(value: Any) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        kind = b"cnumpy\ndtype\n" + text(value.dtype.str[1:].encode()) + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        kind += b"NNN" + write(-1) + write(-1) + b"K\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        shape = b"(" + b"".join(map(write, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + kind + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(write(key) + write(value) for key, value in found.items()) + b"u."


def write_cifar(
    root: Path,
    name: str,
    train: int = 40,
    test: int = 20,
    batches: int = 1,
    dump: Callable[[dict[bytes, Any]], bytes] = python2_pickle,
) -> Path:
    """CIFAR-10 ("cifar10") with so many data batches, or CIFAR-100 ("cifar100"): `train` images in each file of train.

    CIFAR-100's superclasses are the labels' tens.
    """
    noise = np.random.default_rng(0)
    ten = name == "cifar10"
    classes = 10 if ten else 100
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    files = dict.fromkeys([f"data_batch_{number + 1}" for number in range(batches)] if ten else ["train"], train)
    for file, count in {**files, "test_batch" if ten else "test": test}.items():
        labels = [index % classes for index in range(count)]
        found = {b"data": planar(labels, classes, noise), b"labels" if ten else b"fine_labels": labels}
        if not ten:
            found[b"coarse_labels"] = [label // 10 for label in labels]
        (folder / file).write_bytes(dump(found))
    names = [f"class {label}".encode() for label in range(classes)]
    meta = "batches.meta" if ten else "meta"
    (folder / meta).write_bytes(dump({b"label_names" if ten else b"fine_label_names": names}))
    return root


def pickle_at(protocol: int) -> Callable[[Any], bytes]:
    """`pickle.dumps` at a protocol, as a file that was written again by today's Python holds it."""
    return lambda found: pickle.dumps(found, protocol=protocol)


def lengths(data) -> list[int]:
    return [len(data.train), len(data.val), len(data.test)]


def labels_of(dataset) -> list[int]:
    return [dataset[index][1] for index in range(len(dataset))]


def refused(match: str, read, *args, kind=ValueError, **options) -> None:
    """One sentence, of just this type of error."""
    with pytest.raises(ValueError, match=match) as error:
        read(*args, **options)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
