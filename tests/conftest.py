"""What do all tests share? The devices, seeded randomness, and the accuracy rule of the kernels."""

import os

import pytest
import torch

# One thread, here and in the processes that tests start: tensors this small gain nothing from more, and on a busy
# machine the threads wait for each other. `test_the_same_bits_for_any_number_of_threads` sets its own numbers.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])])
def device(request) -> str:
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
