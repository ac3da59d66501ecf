"""How is a GPU's record read? Every target beside what was measured, and the tables of the committed Markdown."""

from typing import Any

from benchmarks.report import judged, table

Record = dict[str, Any]
Row = dict[str, Any]

# Of the same run's copy rate, forward, by rank; compulsory bytes alone are counted.
SHARE = {8: 0.85, 64: 0.85, 128: 0.65, 256: 0.35}
# How many times as long the others take, forward.
OVER_EAGER, OVER_EAGER_WITH_RESIDUAL, OVER_COMPILE, OVER_AUTOTUNE = 3.0, 2.1, 1.5, 1.15
HOST_US = {"forward": 15, "both": 70}
HOST_OF_EAGER = 0.5
KERNELS = {"forward": 1, "both": 4}  # one forward, at most three backward

TITLES = {
    "build": "Build",
    "checks": "Tests and compute-sanitizer",
    "bandwidth": "Forward beside a copy",
    "ratios": "Forward beside eager and torch.compile",
    "host": "What a call costs the host",
    "launches": "Kernels and waiting",
    "grid": "Many sizes and mixes of dtypes against eager, forward",
    "sweep": "Forward under each plan (ms)",
    "autotune": "Forward beside torch.compile, max-autotune without its own CUDA graphs",
}


def size(row: Row) -> str:
    return f"{row['mix']} {row['tokens']:,} × {row['dim']} r {row['rank']}"


def targets(phases: dict[str, Row]) -> list[Row]:
    """Every target with what was measured for it; one that nothing was measured for says why."""
    found = []
    for name in ("bandwidth", "ratios", "autotune", "grid", "host", "launches"):
        if name not in phases:
            continue
        phase = phases[name]
        rows = [row for row in phase["rows"] if "error" not in row]
        found += _TARGETS[name](rows)
        found += [_nothing(name, size(row), row["error"]) for row in phase["rows"] if "error" in row]
        if phase["status"] != "complete":
            found.append(_nothing(name, "the rest" if rows else "everything", phase["status"]))
    return found


def _nothing(phase: str, of: str, why: str) -> Row:
    return {"what": TITLES[phase].lower(), "size": of, "measured": None, "verdict": f"not measured: {why}"}


def _judged(what: str, of: str, measured: float, target: float, at_most: bool = False) -> Row:
    return {"what": what, "size": of, **judged(measured, target, at_most)}


def ratio(row: Row, to: str) -> float:
    return row["ms"][to]["median"] / row["ms"]["ours"]["median"]


def _bandwidth(rows: list[Row]) -> list[Row]:
    return [_judged("forward, share of copy rate", size(row), row["share"], SHARE[row["rank"]]) for row in rows]


