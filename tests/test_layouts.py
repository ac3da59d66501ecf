"""Are data sets read as they lie on people's disks, and are those that cannot be refused in one sentence?"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.layouts import (
    labels_of,
    lengths,
    refused,
    save_picture,
    write_cifar,
    write_domainnet,
    write_fgvc_task,
    write_lists,
    write_vtab1k_task,
)
from tests.pictures import red_and_blue
from vitadapter_ext import cli
from vitadapter_ext.data import catalog, domainnet, fgvc, vtab1k
from vitadapter_ext.data.domainnet import read_domainnet
from vitadapter_ext.data.fgvc import read_fgvc
from vitadapter_ext.data.images import open_rgb
from vitadapter_ext.data.lists import read_lists
from vitadapter_ext.data.samples import MissingDataError, hold_out
from vitadapter_ext.data.vtab1k import read_vtab1k
from vitadapter_ext.train.__main__ import main


def edit(file: Path, line: int, text: str | bytes) -> None:
    """Puts `text` in place of a line of the file, counted from 1."""
    lines = file.read_bytes().split(b"\n")
    lines[line - 1] = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(b"\n".join(lines))


# Lists ---------------------------------------------------------------------------------------------------------------


def test_lists_are_the_splits(tmp_path):
    data = read_lists(write_lists(tmp_path / "birds", ["wren", "owl"], train=20, val=6, test=8))
    assert (data.name, data.classes, lengths(data), data.notes) == ("birds", ("owl", "wren"), [20, 6, 8], [])
    assert labels_of(data.val) == [1, 0] * 3
    assert [path.name for path, _ in data.test.samples] == [f"{index:06}.jpg" for index in range(8)]
    picture, _ = data.train[0]
    assert (picture.mode, picture.size) == ("RGB", (24, 24))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["9", "10", "-1"], ("-1", "9", "10")),
        (["010", "9"], ("9", "010")),
        (["9", "10", "x"], ("10", "9", "x")),
        (["été", "Oiseau"], ("Oiseau", "été")),
    ],
)
def test_labels_are_sorted_as_numbers_if_all_are(tmp_path, labels, classes):
    data = read_lists(write_lists(tmp_path, labels))
    assert data.classes == classes
    assert [data.classes[label] for label in labels_of(data.train)] == [labels[i % len(labels)] for i in range(40)]


def test_a_number_is_one_class_however_it_is_written(tmp_path):
    write_lists(tmp_path, ["01", "2"])
    edit(tmp_path / "train.txt", 39, "images/train/000038.jpg 1")
    edit(tmp_path / "test.txt", 2, "images/test/000001.jpg 002")
    data = read_lists(tmp_path)
    assert data.classes == ("01", "2")
    assert labels_of(data.train) == [0, 1] * 20 and labels_of(data.test) == [0, 1] * 6


def test_white_space_line_ends_and_byte_order_marks(tmp_path):
    write_lists(tmp_path, ["a", "b"], train=4)
    (tmp_path / "images/train/000000.jpg").rename(tmp_path / "images/train/a  b c.jpg")
    lines = ["", "images/train/a  b c.jpg \t a", "  ", "\timages/./train/../train/000001.jpg b", ""]
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = read_lists(tmp_path)
    assert labels_of(data.train) == [0, 1]
    assert data.train.samples[0][0].name == "a  b c.jpg"


def test_without_val_a_fixed_share_of_train_is_held_out(tmp_path):
    data = read_lists(write_lists(tmp_path, ["a", "b"], train=40, val=0))
    assert lengths(data) == [34, 6, 12]
    assert sorted(labels_of(data.val)) == [0, 0, 0, 1, 1, 1]
    train, val = ({path for path, _ in split.samples} for split in (data.train, data.val))
    assert len(train | val) == 40
    assert data.notes == ["no val.txt: 15% of train is held out to choose the best epoch"]
    assert read_lists(tmp_path).val.samples == data.val.samples


def test_classes_are_named_by_a_list(tmp_path):
    write_lists(tmp_path, ["0", "2"], val=0)
    (tmp_path / "classes.txt").write_text("great tit\nnobody\nowl\n\n")
    data = read_lists(tmp_path)
    assert data.classes == ("great tit", "nobody", "owl")
    assert set(labels_of(data.train)) == {0, 2}


def test_images_in_train_and_another_list_are_noted(tmp_path):
    write_lists(tmp_path, ["a", "b"])
    edit(tmp_path / "test.txt", 3, "images/train/000004.jpg a")
    assert read_lists(tmp_path).notes == ["images of test that are in train too: 1"]


def test_unreadable_images_in_lists_are_left_out(tmp_path):
    write_lists(tmp_path, ["a", "b"])
    (tmp_path / "images/train/000003.jpg").write_bytes(b"junk")
    data = read_lists(tmp_path)
    assert lengths(data) == [39, 8, 12]
    assert "1 of 60 images" in data.notes[0] and "images/train/000003.jpg" in data.notes[0]


def test_links_lead_where_their_owner_wants(tmp_path):
    write_lists(tmp_path / "lists", ["a", "b"])
    (tmp_path / "lists" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "lists" / "images").symlink_to(tmp_path / "elsewhere")
    assert lengths(read_lists(tmp_path / "lists")) == [40, 8, 12]


def junk_all(root: Path, split: str) -> None:
    for file in (root / "images" / split).iterdir():
        file.write_bytes(b"junk")


REFUSED_LISTS = {
    "absolute": (lambda r: edit(r / "val.txt", 2, "/etc/x.jpg a"), "val.txt, line 2: /etc/x.jpg is absolute"),
    "outside": (lambda r: edit(r / "val.txt", 2, "images/../../x.jpg a"), "line 2: images/../../x.jpg leaves "),
    "NUL": (lambda r: edit(r / "val.txt", 2, b"images/\0.jpg a"), r"line 2: 'images/\\x00.jpg' has a NUL byte"),
    "no label": (lambda r: edit(r / "train.txt", 4, "images/x.jpg"), "train.txt, line 4: images/x.jpg has no label"),
    "empty": (lambda r: (r / "val.txt").write_text("\n \r\n"), "val.txt lists no images"),
    "one missing": (lambda r: (r / "images/train/000002.jpg").unlink(), "train.txt, line 3: .*02.jpg does not exist$"),
    "three missing": (
        lambda r: [(r / f"images/train/00000{index}.jpg").unlink() for index in (2, 3, 5)],
        r"train.txt, line 3: images/train/000002.jpg does not exist \(and 2 more\)",
    ),
    "a folder": (lambda r: edit(r / "train.txt", 1, "images/train a"), "line 1: images/train is not a file"),
    "no text": (lambda r: edit(r / "test.txt", 1, b"caf\xe9.jpg a"), r"test.txt is not UTF-8 text \(byte 3\)"),
    "UTF-16": (lambda r: (r / "test.txt").write_text("a.jpg 1", "utf-16"), "test.txt is not UTF-8 text"),
    "strange label": (
        lambda r: edit(r / "test.txt", 1, "images/test/000000.jpg c"),
        "test.txt, line 1: .* the label c ",
    ),
    "no name": (lambda r: edit(r / "train.txt", 1, b"images/train/000000.jpg \x1b[2J"), r"line 1: label '\\x1b\[2J'"),
    "one class": (
        lambda r: [write_lists(r, ["a"])],
        r"only one class \('a'\): training a classifier needs at least two",
    ),
    "words with names": (lambda r: (r / "classes.txt").write_text("x\ny"), "line 1: label a is not from 0 to 1"),
    "no train": (lambda r: (r / "train.txt").unlink(), "has val.txt and test.txt but no train.txt"),
    "no test": (lambda r: (r / "test.txt").unlink(), "has train.txt and val.txt but no test.txt"),
    "unreadable": (lambda r: junk_all(r, "test"), "12 of 60 images .* more than 5%"),
}


@pytest.mark.parametrize("case", REFUSED_LISTS)
def test_lists_are_refused_in_one_sentence(tmp_path, case):
    spoil, message = REFUSED_LISTS[case]
    spoil(write_lists(tmp_path, ["a", "b"]))
    refused(message, read_lists, tmp_path)


def test_a_split_or_class_without_a_readable_image_is_refused(tmp_path):
    write_lists(tmp_path, ["a", "b"], train=80, val=1, test=10)
    junk_all(tmp_path, "val")
    refused("has no readable image for val", read_lists, tmp_path)
    (tmp_path / "val.txt").unlink()
    edit(tmp_path / "train.txt", 1, "images/val/000000.jpg c")
    refused("class 'c' in .* without any readable training image", read_lists, tmp_path)


def test_one_image_is_too_few_to_hold_out(tmp_path):
    write_lists(tmp_path, ["a", "b"], train=3, val=0, test=2)
    refused("class 'b' in .* with one training image", read_lists, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n\ny\n", "classes.txt, line 2: .* is no name"),
        ("x\ny\nx", "line 3: x is the name of a class in line 1"),
        ("x\ny", "train.txt, line 3: label 2 is not from 0 to 1"),
        ("x\ny\nz\nw", "test.txt, line 1: no training image has the label 3"),
    ],
)
def test_names_of_classes_that_do_not_fit_are_refused(tmp_path, text, message):
    write_lists(tmp_path, ["0", "1", "2"])
    edit(tmp_path / "test.txt", 1, "images/test/000000.jpg 3")
    (tmp_path / "classes.txt").write_text(text)
    refused(message, read_lists, tmp_path)


def test_where_there_are_no_lists_the_data_is_missing(tmp_path):
    refused("the data folder .*nowhere does not exist", read_lists, tmp_path / "nowhere", kind=MissingDataError)
    refused("has none of the lists train.txt, val.txt, test.txt", read_lists, tmp_path, kind=MissingDataError)


# VTAB-1k -------------------------------------------------------------------------------------------------------------

VTAB = {
    "natural": {
        "caltech101": 102,
        "cifar100": 100,
        "dtd": 47,
        "flowers102": 102,
        "pets": 37,
        "sun397": 397,
        "svhn": 10,
    },
    "specialized": {"camelyon": 2, "eurosat": 10, "resisc45": 45, "retinopathy": 5},
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "kitti": 4,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}

# The published dump's folders that are not called as the tasks, and TensorFlow Datasets' names.
VTAB_FOLDERS = {
    "cifar": "cifar100",
    "cifar_100": "cifar100",
    "Caltech_101": "caltech101",
    "oxford_flowers102": "flowers102",
    "oxford_flowers": "flowers102",
    "flowers": "flowers102",
    "oxford_iiit_pet": "pets",
    "oxford-iiit-pets": "pets",
    "oxford_pet": "pets",
    "svhn_cropped": "svhn",
    "patch_camelyon": "camelyon",
    "PCam": "camelyon",
    "diabetic_retinopathy": "retinopathy",
    "clevr_closest_object_distance": "clevr_dist",
    "clevr_count_all": "clevr_count",
    "dsprites_label_x_position": "dsprites_loc",
    "dsprites_label_orientation": "dsprites_ori",
    "kitti_closest_vehicle_distance": "kitti",
    "smallnorb_label_azimuth": "smallnorb_azi",
    "smallnorb_label_elevation": "smallnorb_ele",
}


def test_vtab_has_nineteen_tasks_in_the_usual_order():
    found = [(task.group, name, task.classes) for name, task in vtab1k.TASKS.items()]
    assert found == [(group, name, count) for group, tasks in VTAB.items() for name, count in tasks.items()]


@pytest.mark.parametrize("suite", [vtab1k, fgvc, domainnet])
def test_no_name_means_two_tasks(suite):
    names = [name for task in suite.TASKS.values() for name in task.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", VTAB_FOLDERS)
def test_vtab_tasks_and_folders_go_by_many_names(tmp_path, folder):
    task = VTAB_FOLDERS[folder]
    classes = vtab1k.TASKS[task].classes
    write_vtab1k_task(tmp_path, folder, classes, train=4, val=2, test=3, used=2)
    for name in (task, folder, task.upper().replace("_", "-")):
        catalog.check(f"vtab1k/{name}", str(tmp_path))
        data = read_vtab1k(tmp_path, name)
        assert (data.name, len(data.classes), lengths(data)) == (f"vtab1k/{task}", classes, [4, 2, 3])


def test_vtab_labels_are_used_as_they_are(tmp_path):
    write_vtab1k_task(tmp_path, "cifar", 100, train=6, val=4, test=5, used=3)
    edit(tmp_path / "cifar" / "test.txt", 1, "images/test/000000.jpg 99")
    data = read_vtab1k(tmp_path, "cifar100")
    assert data.classes == tuple(str(label) for label in range(100))
    assert labels_of(data.test) == [99, 1, 2, 0, 1]
    assert "cifar/train800.txt lists 6 images, not 800" in data.notes[0]
    assert "cifar/val200.txt lists 4 images, not 200" in data.notes[1]


def test_vtab_of_the_usual_size_needs_no_note(tmp_path):
    data = read_vtab1k(write_vtab1k_task(tmp_path, "svhn", 10, train=800, val=200), "svhn")
    assert (lengths(data), data.notes) == ([800, 200, 12], [])


def test_vtab_labels_are_checked_against_the_task(tmp_path):
    write_vtab1k_task(tmp_path, "cifar", 100)
    edit(tmp_path / "cifar" / "train800.txt", 7, "images/train800/000006.jpg 100")
    refused("train800.txt, line 7: label 100 is not from 0 to 99", read_vtab1k, tmp_path, "cifar100")


def test_vtab_folder_that_is_not_there_is_missing_data(tmp_path):
    write_vtab1k_task(tmp_path / "vtab-1k", "cifar", 100)
    missing = "has no folder for the task cifar100: expected one of cifar100, cifar"
    refused(missing, read_vtab1k, tmp_path, "cifar100", kind=MissingDataError)
    (tmp_path / "dtd").mkdir()
    refused("dtd has none of the lists", read_vtab1k, tmp_path, "dtd", kind=MissingDataError)
    (tmp_path / "dtd" / "test.txt").write_text("images/x.jpg 0")
    refused("has test.txt but no train800.txt and no val200.txt", read_vtab1k, tmp_path, "dtd")


def test_two_folders_of_a_task_are_refused_but_not_a_link(tmp_path):
    write_vtab1k_task(tmp_path, "cifar", 100)
    (tmp_path / "cifar100").symlink_to(tmp_path / "cifar")
    assert lengths(read_vtab1k(tmp_path, "cifar100")) == [40, 8, 12]
    (tmp_path / "cifar100").unlink()
    (tmp_path / "CIFAR-100").mkdir()
    refused("2 folders for the task cifar100: CIFAR-100 and cifar", read_vtab1k, tmp_path, "cifar100")


def test_an_unknown_task_is_told_the_nearest(tmp_path):
    refused("unknown VTAB-1k task 'smallnorb': did you mean 'smallnorb_", read_vtab1k, tmp_path, "smallnorb")
    refused("unknown FGVC task 'nabird5': did you mean 'nabirds'", read_fgvc, tmp_path, "nabird5")
    refused("unknown DomainNet task 'skech': did you mean 'sketch'", read_domainnet, tmp_path, "skech")
    with pytest.raises(ValueError, match="unknown vtab1k task 'smallnorb'"):
        catalog.check("vtab1k/smallnorb", str(tmp_path))


# FGVC ----------------------------------------------------------------------------------------------------------------

FGVC_FOLDERS = {
    "CUB_200_2011": ("cub200", 200),
    "nabirds": ("nabirds", 555),
    "OxfordFlower": ("flowers102", 102),
    "OxfordFlowers": ("flowers102", 102),
    "Stanford-dogs": ("dogs120", 120),
    "stanford_cars": ("cars196", 196),
}


@pytest.mark.parametrize("folder", FGVC_FOLDERS)
def test_fgvc_folders(tmp_path, folder):
    task, classes = FGVC_FOLDERS[folder]
    assert fgvc.TASKS[task].classes == classes
    data = read_fgvc(write_fgvc_task(tmp_path, folder, [1, 2], train=6, val=2, test=4), task)
    assert (data.name, lengths(data)) == (f"fgvc/{task}", [6, 2, 4])
    assert f"train.json has 2 classes, not {classes}" in data.notes[0]


def test_fgvc_with_all_classes_needs_no_note(tmp_path):
    data = read_fgvc(write_fgvc_task(tmp_path, "Flowers", list(range(102)), train=102, val=4, test=4), "flowers102")
    assert data.notes == []


@pytest.mark.parametrize("images", ["", "images", "Images"])
@pytest.mark.parametrize(
    ("ids", "classes"), [([7, 100, 23], ("7", "23", "100")), (["7", "100"], ("7", "100")), (["b", "a"], ("a", "b"))]
)
def test_fgvc_ids_become_contiguous(tmp_path, images, ids, classes):
    data = read_fgvc(write_fgvc_task(tmp_path, "nabirds", ids, images=images), "nabirds")
    assert data.classes == classes
    assert [data.classes[label] for label in labels_of(data.test)] == [str(ids[i % len(ids)]) for i in range(12)]
    assert all(path.parent.name == data.classes[label] for path, label in data.train.samples)


def test_fgvc_without_val_holds_some_out(tmp_path):
    data = read_fgvc(write_fgvc_task(tmp_path, "nabirds", [1, 2], val=0), "nabirds")
    assert lengths(data) == [34, 6, 12]
    assert data.notes[-1].startswith("no val.json: 15% of train is held out")


def change(file: Path, path: str, label) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, path: label}))


REFUSED_FGVC = {
    "no JSON": (lambda r: (r / "val.json").write_text('{"a'), "val.json is not JSON"),
    "deep": (lambda r: (r / "val.json").write_text("[" * 100_000), "val.json is not JSON"),
    "a list": (lambda r: (r / "val.json").write_text('["a.jpg", 1]'), "val.json is no mapping of images to class ids"),
    "empty": (lambda r: (r / "train.json").write_text("{}"), "train.json is no mapping"),
    "a list as id": (lambda r: change(r / "test.json", "a.jpg", [1]), "test.json: the class id of a.jpg is neither"),
    "true": (lambda r: change(r / "test.json", "a.jpg", True), "test.json: the class id of a.jpg is neither"),
    "missing": (lambda r: change(r / "test.json", "1/a.jpg", 1), "test.json: 1/a.jpg does not exist$"),
    "outside": (lambda r: change(r / "test.json", "../../../x.jpg", 1), "test.json: ../../../x.jpg leaves"),
    "absolute": (lambda r: change(r / "train.json", "/x.jpg", 1), "train.json: /x.jpg is absolute"),
    "NUL": (lambda r: change(r / "train.json", "1\0.jpg", 1), r"train.json: '1\\x00.jpg' has a NUL byte"),
    "strange id": (
        lambda r: change(r / "val.json", "1/a.jpg", 3),
        "val.json: no training image has the label 3 of 1/a",
    ),
    "no test": (lambda r: (r / "test.json").unlink(), "has train.json and val.json but no test.json"),
}


@pytest.mark.parametrize("case", REFUSED_FGVC)
def test_fgvc_is_refused_in_one_sentence(tmp_path, case):
    spoil, message = REFUSED_FGVC[case]
    spoil(write_fgvc_task(tmp_path, "nabirds", [1, 2]) / "nabirds")
    refused(message, read_fgvc, tmp_path, "nabirds")


def test_fgvc_of_one_class_is_refused(tmp_path):
    refused("only one class", read_fgvc, write_fgvc_task(tmp_path, "nabirds", [1]), "nabirds")


# DomainNet -----------------------------------------------------------------------------------------------------------


def test_domainnet_has_345_classes_whatever_is_listed(tmp_path):
    assert list(domainnet.TASKS) == ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    write_domainnet(tmp_path, "clipart", {0: "aircraft_carrier", 344: "zigzag", 17: "train"})
    write_domainnet(tmp_path, "real", {3: "bus", 4: "axe"})
    data = read_domainnet(tmp_path, "Clipart")
    assert (data.name, len(data.classes)) == ("domainnet/clipart", 345)
    assert [data.classes[label] for label in (0, 1, 17, 344)] == ["aircraft_carrier", "1", "train", "zigzag"]
    assert lengths(data) == [34, 6, 12]
    assert all(path.parent.name == data.classes[label] for path, label in data.val.samples)
    assert data.notes == ["no clipart_val.txt: 15% of train is held out to choose the best epoch"]


@pytest.mark.parametrize("folder", ["txt", "splits"])
def test_domainnet_with_its_lists_in_a_folder_and_a_val_of_ones_own(tmp_path, folder):
    write_domainnet(tmp_path, "real", {3: "bus", 4: "axe"})
    (tmp_path / folder).mkdir()
    lists = {split: tmp_path / folder / f"real_{split}.txt" for split in ("train", "val", "test")}
    for split in ("train", "test"):
        (tmp_path / f"real_{split}.txt").rename(lists[split])
    lines = lists["train"].read_text().splitlines(keepends=True)
    lists["train"].write_text("".join(lines[10:]))
    lists["val"].write_text("".join(lines[:10]))
    data = read_domainnet(tmp_path, "real")
    assert (lengths(data), data.notes) == ([30, 10, 12], [])
    assert [str(path.relative_to(tmp_path)) for path, _ in data.val.samples] == [line.split()[0] for line in lines[:10]]


REFUSED_DOMAINNET = {
    "label": (lambda r: edit(r / "real_test.txt", 2, "real/bus/x.jpg 345"), "line 2: label 345 is not from 0 to 344"),
    "path": (lambda r: edit(r / "real_train.txt", 2, "real/x.jpg 3"), "line 2: real/x.jpg is not of the form domain/c"),
    "two folders": (
        lambda r: edit(r / "real_test.txt", 2, "real/axe/x.jpg 3"),
        "line 2: .*axe, but earlier label 3 is bus",
    ),
    "two labels": (
        lambda r: edit(r / "real_test.txt", 2, "real/bus/x.jpg 9"),
        "label 9 for bus, but earlier bus has label 3",
    ),
    "no test": (lambda r: (r / "real_test.txt").unlink(), "has real_train.txt but no real_test.txt"),
}


@pytest.mark.parametrize("case", REFUSED_DOMAINNET)
def test_domainnet_is_refused_in_one_sentence(tmp_path, case):
    spoil, message = REFUSED_DOMAINNET[case]
    write_domainnet(tmp_path, "real", {3: "bus", 4: "axe"})
    for file in ("real/x.jpg", "real/bus/x.jpg", "real/axe/x.jpg"):
        save_picture(tmp_path / file, 0, 2, np.random.default_rng(0))
    spoil(tmp_path)
    refused(message, read_domainnet, tmp_path, "real")


def test_a_domain_that_is_not_there_is_missing_data(tmp_path):
    write_domainnet(tmp_path, "real", {3: "bus", 4: "axe"})
    refused("none of the lists sketch_train.txt, sketch", read_domainnet, tmp_path, "sketch", kind=MissingDataError)
    refused("nowhere", read_domainnet, tmp_path / "nowhere", "sketch", kind=MissingDataError)


# What all share -------------------------------------------------------------------------------------------------------


def test_a_picture_runs_no_program(tmp_path, monkeypatch):
    write_lists(tmp_path / "data", ["a", "b"], train=200)
    mark = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    picture = next((tmp_path / "data" / "images" / "train").iterdir())
    picture.write_bytes(eps)
    data = read_lists(tmp_path / "data")
    assert f"{picture.name} (not an image)" in data.notes[0] and not mark.exists()
    with pytest.raises(OSError, match="cannot identify"):
        open_rgb(picture)
    assert not mark.exists()


def test_what_a_list_has_twice_is_taken_once(tmp_path):
    root = write_lists(tmp_path, ["a", "b"], val=0)
    once = read_lists(root)
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_text(text + text)
    twice = read_lists(root)
    assert "images that train lists again are left out: 40" in twice.notes
    for split in ("train", "val", "test"):
        assert getattr(twice, split).samples == getattr(once, split).samples
    (root / "train.txt").write_text(text + text.splitlines()[0].rsplit(" ", 1)[0] + " b\n")
    refused("train lists images/train/000000.jpg with two labels", read_lists, root)


def test_images_that_choose_and_test_are_noted(tmp_path):
    root = write_lists(tmp_path, ["a", "b"])
    (root / "test.txt").write_text((root / "val.txt").read_text())
    assert "images of test that are in val too: 8" in read_lists(root).notes


def test_what_is_held_out_is_shuffled_the_same_way_for_good():
    keys = [f"images/{row:03}.jpg" for row in range(40)]
    train, val = hold_out(keys, [row % 2 for row in range(40)], 1)
    assert val == [1, 18, 29, 30, 35, 36] and sorted(train + val) == list(range(40))


@pytest.mark.parametrize("folder", ["dtd_47", "svhn_10", "oxford_iiit_pets_37", "smallnorb_azi_18", "clevr_count_8"])
def test_vtab_folders_with_their_number_of_classes(tmp_path, folder):
    task = next(name for name, task in vtab1k.TASKS.items() if task.is_called(folder))
    assert task.split("_")[0] in folder
    assert [name for name, task in vtab1k.TASKS.items() if task.is_called(folder)] == [task]


# The command line --------------------------------------------------------------------------------------------------


def every_layout(root: Path) -> dict[str, list[str]]:
    """A small tree of each layout, and the flags that name it."""
    for folder in ("folder", "domains", "timm/train", "timm/test"):
        (root / folder).mkdir(parents=True)
    pictures = red_and_blue(root / "folder", 14)
    write_lists(root / "lists", ["cat", "dog"], train=20)
    write_vtab1k_task(root / "vtab", "cifar", 100, train=20, used=2)
    write_fgvc_task(root / "fgvc", "CUB_200_2011", [3, 17], train=20)
    write_domainnet(root / "domains", "real", {3: "cat", 17: "dog"}, train=20)
    write_cifar(root / "pickles", "cifar10", train=40)
    write_cifar(root / "pickles", "cifar100", train=200)
    for split in ("train", "test"):
        red_and_blue(root / "timm" / split, 8)
    return {
        "digits": [],
        "folder": ["--data", str(pictures)],
        "lists": ["--data", str(root / "lists")],
        "vtab1k/cifar": ["--dataset", "vtab1k/cifar", "--data", str(root / "vtab")],
        "fgvc/cub200": ["--dataset", "fgvc/cub200", "--data", str(root / "fgvc")],
        "domainnet/real": ["--dataset", "domainnet/real", "--data", str(root / "domains")],
        "cifar10": ["--dataset", "cifar10", "--data", str(root / "pickles")],
        "cifar100": ["--dataset", "cifar100", "--data", str(root / "pickles")],
        "torch/image_folder": ["--dataset", "torch/image_folder", "--data", str(root / "timm")],
        "minitab/greek": ["--dataset", "minitab/greek"],
    }


def test_each_layout_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--epochs", "1", "--rank", "2", "--batch-size", "100", "--no-baselines"]
    for name, flags in every_layout(tmp_path / "data").items():
        assert cli.run(main, [*flags, *quick, "--out", f"out/{name}"]) == 0, capsys.readouterr().err
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        wanted = {"folder": "folder", "lists": "lists"}.get(name, name)
        assert summary["status"] == "finished" and summary["data"] == wanted.replace("vtab1k/cifar", "vtab1k/cifar100")
        out = capsys.readouterr().out
        assert "images    32 x 32, bilinear, mean 0.3 0.3 0.3, std 0.3 0.3 0.3" in out
        # Its settings run again as they are.
        assert cli.run(main, ["--config", f"out/{name}/config.yaml", "--out", f"again/{name}"]) == 0
        capsys.readouterr()
        files = [(tmp_path / folder / name / "adapter.safetensors").read_bytes() for folder in ("out", "again")]
        assert files[0] == files[1]


BAD = {
    "--dataset vtab1k/cifar": "--dataset vtab1k/cifar needs --data",
    "--dataset vtab1k/cifer --data .": "unknown vtab1k task 'cifer': did you mean 'cifar100'",
    "--dataset fgvc/bears --data .": "unknown fgvc task 'bears'",
    "--dataset minitab/grek": "did you mean 'greek'",
    "--dataset cifar1000 --data .": "unknown dataset 'cifar1000': did you mean 'cifar100'",
    "--dataset digits --data .": "is in the package and takes no --data",
    "--dataset vtab1k/svhn --data .": ". has no folder for the task svhn",
    "--dataset vtab1k/svhn --data nowhere": "the data folder nowhere does not exist",
    "--dataset cifar10 --data .": "cifar-10-batches-py",
    "--dataset torch/image_folder --data nowhere": "the data folder nowhere does not exist",
    "--val-split validation": "--val-split is for timm's data sets",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_names_are_one_sentence(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, argv.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[argv] in err
    assert not list(tmp_path.iterdir())


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    write_cifar(tmp_path, "cifar10")
    mark = tmp_path / "touched"

    class Harm:
        def __reduce__(self):
            return (Path.touch, (mark,))

    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Harm()}, protocol=2))
    assert cli.run(main, ["--dataset", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "refused" in capsys.readouterr().err and not mark.exists() and not (tmp_path / "out").exists()
