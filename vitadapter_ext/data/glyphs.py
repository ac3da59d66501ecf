"""What is the embedded backbone pretrained on? Letters and digits, drawn from fonts that matplotlib carries.

Every glyph of every face is drawn once and kept as two smooth fields whose zero level is an edge: the signed distance
to the printed outline, and minus the distance to the glyph's skeleton. A picture is then one lookup in a field: warp
the coordinates (affine and elastic), add the pen's thickness, and cut at zero. Outlines give print of any weight,
skeletons give the even strokes of a pen. The ink is white on black, as in MNIST and in scikit-learn's digits.
"""

import functools
import string
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont
from scipy import ndimage

CLASSES = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
SIZE = 32  # pixels of a picture, both ways

_CANVAS = 64  # pixels of a field, both ways
_INK = 44  # longest side of a glyph on that canvas; the rest is room for the distances around it
_POINTS = 96  # the size at which a glyph is drawn before it is fitted into _INK


class Face(NamedTuple):
    """A font file and the code points at which its digits, capitals and small letters start (None: it has none)."""

    file: str
    digits: int | None = ord("0")
    upper: int | None = ord("A")
    lower: int | None = ord("a")


# STIXGeneral carries whole alphabets among Unicode's mathematical letters; those that read as ordinary ones are used.
FACES = (
    *(Face(f"DejaVuSans{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(Face(f"DejaVuSansMono{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(Face(f"DejaVuSerif{style}.ttf") for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(Face(f"STIXGeneral{style}.ttf") for style in ("", "Bol", "Italic", "BolIta")),
    *(Face(f"{name}.ttf") for name in ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10")),
    Face("STIXGeneral.ttf", 0x1D7E2, 0x1D5A0, 0x1D5BA),  # sans serif
    Face("STIXGeneral.ttf", 0x1D7EC, 0x1D5D4, 0x1D5EE),  # sans serif bold
    Face("STIXGeneral.ttf", None, 0x1D608, 0x1D622),  # sans serif italic
    Face("STIXGeneral.ttf", 0x1D7F6, 0x1D670, 0x1D68A),  # monospace
    Face("STIXGeneral.ttf", None, 0x1D49C, 0x1D4B6),  # script
    Face("STIXGeneral.ttf", None, 0x1D4D0, 0x1D4EA),  # bold script
)


def glyphs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random glyphs: images float32 (count, 1, 32, 32) in [0, 1], and labels int64 (count,), indices into `CLASSES`.

    The generator (on the CPU) is the only source of chance, so equal seeds give equal pictures.
    """
    fields, members, sizes = _templates()
    # Digits come three times as often: ten classes carry most of what data sets of written signs ask for.
    labels = torch.randint(len(CLASSES) + 20, (count,), generator=generator)
    labels = torch.where(labels < len(CLASSES), labels, labels % 10)
    pick = (torch.rand(count, generator=generator) * sizes[labels]).long()
    pen = torch.rand(count, generator=generator) < 0.6
    field = fields[members[labels, pick], pen.long()].unsqueeze(1)  # (count, 1, canvas, canvas)
    field = F.grid_sample(field, _warp(count, generator), mode="bilinear", padding_mode="border", align_corners=False)
    images = torch.sigmoid((field + _thickness(pen, generator)) * 2.0)  # an edge about one picture pixel wide
    return _degrade(images, generator), labels


@functools.cache
def _templates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields (glyphs, 2, canvas, canvas) in canvas pixels, each class's rows in them, and how many rows it has."""
    masks, rows = [], [[] for _ in CLASSES]
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for face in FACES:
        path = str(folder / face.file)
        font, charmap = ImageFont.truetype(path, _POINTS), FT2Font(path).get_charmap()
        for label, name in enumerate(CLASSES):
            start, first = _start(face, name)
            if start is None or (code := start + ord(name) - ord(first)) not in charmap:
                continue  # the script alphabets have holes
            for mask in _forms(font, chr(code), name):
                rows[label].append(len(masks))
                masks.append(mask)
    masks = np.stack(masks)
    skeletons = _skeletonise(masks)
    distance = ndimage.distance_transform_edt
    fields = [(distance(m) - distance(~m), -distance(~s)) for m, s in zip(masks, skeletons, strict=True)]
    members = torch.zeros(len(CLASSES), max(map(len, rows)), dtype=torch.long)
    for label, found in enumerate(rows):
        members[label, : len(found)] = torch.tensor(found)
    return torch.tensor(np.array(fields), dtype=torch.float32), members, torch.tensor([len(found) for found in rows])


def _start(face: Face, name: str) -> tuple[int | None, str]:
    if name.isdigit():
        return face.digits, "0"
    return (face.upper, "A") if name.isupper() else (face.lower, "a")


def _forms(font: ImageFont.FreeTypeFont, char: str, name: str) -> list[np.ndarray]:
    """The glyph's mask, and the form that no font has but many hands write: a 1 of one stroke, a 7 with a bar."""
    mask = _draw(font, char)
    middle = _CANVAS // 2
    if name == "1":
        stroke = np.zeros_like(mask)
        stroke[middle - _INK // 2 : middle + _INK // 2, middle - 2 : middle + 2] = True
        return [mask, stroke]
    if name == "7":
        crossed = mask.copy()
        stem = int(np.flatnonzero(mask[middle]).mean())
        crossed[middle - 1 : middle + 2, stem - 10 : stem + 11] = True
        return [mask, crossed]
    return [mask]


def _draw(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray:
    """The glyph as a mask (canvas, canvas), centred, its longest side `_INK` pixels."""
    ink = font.getmask(char, mode="L")
    image = Image.frombytes("L", ink.size, bytes(ink))
    scale = _INK / max(image.size)
    image = image.resize([max(2, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(image, ((_CANVAS - image.width) // 2, (_CANVAS - image.height) // 2))
    return np.asarray(canvas) >= 128


def _skeletonise(masks: np.ndarray) -> np.ndarray:
    """Thin masks (n, h, w) to lines one pixel wide (Zhang and Suen, "A fast parallel algorithm for thinning", 1984)."""
    result = masks.astype(np.uint8)
    changing = np.arange(len(result))
    while len(changing):
        masks = result[changing]
        for half in (0, 1):
            p = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
            # The eight neighbours, clockwise from north.
            ring = [p[:, :-2, 1:-1], p[:, :-2, 2:], p[:, 1:-1, 2:], p[:, 2:, 2:]]
            ring += [p[:, 2:, 1:-1], p[:, 2:, :-2], p[:, 1:-1, :-2], p[:, :-2, :-2]]
            north, east, south, west = ring[0], ring[2], ring[4], ring[6]
            count = sum(ring)
            rises = sum((a < b).astype(np.uint8) for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
            open_side = east & south & (north | west) if half == 0 else north & west & (east | south)
            masks = masks & ~((count >= 2) & (count <= 6) & (rises == 1) & (open_side == 0))
        changed = (masks != result[changing]).any((1, 2))
        result[changing] = masks
        changing = changing[changed]
    return result.astype(bool)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low


def _warp(count: int, generator: torch.Generator) -> torch.Tensor:
    """Where each picture pixel looks in the field, (count, size, size, 2) in [-1, 1]: affine, then elastic."""
    angle = 0.17 * torch.randn(count, generator=generator)
    slant = 0.22 * torch.randn(count, generator=generator) + 0.08
    # A glyph fills _INK / _CANVAS of its field; real data sets crop to the ink, so most pictures are nearly filled.
    height = torch.empty(count).uniform_(0.85, 1.1, generator=generator) * (_CANVAS / _INK)
    width = height * torch.exp(0.2 * torch.randn(count, generator=generator))
    zeros, ones = torch.zeros(count), torch.ones(count)
    rotate = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    shear = torch.stack([ones, slant, zeros, ones], -1).view(-1, 2, 2)
    stretch = torch.stack([1 / width, zeros, zeros, 1 / height], -1).view(-1, 2, 2)
    shift = 0.05 * torch.randn(count, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([stretch @ shear @ rotate, shift], -1), [count, 1, SIZE, SIZE], align_corners=False)
    # Elastic: a few random displacements on a coarse lattice, interpolated smoothly.
    coarse = torch.randn(count, 2, 4, 4, generator=generator) * _uniform(count, 0.0, 0.14, generator)
    grid = grid + F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    # Hands differ most in how they share the height out: small loop over a long tail, or the reverse.
    share = 0.25 * torch.randn(count, 1, 1, generator=generator)
    return torch.stack([grid[..., 0], grid[..., 1] + share * torch.cos(grid[..., 1].clamp(-1, 1) * (torch.pi / 2))], -1)


def _thickness(pen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What is added to a field, (count, 1, size, size) in its pixels: the pen's radius, or a print's extra weight."""
    count = len(pen)
    radius = _uniform(count, 1.6, 5.0, generator)
    weight = _uniform(count, -1.0, 2.5, generator)
    thickness = torch.where(pen.view(-1, 1, 1, 1), radius, weight)
    # Uneven pressure swells strokes and now and then breaks one, so that a closed 4 opens as a written one does.
    pressure = torch.randn(count, 1, 5, 5, generator=generator) * _uniform(count, 0.0, 1.4, generator)
    return thickness + F.interpolate(pressure, size=(SIZE, SIZE), mode="bicubic", align_corners=True)


def _degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a small sensor does: fewer pixels, fewer grey levels, noise, uneven ink; then back to the full size."""
    count = len(images)
    contrast = _uniform(count, 0.75, 1.0, generator)
    noise = torch.randn(images.shape, generator=generator) * _uniform(count, 0.0, 0.08, generator)
    resolution = torch.tensor([8, 8, 8, 12, 16, SIZE])[torch.randint(6, (count,), generator=generator)]
    result = torch.empty_like(images)
    for pixels in resolution.unique().tolist():
        chosen = resolution == pixels
        small = F.adaptive_avg_pool2d(images[chosen], pixels)
        # Thin strokes fade when they are averaged; a scanner's exposure brings the ink back to nearly white.
        small = small * contrast[chosen] / small.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)
        small = (small + noise[chosen][..., :pixels, :pixels]).clamp(0, 1)
        small = (small * 16).round() / 16  # what counting the ink of 4 by 4 binary pixels gives
        result[chosen] = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return result
