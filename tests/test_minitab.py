"""Does MiniTAB render the tasks it promises: the same pictures everywhere, each with the right label?"""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from numpy.random import RandomState
from PIL import Image, features
from scipy import ndimage
from sklearn.datasets import load_digits

from benchmarks import minitab_sheet
from vitadapter_ext.data import minitab
from vitadapter_ext.data import minitab_tasks as tasks
from vitadapter_ext.data.digits import Digits
from vitadapter_ext.data.glyphs import FACES
from vitadapter_ext.data.minitab import HASHES, TASKS, fingerprint, read_minitab
from vitadapter_ext.data.minitab_ink import Glyph, field, font_path, stamp

SIZES = {"train": 800, "val": 200, "test": 1000}
RENDERED = [task for task in TASKS if task != "digits"]


def splits(task: str) -> dict[str, minitab.Pictures]:
    data = read_minitab(task)
    return {"train": data.train, "val": data.val, "test": data.test}


def test_eight_tasks_in_the_three_groups():
    groups = {name: task.group for name, task in TASKS.items()}
    assert " ".join(groups) == "digits greek cyrillic scans blackletter orientation counting position"
    assert [*groups.values()] == 3 * ["natural"] + 2 * ["specialized"] + 3 * ["structured"]
    assert [len(task.classes) for task in TASKS.values()] == [10, 24, 20, 26, 26, 8, 8, 16]
    assert all(len(set(task.classes)) == len(task.classes) and task.question.endswith("?") for task in TASKS.values())


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_items(task):
    data = read_minitab(task)
    assert data.name == f"minitab/{task}" and data.classes == TASKS[task].classes
    for name, split in splits(task).items():
        assert len(split) == (797 if (task, name) == ("digits", "test") else SIZES[name])
        picture, label = split[len(split) - 1]
        assert picture.mode == "RGB" and picture.size == (32, 32)
        assert type(label) is int and label == split.labels[-1]
        assert (np.asarray(picture) == split.pixels[-1][:, :, None]).all()


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_balanced_and_in_no_order(task):
    for name, split in splits(task).items():
        counts = np.bincount(split.labels, minlength=len(TASKS[task].classes))
        if (task, name) == ("digits", "test"):  # what the other two left
            assert (counts == np.bincount(load_digits().target) - 100).all()
        else:
            assert counts.max() - counts.min() <= 1
        assert (np.diff(split.labels) < 0).mean() > 0.3


@pytest.mark.parametrize("task", TASKS)
def test_no_two_pictures_are_the_same(task):
    seen = [picture.tobytes() for split in splits(task).values() for picture in split.pixels]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("task", TASKS)
def test_pictures_are_the_published_ones_or_a_note_says_not(task):
    data = read_minitab(task)
    assert (data.notes == []) == (fingerprint(task) == HASHES[task])
    if features.version("freetype2") == "2.14.3":  # that of the table
        assert fingerprint(task) == HASHES[task]


def test_a_note_for_other_pictures(monkeypatch):
    monkeypatch.setitem(HASHES, "counting", "0" * 64)
    (note,) = read_minitab("counting").notes
    assert note == (
        "its pictures differ from those of the published table: another version of FreeType, Pillow, matplotlib or "
        "scikit-learn"
    )
    data = read_minitab("counting")
    assert len(data.notes) == 1 and len(data.train) == 800  # the same data, and the note not twice


def test_fingerprint_covers_pixels_and_labels(monkeypatch):
    found = []
    for change in (None, "pixels", "labels"):
        pixels, labels = np.zeros((2, 32, 32), np.uint8), np.array([0, 1])
        {"pixels": pixels[1, 31], "labels": labels, None: np.empty(1)}[change][-1:] += 1
        monkeypatch.setattr(minitab, "_splits", lambda task, p=pixels, q=labels: {"test": minitab.Pictures(p, q)})
        found.append(fingerprint.__wrapped__("greek"))
    assert len(set(found)) == 3


