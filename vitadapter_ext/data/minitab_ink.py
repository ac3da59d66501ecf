"""How does a letter of a font become ink on a small picture? By one lookup in a field of distances, for each pixel.

Each glyph is drawn once, large, and kept as the signed distance to its outline. Any size, turn, slant and weight of it
is then a matter of which entries are read, and of what is added to them. Fields, looking up and all that is done to a
picture afterwards are float64 arithmetic in numpy, so that another processor's last bit hardly ever shows.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.random import RandomState
from PIL import Image, ImageFont
from scipy import ndimage

SIZE = 32  # pixels of a picture, both ways

_CANVAS = 72  # pixels of a field, both ways
_INK = 48  # longest side of a glyph on that canvas; the rest is room for turning it and for more weight
_MARGIN = (_CANVAS - _INK) // 2
_POINTS = 96  # the size at which a glyph is drawn before it is fitted into _INK
_SAMPLES = 2  # lookups for each picture pixel, both ways


class Glyph(NamedTuple):
    """A character of a font file that matplotlib carries."""

    file: str
    character: str


def font_path(file: str) -> Path:
    """Where matplotlib keeps its font files."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file


@functools.cache
def field(glyph: Glyph) -> np.ndarray:
    """Signed distances to the glyph's outline, positive inside: float32 (72, 72), in its own pixels."""
    ink = _font(glyph.file).getmask(glyph.character, mode="L")
    image = Image.frombytes("L", ink.size, bytes(ink))
    scale = _INK / max(image.size)
    image = image.resize([max(2, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(image, ((_CANVAS - image.width) // 2, (_CANVAS - image.height) // 2))
    inside = np.asarray(canvas) >= 128
    # scipy measures to the middle of the nearest pixel on the other side, half a pixel beyond the outline.
    within, beyond = (ndimage.distance_transform_edt(side) - 0.5 for side in (inside, ~inside))
    return np.where(inside, within, -beyond).astype(np.float32)


@functools.cache
def _font(file: str) -> ImageFont.FreeTypeFont:
    # Basic layout: the other one needs a library that Pillow finds on some machines only.
    return ImageFont.truetype(str(font_path(file)), _POINTS, layout_engine=ImageFont.Layout.BASIC)


def stamp(glyph: Glyph, side: int, *, weight: float = 0.0, **placement: Any) -> np.ndarray:
    """One letter's ink on a square: float64 (side, side), 0 where there is none and 1 where a pixel is full of it.

    Args:
        weight: what is added to the strokes on either side, in pixels.
        placement: as for `lookup`.
    """
    distance, scale = lookup(field(glyph), side, **placement)
    return pooled(np.clip((distance * scale + weight) * _SAMPLES + 0.5, 0, 1), _SAMPLES)


def photograph(picture: np.ndarray, side: int, **placement: Any) -> np.ndarray:
    """A square picture (n, n) on a larger black one, (side, side), placed as `lookup` says."""
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(Image.fromarray(picture).resize((_INK, _INK), Image.Resampling.BILINEAR), 2 * (_MARGIN,))
    return pooled(lookup(np.asarray(canvas) / 255, side, **placement)[0], _SAMPLES)


def lookup(
    table: np.ndarray,
    side: int,
    *,
    height: float,
    width: float | None = None,
    degrees: float = 0.0,
    slant: float = 0.0,
    shift: Sequence[float] = (0.0, 0.0),
    bend: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """What a table (72, 72) holds for each part of a square of `side` pixels: values (2 * side, 2 * side), and how many
    pixels of the square one of the table's is wide.

    Args:
        height, width: what 48 rows and columns of the table become, in pixels; `width` is `height` unless given. A
            glyph's longest side is 48.
        degrees: how far it is turned clockwise, about its centre.
        slant: how far its top leans to the right, as a share of the height.
        shift: where its centre lies right of and below the centre of the square, in pixels.
        bend: displacements (2, 2 * side, 2 * side) in pixels, right and down, of the places where the table is read.
    """
    width = height if width is None else width
    turn = math.radians(degrees)
    right, down = _places(side)
    right, down = right - shift[0], down - shift[1]
    if bend is not None:
        right, down = right + bend[0], down + bend[1]
    across = math.cos(turn) * right + math.sin(turn) * down
    along = math.cos(turn) * down - math.sin(turn) * right
    column = (across + slant * along) * (_INK / width) + _CANVAS / 2
    row = along * (_INK / height) + _CANVAS / 2
    row, column = (np.clip(place, 0, _CANVAS - 1).astype(np.int64) for place in (row, column))
    return table.take(row * _CANVAS + column).astype(np.float64), math.sqrt(width * height) / _INK


@functools.cache
def _places(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each lookup lies right of and below the centre of a square, in picture pixels: (1, n) and (n, 1)."""
    line = (np.arange(side * _SAMPLES) + 0.5) / _SAMPLES - side / 2
    return line[None, :], line[:, None]


def pooled(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` by `factor` pixels."""
    parts = [image[row::factor, column::factor] for row in range(factor) for column in range(factor)]
    return sum(parts) / len(parts)


def bent(random: RandomState, strength: float) -> np.ndarray:
    """Smooth random displacements for `stamp` on a whole picture, with this spread in pixels."""
    return smooth(random.normal(0, strength, (2, 4, 4)), SIZE * _SAMPLES)


def smooth(coarse: np.ndarray, side: int) -> np.ndarray:
    """Values on a coarse square lattice (…, n, n), blended over a picture (…, side, side) with no creases."""
    blend = _blend(coarse.shape[-1], side)
    return blend @ coarse @ blend.T


@functools.cache
def _blend(lattice: int, side: int) -> np.ndarray:
    """How much of each lattice point is in each of `side` pixels, (side, lattice)."""
    place = (np.arange(side) + 0.5) * ((lattice - 1) / side)
    away = np.clip(np.abs(place[:, None] - np.arange(lattice)), 0, 1)
    return 1 - away * away * (3 - 2 * away)


def blurred(image: np.ndarray, strength: float) -> np.ndarray:
    """A blur that takes a share `strength` (0 to 1/3) of each pixel from either neighbour, down and across."""
    for _ in range(2):
        image = image.T
        result = (1 - 2 * strength) * image
        result[1:] += strength * image[:-1]
        result[:-1] += strength * image[1:]
        result[0] += strength * image[0]  # beyond the border it goes on as at the border
        result[-1] += strength * image[-1]
        image = result
    return image


def grey(image: np.ndarray) -> np.ndarray:
    """Brightness from 0 to 1 as uint8."""
    return np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
