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


def draw(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> bytes:
    """A PNG of the metrics rows of a run and of the accuracies in its summary."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) == 1 else None
    losses.plot(epochs, [row["train_loss"] for row in rows], color="C0", label="train", marker=marker)
    losses.plot(epochs, [row["val_loss"] for row in rows], color="C1", label="validation", marker=marker)
    losses.set(xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    losses.legend(frameon=False)

    accuracies.plot(epochs, [100 * row["val_accuracy"] for row in rows], color="C1", label="validation", marker=marker)
    if "test_accuracy" in summary:
        test = 100 * summary["test_accuracy"]
        accuracies.plot(
            summary["best_epoch"], test, "*", color="C3", markersize=12, label=f"test, best epoch: {test:.2f} %"
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
