"""How is a GPU's record read? Every target beside what was measured, and the tables of the committed Markdown."""

from typing import Any

from benchmarks.report import judged, size, table

Record = dict[str, Any]
Row = dict[str, Any]

WORDS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
# Of the same run's copy rate, by rank. Counted is what must move: forward, x, a residual of its own, y and the hidden
# layer; backward, the three streams dy, x and the gradient of x, for a hidden layer could be computed again from x.
SHARE = {"forward": {8: 0.85, 64: 0.85, 128: 0.65, 256: 0.35}, "backward": {8: 0.55, 64: 0.55}}
# What a kernel that kept its partial sums on the chip would be asked for.
STRETCH = 0.7
# How many times as long the others take.
OVER = {"forward": {"eager": 3.0, "compile": 1.5}, "backward": {"eager": 1.9, "compile": 1.4}}
FORWARD_OVER_EAGER_WITH_RESIDUAL, FORWARD_OVER_AUTOTUNE = 2.1, 1.15
ARC_OVER = {"forward": {"eager": 3.0}}
BRANCHES_OVER_CONV = 4.0
IN_WEIGHT_OF_PLAIN, AUTO_OF_FASTER = 1.25, 1.03  # times as long
HOST_US = {"forward": 15, "both": 70}
HOST_OF_EAGER = 0.5
KERNELS = {"forward": 1, "both": 4}  # one forward, at most three backward
WORKSPACE_MB = 16  # and a float32 for each token and rank; as much as that is kept for the backward pass at most
MB = 1 << 20

TITLES = {
    "build": "Build",
    "checks": "Tests and compute-sanitizer",
    "bandwidth": "Forward and backward beside a copy",
    "ratios": "Forward and backward beside eager and torch.compile",
    "branches": "The consolidator's branches beside the grouped convolution (eager) and a copy",
    "layers": "A linear layer with a consolidator's branch, its weight frozen, beside the layer alone",
    "host": "What a call costs the host",
    "launches": "Kernels, waiting and memory",
    "grid": "Many sizes and mixes of dtypes against eager, forward and backward",
    "sweep": "Forward and backward under each plan (ms)",
    "autotune": "Forward beside torch.compile, max-autotune without its own CUDA graphs",
}


def targets(phases: dict[str, Row]) -> list[Row]:
    """Every target with what was measured for it; one that nothing was measured for says why."""
    found = []
    for name in _TARGETS:
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


def ratio(row: Row, part: str, to: str) -> float:
    return row["ms"][f"{part} {to}"]["median"] / row["ms"][f"{part} ours"]["median"]


