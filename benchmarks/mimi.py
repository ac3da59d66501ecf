"""Do pruned adapters beat adapters of that size from scratch? `make pruning`: MiMi from 384 neurons to 48 on the
embedded default, beside random pruning and adapters of rank 4 (48 neurons) in the same places; five seeds, the same
epochs in all. Writes `benchmarks/results/mimi.json`, `mimi.md` and, of one seed, `mimi-widths.png`."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import made_with
from benchmarks.report import json_text, table
from vitadapter_ext._atomic import write_atomically
from vitadapter_ext.train import configure, fit
from vitadapter_ext.train.curves import draw_widths

RESULTS = Path(__file__).parent / "results"
PLAIN = {"method": "adapter", "placement": "houlsby", "bias": False, "scale": 1.0}
ARMS = {
    "MiMi": {"method": "mimi"},
    "MiMi, normalised score": {"method": "mimi", "score": "paper-normalised"},
    "random pruning": {"method": "mimi", "score": "random"},
    "rank 4 from scratch": {**PLAIN, "rank": 4, "init": "linear"},
    "rank 4 from scratch, near-zero init": {**PLAIN, "rank": 4, "init": "houlsby"},
    "rank 32, not pruned": {**PLAIN, "rank": 32, "init": "linear"},
}


def measure(seeds: range, budgets: list[int]) -> tuple[list[dict[str, Any]], bytes]:
    """A row for each arm and number of epochs, and the picture of MiMi's widths in the first run."""
    rows, picture = [], b""
    for epochs in budgets:
        for arm, settings in ARMS.items():
            runs = []
            for seed in seeds:
                with tempfile.TemporaryDirectory() as folder:
                    given = {**settings, "epochs": epochs, "seed": seed, "baselines": False, "out": folder}
                    result = fit(configure(**given))
                    runs.append(result.summary)
            picture = picture or draw_widths(runs[0]["widths"])
            row = {
                "arm": arm,
                "epochs": epochs,
                "neurons": runs[0]["parameters"]["adapter"] // (2 * result.model.embed_dim),
            }
            row["trained_parameters"] = runs[0]["parameters"]["trainable"]
            if "widths" in runs[0]:
                row["vanished"] = [sum(width == 0 for width in run["widths"][-1].values()) for run in runs]
            for key in ("test_accuracy", "val_accuracy", "train_seconds"):
                row[key] = [run[key] for run in runs]
            rows.append(row)
    return rows, picture


def document(result: dict[str, Any]) -> str:
    """The Markdown file."""
    header = ["method", "epochs", "neurons", "trained parameters", "test accuracy (%)", "each seed", "validation (%)"]
    header += ["adapters that vanished", "seconds"]
    rows = []
    for row in result["rows"]:
        test, val = ([100 * share for share in row[f"{split}_accuracy"]] for split in ("test", "val"))
        cells = [row["arm"], row["epochs"], row["neurons"], f"{row['trained_parameters']:,}"]
        cells += [_mean(test), " ".join(f"{share:.1f}" for share in test), _mean(val)]
        cells += [" ".join(map(str, row.get("vanished", ()))) or "–", f"{statistics.mean(row['train_seconds']):.0f}"]
        rows.append(cells)
    facts = "\n".join(f"- {key}: {fact}" for key, fact in result.items() if key != "rows" and fact)
    return f"""\
# MiMi on the embedded default

{facts}

Mean ± standard deviation over the seeds; 500 test images, so that one image is 0.2 points, 297 for validation. Epochs
are those of the whole training: MiMi's four phases share them.

{table(header, rows)}
"""


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 100), metavar="N", help="how many seeds [5]")
    parser.add_argument("--epochs", type=int, nargs="+", default=[30], metavar="N", help="of each whole training [30]")
    arguments = parser.parse_args()
    rows, picture = measure(range(arguments.seeds), arguments.epochs)
    result = {**made_with("make pruning"), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "mimi.json", json_text(result).encode())
    write_atomically(RESULTS / "mimi.md", document(result).encode())
    write_atomically(RESULTS / "mimi-widths.png", picture)
    print(document(result))


if __name__ == "__main__":
    main()
