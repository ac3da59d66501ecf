"""How is a benchmark's record read? Verdicts beside their targets, and the tables that the terminal and the committed
Markdown show."""

import json
import statistics
from typing import Any

import numpy as np

# The two passes that everything is timed for, by their names in a record and in words.
PASSES = {"forward": "forward", "both": "forward + backward"}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80, in ms."""
    p20, median, p80 = (float(f"{1000 * value:.4g}") for value in np.percentile(seconds, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80}


def judged(measured: float, target: float, at_most: bool = False) -> dict[str, Any]:
    """A number beside its target, with the verdict in words: it should be at least, or at most, the target."""
    missing = measured - target if at_most else target - measured
    verdict = "reached" if missing <= 0 else f"{'over' if at_most else 'short'} by {missing:.2g}"
    return {"measured": round(measured, 4), "target": target, "verdict": verdict}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, in columns of even width so that the terminal can show it too."""
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(f'{c:<{w}}' for c, w in zip(line, widths, strict=True))} |" for line in lines)


def json_text(record: dict[str, Any]) -> str:
    """JSON with one row of a list on a line, so that a change of one number changes one line."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in record.items()) + "\n}\n"


def size(row: dict[str, Any]) -> str:
    """What every table calls a row: state (where there are several), dtypes and shape."""
    state = f"{row['state']} " if "state" in row else ""
    return f"{state}{row['mix']} {row['tokens']:,} × {row['dim']} r {row['rank']}"


def times(rows: list[dict[str, Any]], unit: str = "ms") -> str:
    """Medians with p20–p80 of every function."""
    scale = {"ms": 1, "µs": 1000}[unit]

    def cell(spread: dict[str, float]) -> str:
        median, p20, p80 = (f"{scale * spread[name]:.3g}" for name in ("median", "p20", "p80"))
        return f"{median} ({p20}–{p80})"

    body = [
        [size(row), text, *(cell(spread) for spread in row[f"{part}_ms"].values()), row["rounds"], _others(row)]
        for row in rows
        for part, text in PASSES.items()
    ]
    functions = [f"{name} ({unit})" for name in rows[0]["both_ms"]]
    return table(["size", "pass", *functions, "rounds", "other programs' cores"], body)


def targets(rows: list[dict[str, Any]]) -> str:
    """Every number that has a target, as "measured of target: verdict"."""
    names = list(dict.fromkeys(name for row in rows for name in row["judged"]))
    return table(["size", *names], [[size(row), *(_verdict(row["judged"].get(n)) for n in names)] for row in rows])


def floors(rows: list[dict[str, Any]]) -> str:
    """Times beside the machine's floor, page faults that show the state of malloc, and errors against float64."""
    body = []
    for row in rows:
        ours, eager = row["error"]["ours"], row["error"]["eager"]
        body.append(
            [
                size(row),
                *(f"{row[f'{part}_ms']['ours']['median'] / row['floor_ms'][part]:.2f}" for part in PASSES),
                f"{row['GFLOP_per_s']:.0f}",
                f"{100 * row['share_of_gemm']:.0f} %",
                " / ".join(f"{row['page_faults'][name]:,}" for name in ("ours", "eager")),
                f"{ours['y']:.2g} / {eager['y']:.2g}",
                f"{ours['gradient']:.2g} / {eager['gradient']:.2g}",
            ]
        )
    header = ["size", "forward / floor", "both / floor", "GFLOP/s", "of gemm", "page faults ours / eager"]
    return table([*header, "error of y", "of the worst gradient"], body)


def rates(by_state: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(by_state.values())))
    return table(["rate", *by_state], [[name, *(state[name] for state in by_state.values())] for name in names])


def memory(rows: list[dict[str, Any]]) -> str:
    """Peak growth in MB, forward + backward once."""
    body = [
        [size(row), f"{row['ours_MB']:.1f}", f"{row['eager_MB']:.1f}", row["judged"]["ours (MB)"]["verdict"]]
        for row in rows
    ]
    return table(["size", "ours (MB)", "eager (MB)", "ours ≤ eager"], body)


def grid(rows: list[dict[str, Any]]) -> str:
    """How the grid went: geometric means by dtypes, the ten smallest ratios to eager, and what is slower than it."""
    compared = [(row["ratio"][part]["eager"], part, row) for row in rows for part in PASSES]
    means = []
    for mix in dict.fromkeys(row["mix"] for row in rows):
        ratios = [[ratio for ratio, part, row in compared if (part, row["mix"]) == (of, mix)] for of in PASSES]
        means.append([mix, len(ratios[0]), *(f"{statistics.geometric_mean(of_pass):.2f}" for of_pass in ratios)])
    compared.sort(key=lambda comparison: comparison[0])
    smallest = []
    for ratio, part, row in compared[:10]:
        medians = [f"{spread['median']:.4g}" for spread in row[f"{part}_ms"].values()]
        smallest.append([size(row), PASSES[part], *medians, f"{ratio:.2f}"])
    slower = [f"- {size(row)}, {PASSES[part]}: {ratio:.2f}" for ratio, part, row in compared if part in row["slower"]]
    parts = [
        f"{len(rows)} sizes, {len(compared)} comparisons. Geometric means of eager's time / ours:",
        table(["dtypes", "sizes", *PASSES.values()], means),
        "The ten smallest:",
        table(["size", "pass", "ours (ms)", "eager (ms)", "eager / ours"], smallest),
        "Slower than eager:\n\n" + "\n".join(slower) if slower else "Nothing is slower than eager.",
    ]
    return "\n\n".join(parts)


def missed(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """How many targets were missed, of how many."""
    verdicts = [judgement["verdict"] for row in rows for judgement in row.get("judged", {}).values()]
    return sum(verdict != "reached" for verdict in verdicts), len(verdicts)


def _verdict(judgement: dict[str, Any] | None) -> str:
    if judgement is None:
        return ""
    return f"{judgement['measured']:.3g} of {judgement['target']:g}: {judgement['verdict']}"


def _others(row: dict[str, Any]) -> str:
    if row["others_cores"] is None:
        return "unknown"
    return f"{row['others_cores']:.2f}{', noisy' if row['noisy'] else ''}"
