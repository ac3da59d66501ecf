"""What does memory cost? The states of malloc in which a benchmark runs, page faults, and the growth of a process.

Whether an output costs fresh pages depends on what malloc did before, not only on the output's size, so both extremes
are pinned.
"""

import concurrent.futures
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by glibc before Python starts: memory is kept for good, or every block from 1 MB on is mapped anew.
MALLOC = {
    "no-fault": {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "9000000000"},
    "all-fault": {"MALLOC_MMAP_THRESHOLD_": "1048576"},
}


def malloc_state() -> str:
    """Of this process: "no-fault", "all-fault", or "unpinned"."""
    mine = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return next((state for state, environment in MALLOC.items() if environment == mine), "unpinned")


def page_faults(work: Callable[[], object]) -> int:
    """How many pages the system gave this process for the first time while the work ran."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_growth(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """By how many bytes the resident memory of a fresh process grows at most while it runs the work that
    `prepare(*arguments)` returns.

    Exact where the work returns all that it needs at most. What it gives back before is sharp to about 1 MB: the
    system's peak lags behind by some pages of each core, and idle pages of the libraries may be taken away meanwhile.
    Blocks up to 32 MB may be memory that the preparation has freed, which does not grow.

    Raises:
        OSError: this system has no /proc.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_grow, prepare, arguments).result()


def _grow(prepare: Callable[..., Callable[[], object]], arguments: tuple) -> int:
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, which loading the libraries may have set
    before = _memory("smaps_rollup")
    result = work()  # noqa: F841 - it is there while its pages are counted
    after, peak = _memory("smaps_rollup"), _memory("status")["VmHWM"]
    return max(peak - before["Rss"], after["Anonymous"] - before["Anonymous"])


def _memory(file: str) -> dict[str, int]:
    """Bytes, by the names of one of this process's files in /proc."""
    lines = (line.split() for line in Path("/proc/self", file).read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
