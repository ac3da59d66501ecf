"""Are CIFAR's pickles read, of every age, and does nothing in them run?"""

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.layouts import (
    labels_of,
    lengths,
    pickle_at,
    planar,
    python2_pickle,
    refused,
    write_cifar,
)
from vitadapter_ext.data.cifar import read_cifar
from vitadapter_ext.data.samples import MissingDataError


@pytest.mark.parametrize("dump", [python2_pickle, *map(pickle_at, (2, 4, 5))], ids=["python2", "2", "4", "5"])
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_pickles_of_every_age(tmp_path, name, classes, dump):
    data = read_cifar(write_cifar(tmp_path, name, train=3 * classes, test=2 * classes, dump=dump), name)
    assert (data.name, lengths(data)) == (name, [2 * classes, classes, 2 * classes])
    assert data.classes == tuple(f"class {label}" for label in range(classes))
    assert labels_of(data.test) == 2 * list(range(classes))
    noise = np.random.default_rng(0)
    rows = planar([index % classes for index in range(3 * classes)], classes, noise)
    for split in (data.train, data.val):
        picture, label = split[classes // 2]
        row = split.indices[classes // 2]
        assert (picture.mode, label) == ("RGB", row % classes)
        assert np.array_equal(np.asarray(picture), rows[row].reshape(3, 32, 32).transpose(1, 2, 0))
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(3 * classes))


def test_cifar_may_lie_in_the_folder_itself(tmp_path):
    write_cifar(tmp_path, "cifar100", train=200)
    assert lengths(read_cifar(tmp_path / "cifar-100-python", "CIFAR-100")) == [100, 100, 20]


def test_the_batches_that_are_there_are_read(tmp_path):
    write_cifar(tmp_path, "cifar10", train=20, batches=4)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").unlink()
    data = read_cifar(tmp_path, "cifar10")
    assert len(data.train) + len(data.val) == 60


def test_without_names_the_classes_are_numbers(tmp_path):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "batches.meta").unlink()
    data = read_cifar(tmp_path, "cifar10")
    assert data.classes == tuple("0123456789") and "no batches.meta" in data.notes[-1]