def _ratios(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        over_eager = OVER_EAGER_WITH_RESIDUAL if "residual" in row["mix"] else OVER_EAGER
        found.append(_judged("forward over eager", size(row), ratio(row, "eager"), over_eager))
        found.append(_judged("forward over compile", size(row), ratio(row, "compile"), OVER_COMPILE))
    return found


def _autotune(rows: list[Row]) -> list[Row]:
    return [_judged("forward over max-autotune", size(r), ratio(r, "max-autotune"), OVER_AUTOTUNE) for r in rows]


def _grid(rows: list[Row]) -> list[Row]:
    if not rows:
        return []
    worst = min(rows, key=lambda row: ratio(row, "eager"))
    slower = sum(ratio(row, "eager") < 1 for row in rows)
    of = f"{size(worst)}, the worst of {len(rows)}; {slower} below 1"
    return [_judged("forward over eager, any size", of, ratio(worst, "eager"), 1.0)]


def _host(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        for part, target in HOST_US.items():
            our, eagers = (row["us"][f"{part} {name}"]["median"] for name in ("ours", "eager"))
            words = _PASSES[part]
            found.append(_judged(f"host, {words} (µs)", size(row), our, target, at_most=True))
            found.append(_judged(f"host, {words}, of eager's", size(row), our / eagers, HOST_OF_EAGER, at_most=True))
    return found


def _launches(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        for part, target in KERNELS.items():
            words = _PASSES[part]
            found.append(_judged(f"kernels, {words}", size(row), row["kernels"]["ours"][part], target, at_most=True))
            found.append(_judged(f"waits for the GPU, {words}", size(row), int(row["waits"][part]), 0, at_most=True))
    return found


_PASSES = {"forward": "forward", "both": "forward + backward"}
_TARGETS = {
    "bandwidth": _bandwidth,
    "ratios": _ratios,
    "autotune": _autotune,
    "grid": _grid,
    "host": _host,
    "launches": _launches,
}


def targets_table(found: list[Row]) -> str:
    cells = []
    for row in found:
        numbers = ["", ""] if row["measured"] is None else [f"{row['measured']:.3g}", f"{row['target']:g}"]
        cells.append([row["what"], row["size"], *numbers, row["verdict"]])
    reached = sum(row["verdict"] == "reached" for row in found)
    head = ["what", "size", "measured", "target", "verdict"]
    return f"{table(head, cells)}\n\n{reached} of {len(found)} targets reached."


def phases_table(phases: dict[str, Row]) -> str:
    return table(["phase", "how it ended", "seconds"], [[n, p["status"], p["seconds"]] for n, p in phases.items()])


def phase_table(name: str, phase: Row) -> str:
    """What a phase measured, one line a cell: medians with p20–p80 (ms, host µs), then its other numbers."""
    rows, errors = [], []
    for row in phase["rows"]:
        if "error" in row:
            errors.append(f"- {size(row)}: {row['error']}")
        elif name != "grid" or ratio(row, "eager") < 1.1:
            rows.append([size(row), *_cells(row)])
    parts = []
    if name == "grid":
        parts.append(f"{len(phase['rows']) - len(errors)} sizes were measured; eager / ours below 1.1:")
    if rows:
        columns = max(map(len, rows))
        rows = [row + [""] * (columns - len(row)) for row in rows]
        parts.append(table(["size", *_header(name, columns - 1)], rows))
    elif name != "grid" or not phase["rows"]:
        parts.append("Nothing was measured.")
    return "\n\n".join([*parts, "\n".join(errors)] if errors else parts)


def _cells(row: Row) -> list[str]:
    if "kernels" in row:
        counts = [", ".join(str(row["kernels"][name][part]) for part in _PASSES) for name in ("ours", "eager")]
        return [*counts, ", ".join(row["kernel_names"]["forward"])[:60]]
    spreads = row.get("ms") or row["us"]
    cells = [f"{name} {s['median']:.4g} ({s['p20']:.4g}–{s['p80']:.4g})" for name, s in spreads.items()]
    if "unfit" in row:  # a sweep: the fastest first
        by_time = sorted(spreads.items(), key=lambda plan: plan[1]["median"])
        times = ", ".join(f"{plan} {spread['median']:.4g}" for plan, spread in by_time)
        return [times, ", ".join(row["unfit"])]
    cells += [f"{row[key]:,} {key.replace('_per_', '/')}" for key in ("GB_per_s", "TFLOP_per_s") if key in row]
    cells += [f"{100 * row['share']:.0f} % of copy"] if "share" in row else []
    cells += [f"eager / ours {ratio(row, 'eager'):.2f}"] if "eager" in row.get("ms", {}) else []
    return cells


def _header(name: str, columns: int) -> list[str]:
    if name == "sweep":
        return ["plans that fit, the fastest first", "plans that do not fit"]
    if name == "launches":
        return ["launches of ours, forward and forward + backward", "of eager", "the forward kernel"]
    return [""] * columns


def document(record: Record) -> str:
    facts = [f"- {name}: {value}" for name, value in record.items() if isinstance(value, str) and value]
    parts = ["# Adapter on a GPU", "\n".join(facts)]
    parts += ["## Targets", targets_table(record["targets"]), "## Phases", phases_table(record["phases"])]
    for name, phase in record["phases"].items():
        if "rows" in phase:
            parts += [f"## {TITLES[name]}", phase_table(name, phase)]
    return "\n\n".join(parts) + "\n"
