"""Do the CUDA kernels compute what they should, on the CPU? The C++ test program that CMake builds and ctest runs
(`tests/cpp/cuda_test.cpp`), here with cases from another seed, so that the two together see more."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "build" / "cmake" / "cuda_test"

built = pytest.mark.skipif(not PROGRAM.exists(), reason="the C++ tests are not built: make cpp-build")


def run(*arguments: str) -> subprocess.CompletedProcess:
    # The sanitizer's check for leaks needs rights that a container may not have, and is not what these tests are for.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, env=environment)


def choices(kernels) -> dict[tuple[str, int], set[str]]:
    """What kernels' templates are given: a set for each place. `Kernel<Float32, 16>` has Float32 in place 1."""
    given: dict[tuple[str, int], set[str]] = {}
    for kernel in kernels:
        parts = re.findall(r"\w+", kernel)
        for place, part in enumerate(parts):
            given.setdefault((parts[0], place), set()).add(part)
    return given


@built
def test_every_fast_kernel_on_the_emulator():
    finished = run("samples", "2", "80")
    print(finished.stdout)  # how many cases, by kernel: pytest -s shows it
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = r"((?:^  .+: \d+ cases\n)+)fast {} kernels: (\d+) cases in (\d+) orders of threads, 0 failures"
    ops = ("adapter", "ARC", "consolidator")
    summaries = [re.search(summary.format(op), finished.stdout, re.MULTILINE) for op in ops]
    for counted in summaries:
        assert counted and int(counted[2]) == 80 and int(counted[3]) >= 5
    # Of every kernel that a training step launches, each arithmetic, each way to store x and each number of ranks.
    launched = choices(json.loads(run("launches").stdout))
    sampled, of_arc, of_consolidator = (
        choices(re.findall(r"^  (.+): \d+ cases$", counted[1], re.MULTILINE)) for counted in summaries
    )
    assert sampled | of_arc | of_consolidator == launched
    # ARC goes through the adapter's kernels: all of those that it may have, too.
    assert {name for name, _ in of_arc} == {"AdapterForwardKernel", "ReductionKernel", "ArcReductionEnd"}
    assert all(of_arc[place] == launched[place] for place in of_arc)
    for kernel in ("AdapterForwardKernel", "AdapterBackwardKernel"):
        assert sampled[kernel, 1] == {"BFloat16", "Float16", "Tf32", "Float32"}
        assert sampled[kernel, 3] == {"16", "64", "256"}


@built
@pytest.mark.parametrize("arguments", [("nonsense",), ("everywhere", "5/4"), ("samples",), ("samples", "5", "0")])
def test_the_program_refuses_what_it_does_not_know(arguments):
    finished = run(*arguments)
    assert finished.returncode == 2 and "cuda_test: " in finished.stderr
