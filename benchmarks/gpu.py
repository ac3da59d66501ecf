"""What does a machine with a GPU say? `make gpu`: builds for the GPU that is there, runs the `cuda` tests and
compute-sanitizer, takes first timings, and writes all that to `benchmarks/results/`; no network is needed.

Ends with 0; with 1 where the build or a test failed; without a GPU with 3, of which make itself makes its own 2.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("make gpu: this Python has no torch; name one that has: make gpu PYTHON=...")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

DIM = 768
# (tokens, rank, dtype): one image batch of ViT-B/16 and a large one, a narrow and a wide bottleneck.
CELLS = [(n, r, dtype) for n in (12_608, 100_864) for r in (8, 64) for dtype in (torch.bfloat16, torch.float32)]


def run(*command: str, **environment: str) -> bool:
    """Runs a command from the repository's root, its output shown; whether it ended well."""
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == 0


def median_ms(works: list[Callable[[], object]], repeats: int = 20) -> list[float]:
    """The median time of each piece of work on the GPU (ms); they take turns, so that clocks and caches favour none."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2
    ahead = 2_000_000  # clock ticks, about 1 ms: the GPU waits until the host has launched everything
    times = [[] for _ in works]
    for repeat in range(repeats + 3):
        for work, its_times in zip(works, times, strict=True):
            flush.zero_()
            torch.cuda._sleep(ahead)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            if repeat >= 3:
                its_times.append(begin.elapsed_time(end))
    return [statistics.median(its_times) for its_times in times]


def eager(x, down, down_bias, up, up_bias):
    return x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def time_cell(tokens: int, rank: int, dtype: torch.dtype) -> dict:
    """Forward (as in training: with what backward needs), and forward + backward, of ours, eager and `torch.compile`;
    and the copy rate of the same run."""
    from vitadapter_ext.ops import adapter

    torch._dynamo.reset()  # or the kernels of an earlier cell would serve this one with symbolic sizes

    def tensor(*shape):
        return (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).to(dtype).requires_grad_()

    x, down, down_bias = tensor(tokens, DIM), tensor(rank, DIM), tensor(rank)
    up, up_bias, grad = tensor(DIM, rank), tensor(DIM), torch.randn(tokens, DIM, device="cuda", dtype=dtype)
    inputs = (x, down, down_bias, up, up_bias)

    def ours(x, down, down_bias, up, up_bias):
        return adapter(x, down, up, down_bias=down_bias, up_bias=up_bias)

    functions = {"ours": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    forward, both = {}, {}
    for name, function in functions.items():
        forward[name] = lambda f=function: f(*inputs)
        both[name] = lambda f=function: torch.autograd.grad(f(*inputs), inputs, grad)
    source, target = x.detach(), torch.empty_like(x)
    works = [*forward.values(), *both.values(), lambda: target.copy_(source)]
    *times, copy_ms = median_ms(works)
    row = {"tokens": tokens, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    row |= {f"forward_ms_{name}": t for name, t in zip(functions, times[:3], strict=True)}
    row |= {f"both_ms_{name}": t for name, t in zip(functions, times[3:], strict=True)}
    row["copy_GB_per_s"] = 2 * x.numel() * x.element_size() / copy_ms / 1e6
    return row


def table(rows: list[dict]) -> str:
    lines = [
        f"| tokens × {DIM} | rank | dtype | forward ours / eager / compile (ms) | forward + backward (ms) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            " / ".join(f"{row[f'{part}_ms_{name}']:.3f}" for name in ("ours", "eager", "compile"))
            for part in ("forward", "both")
        ]
        lines.append(f"| {row['tokens']} | {row['rank']} | {row['dtype']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu: this machine has no NVIDIA GPU that torch can use; nothing was built, run or timed")
        return 3
    major, minor = torch.cuda.get_device_capability()
    build = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "VITADAPTER_CUDA": "1"}
    if not run(sys.executable, "setup.py", "build_ext", "--inplace", **build):
        return 1
    from benchmarks.record import made_with  # now that there is a library to import

    record = made_with("make gpu")
    files = [f"tests/test_adapter{part}.py" for part in ("", "_autograd", "_behaviour")]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *files]
    record["tests_passed"] = run(*tests)
    if shutil.which("compute-sanitizer"):
        # Small cases of each kind: the sanitizer slows everything down a hundredfold.
        few = "rank_zero or no_rows or strided or cuda_graphs or (dtype_mixes and shape1 and float32-float32)"
        sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--report-api-errors", "no"]
        record["sanitizer_passed"] = run(*sanitizer, *tests, "-k", few)
    else:
        record["sanitizer_passed"] = "compute-sanitizer was not found"

    record["rows"] = [time_cell(*cell) for cell in CELLS]
    print(table(record["rows"]))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{record['gpu'].replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}; tests passed: {record['tests_passed']}")
    return 0 if record["tests_passed"] and record["sanitizer_passed"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
