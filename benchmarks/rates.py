"""What can this machine do at best? Its processor, the rates of its memory and of matrix products, and the time below
which no kernel can come with them."""

import functools
import mmap
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import vitadapter_ext
from benchmarks.interleaved import take_quiet_turns, warm_up
from benchmarks.report import spread
from vitadapter_ext import _C

LARGE, SMALL = 12_608 * 768, 1_576 * 768  # elements of the copied float32 tensors: 39 MB and 5 MB
FRESH = 64 << 20  # bytes
GEMM = 2048
# PyTorch has bfloat16 products from AVX-512 on; what runs in their place below takes a hundred times as long.
GEMM_DTYPES = (torch.float32, torch.bfloat16) if "avx512" in _C.cpu_levels() else (torch.float32,)


def processor() -> dict[str, str]:
    """Model, caches (of one core; "" where /sys does not tell) and the level of the kernels in use."""
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        model = platform.processor()
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches.append(f"L{level}{'' if kind == 'Unified' else kind[0].lower()} {size}")
    return {"cpu": model, "caches": ", ".join(caches), "cpu_level": vitadapter_ext.build_info()["cpu_level"]}


@functools.cache
def machine_rates(rounds: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of a 2048³ product; GB/s, read plus written, of `copy_` into a warm buffer; GB/s written to fresh pages
    of 4 KB, which are mapped and given back in the same time, as an output's are."""
    works = {f"gemm_{_name(dtype)}": _gemm(dtype) for dtype in GEMM_DTYPES}
    works |= {"copy_large": _copy(LARGE), "copy_small": _copy(SMALL), "fresh": _write_fresh_pages}
    warm_up(works)
    times, _ = take_quiet_turns(works, rounds, seconds)
    ms = {name: spread(its_times)["median"] for name, its_times in times.items()}
    rates = {f"gemm_{_name(d)}_GFLOP_per_s": 2 * GEMM**3 / ms[f"gemm_{_name(d)}"] / 1e6 for d in GEMM_DTYPES}
    rates |= {
        "copy_39MB_GB_per_s": 2 * 4 * LARGE / ms["copy_large"] / 1e6,
        "copy_5MB_GB_per_s": 2 * 4 * SMALL / ms["copy_small"] / 1e6,
        "fresh_pages_GB_per_s": FRESH / ms["fresh"] / 1e6,
    }
    return {name: round(rate, 1) for name, rate in rates.items()}


class Cost(NamedTuple):
    """What an op cannot do without: {"forward", "both"} each, "both" being forward + backward."""

    moved: dict[str, int]  # bytes
    flops: dict[str, int]
    stream: int  # bytes of the largest tensor, which says what copy is like it


def sandwich(tokens: int, dim: int, rank: int, dtype: torch.dtype) -> Cost:
    """Forward reads x and writes y and the hidden layer (float32); backward reads grad, x and the hidden layer and
    writes the gradient of x."""
    stream, hidden, product = tokens * dim * dtype.itemsize, tokens * rank * 4, 2 * tokens * dim * rank
    moved = {"forward": 2 * stream + hidden, "both": 5 * stream + 2 * hidden}
    return Cost(moved, {"forward": 2 * product, "both": 6 * product}, stream)


def consolidator(tokens: int, width: int, out: int, groups: Sequence[int], dtype: torch.dtype) -> Cost:
    """Forward reads x and base and writes y; backward reads grad and x and writes the gradient of x: that of base is
    grad itself. A branch has one product forward and two backward, and few parameters."""
    x, y = (tokens * size * dtype.itemsize for size in (width, out))
    product = sum(2 * tokens * width * out // g for g in groups)
    return Cost({"forward": x + 2 * y, "both": 3 * x + 3 * y}, {"forward": product, "both": 3 * product}, max(x, y))


def floor_ms(cost: Cost, dtype: torch.dtype, rates: dict[str, float]) -> dict[str, float]:
    """The larger of compulsory bytes over the copy rate and arithmetic over the rate of a product, forward and
    forward + backward."""
    copy = rates["copy_5MB_GB_per_s" if cost.stream <= 4 * SMALL else "copy_39MB_GB_per_s"]
    gemm = gemm_rate(dtype, rates)
    return {part: round(max(moved / copy, cost.flops[part] / gemm) / 1e6, 5) for part, moved in cost.moved.items()}


def gemm_rate(dtype: torch.dtype, rates: dict[str, float]) -> float:
    """GFLOP/s of the fastest product for tensors of a dtype: all may be multiplied in float32."""
    names = [f"gemm_{_name(each)}_GFLOP_per_s" for each in (dtype, torch.float32)]
    return max(rates[name] for name in names if name in rates)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gemm(dtype: torch.dtype):
    a, b = (torch.randn(GEMM, GEMM).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(elements: int):
    source, target = torch.ones(elements), torch.ones(elements)
    return lambda: target.copy_(source)


def _write_fresh_pages() -> None:
    # Not torch.empty: where malloc keeps what it has, its pages are fresh only once.
    pages = mmap.mmap(-1, FRESH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)  # and with the last reference they are given back
