"""How good is the default run beside its baselines? `make figure`: adapter, linear probe, BitFit and full fine-tuning
on the embedded default, three seeds each, as `benchmarks/results/digits.json` and `digits.png`."""

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.record import made_with
from vitadapter_ext._atomic import write_atomically
from vitadapter_ext.train import configure, fit

RESULTS = Path(__file__).parent / "results"
METHODS = {
    "linear-probe": "linear probe",
    "bitfit": "BitFit",
    "adapter": "adapter, rank 8",
    "full": "full fine-tuning",
}


def measure(seeds: range) -> dict:
    """{"rows": a row a method, and with what they were made}; accuracies in 0..1 on the 500 test images."""
    rows, untouched = [], None
    for method, label in METHODS.items():
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(fit(configure(method=method, seed=seed, out=folder)).summary)
        untouched = runs[0]["backbone_accuracy"]
        rows.append(
            {
                "method": method,
                "label": label,
                "test_accuracy": [run["test_accuracy"] for run in runs],
                "trained_parameters": runs[0]["parameters"]["trainable"],
                "train_seconds": [run["train_seconds"] for run in runs],
                "adapter_file_bytes": runs[0]["adapter_file_bytes"],
            }
        )
    return {
        **made_with("make figure"),
        "untouched_backbone_accuracy": untouched,
        "rows": rows,
    }


def draw(result: dict, path: Path) -> None:
    """Mean test accuracy over trained parameters, a bar from the lowest to the highest seed, as a PNG."""
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in result["rows"]:
        accuracies = [100 * accuracy for accuracy in row["test_accuracy"]]
        mean, count = statistics.mean(accuracies), row["trained_parameters"]
        ours = row["method"] == "adapter"
        colour = "#c1440e" if ours else "#4a5a6a"
        spread = [[mean - min(accuracies)], [max(accuracies) - mean]]
        axes.errorbar(count, mean, spread, fmt="o", color=colour, markersize=9 if ours else 7, capsize=4)
        axes.annotate(
            f"{row['label']}\n{mean:.1f} %, {count:,} trained",
            (count, mean),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            va="top",
            color=colour,
            fontsize=9,
            fontweight="bold" if ours else "normal",
        )
    means = [100 * statistics.mean(row["test_accuracy"]) for row in result["rows"]]
    axes.set_xscale("log")
    axes.set_xlim(right=4 * max(row["trained_parameters"] for row in result["rows"]))
    axes.set_xlim(left=min(row["trained_parameters"] for row in result["rows"]) / 4)
    axes.set_ylim(min(means) - 1.6, 100)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test accuracy (%)")
    untouched = 100 * result["untouched_backbone_accuracy"]
    axes.set_title(
        f"Handwritten digits from a ViT pretrained on printed glyphs (untouched: {untouched:.1f} %)", fontsize=9.5
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png)
    write_atomically(path, png.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 100), metavar="N", help="how many seeds [3]")
    parser.add_argument("--redraw", action="store_true", help="only draw the figure again from the stored numbers")
    arguments = parser.parse_args()
    stored = RESULTS / "digits.json"
    if not arguments.redraw:
        write_atomically(stored, (json.dumps(measure(range(arguments.seeds)), indent=1) + "\n").encode())
    result = json.loads(stored.read_text())
    draw(result, RESULTS / "digits.png")
    for row in result["rows"]:
        accuracies = " ".join(f"{100 * accuracy:.1f}" for accuracy in row["test_accuracy"])
        mean = 100 * statistics.mean(row["test_accuracy"])
        print(f"{row['label']:<18} {mean:6.2f} %  ({accuracies})  {row['trained_parameters']:>9,} trained parameters")


if __name__ == "__main__":
    main()
