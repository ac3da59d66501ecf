"""How is a model drawn? `Canvas` puts `Part`s on lines, a chain of them or a residual branch, and knows no model.

Half a block, such as x + attn(...), is the stream, which runs straight on, with its residual branch above. An adapter
is a loop: it leaves the line that it reads and joins the line that it adds to.
"""

import functools
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

FORMATS = ("png", "svg", "pdf")
LOOPS = ("on the branch", "after the sum", "around the branch")
_LEGEND = {
    "frozen": "frozen",
    "added": "added by the method",
    "trained": "trained too: the head, tensors of the backbone",
}
_COLOURS = {"frozen": ("#e8e8e8", "#333333"), "added": ("#c8402a", "white"), "trained": ("#2f6fae", "white")}
_LINE, _GAP, _MARGIN, _RADIUS = 0.15, 0.16, 0.3, 0.08  # inches: of text, between boxes, around all, of a plus
_WIDTH = 11.0  # inches, where a chain goes on in the next line
_SIZE, _DPI = 8, 120  # points; pixels of an inch


@dataclass(frozen=True)
class Part:
    """A box of the picture.

    Attributes:
        name: in its block, or in the model.
        role: "frozen", "added" or "trained" (a part of it is enough).
        place: in the model "chain", or "beside" it; in a block "branch" or one of `LOOPS`.
        half: of a block, "attn" or "mlp".
        column: counts from the left; boxes of one column are passed side by side.
        words: what else the box says.
        only: the kind of tensor that is trained, such as "bias", where those of other kinds are frozen.
        sizes: widths from input to output.
        parameters: how many are trained.
    """

    name: str
    role: str
    place: str
    half: str = ""
    column: int = 0
    words: str = ""
    only: str = ""
    sizes: tuple[int, ...] = ()
    parameters: int = 0


def _range(numbers: Sequence[int], style: str = "") -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:{style}}" if low == high else f"{low:{style}} … {high:{style}}"


def text(parts: Sequence[Part]) -> list[str]:
    """The lines of the box that stands for the same part of several blocks; its name may have several."""
    first = parts[0]
    lines = [*first.name.split("\n"), " → ".join(map(_range, zip(*(part.sizes for part in parts), strict=True)))]
    count = _range([part.parameters for part in parts], ",")
    trained = (f"{first.only}: {count}" if first.only else f"{count} parameters") if first.role != "frozen" else ""
    return [line for line in (*lines, first.words, trained) if line]


