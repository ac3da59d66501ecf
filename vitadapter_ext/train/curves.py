"""How did the training go? A figure of losses and accuracies with the baselines, and one of the adapters' widths."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_BASELINES = (
    ("linear_probe_accuracy", "linear probe (test)", "--"),
    ("backbone_accuracy", "untouched backbone (test)", ":"),
)


def draw(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], again: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """A PNG of the metrics rows of a run and of the accuracies in its summary.

    Args:
        again: the rows of the training on all images, which have no validation; `rows` may be the same ones.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    judged = [row for row in rows if row["val_loss"] is not None]
    if judged:
        losses.plot(*_series(judged, "train_loss"), color="C0", label="train")
        losses.plot(*_series(judged, "val_loss"), color="C1", label="validation")
        accuracies.plot(*_series(judged, "val_accuracy", 100), color="C1", label="validation")
    if again:
        losses.plot(*_series(again, "train_loss"), color="C2", label="train and validation together")
    for axes in (losses, accuracies):
        for line in axes.lines:
            line.set_marker("o" if len(line.get_xdata()) == 1 else "")
    losses.set(xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    losses.legend(frameon=False)

    if "test_accuracy" in summary:
        test = 100 * summary["test_accuracy"]
        when = "train and validation together" if again else f"epoch {summary['best_epoch']}"
        accuracies.plot(
            summary["best_epoch"], test, "*", color="C3", markersize=12, label=f"test, {when}: {test:.2f} %"
        )
    for key, label, style in _BASELINES:
        if key in summary:
            accuracies.axhline(
                100 * summary[key], color="0.4", linestyle=style, label=f"{label}: {100 * summary[key]:.2f} %"
            )
    accuracies.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracies.legend(frameon=False)
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_widths(widths: Sequence[Mapping[str, int]]) -> bytes:
    """A PNG of each adapter's width in each phase, blocks along the axis and a panel for each position.

    Args:
        widths: of each phase, by the adapter's name, such as "blocks.3.adapter_mlp". They only shrink, so that each
            phase's bars stand inside the former's.
    """
    positions = list(dict.fromkeys(name.rpartition("_")[2] for name in widths[0]))
    count = len(widths[0]) // len(positions)
    figure = Figure(figsize=(max(5.0, 1.6 + 0.36 * count), 1.2 + 2.0 * len(positions)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(positions), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    shades = [f"{0.92 - 0.24 * i / max(1, len(widths) - 2):.2f}" for i in range(len(widths) - 1)] + ["#c1440e"]
    labels = [f"{'start' if i == 0 else f'after prune {i}'}: {sum(w.values()):,} neurons" for i, w in enumerate(widths)]
    for axes, position in zip(panels, positions, strict=True):
        names = [name for name in widths[0] if name.endswith(f"_{position}")]
        for phase, label, shade in zip(widths, labels, shades, strict=True):
            axes.bar(range(count), [phase[name] for name in names], width=0.8, color=shade, label=label)
        for place, name in enumerate(names):
            axes.annotate(str(widths[-1][name]), (place, widths[-1][name]), ha="center", va="bottom", fontsize=8)
        blocks = [".".join(re.findall(r"\d+", name)) for name in names]
        axes.set_xticks(range(count), blocks, rotation=0 if max(map(len, blocks)) < 4 else 90)
        axes.set_ylabel(f"neurons, {position}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("block")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return _png(figure)


def _series(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1) -> tuple[list[int], list[float]]:
    return [row["epoch"] for row in rows], [factor * row[key] for row in rows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
