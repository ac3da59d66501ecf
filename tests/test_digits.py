"""Are the real digits split once and for all, and drawn as the backbone expects them?"""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vitadapter_ext.data.digits import SPLITS, Digits, split_indices

# Of the three lists of rows in turn, as little-endian int64. It must never change: published numbers stand on it.
SPLIT_SHA256 = "e0eea32a529eac4982b69a84c34a48f4bad5f2eaabb9274ba9f5361c50aa9b2b"


def test_split_is_the_committed_one():
    rows = split_indices()
    assert {name: len(part) for name, part in rows.items()} == SPLITS == {"train": 1000, "val": 297, "test": 500}
    joined = np.concatenate([rows[name] for name in ("train", "val", "test")]).astype("<i8")
    assert hashlib.sha256(joined.tobytes()).hexdigest() == SPLIT_SHA256


def test_splits_are_disjoint_and_complete():
    joined = np.concatenate(list(split_indices().values()))
    assert sorted(joined.tolist()) == list(range(1797))


def test_no_picture_is_in_two_splits():
    """Two rows with the same pixels would leak from training into test."""
    images = load_digits().images
    seen = [{images[row].tobytes() for row in rows} for rows in split_indices().values()]
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])


@pytest.mark.parametrize("split", SPLITS)
def test_split_is_stratified(split):
    labels = load_digits().target
    here = np.bincount(labels[split_indices()[split]], minlength=10)
    share = np.bincount(labels) * SPLITS[split] / len(labels)
    assert np.abs(here - share).max() <= 2


@pytest.mark.parametrize("split", SPLITS)
def test_items(split):
    digits = Digits(split)
    image, label = digits[0]
    assert len(digits) == SPLITS[split] == len(digits.targets)
    assert image.mode == "RGB" and image.size == (32, 32) and isinstance(label, int)
    assert digits.classes == tuple("0123456789")
    assert set(digits.targets) == set(range(10))
    row = split_indices()[split][0]
    assert label == load_digits().target[row]
    # Enlarging is smooth and keeps the polarity: shrinking back gives the counts of ink.
    back = np.asarray(image.convert("L"), float).reshape(8, 4, 8, 4).mean((1, 3)) * 16 / 255
    assert np.corrcoef(back.ravel(), load_digits().images[row].ravel())[0, 1] > 0.95


def test_transform_is_applied():
    image, label = Digits("val", transform=lambda picture: picture.size)[5]
    assert image == (32, 32) and label == Digits("val").targets[5]


def test_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown split 'tets' of the digits: known: train, val, test"):
        Digits("tets")
