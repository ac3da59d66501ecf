"""Do the CUDA kernels compute what they should, on the CPU? The C++ test program that CMake builds and ctest runs
(`tests/cpp/cuda_test.cpp`), here with cases from another seed, so that the two together see more."""

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


@built
def test_every_fast_kernel_on_the_emulator():
    finished = run("samples", "2", "80")
    print(finished.stdout)  # how many cases, by kernel: pytest -s shows it
    assert finished.returncode == 0, finished.stdout + finished.stderr
    counted = re.search(r"fast adapter kernels: (\d+) cases in (\d+) orders of threads, 0 failures", finished.stdout)
    assert counted and int(counted[1]) == 80 and int(counted[2]) >= 5
    kernels = re.findall(r"AdapterForwardKernel<(\w+), (\w+), (\d+)>: \d+ cases", finished.stdout)
    assert {math for math, _, _ in kernels} == {"BFloat16", "Float16", "Tf32", "Float32"}
    assert {rank for _, _, rank in kernels} == {"16", "64", "256"}


@built
@pytest.mark.parametrize("arguments", [("nonsense",), ("everywhere", "5/4"), ("samples",), ("samples", "5", "0")])
def test_the_program_refuses_what_it_does_not_know(arguments):
    finished = run(*arguments)
    assert finished.returncode == 2 and "cuda_test: " in finished.stderr
