"""What does `make bench OP=<op>` do with a suite? It runs each part in a process of its own, whose environment pins
malloc and the instruction set, prints its tables, and writes a complete run to `benchmarks/results/<op>-cpu.json` and
`.md`.

Ends with 0 when everything was measured, whether or not the targets are reached, and with 1 when something failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.memory import MALLOC, peak_growth
from benchmarks.rates import processor
from benchmarks.record import made_with
from vitadapter_ext import _C
from vitadapter_ext._atomic import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# AVX2 for these kernels and for all that PyTorch calls.
AVX2 = {
    "VITADAPTER_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


class Part(NamedTuple):
    title: str
    test: str  # of the suite
    environments: list[dict[str, str]]
    rounds: int  # at least
    seconds: float  # at least, for each size
    table: Callable[[list[dict[str, Any]]], str]  # of its rows


def _cells(rows: list[dict[str, Any]]) -> str:
    return "\n\n".join((report.times(rows), report.targets(rows), report.floors(rows)))


def _avx2(rows: list[dict[str, Any]]) -> str:
    return f"{report.times(rows)}\n\n{report.targets(rows)}"


def _host(rows: list[dict[str, Any]]) -> str:
    return f"{report.times(rows, 'µs')}\n\n{report.targets(rows)}"


NO_FAULT = MALLOC["no-fault"]
HOST = Part("The cost of a call, on a tiny tensor", "test_host_cost", [NO_FAULT], 9, 1.0, _host)
# Of the sandwich's ops.
PARTS = {
    "cells": Part("Ours, eager and torch.compile", "test_cell", list(MALLOC.values()), 9, 2.5, _cells),
    "avx2": Part("Ours and eager with AVX2 alone", "test_avx2", [NO_FAULT | AVX2], 9, 1.5, _avx2),
    "host": HOST,
    "grid": Part("Many sizes and mixes of dtypes against eager", "test_grid", [NO_FAULT], 7, 0.15, report.grid),
}
MEMORY = "Growth of the memory at most, forward + backward"
QUICK = "not n12608 and not n100000"


def main(
    op: str,
    description: str,
    peak_memory_work: Callable,
    memory_sizes: list[dict[str, Any]],
    parts: dict[str, Part] = PARTS,
    other: str = "eager",
) -> int:
    """The command of one op's suite, `benchmarks/bench_<op>.py`.

    Args:
        peak_memory_work: of ("ours" or the other, size), returns the work whose memory counts.
        other: the function whose memory ours is held against.
    """
    arguments = _arguments(op, description, parts)
    chosen = [name for name in (*parts, "memory") if getattr(arguments, name)] or [*parts, "memory"]
    words = [f"({words})" for words in (arguments.k, QUICK if arguments.quick else "") if words]

    result = {**made_with(f"make bench OP={op}"), **processor()}
    document = [
        f"# The op `{op}` on the CPU",
        "\n".join(f"- {name}: {value}" for name, value in result.items() if value),
    ]
    print("\n\n".join(document), flush=True)
    well = True
    for name in chosen:
        document.append(f"## {MEMORY if name == 'memory' else parts[name].title}")
        print(f"\n{document[-1]}\n", flush=True)
        if name == "memory":
            rows = _memory_rows(peak_memory_work, memory_sizes, other)
        elif name == "avx2" and "avx2" not in _C.cpu_levels():
            rows = []
        else:
            rows, part_well = _rows(f"benchmarks/bench_{op}.py", parts[name], " and ".join(words), arguments.quick)
            well &= part_well
        if name == "cells" and rows:
            result["rates"] = {row["state"]: row.pop("rates") for row in rows}
            document.append(report.rates(result["rates"]))
            print(f"\n{document[-1]}")
        result[name] = rows
        table = report.memory if name == "memory" else parts[name].table
        document.append(table(rows) if rows else "Nothing was measured: no such size, or not on this machine.")
        print(f"\n{document[-1]}", flush=True)
    missed, judged = report.missed([row for name in chosen for row in result[name]])
    document.append(f"{judged - missed} of {judged} targets reached.")
    print(f"\n{document[-1]}")

    complete = len(chosen) == len(parts) + 1 and not words
    if complete and well:
        RESULTS.mkdir(exist_ok=True)
        write_atomically(RESULTS / f"{op}-cpu.json", report.json_text(result).encode())
        write_atomically(RESULTS / f"{op}-cpu.md", ("\n\n".join(document) + "\n").encode())
        print(f"written to benchmarks/results/{op}-cpu.json and {op}-cpu.md")
    return 0 if well else 1


def _arguments(op: str, description: str, parts: dict[str, Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{op}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A complete run, with no option, also writes its results; a part is only printed.",
    )
    titles = {name: part.title for name, part in parts.items()} | {"memory": MEMORY}
    for name, title in titles.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"only this part, or with others: {title}")
    parser.add_argument(
        "-k",
        default="",
        metavar="WORDS",
        help="only sizes that fit (memory has its own), as pytest's -k: 'bfloat16 and n1576'",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, no large sizes: does everything run?")
    return parser.parse_args()


def _rows(suite: str, part: Part, words: str, quick: bool) -> tuple[list[dict[str, Any]], bool]:
    """The rows of one part, from the files that pytest-benchmark wrote, and whether every test passed."""
    rounds, seconds = (3, part.seconds / 10) if quick else (part.rounds, part.seconds)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-k", words]
    command += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-min-rounds={rounds}"]
    command += [f"--benchmark-max-time={seconds}", f"{suite}::{part.test}"]
    rows, well = [], True
    with tempfile.TemporaryDirectory() as folder:
        for environment in part.environments:
            file = Path(folder) / "times.json"
            file.unlink(missing_ok=True)
            run = subprocess.run([*command, f"--benchmark-json={file}"], cwd=ROOT, env=os.environ | environment)
            well &= run.returncode in (0, 5)  # 5: no size fits the words
            if file.exists() and file.stat().st_size:
                lines = json.loads(file.read_text())["benchmarks"]
                # A line for each function, and beside each of them their common row.
                rows += {line["group"]: line["extra_info"] for line in lines}.values()
    return rows, well


def _memory_rows(work: Callable, sizes: list[dict[str, Any]], other: str) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        try:
            grown = {name: round(peak_growth(work, name, size) / 1e6, 1) for name in ("ours", other)}
        except OSError:  # this system has no /proc
            return []
        row = size | {f"{name}_MB": megabytes for name, megabytes in grown.items()}
        row["judged"] = {"ours (MB)": report.judged(grown["ours"], grown[other], at_most=True)}
        rows.append(row)
    return rows