def test_another_process_renders_the_same_pictures():
    """With other instructions for its matrix products too, as an older processor would."""
    some = ("scans", "orientation")
    code = f"from vitadapter_ext.data.minitab import fingerprint\nprint(*map(fingerprint, {some}))"
    other = {"OPENBLAS_CORETYPE": "Nehalem", "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **other},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [fingerprint(task) for task in some]


def test_rendered_once_and_again_the_same():
    first = read_minitab("orientation")
    assert read_minitab("orientation").train is first.train
    again = minitab._splits.__wrapped__("orientation")
    assert again["train"] is not first.train
    assert all((again[name].pixels == split.pixels).all() for name, split in splits("orientation").items())
    with pytest.raises(ValueError, match="read-only"):
        first.train.pixels[0] = 0


@pytest.mark.parametrize("task", RENDERED)
def test_a_picture_depends_on_its_task_split_and_index_alone(task):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    for name, split in splits(task).items():
        index = len(split) // 3
        random = minitab._start(RandomState(), task, name, str(index))
        alone = tasks.DRAW[task](tasks.GLYPHS[task], int(split.labels[index]), random)
        assert (alone == split.pixels[index]).all()
    assert (np.random.get_state()[1] == before).all()


def test_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown MiniTAB task 'greeks': did you mean 'greek'"):
        read_minitab("greeks")


def test_digits_are_all_the_handwritten_ones_each_in_one_split(monkeypatch):
    monkeypatch.setattr(tasks, "handwritten", lambda picture, random: picture)
    found = [
        (picture.tobytes(), int(label))
        for split in minitab._digits().values()
        for picture, label in zip(split.pixels, split.labels, strict=True)
    ]
    real = [(picture.convert("L").tobytes(), label) for name in SIZES for picture, label in Digits(name)]
    assert len(found) == 1797 and sorted(found) == sorted(real)


@pytest.mark.parametrize("task", RENDERED)
def test_every_letter_is_in_its_font(task):
    """A font draws a box for what it lacks."""
    charmaps = {}
    for glyph in {glyph for sign in tasks.GLYPHS[task] for glyph in sign}:
        if glyph.file not in charmaps:
            charmaps[glyph.file] = FT2Font(str(font_path(glyph.file))).get_charmap()
        assert ord(glyph.character) in charmaps[glyph.file], glyph


@pytest.mark.parametrize("task", ["greek", "cyrillic", "scans", "blackletter"])
def test_a_class_is_one_letter_and_no_two_classes_look_the_same(task):
    signs = tasks.GLYPHS[task]
    assert len(signs) == len(TASKS[task].classes)
    for face in range(len(signs[0])):
        assert len({(field(sign[face]) > 0).tobytes() for sign in signs}) == len(signs)


def test_blackletter_is_of_faces_that_the_backbone_never_saw():
    seen = {
        (face.file, start + place)
        for face in FACES
        for start, count in ((face.digits, 10), (face.upper, 26), (face.lower, 26))
        if start is not None
        for place in range(count)
    }
    shown = {(glyph.file, ord(glyph.character)) for sign in tasks.GLYPHS["blackletter"] for glyph in sign}
    assert len(shown) == 3 * 26 and not shown & seen


@pytest.mark.parametrize("task", RENDERED)
def test_natural_and_structured_pictures_are_white_on_black_and_scans_dark_on_light(task):
    pixels = splits(task)["train"].pixels / 255
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)
    if task == "scans":
        assert np.median(border) > 0.5 and (pixels.min((1, 2)) < np.median(border, 1) - 0.1).all()
    else:
        assert np.median(border) < 0.1 and (pixels.max((1, 2)) > 0.3).all()


@pytest.mark.parametrize("count", range(1, 9))
def test_as_many_letters_as_the_label_says(count):
    random = RandomState(count)
    for _ in range(40):
        ink = tasks.scattered(tasks.GLYPHS["counting"], count, random)
        assert ndimage.label(ink > 0.3, np.ones((3, 3)))[1] == count
        assert not ink[0].any() and not ink[:, 0].any()


def test_counted_pictures_show_their_letters():
    """Also when they are worn, nearly always: blur joins neighbours now and then."""
    test, right = read_minitab("counting").test, 0
    for pixels, label in zip(test.pixels, test.labels, strict=True):
        grey = ndimage.gaussian_filter(pixels / 255, 0.4)
        blobs, count = ndimage.label(grey > 0.3 * grey.max(), np.ones((3, 3)))
        right += (ndimage.sum_labels(np.ones((32, 32)), blobs, range(1, count + 1)) >= 3).sum() == label + 1
    assert right > 0.85 * len(test)


def test_the_bright_letter_is_in_the_cell():
    test = read_minitab("position").test
    cells, away = [], []
    for pixels, label in zip(test.pixels, test.labels, strict=True):
        grey = ndimage.gaussian_filter(pixels / 255, 0.7)
        blobs, count = ndimage.label(grey > 0.5 * grey.max())
        brightest = 1 + np.argmax(ndimage.sum_labels(grey, blobs, range(1, count + 1)))
        rows, columns = ndimage.find_objects(blobs)[brightest - 1]
        centre = np.array([rows.start + rows.stop, columns.start + columns.stop]) / 2
        middle = np.array(divmod(int(label), 4)) * 8 + 4
        cells.append((np.abs(centre - middle) <= 4).all())
        away.append(np.abs(centre - middle).max())
    assert np.mean(cells) > 0.9
    assert np.mean(np.array(away) > 5.5) < 0.01  # found a pixel beside its place, and no more
    assert TASKS["position"].classes[6] == "row 2, column 3"


