"""What do MiniTAB's pictures look like? Sixteen test images of each task with their labels, on one sheet.

python -m benchmarks.minitab_sheet      writes benchmarks/results/minitab-sheet.png
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitadapter_ext._atomic import write_atomically
from vitadapter_ext.data.minitab import TASKS, read_minitab
from vitadapter_ext.data.minitab_ink import SIZE, font_path

SHEET = Path(__file__).parent / "results" / "minitab-sheet.png"

ROWS, COLUMNS = 2, 8  # of pictures in a task's panel
ZOOM = 3
GREYS = 32  # shades on the sheet; all 256 would make the noise fill most of the file

_PICTURE = SIZE * ZOOM
_CELL = (_PICTURE + 6, _PICTURE + 40)  # a picture and two lines of label under it
_TITLE = 54
_PANEL = (COLUMNS * _CELL[0], _TITLE + ROWS * _CELL[1])
_GAP = 24


def sheet() -> Image.Image:
    """All tasks, two panels in a row, as a grey image."""
    lines = (len(TASKS) + 1) // 2
    size = (2 * _PANEL[0] + 3 * _GAP, lines * (_PANEL[1] + _GAP) + _GAP)
    image = Image.new("L", size, 255)
    for place, task in enumerate(TASKS):
        corner = (_GAP + place % 2 * (_PANEL[0] + _GAP), _GAP + place // 2 * (_PANEL[1] + _GAP))
        image.paste(panel(task), corner)
    return image.quantize(GREYS, dither=Image.Dither.NONE)


def panel(task: str) -> Image.Image:
    """One task: what it asks, and pictures with their labels, from all over its classes."""
    group, classes, question = TASKS[task]
    image = Image.new("L", _PANEL, 255)
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), f"{task}  ({group}, {len(classes)} classes)", 0, _font("DejaVuSans-Bold.ttf", 19))
    draw.text((0, 26), question, 60, _font("DejaVuSans.ttf", 16))
    for place, (picture, label) in enumerate(_examples(task, ROWS * COLUMNS)):
        left, top = place % COLUMNS * _CELL[0], _TITLE + place // COLUMNS * _CELL[1]
        image.paste(picture.convert("L").resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (left, top))
        name = classes[label].replace(", ", ",\n")
        below = (left + _PICTURE / 2, top + _PICTURE + 3)
        draw.multiline_text(below, name, 0, _font("DejaVuSans.ttf", 14), "ma", spacing=1, align="center")
    return image


def _examples(task: str, count: int) -> list[tuple[Image.Image, int]]:
    """Test images of labels that lie evenly over the classes; where there are fewer classes, round after round."""
    test, classes = read_minitab(task).test, len(TASKS[task].classes)
    wanted = np.arange(count) * classes // count if classes > count else np.arange(count) % classes
    found = []
    for place, label in enumerate(wanted):
        earlier = int((wanted[:place] == label).sum())
        found.append(test[np.flatnonzero(test.labels == label)[earlier]])
    return found


def _font(file: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(file)), points)


def main() -> None:
    argparse.ArgumentParser("python -m benchmarks.minitab_sheet", description=__doc__.partition("\n")[0]).parse_args()
    png = io.BytesIO()
    sheet().save(png, "PNG", optimize=True)
    write_atomically(SHEET, png.getvalue())
    print(f"{SHEET}: {len(png.getvalue()) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
