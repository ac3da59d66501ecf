"""What does the embedded backbone adapt to? Real handwritten digits that scikit-learn carries, with one fixed split.

1,797 pictures of 8 by 8 pixels with 17 grey levels, white ink on black (E. Alpaydin and C. Kaynak, "Optical Recognition
of Handwritten Digits", UCI, 1998; scikit-learn ships its test part). They come here as 32 by 32 RGB pictures.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from .samples import Data

SPLITS = {"train": 1000, "val": 297, "test": 500}  # images in each
SIZE = 32  # pixels of a picture, both ways


def read_digits() -> Data:
    """All three splits."""
    train, val, test = (Digits(split) for split in SPLITS)
    return Data("digits", Digits.classes, train, val, test)


def split_indices() -> dict[str, np.ndarray]:
    """The rows of `load_digits` in each split: disjoint, together all, each class's share right to two images."""
    labels = load_digits().target
    # RandomState's stream is frozen for good (NumPy NEP 19), so the split is the same with every version.
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class: taking evenly along it is stratified
    test, rest = _take_evenly(order, SPLITS["test"])
    val, train = _take_evenly(rest, SPLITS["val"])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def _take_evenly(order: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` entries at even distances along `order`, and the others."""
    steps = np.arange(len(order) + 1) * count // len(order)
    taken = np.diff(steps) == 1
    return order[taken], order[~taken]


class Digits(Dataset):
    """The digits of one split ("train", "val" or "test") as (picture, label) pairs.

    A picture is an RGB `PIL.Image` of 32 by 32 pixels, or what `transform` makes of it; a label is an int from 0 to 9,
    an index into `classes`. Raises `ValueError` for any other split.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, transform: Callable[[Image.Image], Any] | None = None):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the digits: known: {', '.join(SPLITS)}")
        rows = split_indices()[split]
        data = load_digits()
        self.images = [_picture(counts) for counts in data.images[rows]]
        self.targets = data.target[rows].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _picture(counts: np.ndarray) -> Image.Image:
    """Ink counts (8, 8) from 0 to 16 as a picture like those of the pretraining: white on black, enlarged smoothly."""
    grey = Image.fromarray(np.round(counts * (255 / 16)).astype(np.uint8))
    return grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")