class Canvas:
    """Draws downwards in inches: `y` is where the next row begins, `width` how far the widest has come."""

    def __init__(self) -> None:
        self.figure = Figure(dpi=_DPI)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.y, self.width = 0.0, 0.0

    def chain(self, parts: Sequence[Part]) -> None:
        x, height = _MARGIN, max((_size([part])[1] for part in parts), default=0.0)
        y = self.y - height / 2
        for number, part in enumerate(parts):
            width, _ = _size([part])
            if number and x + 2 * _GAP + width > _WIDTH:
                x, y = _MARGIN, y - height - 2 * _GAP
            if number:
                if part.place == "chain":
                    self._line([(x, y), (x + 2 * _GAP, y)], arrow=True)
                x += 2 * _GAP
            self._box(x, y, [part], height)
            x += width
            self.width = max(self.width, x)
        self.y = y - height / 2 - _GAP

    def heading(self, words: str) -> None:
        for line in textwrap.wrap(words, 110):
            self._text(_MARGIN, self.y - _LINE, line, weight="bold", size=9, ha="left")
            self.y -= 1.4 * _LINE
        self.y -= _GAP

    def half(self, parts: Sequence[Sequence[Part]], start: str, end: str) -> None:
        """Half a block; `parts` are one of each block that is drawn, for each box."""
        columns = [list(group) for _, group in groupby(parts, key=lambda same: same[0].column)]
        at = {place: [c for c in columns if c[0][0].place == place] for place in ("branch", *LOOPS)}
        height = {place: max(map(_height, found), default=0.0) for place, found in at.items()}
        rise = height["branch"] / 2 + 1.5 * _GAP
        lifted = [height[place] + _GAP if at[place] else 0.0 for place in ("on the branch", "after the sum")]
        stream = self.y - max(rise + height["branch"] / 2, rise + lifted[0], lifted[1])
        branch, fork = stream + rise, _MARGIN + 2 * _GAP
        x = fork + _GAP
        for column in columns:
            if column[0][0].place == "branch":
                x = self._column(x, branch, column)
            elif column[0][0].place == "on the branch":
                x = self._loop(x, branch, [column[0]])
        around = [column[0] for column in at["around the branch"]]
        total = max(x, fork + sum(_size(same)[0] + 2 * _GAP for same in around)) + _GAP
        self._line([(fork, stream), (fork, branch), (fork + _GAP, branch)])
        self._line([(x, branch), (total, branch), (total, stream + _RADIUS)], arrow=True)
        self.y = stream - 1.5 * _GAP
        for same in around:
            width, tall = _size(same)
            below = stream - tall / 2 - _GAP
            self._line([(fork, stream), (fork, below), (total, below), (total, stream - _RADIUS)], "added", arrow=True)
            self._box((fork + total - width) / 2, below, same, tall)
            self.y = below - tall / 2 - 1.5 * _GAP
        x = total + 1.5 * _GAP
        if at["after the sum"]:
            x = self._loop(x, stream, [column[0] for column in at["after the sum"]])
        self._line([(_MARGIN + 0.5 * _GAP, stream), (x + _GAP, stream)], arrow=True)
        self._plus(total, stream)
        self._text(_MARGIN, stream, start)
        self._text(x + 2 * _GAP, stream, end)
        self.width = max(self.width, x + 3 * _GAP)

    def _column(self, x: float, y: float, column: Sequence[Sequence[Part]]) -> float:
        """Boxes that the line at `y` passes side by side, one above the other; returns where it goes on."""
        width = max(_size(same)[0] for same in column)
        top = y + _height(column) / 2
        for same in column:
            _, tall = _size(same)
            level = top - tall / 2
            self._line([(x, y), (x, level), (x + width + 2 * _GAP, level), (x + width + 2 * _GAP, y)])
            self._box(x + _GAP, level, same, tall, width)
            top -= tall + _GAP / 2
        return x + width + 2 * _GAP

    def _loop(self, x: float, y: float, boxes: Sequence[Sequence[Part]]) -> float:
        """The line at `y` goes on, and its loop above goes through the boxes; returns where they are one again."""
        tall = max(_size(same)[1] for same in boxes)
        level, at = y + tall / 2 + _GAP, x + 2 * _GAP
        end = at + sum(_size(same)[0] + _GAP for same in boxes)
        self._line([(x, y), (end + 2 * _GAP, y)])
        self._line([(x + _GAP, y), (x + _GAP, level), (end, level), (end, y + _RADIUS)], "added", arrow=True)
        for same in boxes:
            self._box(at, level, same, _size(same)[1])
            at += _size(same)[0] + _GAP
        self._plus(end, y)
        return end + 2 * _GAP

    def _box(self, x: float, y: float, same: Sequence[Part], height: float, width: float | None = None) -> None:
        """A box whose left side has its middle at (x, y)."""
        face, ink = _COLOURS[same[0].role]
        lines, width = text(same), width or _size(same)[0]
        style = "round,pad=0,rounding_size=0.05"
        self.axes.add_patch(
            FancyBboxPatch((x, y - height / 2), width, height, boxstyle=style, fc=face, ec="#777777", lw=0.6, zorder=2)
        )
        bold = same[0].name.count("\n") + 1
        for number, line in enumerate(lines):
            level = y + (len(lines) - 1 - 2 * number) * _LINE / 2
            weight = "bold" if number < bold else "normal"
            self._text(x + width / 2, level, line, color=ink, weight=weight)

    def _line(self, points: Sequence[tuple[float, float]], role: str = "frozen", arrow: bool = False) -> None:
        colour = _COLOURS["added"][0] if role == "added" else "#555555"
        self.axes.plot(*zip(*points, strict=True), color=colour, lw=1.1, zorder=1, solid_joinstyle="round")
        if arrow:
            ends = {"arrowstyle": "-|>", "color": colour, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
            self.axes.annotate("", points[-1], points[-2], arrowprops=ends, zorder=1)

    def _plus(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), _RADIUS, fc="white", ec="#333333", lw=1.0, zorder=3))
        for dx, dy in ((0.6 * _RADIUS, 0), (0, 0.6 * _RADIUS)):
            self.axes.plot((x - dx, x + dx), (y - dy, y + dy), color="#333333", lw=1.0, zorder=4)

    def _text(self, x: float, y: float, words: str, size: float = _SIZE, **kwargs) -> None:
        self.axes.text(x, y, words, size=size, va="center_baseline", zorder=5, **{"ha": "center", **kwargs})

    def save(self, title: str, lines: Sequence[str], format: str) -> bytes:
        """The file, with title, lines and legend above what was drawn."""
        top = (4 + len(lines)) * 1.3 * _LINE
        self._text(_MARGIN, top - 1.6 * _LINE, title, size=11, weight="bold", ha="left")
        self.width = max(self.width, _MARGIN + _breadth(title, 11, "bold"), *(_MARGIN + _breadth(t) for t in lines))
        for number, line in enumerate(lines):
            self._text(_MARGIN, top - (3 + 1.2 * number) * _LINE, line, color="#333333", ha="left")
        x = _MARGIN
        for role, words in _LEGEND.items():
            self.axes.add_patch(Rectangle((x, 1.6 * _LINE), 0.24, 0.13, fc=_COLOURS[role][0], ec="#777777", lw=0.6))
            self._text(x + 0.32, 2 * _LINE, words, ha="left")
            x += 0.32 + _breadth(words) + 2 * _GAP
        width, height = max(self.width, x) + _MARGIN, top - self.y
        self.axes.set(xlim=(0, width), ylim=(self.y, top))
        self.figure.set_size_inches(width, height)
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format=format, dpi=_DPI)
        return buffer.getvalue()


@functools.cache
def _breadth(words: str, size: float = _SIZE, weight: str = "normal") -> float:
    """The width of a line in inches."""
    return TextPath((0, 0), words, size=size, prop=FontProperties(weight=weight)).get_extents().width / 72


def _size(same: Sequence[Part]) -> tuple[float, float]:
    """Width and height of a box."""
    lines = text(same)
    return max(_breadth(line, weight="bold") for line in lines) + 0.16, (len(lines) + 0.6) * _LINE


def _height(column: Sequence[Sequence[Part]]) -> float:
    return sum(_size(same)[1] + _GAP / 2 for same in column) - _GAP / 2
