"""How are several functions timed side by side? In one process and in turns (A/B/C/D/A/B/C/D…), so that clocks, caches
and other programs favour none, on a quiet machine if it can be; the times become lines of pytest-benchmark's table.
"""

import gc
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.report import spread

Works = dict[str, Callable[[], object]]
Times = dict[str, list[float]]

# Cores that other programs may keep busy: while waiting for a quiet machine, and during a measurement that counts.
QUIET, NOISY = 0.06, 0.1


def warm_up(works: Works, rounds: int = 3) -> None:
    """Runs everything a few times: what compiles, compiles; caches and malloc's heap reach their steady state."""
    for _ in range(rounds):
        for work in works.values():
            work()


def take_turns(works: Works, rounds: int, seconds: float) -> Times:
    """The times (s) of each piece of work, taken in turns for at least so many rounds and so many seconds."""
    times = {name: [] for name in works}
    warm_up(works, 1)  # whoever came before has left caches that favour nobody
    gc.collect()
    gc.disable()  # or a collection is charged to whoever's turn it is
    begin, done = time.perf_counter(), 0
    try:
        while done < rounds or time.perf_counter() - begin < seconds:
            for name, work in works.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
            done += 1
    finally:
        gc.enable()
    return times


def take_quiet_turns(works: Works, rounds: int, seconds: float, attempts: int = 3) -> tuple[Times, float | None]:
    """`take_turns` on a quiet machine, for which it waits at most 10 times `seconds`; where other programs came in
    between, again, and the quietest attempt counts.

    Returns: the times, and how many cores other programs kept busy meanwhile (None where there is no /proc/stat).
    """
    found = []
    for _ in range(attempts):
        _wait_until_quiet(10 * seconds)
        others = OtherPrograms()
        times = take_turns(works, rounds, seconds)
        cores = others.cores()
        found.append((times, cores))
        if cores is None or cores <= NOISY:
            return times, cores
    return min(found, key=lambda attempt: attempt[1])


class OtherPrograms:
    """A stopwatch for the processor time that other programs take."""

    def __init__(self):
        self._time, self._taken = time.perf_counter(), self._seconds()

    def cores(self) -> float | None:
        """How many cores they have kept busy since the start; None where there is no /proc/stat."""
        if self._taken is None:
            return None
        return max(0.0, (self._seconds() - self._taken) / (time.perf_counter() - self._time))

    @staticmethod
    def _seconds() -> float | None:
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        idle, waiting = ticks[3:5]
        own = resource.getrusage(resource.RUSAGE_SELF)
        return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def _wait_until_quiet(timeout: float) -> None:
    end = time.perf_counter() + timeout
    while time.perf_counter() < end:
        others = OtherPrograms()
        time.sleep(min(0.5, timeout))
        if (others.cores() or 0.0) <= QUIET:
            return


def summarised(times: Times, others_cores: float | None = None, to: str = "ours") -> dict[str, Any]:
    """The row of times that are named "<pass> <function>", such as "forward eager".

    Returns: rounds; others_cores and whether that is noisy; for each pass "<pass>_ms" with the spread of each function,
        and "ratio" with how many times as long as the function `to` each takes.
    """
    rounds = len(next(iter(times.values())))
    noisy = others_cores is not None and others_cores > NOISY
    row = {"rounds": rounds, "others_cores": others_cores and round(others_cores, 2), "noisy": noisy, "ratio": {}}
    for name, seconds in times.items():
        part, function = name.split()
        row.setdefault(f"{part}_ms", {})[function] = spread(seconds)
        row["ratio"].setdefault(part, {})[function] = round(np.median(seconds) / np.median(times[f"{part} {to}"]), 4)
    return row


def budget(config: pytest.Config) -> tuple[int, float]:
    """Rounds and seconds at least, by pytest-benchmark's `--benchmark-min-rounds` and `--benchmark-max-time`."""
    return config.getoption("benchmark_min_rounds"), float(config.getoption("benchmark_max_time"))


def record(benchmark, times: Times, row: dict[str, Any]) -> None:
    """Gives pytest-benchmark a line for each function, and beside each of them in its file the row as `extra_info`.

    Its own `pedantic` would time one function after the other. This does what `pedantic` does, for several.
    """
    benchmark._mode = "interleaved"
    benchmark.extra_info = row
    test, node = benchmark.name, benchmark.fullname
    benchmark.group = test
    for work, seconds in times.items():
        benchmark.name, benchmark.fullname = f"{test} {work}", f"{node} {work}"
        stats = benchmark._make_stats(iterations=1)
        for time_of_one in seconds:
            stats.update(time_of_one)
