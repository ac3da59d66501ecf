"""What does a picture of each MiniTAB task show? The signs of the seven rendered tasks, and a function that draws each.

A function of `DRAW` takes the task's entry in `GLYPHS`, a label, and the `RandomState` from which it draws all chance;
it returns brightness as uint8 (32, 32).
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import RandomState

from .minitab_ink import SIZE, Glyph, bent, blurred, grey, photograph, pooled, smooth, stamp

Signs = Sequence[Sequence[Glyph]]  # for each kind of sign, its form in each face

GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "бгджзийлпфцчшщъыьэюя"  # without those that look like a Latin letter, small or capital
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMALL = CAPITALS.lower()
# Turned, none of these can be taken for an upright sign, as 7 can for L, C for U, P for d, e for a, and B for itself.
TURNED = "AEFGKRTYk4"
WHOLE = SMALL.replace("i", "").replace("j", "")  # each of one piece

DIRECTIONS = 8
MOST = 8  # letters to count
CELLS = 4  # of a picture, both ways

_PLAIN = tuple(f"DejaVu{family}{weight}.ttf" for family in ("Sans", "SansMono", "Serif") for weight in ("", "-Bold"))
_OBLIQUE = tuple(f"DejaVu{family}-{weight}Oblique.ttf" for family in ("Sans", "SansMono") for weight in ("", "Bold"))
_ITALIC = ("DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf")
_OTHERS = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmr10.ttf", "cmb10.ttf", "cmtt10.ttf")
_LATIN = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", *_OTHERS)
_SANS = _PLAIN[:4]


def _letters(faces: Sequence[str], letters: Sequence[str]) -> Signs:
    return [[Glyph(face, letter) for face in faces] for letter in letters]


GLYPHS: dict[str, Signs] = {
    "greek": _letters((*_PLAIN, *_OBLIQUE, *_ITALIC), GREEK),
    "cyrillic": _letters((*_PLAIN, *_OBLIQUE), CYRILLIC),  # in italics some take the shape of a Latin letter
    "scans": _letters(_LATIN, CAPITALS),
    # STIXGeneral carries Fraktur, bold Fraktur and double-struck letters among Unicode's mathematical ones.
    "blackletter": [
        [Glyph("STIXGeneral.ttf", chr(start + place)) for start in (0x1D51E, 0x1D586, 0x1D552)] for place in range(26)
    ],
    "orientation": _letters(_LATIN, TURNED),
    "counting": _letters(_SANS, WHOLE),
    "position": _letters(_SANS, WHOLE),
}


def handwritten(picture: np.ndarray, random: RandomState) -> np.ndarray:
    """A written sign, uint8 (n, n), smaller, turned and out of the middle."""
    placed = photograph(
        picture,
        SIZE,
        height=random.uniform(14, 20),
        degrees=random.normal(0, 8),
        shift=random.uniform(-4, 4, 2),
    )
    return grey(_worn(placed, random))


def _letter(signs: Signs, label: int, random: RandomState) -> np.ndarray:
    """One large letter, as presses and hands vary it."""
    return grey(_worn(_varied(_one_of(signs[label], random), random), random))


def _scan(signs: Signs, label: int, random: RandomState) -> np.ndarray:
    """A letter as a bad scan: dark, blurred, uneven ink and blots, on paper with shades, grain and folds."""
    ink = _varied(_one_of(signs[label], random), random)
    ink *= np.clip(1 + smooth(random.normal(0, 0.35, (6, 6)), SIZE), 0.6, 1)
    for _ in range(random.randint(3)):
        ink = np.maximum(ink, _dot(random.uniform(2, SIZE - 2, 2), random.uniform(0.8, 2)))
    paper = random.uniform(0.6, 0.95) + smooth(random.normal(0, 0.1, (3, 3)), SIZE)
    for _ in range(random.randint(3)):
        paper += _fold(random)
    strength = random.uniform(0.45, 0.8)
    picture = paper * (1 - strength * blurred(ink, random.uniform(0.05, 0.25)))
    return grey(picture + random.normal(0, random.uniform(0.02, 0.06), picture.shape))


def _turned(signs: Signs, label: int, random: RandomState) -> np.ndarray:
    """Any of the signs, turned clockwise by `label` eighths and by some degrees of jitter."""
    picture = stamp(
        _one_of(_one_of(signs, random), random),
        SIZE,
        height=random.uniform(14, 21),
        degrees=label * 360 / DIRECTIONS + random.uniform(-7, 7),
        weight=random.uniform(-0.1, 0.6),
        shift=random.uniform(-2, 2, 2),
    )
    return grey(_worn(picture, random))


def _counted(signs: Signs, label: int, random: RandomState) -> np.ndarray:
    """`label` + 1 small letters, none touching another."""
    return grey(_worn(scattered(signs, label + 1, random), random, noise=0.06))


def scattered(signs: Signs, count: int, random: RandomState) -> np.ndarray:
    """`count` small letters in full ink: float64 (32, 32), with two black pixels at least between any two."""
    picture, boxes = np.zeros((SIZE, SIZE)), []
    while len(boxes) < count:
        letter = _small(_one_of(_one_of(signs, random), random), random.randint(5, 9), random.randint(-1, 2) * 12)
        height, width = letter.shape
        free = np.zeros((SIZE - height, SIZE - width), bool)  # for the letter's upper left corner
        free[1:, 1:] = True
        for top, left, bottom, right in boxes:
            free[max(top - height - 1, 0) : bottom + 2, max(left - width - 1, 0) : right + 2] = False
        places = np.flatnonzero(free)
        if not len(places):  # it became full before it held all
            picture, boxes = np.zeros((SIZE, SIZE)), []
            continue
        top, left = divmod(_one_of(places, random), free.shape[1])
        boxes.append((top, left, top + height, left + width))
        picture[top : top + height, left : left + width] = letter
    return picture


@functools.cache
def _small(glyph: Glyph, height: int, degrees: int) -> np.ndarray:
    """A letter's ink, cropped."""
    ink = stamp(glyph, 2 * height, height=height, degrees=degrees, weight=0.2)
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _placed(signs: Signs, label: int, random: RandomState) -> np.ndarray:
    """A small letter whose centre lies in cell `label`, counted row by row, among fainter dots."""
    height = random.uniform(7, 11)
    corner = np.array([label % CELLS, label // CELLS]) * (SIZE / CELLS)
    # Half a pixel at least from the cell's edge, and whole inside the picture.
    first = np.maximum(corner + 0.5, height / 2 + 1)
    last = np.minimum(corner + SIZE / CELLS - 0.5, SIZE - height / 2 - 1)
    letter = stamp(
        _one_of(_one_of(signs, random), random),
        SIZE,
        height=height,
        degrees=random.normal(0, 10),
        weight=random.uniform(0.2, 0.5),
        shift=random.uniform(first, last) - SIZE / 2,
    )
    dots = np.zeros((SIZE, SIZE))
    for _ in range(random.randint(3, 9)):
        dot = _dot(random.uniform(1, SIZE - 1, 2), random.uniform(0.5, 1.8))
        dots = np.maximum(dots, random.uniform(0.15, 0.4) * dot)
    return grey(_worn(np.maximum(letter, dots), random, noise=0.06))


def _varied(glyph: Glyph, random: RandomState) -> np.ndarray:
    """A large letter of any size, proportions, slant and weight, a little turned, bent and out of the middle."""
    height = random.uniform(16, 23)
    picture = stamp(
        glyph,
        SIZE,
        height=height,
        width=min(height * random.uniform(0.75, 1.3), 23),
        degrees=random.normal(0, 7),
        slant=random.normal(0, 0.12),
        weight=random.uniform(-0.1, 0.6),
        shift=random.uniform(-2, 2, 2),
        bend=bent(random, random.uniform(0, 1.4)),
    )
    if random.uniform() < 0.3:  # as if it had been scanned with half the pixels
        picture = pooled(picture, 2).repeat(2, 0).repeat(2, 1)
    return picture


def _worn(picture: np.ndarray, random: RandomState, noise: float = 0.12) -> np.ndarray:
    """White ink as a weak sensor gives it back: blurred, with less contrast, and with this much noise at most."""
    picture = blurred(picture, random.uniform(0, 0.2)) * random.uniform(0.6, 1)
    return picture + random.normal(0, random.uniform(0, noise), picture.shape)


def _fold(random: RandomState) -> np.ndarray:
    """What a straight fold adds to the paper: a bright line with a shadow along it."""
    angle = random.uniform(0, math.pi)
    right, down = _offsets(random.uniform(4, SIZE - 4, 2))
    distance = math.cos(angle) * right + math.sin(angle) * down
    line, shadow = (np.clip(1.2 - np.abs(distance - away), 0, 1) for away in (0, 1.5))
    return random.uniform(0.05, 0.25) * line - random.uniform(0.05, 0.2) * shadow


def _dot(centre: Sequence[float], radius: float) -> np.ndarray:
    right, down = _offsets(centre)
    return np.clip(radius + 0.5 - np.sqrt(right * right + down * down), 0, 1)


def _offsets(centre: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How far right of and below a point the pixels' centres lie: (1, 32) and (32, 1)."""
    line = np.arange(SIZE) + 0.5
    return (line - centre[0])[None, :], (line - centre[1])[:, None]


def _one_of(options: Sequence, random: RandomState):
    return options[random.randint(len(options))]


DRAW: dict[str, Callable[[Signs, int, RandomState], np.ndarray]] = {
    "greek": _letter,
    "cyrillic": _letter,
    "scans": _scan,
    "blackletter": _letter,
    "orientation": _turned,
    "counting": _counted,
    "position": _placed,
}
