"""What do all tests share? The devices and CPU levels, seeded randomness, and the accuracy rule of the kernels."""

import contextlib
import os

import pytest
import torch

from vitadapter_ext import _C

# One thread, here and in the processes that tests start: tensors this small gain nothing from more, and on a busy
# machine the threads wait for each other. `test_the_same_bits_for_any_number_of_threads` sets its own numbers.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])
LEVELS = ("portable", "avx2", "avx512", "bf16")


def on_levels(prefix: str = "") -> list:
    """A parameter for each CPU level; what this machine lacks is skipped."""
    has = _C.cpu_levels()
    skip = {level: pytest.mark.skipif(level not in has, reason=f"this machine has no {level}") for level in LEVELS}
    return [pytest.param(prefix + level, marks=skip[level]) for level in LEVELS]


@contextlib.contextmanager
def at_level(level: str):
    """The CPU kernels run at this level, and afterwards at the one before."""
    before = _C.cpu_level()
    _C.use_cpu_level(level)
    try:
        yield
    finally:
        _C.use_cpu_level(before)


@pytest.fixture(params=on_levels())
def cpu_level(request):
    with at_level(request.param):
        yield request.param


@pytest.fixture(params=[*on_levels("cpu-"), CUDA])
def device(request):
    """Each type of device; the CPU once at each level, for what the levels compute each in their own way."""
    name, _, level = request.param.partition("-")
    with at_level(level) if level else contextlib.nullcontext():
        yield name


@pytest.fixture(params=["cpu", CUDA])
def plain_device(request) -> str:
    """Each type of device, for what the CPU level does not touch: float64, and all but the kernels."""
    return request.param


@pytest.fixture(autouse=True)
def _seed(request):
    # A seed of its own for every test, the same on every run.
    torch.manual_seed(sum(request.node.nodeid.encode()))


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_as_good_as_eager(ours: list[dict], eager: list[dict], exact: list[dict]) -> None:
    """For every named tensor: RMS error against float64 at most 1.5 times plain PyTorch's at the same dtypes, plus
    2 ulp of the tensor's RMS. The lists hold several draws, pooled: the error of one short vector is mostly luck."""
    for name in exact[0]:
        assert all(o[name].dtype == e[name].dtype for o, e in zip(ours, eager, strict=True)), name
        pooled = [torch.cat([draw[name].double().flatten() for draw in draws]) for draws in (ours, eager, exact)]
        error, allowed = rms(pooled[0] - pooled[2]), rms(pooled[1] - pooled[2])
        bound = 1.5 * allowed + 2 * torch.finfo(ours[0][name].dtype).eps * rms(pooled[2])
        # Written so that a NaN fails.
        assert error <= bound, f"{name}: RMS error {error:.3g}, plain PyTorch's {allowed:.3g}, bound {bound:.3g}"