@pytest.mark.parametrize("label", range(8))
def test_signs_are_turned_as_their_label_says(label):
    """The upright picture of the same chance, turned by Pillow to all directions, fits best at the label's."""
    right = 0
    for seed in range(30):
        upright, turned = (tasks._turned(tasks.GLYPHS["orientation"], turn, RandomState(seed)) for turn in (0, label))
        fits = []
        for turn in range(8):
            candidate = np.asarray(Image.fromarray(upright).rotate(-45 * turn, Image.Resampling.BILINEAR), float)
            # The shift stays while the rest is turned, so they are laid upon each other where they fit best.
            spectra = np.fft.fft2(turned.astype(float)) * np.fft.fft2(candidate).conj()
            fits.append(np.fft.ifft2(spectra).real.max() / np.linalg.norm(candidate))
        right += int(np.argmax(fits)) == label
    assert right >= 29
    assert TASKS["orientation"].classes[label] == f"{45 * label}°"


def test_no_sign_has_rotational_symmetry():
    for sign in tasks.GLYPHS["orientation"]:
        for glyph in sign:
            upright = stamp(glyph, 32, height=22)
            for degrees in range(45, 360, 45):
                other = stamp(glyph, 32, height=22, degrees=degrees)
                assert np.abs(upright - other).sum() > 0.2 * (upright + other).sum(), (glyph, degrees)


def box(ink: np.ndarray) -> tuple[int, int, int, int]:
    """The first and last row, then column, with ink."""
    rows, columns = np.flatnonzero((ink > 0.5).any(1)), np.flatnonzero((ink > 0.5).any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_stamp_puts_a_glyph_where_and_as_it_is_told():
    glyph = Glyph("DejaVuSans.ttf", "H")
    plain = stamp(glyph, 32, height=16)
    assert plain.dtype == np.float64 and plain.min() == 0 and plain.max() == 1
    top, bottom, left, right = box(plain)
    assert 15 <= bottom - top + 1 <= 16 and abs(top + bottom - 31) <= 1 and abs(left + right - 31) <= 1
    assert np.abs(np.roll(plain, (-3, 5), (0, 1)) - stamp(glyph, 32, height=16, shift=(5, -3))).max() < 1e-12
    wide = box(stamp(glyph, 32, height=16, width=24))
    assert wide[:2] == (top, bottom) and (wide[3] - wide[2] + 1) / (right - left + 1) == pytest.approx(1.5, abs=0.15)
    assert np.abs(stamp(glyph, 32, height=16, degrees=90) - np.rot90(plain, -1)).mean() < 0.02
    bold, light = (stamp(glyph, 32, height=16, weight=weight).sum() for weight in (0.5, -0.4))
    assert bold > 1.2 * plain.sum() > 1.4 * light
    leaning = stamp(glyph, 32, height=16, slant=0.4)
    middle = leaning @ np.arange(-15.5, 16) / np.maximum(leaning.sum(1), 1)
    assert middle[10] > 1.5 and middle[21] < -1.5  # its top to the right
    bend = np.zeros((2, 64, 64))
    bend[0] += 3  # read further right: it comes to lie further left
    assert np.abs(np.roll(plain, -3, 1) - stamp(glyph, 32, height=16, bend=bend)).max() < 1e-12


def test_sheet_shows_every_task_in_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(minitab_sheet, "SHEET", tmp_path / "sheet.png")
    monkeypatch.setattr(sys, "argv", ["minitab_sheet", "--help"])
    with pytest.raises(SystemExit, match="0"):
        minitab_sheet.main()
    assert not (tmp_path / "sheet.png").exists()
    monkeypatch.setattr(sys, "argv", ["minitab_sheet"])
    minitab_sheet.main()
    assert (tmp_path / "sheet.png").stat().st_size <= 200_000
    examples = minitab_sheet._examples("position", 16)
    assert [label for _, label in examples] == [*range(16)]
    twice = minitab_sheet._examples("counting", 16)
    assert [label for _, label in twice] == 2 * [*range(8)]
    assert len({picture.tobytes() for picture, _ in twice}) == 16
