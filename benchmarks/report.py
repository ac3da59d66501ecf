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
    if "layer" in row:
        words = [
            row["layer"],
            "g",
            " + ".join(map(str, row["groups"])),
            *([row["shuffle"]] if "shuffle" in row else []),
        ]
    else:
        words = ["×", str(row["dim"]), "r", str(row["rank"])]
    return f"{state}{row['mix']} {row['tokens']:,} {' '.join(words)}"


def times(rows: list[dict[str, Any]], unit: str = "ms") -> str:
    """Medians with p20–p80 of every function."""
    scale = {"ms": 1, "µs": 1000}[unit]

    def cell(spread: dict[str, float] | None) -> str:
        if spread is None:
            return ""
        median, p20, p80 = (f"{scale * spread[name]:.3g}" for name in ("median", "p20", "p80"))
        return f"{median} ({p20}–{p80})"

    names = _functions(rows)
    body = [
        [size(row), text, *(cell(row[f"{part}_ms"].get(name)) for name in names), row["rounds"], _others(row)]
        for row, part, text in _passes(rows)
    ]
    return table(["size", "pass", *(f"{name} ({unit})" for name in names), "rounds", "other programs' cores"], body)


def ratios(rows: list[dict[str, Any]], to: str) -> str:
    """How many times as long as one function the others take."""
    names = [name for name in _functions(rows) if name != to]
    body = []
    for row, part, text in _passes(rows):
        ratio = row["ratio"][part]
        body.append([size(row), text, *(f"{ratio[name] / ratio[to]:.2f}" if name in ratio else "" for name in names)])
    return table(["size", "pass", *(f"{name} / {to}" for name in names)], body)


def slower_than(row: dict[str, Any], other: str) -> list[str]:
    """The passes in which ours is slower than another function, by more than 3 % and by more than either spreads."""
    found = []
    for _, part, _ in _passes([row]):
        spreads, ratio = row[f"{part}_ms"], row["ratio"][part].get(other, 1)
        if ratio < 0.97 and spreads["ours"]["p20"] > spreads[other]["p80"]:
            found.append(part)
    return found


def slower(rows: list[dict[str, Any]], others: list[str]) -> str:
    """Where ours is slower than one of the others."""
    lines = [
        f"- {size(row)}, {PASSES[part]}: {row['ratio'][part][other]:.2f} of the speed of {other}"
        for row in rows
        for other in others
        for part in slower_than(row, other)
    ]
    words = " or ".join(others)
    return f"Slower than {words}:\n\n" + "\n".join(lines) if lines else f"Nothing is slower than {words}."


def _passes(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, str]]:
    """Each row with each pass that it was timed for, and that one in words."""
    return [(row, part, text) for row in rows for part, text in PASSES.items() if part in row["ratio"]]


def _functions(rows: list[dict[str, Any]]) -> list[str]:
    """The names of all that any row has times of."""
    return list(dict.fromkeys(name for row in rows for name in row["both_ms"]))


def targets(rows: list[dict[str, Any]]) -> str:
    """Every number that has a target, as "measured of target: verdict"."""
    names = list(dict.fromkeys(name for row in rows for name in row["judged"]))
    body = [[size(row), *(_verdict(row["judged"].get(name)) for name in names)] for row in rows if row["judged"]]
    return table(["size", *names], body)


def floors(rows: list[dict[str, Any]]) -> str:
    """Times beside the machine's floor, and what `accuracy` shows."""
    body = [
        [
            size(row),
            *(f"{row[f'{part}_ms']['ours']['median'] / row['floor_ms'][part]:.2f}" for part in PASSES),
            f"{row['GFLOP_per_s']:.0f}",
            f"{100 * row['share_of_gemm']:.0f} %",
            *_accuracy(row),
        ]
        for row in rows
    ]
    return table(["size", "forward / floor", "both / floor", "GFLOP/s", "of gemm", *_accuracy_header(rows)], body)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """Page faults that show the state of malloc, and errors against float64."""
    return table(["size", *_accuracy_header(rows)], [[size(row), *_accuracy(row)] for row in rows])


def _accuracy_header(rows: list[dict[str, Any]]) -> list[str]:
    return [f"page faults {' / '.join(rows[0]['error'])}", "error of y", "of the worst gradient"]


def _accuracy(row: dict[str, Any]) -> list[str]:
    return [
        " / ".join(f"{faults:,}" for faults in row["page_faults"].values()),
        *(" / ".join(f"{error[of]:.2g}" for error in row["error"].values()) for of in ("y", "gradient")),
    ]


def rates(by_state: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(by_state.values())))
    return table(["rate", *by_state], [[name, *(state[name] for state in by_state.values())] for name in names])


def memory(rows: list[dict[str, Any]]) -> str:
    """Peak growth in MB, forward + backward once."""
    names = [name.removesuffix("_MB") for name in rows[0] if name.endswith("_MB")]
    body = [
        [size(row), *(f"{row[f'{name}_MB']:.1f}" for name in names), row["judged"]["ours (MB)"]["verdict"]]
        for row in rows
    ]
    return table(["size", *(f"{name} (MB)" for name in names), f"ours ≤ {names[1]}"], body)


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
