"""How good is the default run beside other methods? `make figure`: each on the embedded default with its recipe, three
seeds, as `benchmarks/results/digits.json` and `digits.png`."""

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
    "mimi": "MiMi, 384 to 48 neurons",
    "arc": "ARC, rank 16",
    "adapter": "adapter, rank 8",
    "consolidator": "Consolidator, 64 groups",
    "full": "full fine-tuning",
}

OURS = ("mimi", "arc", "adapter", "consolidator")


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
    """A row a method, as a PNG: on the left test accuracy, mean and all seeds, on the right trained parameters."""
    figure = Figure(figsize=(7.6, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, parameters = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(result["rows"]):
        colour = "#c1440e" if row["method"] in OURS else "#4a5a6a"
        seeds = [100 * share for share in row["test_accuracy"]]
        mean, count = statistics.mean(seeds), row["trained_parameters"]
        accuracy.plot([min(seeds), max(seeds)], [place, place], color=colour, linewidth=2, alpha=0.4)
        accuracy.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=9)
        accuracy.plot(mean, place, "o", color=colour, markersize=8)
        accuracy.annotate(f"{mean:.1f}", (mean, place), (0, 7), textcoords="offset points", ha="center", color=colour)
        parameters.barh(place, count, height=0.5, color=colour)
        parameters.annotate(f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center", color=colour)
    accuracy.set_yticks(range(len(result["rows"])), [row["label"] for row in result["rows"]])
    accuracy.set_ylim(-0.6, len(result["rows"]) - 0.3)
    untouched = 100 * result["untouched_backbone_accuracy"]
    accuracy.set_xlabel(f"test accuracy (%); untouched backbone: {untouched:.1f}")
    parameters.set_xlabel("trained parameters")
    parameters.set_xscale("log")
    parameters.set_xlim(100, 30 * max(row["trained_parameters"] for row in result["rows"]))
    for axes in (accuracy, parameters):
        axes.grid(axis="x", alpha=0.25)
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
        RESULTS.mkdir(exist_ok=True)
        write_atomically(stored, (json.dumps(measure(range(arguments.seeds)), indent=1) + "\n").encode())
    result = json.loads(stored.read_text())
    draw(result, RESULTS / "digits.png")
    for row in result["rows"]:
        accuracies = " ".join(f"{100 * accuracy:.1f}" for accuracy in row["test_accuracy"])
        mean = 100 * statistics.mean(row["test_accuracy"])
        print(f"{row['label']:<24} {mean:6.2f} %  ({accuracies})  {row['trained_parameters']:>9,} trained parameters")


if __name__ == "__main__":
    main()
