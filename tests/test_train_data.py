"""Which images does a run see? Folders of every layout, damaged files, odd picture modes, and their splits."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitadapter_ext.data.folder import read_folder
from vitadapter_ext.data.images import open_rgb, to_rgb, unreadable
from vitadapter_ext.train import configure
from vitadapter_ext.train.config import AUGMENTATIONS
from vitadapter_ext.train.data import Transformed, loader, read_data, training_transform

DATA_CONFIG = {
    "input_size": (3, 24, 24),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def fill(folder: Path, **counts: int) -> Path:
    """A folder for each class with so many pictures of noise, JPEG and PNG in turn."""
    noise = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            picture.save(folder / name / f"{index:03}.{'jpg' if index % 2 else 'png'}")
    return folder


def files(split) -> list[str]:
    return [str(path) for path, _ in split.samples]


def splits_of(data) -> dict:
    return {"train": data.train, "val": data.val, "test": data.test}


def test_without_split_folders_a_fixed_share_of_each_class_is_held_out(tmp_path):
    fill(tmp_path, dog=40, cat=20)
    data = read_folder(tmp_path)
    splits = splits_of(data)
    assert data.classes == ("cat", "dog")
    labels = {name: np.bincount([label for _, label in split.samples]).tolist() for name, split in splits.items()}
    assert labels == {"train": [14, 28], "val": [3, 6], "test": [3, 6]}
    every = sum((files(split) for split in splits.values()), [])
    assert len(set(every)) == 60
    assert "no test folder" in data.notes[0]
    again = splits_of(read_folder(tmp_path))
    assert {name: files(split) for name, split in again.items()} == {
        name: files(split) for name, split in splits.items()
    }


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_folders_are_used_as_they_are(tmp_path, val):
    for name, count in (("train", 6), (val, 2), ("test", 3)):
        fill(tmp_path / name, a=count, b=count)
    data = read_folder(tmp_path)
    assert [len(data.train), len(data.val), len(data.test)] == [12, 4, 6]
    assert data.notes == []


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_one_held_out_folder_is_the_test_set(tmp_path, held_out):
    fill(tmp_path / "train", a=20, b=20)
    fill(tmp_path / held_out, a=4, b=5)
    data = read_folder(tmp_path)
    assert [len(data.train), len(data.val), len(data.test)] == [34, 6, 9]
    assert all(f"/{held_out}/" in path for path in files(data.test))
    assert all("/train/" in path for path in files(data.val))
    assert f"the {held_out} folder is the test set" in data.notes[0]


def test_a_class_may_be_called_train(tmp_path):
    assert read_folder(fill(tmp_path, bus=8, train=8, test=8)).classes == ("bus", "test", "train")


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "dev")])
def test_other_names_of_the_splits(tmp_path, names):
    for name in names:
        fill(tmp_path / name, a=8, b=8)
    data = read_folder(tmp_path)
    assert data.classes == ("a", "b") and len(data.test) == 16


def test_held_out_folders_beside_an_unknown_one_are_no_classes(tmp_path):
    for name in ("val", "test", "learn"):
        fill(tmp_path / name, a=8, b=8)
    with pytest.raises(ValueError, match="has test and val but no train folder"):
        read_folder(tmp_path)


def test_a_class_name_that_is_no_text_is_refused(tmp_path):
    fill(tmp_path, a=8, b=8)
    os.rename(os.fsencode(tmp_path / "b"), os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match="a name that is no printable text"):
        read_folder(tmp_path)


def test_a_class_that_only_train_has_is_fine(tmp_path):
    fill(tmp_path / "train", a=4, b=4, c=4)
    fill(tmp_path / "val", a=2, b=2)
    fill(tmp_path / "test", b=2, c=2)
    assert {label for _, label in read_folder(tmp_path).test.samples} == {1, 2}


def test_hidden_files_other_files_and_capital_extensions(tmp_path):
    fill(tmp_path, a=4, b=4)
    fill(tmp_path / ".thumbnails", x=1)
    (tmp_path / "a" / ".hidden.jpg").write_bytes(b"no picture")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "a" / "001.jpg").rename(tmp_path / "b" / "deep" / "X.JPEG")
    splits = splits_of(read_folder(tmp_path))
    assert sum(len(split) for split in splits.values()) == 8
    assert any(path.endswith("X.JPEG") for split in splits.values() for path in files(split))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def test_unreadable_images_are_named_counted_and_left_out(tmp_path):
    fill(tmp_path, a=30, b=30)
    truncate(tmp_path / "a" / "001.jpg")
    (tmp_path / "b" / "002.png").write_bytes(b"")
    data = read_folder(tmp_path)
    assert sum(len(split) for split in splits_of(data).values()) == 58
    assert "2 of 60 images" in data.notes[0] and "left out" in data.notes[0]
    assert "a/001.jpg" in data.notes[0] and "b/002.png" in data.notes[0]


def test_more_than_five_percent_unreadable_is_refused(tmp_path):
    fill(tmp_path, a=20, b=20)
    for index in (1, 3, 5):
        truncate(tmp_path / "a" / f"{index:03}.jpg")
    with pytest.raises(ValueError, match=r"3 of 40 images .* more than 5%: a/001.jpg"):
        read_folder(tmp_path)


def test_ten_unreadable_images_are_named_at_most(tmp_path):
    fill(tmp_path, a=20, b=5)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path)
    assert str(error.value).count("a/0") == 10 and str(error.value).endswith("…")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_quick_check_notices_every_truncation_that_opening_does(tmp_path, kind):
    whole = tmp_path / f"whole.{kind}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole)
    data = whole.read_bytes()
    assert unreadable([whole]) == {}
    for length in range(0, len(data) - 40, max(1, len(data) // 40)):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(data[:length])
        assert cut in unreadable([cut]), length
        with pytest.raises(Exception):  # noqa: B017 - Pillow raises many types
            open_rgb(cut)


REFUSED = {
    "missing": (lambda root: root / "nowhere", "does not exist"),
    "a file": (lambda root: (root / "x").touch() or root / "x", "is not a folder"),
    "empty": (lambda root: root, "no images"),
    "empty classes": (lambda root: fill(root, a=0, b=0), "no images"),
    "images without classes": (lambda root: fill(root, a=3) / "a", "a folder for each class"),
    "one class": (lambda root: fill(root, a=9), "only one class"),
    "an empty class": (lambda root: fill(root, a=9, b=0), "class 'b' .* without any readable training image"),
    "too few": (lambda root: fill(root, a=9, b=2), "class 'b' .* too few .* at least 3"),
    "no train": (lambda root: fill(root / "val", a=1) and fill(root / "test", a=1) and root, "no train folder"),
    "strange class in val": (
        lambda root: fill(root / "train", a=3, b=3) and fill(root / "val", a=1, c=1) and root,
        "class 'c' in the val folder .* but not in its train folder",
    ),
    "two vals": (
        lambda root: fill(root / "train", a=3, b=3) and fill(root / "val", a=1) and fill(root / "valid", a=1) and root,
        "two folders for val",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(tmp_path, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        read_folder(make(tmp_path))
    assert "\n" not in str(error.value)


def test_odd_modes_become_rgb():
    half = {
        "I;16": Image.fromarray(np.full((2, 2), 0x8000, np.uint16)),
        "I": Image.fromarray(np.full((2, 2), 0x8000, np.int32)),
        "L": Image.new("L", (2, 2), 128),
        "LA": Image.new("LA", (2, 2), (128, 255)),
        "RGBA": Image.new("RGBA", (2, 2), (128, 128, 128, 255)),
        "P": Image.new("RGB", (2, 2), (128, 128, 128)).convert("P", palette=Image.Palette.ADAPTIVE),
        "CMYK": Image.new("CMYK", (2, 2), (127, 127, 127, 0)),
    }
    for mode, image in half.items():
        assert image.mode == mode
        assert to_rgb(image).mode == "RGB"
        assert to_rgb(image).getpixel((0, 0)) == (128, 128, 128), mode
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_is_white(tmp_path):
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_rgb(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_transforms_give_the_size_of_the_checkpoint(augmentation):
    picture = Image.effect_noise((70, 40), 80).convert("RGB")
    transform = training_transform(configure(augmentation=augmentation), DATA_CONFIG)
    torch.manual_seed(0)
    first, second = transform(picture), transform(picture)
    assert first.shape == (3, 24, 24)
    assert torch.equal(first, second) == (augmentation == "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_seeds_give_equal_batches(tmp_path, workers):
    config = configure(data=str(fill(tmp_path, a=8, b=8)), workers=workers, batch_size=4, augmentation="affine")
    batches = []
    for _ in range(2):
        torch.manual_seed(5)
        data = read_data(config)
        found = loader(data.train, training_transform(config, DATA_CONFIG), config, torch.device("cpu"), shuffle=True)
        batches.append(torch.cat([images for images, _ in found]))
    assert torch.equal(*batches)


def test_the_digits_need_no_folder():
    data = read_data(configure())
    assert (data.name, len(data.train), len(data.val), len(data.test)) == ("digits", 1000, 297, 500)
    image, label = Transformed(data.test, training_transform(configure(augmentation="none"), DATA_CONFIG))[0]
    assert image.shape == (3, 24, 24) and 0 <= label < 10