class Touches:
    """Unpickled by Python's own unpickler it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_cifar_file_runs_nothing(tmp_path):
    write_cifar(tmp_path, "cifar10")
    made = tmp_path / "made"
    content = pickle.dumps({b"data": Touches(made), b"labels": []})
    pickle.loads(content)
    assert made.exists()  # so that the pickle is one that would
    made.unlink()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    refused("data_batch_1 wants to run .*Path.*, which no CIFAR file needs: refused", read_cifar, tmp_path, "cifar10")
    assert not made.exists()


HOSTILE = {
    "os.system": b"cos\nsystem\n(S'true'\ntR.",
    "builtins.eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
    "numpy.core.multiarray.scalar": b"cnumpy.core.multiarray\nscalar\n.",
    "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n.",
    "_codecs.decode": b"c_codecs\ndecode\n.",
    "_codecs.encode with 'rot13'": b"c_codecs\nencode\n(Va\nVrot13\ntR.",
    "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_what_the_format_needs_is_let_in(tmp_path, name):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(HOSTILE[name])
    refused(re.escape(f"test_batch wants to run {name}, which"), read_cifar, tmp_path, "cifar10")


def test_a_pickle_cannot_change_what_stands_in_for_numpy(tmp_path):
    """State set on the function that makes arrays, instead of on an array."""
    write_cifar(tmp_path, "cifar10")
    for target in (b"cnumpy\nndarray\n", b"c_codecs\nencode\n"):
        content = b"\x80\x02" + target + b"}U\x08__call__I1\nsb."
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
        refused("data_batch_1 is cut short or no pickle", read_cifar, tmp_path, "cifar10")
    write_cifar(tmp_path / "again", "cifar10")
    assert lengths(read_cifar(tmp_path / "again", "cifar10")) == [30, 10, 20]


def batch(data=None, labels=None) -> bytes:
    data = np.zeros((20, 3072), np.uint8) if data is None else data
    return pickle.dumps({b"data": data, b"labels": 2 * list(range(10)) if labels is None else labels}, protocol=2)


SPOILED_BATCHES = {
    "cut short": (batch()[:-2000], "data_batch_1 is cut short or no pickle"),
    "empty": (b"", "is cut short or no pickle"),
    "no pickle": (b"\x1f\x8b gzip", "is cut short or no pickle"),
    "a list": (pickle.dumps([1]), "holds no dictionary"),
    "no data": (pickle.dumps({b"labels": []}), "has no array of pixels"),
    "data as bytes": (batch(b"\0" * 3072, [0]), "has no array of pixels"),
    "too narrow": (batch(np.zeros((20, 3071), np.uint8)), r"data is not an array of bytes \(N, 3072\)"),
    "one axis": (batch(np.zeros(3072, np.uint8), [0]), "has no array of pixels"),
    "no rows": (batch(np.zeros((0, 3072), np.uint8), []), "has no array|is not an array|wants to run"),
    "floats": (batch(np.zeros((20, 3072), np.float32)), "data is not an array of bytes"),
    "signed": (batch(np.zeros((20, 3072), np.int8)), "data is not an array of bytes"),
    "objects": (batch(np.full((20, 3072), None)), "data is not an array of bytes"),
    "too few labels": (batch(labels=[0, 1]), "has 20 images but 2 labels"),
    "no labels": (batch(labels=7), "has no list labels"),
    "label 10": (batch(labels=[10] * 20), "data_batch_1, image 0: label 10 is not from 0 to 9"),
    "label -1": (batch(labels=[0] * 19 + [-1]), "data_batch_1, image 19: label -1 is not from 0 to 9"),
    "a text": (batch(labels=[0, "a"] * 10), "image 1: a label of type str is not from 0 to 9"),
    "a truth": (batch(labels=[True] * 20), "image 0: a label of type bool"),
    "a lonely class": (batch(labels=[0] * 19 + [1]), "class 'class 1' in .* with one training image"),
    "rows that are no whole number": (
        batch().replace(b"K\x14M\x00\x0c", b"G" + struct.pack(">d", 20.0) + b"M\x00\x0c"),
        "data is not an array of bytes",
    ),
    "lying about its rows": (
        batch().replace(b"K\x14M\x00\x0c", b"K\x15M\x00\x0c"),
        "data is not an array of bytes",
    ),
}


@pytest.mark.parametrize("case", SPOILED_BATCHES)
def test_spoiled_batches_are_refused_in_one_sentence(tmp_path, case):
    content, message = SPOILED_BATCHES[case]
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    refused(message, read_cifar, tmp_path, "cifar10")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_columns_first(tmp_path, protocol):
    write_cifar(tmp_path, "cifar10")
    rows = planar(2 * list(range(10)), 10, np.random.default_rng(1))
    content = pickle.dumps({"data": np.asfortranarray(rows), "labels": 2 * list(range(10))}, protocol=protocol)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    picture, _ = read_cifar(tmp_path, "cifar10").test[7]
    assert np.array_equal(np.asarray(picture), rows[7].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("names", [["a"] * 10, ["a", "b"], "abcdefghij", [1] * 10, None])
def test_names_that_do_not_fit_are_refused(tmp_path, names):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    refused("batches.meta(: label_names is not 10| has no list label_names)", read_cifar, tmp_path, "cifar10")


def test_cifar_that_is_not_there(tmp_path):
    write_cifar(tmp_path, "cifar10")
    refused("neither .* has the training images, train$", read_cifar, tmp_path, "cifar100", kind=MissingDataError)
    refused("does not exist", read_cifar, tmp_path / "nowhere", "cifar10", kind=MissingDataError)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    refused("has training images but no test_batch", read_cifar, tmp_path, "cifar10")
    refused("unknown CIFAR data set 'cifar1000': did you mean 'cifar100'", read_cifar, tmp_path, "cifar1000")


# Small files that would take all memory, all time, or the stack of a reader that trusts them.
_SHARED = b"\x80\x02)" + b"2\x86" * 60  # tuples of two of the same, sixty deep
BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "key": b"\x80\x02}" + _SHARED[2:] + b"Ns.",
    "keys": b"\x80\x02}(" + _SHARED[2:] + b"Nu.",
    "dict": b"\x80\x02(" + _SHARED[2:] + b"Nd.",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
    "set": b"\x80\x04\x8f(" + _SHARED[2:] + b"\x90.",
    "frozenset": b"\x80\x04(" + _SHARED[2:] + b"\x91.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + _SHARED[2:] + b"\x86R.",
    "extension": b"\x80\x02\x82\x01.",
    "escape": b"\x80\x02F\x1b[2J\n.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_stay_small(tmp_path, bomb):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(BOMBS[bomb])
    with pytest.raises(ValueError) as error:
        read_cifar(tmp_path, "cifar10")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("shape", [(2_000_000_000, b"x"), (10**18, b"x"), (b"x", 3072), (2, 3071), (True, 3072)])
def test_a_shape_that_is_none_is_refused(tmp_path, shape):
    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(0, np.uint8).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype("u1"), False, b"x" * 10)

    write_cifar(tmp_path, "cifar10")
    content = pickle.dumps({b"data": Array(), b"labels": [0, 1]}, protocol=2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    refused(r"test_batch.* array of ", read_cifar, tmp_path, "cifar10")


def test_part_of_the_training_files_is_said(tmp_path):
    assert (
        "has 2 of 5 files of training images"
        in read_cifar(write_cifar(tmp_path, "cifar10", batches=2), "cifar10").notes[1]
    )
    whole = read_cifar(write_cifar(tmp_path / "whole", "cifar10", train=20, batches=5), "cifar10")
    assert not any(" of 5 files" in note for note in whole.notes)