def _bandwidth(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        for part, share in row["share"].items():
            if target := SHARE[part].get(row["rank"]):
                found.append(_judged(f"{part}, share of copy rate", size(row), share, target))
        if row["rank"] in SHARE["backward"]:
            what = "backward, share of copy rate, as in one pass"
            found.append(_judged(what, size(row), row["share"]["backward"], STRETCH))
    return found


def _ratios(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        for part, others in (ARC_OVER if row["mix"].startswith("ARC") else OVER).items():
            for other, target in others.items():
                if (part, other) == ("forward", "eager") and "residual" in row["mix"]:
                    target = FORWARD_OVER_EAGER_WITH_RESIDUAL
                found.append(_judged(f"{part} over {other}", size(row), ratio(row, part, other), target))
    return found


def _branches(rows: list[Row]) -> list[Row]:
    what = "forward + backward over the grouped convolution"
    return [_judged(what, size(row), ratio(row, "both", "eager"), BRANCHES_OVER_CONV) for row in rows]


def _layers(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        took = {name: spread["median"] for name, spread in _of_part(row, "both").items()}
        of_plain, of_faster = (
            took["in-weight"] / took["plain"],
            took[row["auto"]] / min(took["in-weight"], took["beside"]),
        )
        what = "in-weight training, of the plain layer's time"
        found.append(_judged(what, size(row), of_plain, IN_WEIGHT_OF_PLAIN, at_most=True))
        what = "auto, of the faster way's time"
        found.append(_judged(what, size(row), of_faster, AUTO_OF_FASTER, at_most=True))
    return found


def _autotune(rows: list[Row]) -> list[Row]:
    what, target = "forward over max-autotune", FORWARD_OVER_AUTOTUNE
    return [_judged(what, size(row), ratio(row, "forward", "max-autotune"), target) for row in rows]


def _grid(rows: list[Row]) -> list[Row]:
    found = []
    for part in OVER if rows else ():
        worst = min(rows, key=lambda row: ratio(row, part, "eager"))
        slower = sum(ratio(row, part, "eager") < 1 for row in rows)
        of = f"{size(worst)}, the worst of {len(rows)}; {slower} below 1"
        what = f"{part} over eager, any size of the grid (ranks to 256)"
        found.append(_judged(what, of, ratio(worst, part, "eager"), 1.0))
    return found


def _host(rows: list[Row]) -> list[Row]:
    found = []
    for row in rows:
        for part, target in HOST_US.items():
            our, eagers = (row["us"][f"{part} {name}"]["median"] for name in ("ours", "eager"))
            words = WORDS[part]
            found.append(_judged(f"host, {words} (µs)", size(row), our, target, at_most=True))
            found.append(_judged(f"host, {words}, of eager's", size(row), our / eagers, HOST_OF_EAGER, at_most=True))
    return found


def _launches(rows: list[Row]) -> list[Row]:
    found = []

    def at_most(row: Row, what: str, measured: float, target: float) -> None:
        found.append(_judged(what, size(row), measured, target, at_most=True))

    for row in rows:
        for part, target in KERNELS.items():
            at_most(row, f"kernels, {WORDS[part]}", row["kernels"]["ours"][part], target)
            at_most(row, f"waits for the GPU, {WORDS[part]}", int(row["waits"][part]), 0)
        at_most(row, "the module, kernels that are not ours", len(row["foreign"]), 0)
        hidden_mb = 4 * row["tokens"] * row.get("rank", 0) / MB  # the consolidator has no hidden layer
        our = {what: size / MB for what, size in row["bytes"]["ours"].items()}
        at_most(row, "saved for backward beside the inputs (MB)", our["saved"], hidden_mb)
        at_most(row, "workspace, backward (MB)", our["workspace"], WORKSPACE_MB + hidden_mb)
    return found


_TARGETS = {
    "bandwidth": _bandwidth,
    "ratios": _ratios,
    "branches": _branches,
    "layers": _layers,
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
    """What a phase measured, one line a cell and pass: medians with p20–p80 (ms, host µs), then its other numbers."""
    lines, errors = [], []
    for row in phase["rows"]:
        if "error" in row:
            errors.append(f"- {size(row)}: {row['error']}")
        else:
            lines += [[size(row), *cells] for cells in _LINES.get(name, _times)(row)]
    parts = []
    if name == "grid":
        parts.append(f"{len(phase['rows']) - len(errors)} sizes were measured; eager / ours below 1.1:")
    if lines:
        columns = max(map(len, lines))
        header = ["size", *_HEADERS.get(name, ["pass"])]
        header += [""] * (columns - len(header))
        parts.append(table(header, [line + [""] * (columns - len(line)) for line in lines]))
    elif name != "grid" or not phase["rows"]:
        parts.append("Nothing was measured.")
    return "\n\n".join([*parts, "\n".join(errors)] if errors else parts)


def _of_part(row: Row, part: str) -> dict[str, Row]:
    """The times of a pass, by whose they are; a copy is beside every pass."""
    spreads = row.get("ms") or row["us"]
    found = {name.removeprefix(f"{part} "): spread for name, spread in spreads.items() if name.startswith(f"{part} ")}
    return found | {name: spread for name, spread in spreads.items() if name == "copy"} if found else {}


def _times(row: Row) -> list[list[str]]:
    lines = []
    for part, words in WORDS.items():
        spreads = _of_part(row, part)
        if not spreads:
            continue
        line = [f"{name} {s['median']:.4g} ({s['p20']:.4g}–{s['p80']:.4g})" for name, s in spreads.items()]
        for key in ("GB_per_s", "TFLOP_per_s"):
            line += [f"{row[key][part]:,} {key.replace('_per_', '/')}"] if part in row.get(key, {}) else []
        line += [f"{100 * row['share'][part]:.0f} % of copy"] if part in row.get("share", {}) else []
        if "ms" in row and "ours" in spreads:
            others = [name for name in spreads if name not in ("ours", "copy")]
            line += [f"{other} / ours {ratio(row, part, other):.2f}" for other in others]
        lines.append([words, *line])
    return lines


def _layer_lines(row: Row) -> list[list[str]]:
    (line,), spreads = _times(row), _of_part(row, "both")
    plain = spreads["plain"]["median"]
    of_plain = [f"{name} / plain {spread['median'] / plain:.2f}" for name, spread in spreads.items() if name != "plain"]
    return [[*line, *of_plain, f"auto is {row['auto']}"]]


def _grid_lines(row: Row) -> list[list[str]]:
    return [line for part, line in zip(OVER, _times(row), strict=True) if ratio(row, part, "eager") < 1.1]


def _sweep_lines(row: Row) -> list[list[str]]:
    lines = []
    for part in OVER:
        by_time = sorted(_of_part(row, part).items(), key=lambda plan: plan[1]["median"])
        unfit = [name.removeprefix(f"{part} ") for name in row["unfit"] if name.startswith(f"{part} ")]
        times = "; ".join(f"{plan} {spread['median']:.4g}" for plan, spread in by_time)
        lines.append([WORDS[part], times, "; ".join(unfit)])
    return lines


def _launch_lines(row: Row) -> list[list[str]]:
    counts = [", ".join(str(row["kernels"][name][part]) for part in KERNELS) for name in ("ours", "eager")]
    sizes = [
        ", ".join(f"{row['bytes'][name][what] / MB:.4g}" for what in ("saved", "workspace"))
        for name in ("ours", "eager")
    ]
    names = "; ".join(name.removeprefix("void vitadapter::cuda::")[:60] for name in row["kernel_names"]["both"])
    return [[*counts, *sizes, names, "; ".join(row["foreign"]) or "none"]]


_LINES = {"layers": _layer_lines, "grid": _grid_lines, "sweep": _sweep_lines, "launches": _launch_lines}
_HEADERS = {
    "sweep": ["pass", "plans that fit, the fastest first", "plans that do not fit"],
    "launches": [
        "launches of ours, forward and forward + backward",
        "of eager",
        "MB of ours, saved and workspace",
        "of eager",
        "our kernels",
        "other kernels of the module",
    ],
}


def document(record: Record) -> str:
    facts = [f"- {name}: {value}" for name, value in record.items() if isinstance(value, str) and value]
    parts = ["# Adapter, ARC and Consolidator on a GPU", "\n".join(facts)]
    parts += ["## Targets", targets_table(record["targets"]), "## Phases", phases_table(record["phases"])]
    for name, phase in record["phases"].items():
        if "rows" in phase:
            parts += [f"## {TITLES[name]}", phase_table(name, phase)]
    return "\n\n".join(parts) + "\n"
