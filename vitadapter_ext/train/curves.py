"""How did the training go? One figure: losses on the left, accuracies with the baselines on the right."""

import io
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
