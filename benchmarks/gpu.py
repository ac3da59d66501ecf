"""What does a machine with a GPU say? `make gpu` builds for the GPU that is there, runs the `cuda` tests and
compute-sanitizer, measures what benchmarks/gpu_cells.py lists, and sets every number beside its target, into
`benchmarks/results/<gpu>.md` and `.json`. No network is needed. All of it ends within 8 minutes: a phase that takes too
long is stopped, and one that fails is not the end of the others; both stand in the tables.

    python -m benchmarks.gpu build sweep      # some phases only, printed and not written

Ends with 0, whether or not the targets are reached; with 1 where the build, a test or a measurement failed; without a
GPU with 3, of which make itself makes its own 2.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError:
    sys.exit("make gpu: this Python has no torch; name one that has: make gpu PYTHON=...")

from benchmarks import gpu_report, report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

SECONDS = 8 * 60 - 15  # for all phases; the rest is for Python to start, write and stop
# Phases in their order, with the seconds that each may take.
LIMITS = {
    "build": 220,
    "checks": 140,
    "bandwidth": 35,
    "ratios": 80,
    "branches": 45,
    "layers": 30,
    "host": 25,
    "launches": 30,
    "grid": 55,
    "sweep": 45,
    "autotune": 60,
}
LEAST = 15  # seconds: with less a phase does not begin
START = 10  # seconds of a phase's time for a process to import torch and to end

TEST_FILES = [f"tests/test_adapter{part}.py" for part in ("", "_autograd", "_behaviour", "_cuda")]
TEST_FILES += [f"tests/test_arc{part}.py" for part in ("", "_autograd", "_behaviour", "_module", "_cuda")]
TEST_FILES += [f"tests/test_consolidator{part}.py" for part in ("", "_autograd", "_module", "_cuda")]
TEST_FILES += ["tests/test_consolidated_linear.py", "tests/test_ops.py"]
# Small cases of each kind: the sanitizer slows everything down a hundredfold.
SANITIZED = "a_few_of_each_kind"
SANITIZED_FILES = [f"tests/test_{op}_cuda.py" for op in ("adapter", "arc", "consolidator")]

Phase = dict[str, Any]


def start(command: list[str], log: Path | None = None, **environment: str) -> subprocess.Popen:
    """Starts a command from the repository's root, in a process group of its own; output to the log, else shown."""
    print("$", " ".join(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )


def finish(process: subprocess.Popen, deadline: float) -> int | None:
    """The exit status; None where the process, stopped with all that it started, did not end in time."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def build(seconds: float) -> Phase:
    deadline = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "VITADAPTER_CUDA": "1"}
    # Without the second, plain PyTorch would be tested and timed.
    has_kernels = "assert _library.has_kernels(torch.device('cuda', 0)), _library.build_info()"
    for command in (
        ["setup.py", "build_ext", "--inplace"],
        ["-c", f"import torch; from vitadapter_ext import _library; {has_kernels}"],
    ):
        ended = finish(start([sys.executable, *command], **environment), deadline)
        if ended != 0:
            return {"status": "out of time" if ended is None else f"failed: {' '.join(command)[:40]}", "well": False}
    return {"status": "complete", "well": True}


def check_commands() -> dict[str, list[str]]:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    tests += ["-o", "faulthandler_timeout=60"]  # so that a test that hangs is named before its process is stopped
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    commands = {"tests": [*tests, *workers, *TEST_FILES]}
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
            commands[tool] = [*sanitizer, *tests, "-k", SANITIZED, *SANITIZED_FILES]
    return commands


def verdict(name: str, ended: int | None, log: str) -> tuple[str, bool]:
    """How the tests, alone or under a tool of compute-sanitizer, went, and whether that is well: a tool that could not
    do its work has not found anything."""
    passed = re.findall(r"^=*\s*(\d+ passed.*?)(?: in .*)?$", log, re.MULTILINE)
    if name == "tests":
        if ended is None:
            return "did not finish in time", False
        return (f"{passed[-1]}", True) if ended == 0 and passed else ("failed", False)
    problems = [int(count) for count in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)]
    # One that was stopped, or crashed, has no summary, and may have found something all the same.
    reports = re.findall(r"^=+ (?:Invalid |Error: |.*Race reported|.*hazard detected)", log, re.MULTILINE)
    found = sum(problems) or len(reports)
    if found:
        return f"found {found} problems", False
    if ended is None:
        return "did not finish in time", True
    if "Device not supported" in log or not (
        problems or re.search(r"^=*\s*\d+ (passed|failed|error)", log, re.MULTILINE)
    ):
        return "could not run here", True
    return (f"{passed[-1]}", True) if ended == 0 and passed else ("failed", False)


def checks(seconds: float) -> Phase:
    """The tests and the sanitizer's tools beside each other: nothing is timed here."""
    deadline = time.monotonic() + seconds
    words, well = [], True
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        try:
            for name, command in check_commands().items():
                # Every tensor in memory of its own, or memcheck would not see where one ends.
                own_memory = {} if name == "tests" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                running[name] = start(command, Path(folder, name), **own_memory)
        finally:
            ended = {name: finish(process, deadline) for name, process in running.items()}
        for name, status in ended.items():
            log = Path(folder, name).read_text(errors="replace")
            word, is_well = verdict(name, status, log)
            print(f"\n--- {name}: {word}", *log.splitlines()[-5 if is_well else -80 :], sep="\n", flush=True)
            words.append(f"{name}: {word}")
            well &= is_well
    if len(words) == 1:
        words.append("compute-sanitizer was not found")
    return {"status": "; ".join(words), "well": well}


def cells(name: str, seconds: float) -> Phase:
    """A phase of benchmarks/gpu_cells.py, in a process of its own."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        soft = str(max(1, round(seconds - START)))
        ended = finish(start([sys.executable, "-m", "benchmarks.gpu_cells", name, str(file), soft]), deadline)
        lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a process that was stopped may leave half a line
            rows.append(json.loads(line))
    status = rows.pop()["end"] if rows and "end" in rows[-1] else "out of time"
    if ended not in (0, None):
        status = f"failed: exit status {ended}"
    errors = sum("error" in row for row in rows)
    if errors and not status.startswith("failed"):
        status = f"failed: {errors} of {len(rows)} cells; {status}"
    return {"status": status, "well": not status.startswith("failed"), "rows": rows}


def run_phase(name: str, left: float) -> Phase:
    """Runs a phase in the time that is left for all; what it raises becomes its status."""
    begin = time.monotonic()
    seconds = min(LIMITS[name], left)
    measures = name not in ("build", "checks")
    phase: Phase = {"rows": []} if measures else {}
    if left < LEAST:
        phase |= {"status": "no time was left", "well": measures}
    else:
        try:
            phase |= cells(name, seconds) if measures else {"build": build, "checks": checks}[name](seconds)
        except Exception as error:
            phase |= {"status": f"failed: {type(error).__name__}: {error}", "well": False}
    return {"status": phase.pop("status"), "seconds": round(time.monotonic() - begin), **phase}


def facts() -> dict[str, str]:
    from benchmarks.record import made_with  # now that there is a library to import

    major, minor = torch.cuda.get_device_capability()
    return {**made_with("make gpu"), "capability": f"{major}.{minor}", "cuda": str(torch.version.cuda)}


def write(record: dict[str, Any]) -> list[Path]:
    """The record and its tables; after every phase, so that nothing is lost where the rest is."""
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower()).strip("-")
    flat = record | {"phases": {n: {k: v for k, v in p.items() if k != "rows"} for n, p in record["phases"].items()}}
    flat |= {n: phase["rows"] for n, phase in record["phases"].items() if "rows" in phase}
    files = [RESULTS / f"{name}.json", RESULTS / f"{name}.md"]
    files[0].write_text(report.json_text(flat))
    files[1].write_text(gpu_report.document(record))
    return files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phases", nargs="*", metavar="phase", help=f"{', '.join(LIMITS)}; all by default")
    chosen = parser.parse_args(arguments).phases
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"there is no phase {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        print("make gpu: this machine has no NVIDIA GPU that torch can use; nothing was built, run or timed")
        return 3
    end = time.monotonic() + SECONDS
    record: dict[str, Any] = {}
    phases: dict[str, Phase] = {}
    files: list[Path] = []
    for name in [name for name in LIMITS if name in chosen] if chosen else LIMITS:
        print(f"\n== {name}", flush=True)
        phases[name] = run_phase(name, end - time.monotonic())
        print(f"{name}: {phases[name]['status']} ({phases[name]['seconds']} s)", flush=True)
        if name == "build":
            if not phases[name]["well"]:
                return 1  # there is nothing to run, and no result to put in the place of an earlier one
            continue
        if "rows" in phases[name]:
            print(gpu_report.phase_table(name, phases[name]), flush=True)
        record = (record or facts()) | {"targets": gpu_report.targets(phases), "phases": phases}
        if not chosen:
            files = write(record)
    if record:
        print(f"\n{gpu_report.targets_table(record['targets'])}\n\n{gpu_report.phases_table(phases)}")
    print(*(f"written to {path.relative_to(ROOT)}" for path in files), sep="\n")
    return 0 if all(phase["well"] for phase in phases.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
