"""How is work on a GPU timed? What it takes there, as replays of CUDA graphs in turns; what it costs the host to ask
for it; how many kernels it launches, whether it waits for any, and how much memory it takes."""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import spread

Work = Callable[[], object]


class After(NamedTuple):
    """Work that gets what other work returned, such as a backward pass; only `then` is timed."""

    first: Work
    then: Callable[[Any], object]

    def __call__(self) -> object:
        return self.then(self.first())


@functools.cache
def _larger_than_any_l2() -> torch.Tensor:
    return torch.zeros(64 << 20, device="cuda")  # 256 MB


def _cool_l2() -> None:
    # By reading: lines that it wrote would be written back in the time of whoever comes next.
    torch.sum(_larger_than_any_l2())


class Replay:
    """Work captured as a CUDA graph, behind what cools the L2.

    The events that time it are nodes of the graph, right before and right after the work. The other way, [cool, work]
    less [cool], would add the noise of two more times, each as long as a small kernel's; and without a graph the gaps
    between launches would count, which is the host's time. What the work comes after is in the graph too, before all
    that: autograd runs a backward pass on the stream of its forward pass, and only one stream is captured. So no
    result of an earlier forward pass may be alive with its graph, either: its inputs would keep their stream.
    """

    def __init__(self, work: Work):
        first, then = work if isinstance(work, After) else (lambda: None, lambda _: work())
        work()  # what compiles or tunes itself does it on the default stream
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
            _cool_l2()
        torch.cuda.current_stream().wait_stream(side)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            before = first()
            _cool_l2()
            self._begin.record()
            then(before)
            self._end.record()

    def seconds(self) -> float:
        self._graph.replay()
        torch.cuda.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


def gpu_times(works: dict[str, Work], rounds: int = 15, warm_up: float = 0.03) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 (ms) of what each piece of work takes on the GPU with a cold L2; they take turns."""
    replays = {name: Replay(work) for name, work in works.items()}
    times = {name: [] for name in works}
    begin, done = time.perf_counter(), -3  # rounds that do not count, until the clocks are up
    while done < rounds:
        for name, replay in replays.items():
            seconds = replay.seconds()
            if done >= 0:
                times[name].append(seconds)
        done += done != -1 or time.perf_counter() - begin > warm_up
    return {name: spread(its_times) for name, its_times in times.items()}


def host_times(works: dict[str, Work], calls: int = 30, rounds: int = 25) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 (µs) of what a call costs the host; so many calls in a row, as layers make them, in turns.

    The GPU must be faster than the host, and its queue hold all that one turn launches.
    """
    times = {name: [] for name in works}
    gc.collect()
    gc.disable()  # or a collection is charged to whoever's turn it is
    try:
        for round_ in range(-3, rounds):
            for name, work in works.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(calls):
                    work()
                took = time.perf_counter() - begin
                if round_ >= 0:
                    times[name].append(1000 * took / calls)  # ms: spread() makes a thousand of every unit
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return {name: spread(its_times) for name, its_times in times.items()}


def kernels(work: Work) -> list[str]:
    """The names of what a call launches on the GPU: kernels, copies and memsets. Raises where the profiler saw none:
    it may not be allowed to look, and no kernel at all would be within every limit."""
    for _ in range(2):  # the first profile starts the profiler up, and may miss something
        work()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
    on_gpu = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [name for name in on_gpu if not name.startswith("Activity Buffer")]  # the profiler's own
    if not names:
        raise RuntimeError("the profiler saw no kernel")
    return names


def waits_for_gpu(work: Work) -> bool:
    """Whether a call returns only when the GPU has done what was asked for before."""
    for _ in range(2):
        work()  # its memory is there from now on, its kernels are loaded
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # clock ticks, about 0.2 s
    before = torch.cuda.Event()
    before.record()
    work()
    waited = before.query()
    torch.cuda.synchronize()
    return waited


def peak_bytes(work: Work) -> int:
    """How many bytes on the GPU a call asks for at most at a time, beside what it returns."""
    work()  # libraries have their own memory from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    found = torch.cuda.memory_stats()
    del result
    return found["requested_bytes.all.peak"] - found["requested_bytes.all.current"]
