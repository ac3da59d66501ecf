"""Does `make gpu` keep to its time, say what failed, and set numbers beside the right targets? Without a GPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_cells, gpu_plans, gpu_problem, gpu_report, gpu_timing

TINY = (16, 4, 6)  # dim, rank, tokens
TINY_BRANCHES = ("tiny", (8, 2), 6)  # layer, groups, tokens
SANDWICHES = gpu_problem.mixes_of("adapter", "ARC")
CONSOLIDATORS = gpu_problem.mixes_of("consolidator", "consolidated linear")
# Those of the other phases are the sandwich's alone, or for all ops.
PHASES_OF = {"consolidator": ["branches", "host", "launches"], "consolidated linear": ["layers"]}


def spreads(unit: str = "ms", part: str = "", **medians: float) -> dict:
    """The times of a row; a pass goes before every name, or the names have theirs."""
    names = {f"{part} {name}" if part else name.replace("_", " "): median for name, median in medians.items()}
    return {unit: {name: {"median": m, "p20": m, "p80": m} for name, m in names.items()}}


def passes(*parts: dict) -> dict:
    """The times of several passes as one row's."""
    return {"ms": {name: spread for part in parts for name, spread in part["ms"].items()}}


def row(mix="bfloat16", rank=64, tokens=131_072, **facts) -> dict:
    return {"mix": mix, "dim": 768, "rank": rank, "tokens": tokens, **facts}


def branch_row(mix="consolidator bfloat16", groups=(384,), **facts) -> dict:
    return {"mix": mix, "layer": "qkv", "groups": groups, "tokens": 12_608, **facts}


def phase(*rows, status="complete", **facts) -> dict:
    return {"status": status, "well": True, "seconds": 1, "rows": list(rows), **facts}


HIDDEN = 131_072 * 64 * 4  # bytes
LAUNCHES = {
    "kernels": {"ours": {"forward": 1, "both": 5}, "eager": {"forward": 4, "both": 12}},
    "kernel_names": {"forward": ["sandwich"], "both": ["sandwich", "a", "b", "c", "d"]},
    "foreign": ["a copy"],
    "bytes": {
        "ours": {"saved": HIDDEN, "workspace": HIDDEN + (17 << 20)},
        "eager": {"saved": 2 * HIDDEN, "workspace": 3 * HIDDEN},
    },
    "waits": {"forward": False, "both": True},
}
RATES = {
    "copy_GB_per_s": 4300,
    "GB_per_s": {"forward": 3700, "backward": 2600},
    "TFLOP_per_s": {"forward": 90.0, "backward": 120.0},
}
PHASES = {
    "build": {"status": "complete", "well": True, "seconds": 60},
    "checks": {"status": "tests: 3 passed", "well": True, "seconds": 60},
    "bandwidth": phase(
        row(
            share={"forward": 0.86, "backward": 0.6}, **RATES, **spreads(forward_ours=0.1, backward_ours=0.2, copy=0.09)
        ),
        row(
            rank=256,
            share={"forward": 0.3, "backward": 0.2},
            **RATES,
            **spreads(forward_ours=0.4, backward_ours=0.9, copy=0.09),
        ),
        status="out of time",
    ),
    "ratios": phase(
        row(
            **passes(
                spreads(part="forward", ours=1.0, eager=3.2, compile=1.4),
                spreads(part="backward", ours=2.0, eager=3.6, compile=3.0),
                spreads(part="both", ours=3.0, eager=6.8, compile=4.4),
            )
        ),
        row(
            mix="bfloat16, residual",
            **passes(
                spreads(part="forward", ours=1.0, eager=2.2, compile=1.6),
                spreads(part="backward", ours=1.0, eager=2.2, compile=1.6),
                spreads(part="both", ours=2.0, eager=4.4, compile=3.2),
            ),
        ),
        row(rank=8, error="ArithmeticError: y differs"),
    ),
    "branches": phase(
        branch_row(
            share={"forward": 0.7, "backward": 0.6},
            **RATES,
            **passes(
                spreads(forward_ours=1.0, forward_eager=3.9, copy=0.5),
                spreads(part="backward", ours=1.0, eager=8.0),
                spreads(part="both", ours=2.0, eager=11.9),
            ),
        ),
        branch_row(groups=(384, 96), **spreads(both_ours=2.0, both_eager=7.0)),
    ),
    "layers": phase(
        branch_row(
            mix="consolidated linear bfloat16",
            auto="beside",
            **passes(spreads(part="both", **{"in-weight": 1.1, "beside": 1.6, "plain": 1.0, "eager": 9.0})),
        )
    ),
    "host": phase(row(**spreads("us", forward_ours=16, both_ours=50, forward_eager=40, both_eager=90))),
    "launches": phase(row(**LAUNCHES)),
    "grid": phase(
        row(**spreads(forward_ours=1.0, forward_eager=2.0, backward_ours=1.0, backward_eager=1.05)),
        row(rank=3, **spreads(forward_ours=1.0, forward_eager=0.8, backward_ours=1.0, backward_eager=1.5)),
    ),
    "sweep": phase(
        row(
            unfit=["forward 16 rows kept", "backward 8 rows kept"],
            **passes(
                spreads(part="forward", automatic=0.12, simple=3.0, fast=0.11),
                spreads(part="backward", automatic=0.2, fast=0.19),
            ),
        )
    ),
    "autotune": phase(status="no time was left"),
}


def test_every_number_stands_beside_its_target():
    found = gpu_report.targets(PHASES)
    by_what = {}
    for judged in found:
        by_what.setdefault(judged["what"], []).append(judged.get("target"))
    assert by_what["forward, share of copy rate"] == [0.85, 0.35]
    assert by_what["backward, share of copy rate"] == [0.55]
    assert by_what["backward, share of copy rate, as in one pass"] == [0.7]
    assert by_what["forward over eager"] == [3.0, 2.1] and by_what["backward over eager"] == [1.9, 1.9]
    assert by_what["forward over compile"] == [1.5, 1.5] and by_what["backward over compile"] == [1.4, 1.4]
    assert by_what["saved for backward beside the inputs (MB)"] == [32]
    assert by_what["workspace, backward (MB)"] == [48]
    verdicts = {(j["what"], j["size"]): j["verdict"] for j in found}
    large = "131,072 × 768 r"
    assert verdicts["forward, share of copy rate", f"bfloat16 {large} 64"] == "reached"
    assert verdicts["forward, share of copy rate", f"bfloat16 {large} 256"] == "short by 0.05"
    assert verdicts["backward, share of copy rate", f"bfloat16 {large} 64"] == "reached"
    assert verdicts["backward, share of copy rate, as in one pass", f"bfloat16 {large} 64"] == "short by 0.1"
    assert verdicts["forward and backward beside a copy", "the rest"] == "not measured: out of time"
    assert verdicts["forward over compile", f"bfloat16 {large} 64"] == "short by 0.1"
    assert verdicts["backward over eager", f"bfloat16 {large} 64"] == "short by 0.1"
    assert verdicts["backward over eager", f"bfloat16, residual {large} 64"] == "reached"
    failed = verdicts["forward and backward beside eager and torch.compile", f"bfloat16 {large} 8"]
    assert failed == "not measured: ArithmeticError: y differs"
    assert verdicts["host, forward (µs)", f"bfloat16 {large} 64"] == "over by 1"
    assert verdicts["host, forward, of eager's", f"bfloat16 {large} 64"] == "reached"
    assert verdicts["host, forward + backward, of eager's", f"bfloat16 {large} 64"] == "over by 0.056"
    assert verdicts["kernels, forward", f"bfloat16 {large} 64"] == "reached"
    assert verdicts["kernels, forward + backward", f"bfloat16 {large} 64"] == "over by 1"
    assert verdicts["waits for the GPU, forward + backward", f"bfloat16 {large} 64"] == "over by 1"
    assert verdicts["the module, kernels that are not ours", f"bfloat16 {large} 64"] == "over by 1"
    assert verdicts["saved for backward beside the inputs (MB)", f"bfloat16 {large} 64"] == "reached"
    assert verdicts["workspace, backward (MB)", f"bfloat16 {large} 64"] == "over by 1"
    anywhere = "over eager, any size of the grid (ranks to 256)"
    assert verdicts[f"forward {anywhere}", f"bfloat16 {large} 3, the worst of 2; 1 below 1"] == "short by 0.2"
    assert verdicts[f"backward {anywhere}", f"bfloat16 {large} 64, the worst of 2; 0 below 1"] == "reached"
    branches, convolution = "consolidator bfloat16 12,608 qkv g 384", "forward + backward over the grouped convolution"
    assert verdicts[convolution, branches] == "reached"
    assert verdicts[convolution, f"{branches} + 96"] == "short by 0.5"
    layer = "consolidated linear bfloat16 12,608 qkv g 384"
    assert verdicts["in-weight training, of the plain layer's time", layer] == "reached"
    assert verdicts["auto, of the faster way's time", layer] == "over by 0.42"
    assert verdicts[gpu_report.TITLES["autotune"].lower(), "everything"] == "not measured: no time was left"
    reached = sum(verdict == "reached" for verdict in verdicts.values())
    assert f"{reached} of {len(found)} targets reached." in gpu_report.targets_table(found)


def test_the_document_has_every_phase_and_its_rows():
    record = {"gpu": "NVIDIA X", "phases": PHASES, "targets": gpu_report.targets(PHASES)}
    text = gpu_report.document(record)
    for name in gpu_cells.PHASES:
        assert f"## {gpu_report.TITLES[name]}\n" in text
    assert "- gpu: NVIDIA X" in text and "86 % of copy" in text
    assert "fast 0.11; automatic 0.12; simple 3" in text and "fast 0.19; automatic 0.2" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    large = "bfloat16 131,072 × 768 r"
    assert [f"{large} 64", "forward", "fast 0.11; automatic 0.12; simple 3", "16 rows kept"] in lines
    assert [f"{large} 64", "backward", "fast 0.19; automatic 0.2", "8 rows kept"] in lines
    (backward,) = (line for line in lines if line[:2] == [f"{large} 64", "backward"] and "ours 2 (2–2)" in line)
    assert backward[-2:] == ["eager / ours 1.80", "compile / ours 1.50"]
    (of_copy,) = (line for line in lines if line[:2] == [f"{large} 64", "backward"] and "60 % of copy" in line)
    assert of_copy[2:4] == ["ours 0.2 (0.2–0.2)", "copy 0.09 (0.09–0.09)"]
    assert "2 sizes were measured; eager / ours below 1.1:" in text
    below = [line[:2] for line in lines if line[-1:] in (["eager / ours 0.80"], ["eager / ours 1.05"])]
    assert below == [[f"{large} 64", "backward"], [f"{large} 3", "forward"]]
    assert "| 1, 5 " in text and "| 32, 49 " in text and "sandwich; a; b; c; d" in text and "a copy" in text
    assert f"- {large} 8: ArithmeticError: y differs" in text
    (of_branches,) = (line for line in lines if line[:2] == ["consolidator bfloat16 12,608 qkv g 384", "backward"])
    (of_layer,) = (
        line for line in lines if line[:2] == ["consolidated linear bfloat16 12,608 qkv g 384", "forward + backward"]
    )
    assert of_layer[-4:] == ["in-weight / plain 1.10", "beside / plain 1.60", "eager / plain 9.00", "auto is beside"]
    assert "60 % of copy" in of_branches and of_branches[-1] == "eager / ours 8.00"


def test_every_phase_has_a_limit_a_title_and_sizes_of_known_mixes():
    assert list(gpu.LIMITS) == list(gpu_report.TITLES) == ["build", "checks", *gpu_cells.PHASES]
    for _, sizes in gpu_cells.PHASES.values():
        assert sizes and len(set(sizes)) == len(sizes) and {size[0] for size in sizes} <= set(gpu_problem.MIXES)
    grid = gpu_cells.PHASES["grid"][1]
    for name, (_, sizes) in gpu_cells.PHASES.items():
        for op, its_phases in PHASES_OF.items():
            assert (name in its_phases) == any(gpu_problem.MIXES[size[0]].op == op for size in sizes)
    for mix in SANDWICHES:
        assert {size[2] for size in grid if size[0] == mix} == {1, 3, 8, 16, 64, 128, 256}


def test_every_file_of_tests_is_there():
    assert all((gpu.ROOT / file).exists() for file in gpu.TEST_FILES + gpu.SANITIZED_FILES)


def test_without_a_gpu_it_says_so_and_ends_with_3():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=gpu.ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3
    assert "this machine has no NVIDIA GPU that torch can use; nothing was built, run or timed" in run.stdout


def test_an_unknown_phase_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["swep"])
    assert "there is no phase swep; there are build, checks" in capsys.readouterr().err


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script on a made-up GPU, whose phases are made up too; returns what may be changed of them."""
    phases = {name: (lambda seconds, name=name: PHASES[name]) for name in gpu.LIMITS}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda: {"gpu": "NVIDIA Made-Up", "command": "make gpu"})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "build", lambda seconds: phases["build"](seconds))
    monkeypatch.setattr(gpu, "checks", lambda seconds: phases["checks"](seconds))
    monkeypatch.setattr(gpu, "cells", lambda name, seconds: phases[name](seconds))
    return phases


def written(tmp_path) -> tuple[dict, str]:
    files = [tmp_path / "results" / f"nvidia-made-up.{kind}" for kind in ("json", "md")]
    return json.loads(files[0].read_text()), files[1].read_text()


def test_a_whole_run_is_printed_and_written(script, tmp_path, capsys):
    assert gpu.main([]) == 0
    record, text = written(tmp_path)
    printed = capsys.readouterr().out
    assert record["bandwidth"] == PHASES["bandwidth"]["rows"]
    assert record["phases"]["checks"]["status"] == "tests: 3 passed"
    assert record["targets"] == gpu_report.targets(PHASES)
    assert (
        gpu_report.targets_table(record["targets"]) in printed and gpu_report.targets_table(record["targets"]) in text
    )
    assert "written to results/nvidia-made-up.json" in printed


def test_a_phase_that_raises_is_not_the_end_of_the_others(script, tmp_path):
    def fail(seconds):
        raise OSError("no more processes")

    script["ratios"] = fail
    assert gpu.main([]) == 1
    record, text = written(tmp_path)
    assert record["phases"]["ratios"]["status"] == "failed: OSError: no more processes" and record["ratios"] == []
    assert "not measured: failed: OSError: no more processes" in text
    assert record["grid"] == PHASES["grid"]["rows"]


def test_failed_tests_are_an_exit_status_and_the_rest_is_measured(script, tmp_path):
    script["checks"] = lambda seconds: {"status": "tests: failed", "well": False}
    assert gpu.main([]) == 1
    assert written(tmp_path)[0]["bandwidth"]


def test_after_a_failed_build_nothing_runs_and_nothing_is_written(script, tmp_path):
    script["build"] = lambda seconds: {"status": "failed", "well": False}
    script["checks"] = None
    assert gpu.main([]) == 1 and not (tmp_path / "results").exists()


def test_phases_share_the_time_that_is_left(script, tmp_path, monkeypatch):
    now, given = [0.0], {}
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def takes_all(name):
        def run(seconds):
            given[name] = seconds
            now[0] += seconds
            return PHASES[name]

        return run

    script |= {name: takes_all(name) for name in gpu.LIMITS}
    assert gpu.main([]) == 0
    assert now[0] <= gpu.SECONDS < 8 * 60
    assert all(seconds <= gpu.LIMITS[name] for name, seconds in given.items())
    record, text = written(tmp_path)
    assert record["phases"]["autotune"]["status"] == "no time was left" and "not measured: no time was left" in text


def test_some_phases_are_printed_and_not_written(script, tmp_path, capsys):
    assert gpu.main(["sweep", "build"]) == 0
    assert "fast 0.11" in capsys.readouterr().out and not (tmp_path / "results").exists()


def test_what_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(process.pid))
time.sleep(60)"""
    process = gpu.start([sys.executable, "-c", code])
    while not (child.exists() and child.read_text()):
        time.sleep(0.01)
    assert gpu.finish(process, time.monotonic() + 0.1) is None
    assert process.poll() is not None
    for _ in range(500):
        try:
            with open(f"/proc/{child.read_text()}/stat") as stat:
                if stat.read().split()[2] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.01)
    pytest.fail("the process that it started still runs")


def test_rows_come_back_from_a_process_and_so_does_how_it_ended(monkeypatch):
    def ends(code: str) -> dict:
        def start(command, **environment):
            return subprocess.Popen([sys.executable, "-c", f"file = open({command[-2]!r}, 'w'); {code}"])

        monkeypatch.setattr(gpu, "start", start)
        return gpu.cells("grid", 20)

    good = r"""print('{"mix": "a"}', '{"end": "complete"}', sep='\n', file=file)"""
    assert ends(good) == {"status": "complete", "well": True, "rows": [{"mix": "a"}]}
    half = r"""print('{"mix": "a"}\n{"mi', end='', file=file)"""
    assert ends(half) == {"status": "out of time", "well": True, "rows": [{"mix": "a"}]}
    assert ends(f"{half}; file.flush(); 1 / 0")["status"] == "failed: exit status 1"
    wrong = ends(r"""print('{"error": "it"}', '{"end": "out of time"}', sep='\n', file=file)""")
    assert (wrong["status"], wrong["well"]) == ("failed: 1 of 1 cells; out of time", False)


@pytest.mark.parametrize(
    ("name", "ended", "log", "expected"),
    [
        ("tests", 0, "....\n3 passed, 1 skipped in 2.00s\n", ("3 passed, 1 skipped", True)),
        ("tests", 0, "....\n===== 3 passed in 2.00s =====\n", ("3 passed", True)),
        ("tests", 1, "1 failed, 3 passed in 2.00s\n", ("failed", False)),
        ("tests", 0, "4 skipped in 1s", ("failed", False)),
        ("tests", None, "....", ("did not finish in time", False)),
        ("memcheck", 0, "3 passed in 2s\n========= ERROR SUMMARY: 0 errors", ("3 passed", True)),
        ("memcheck", 1, "3 passed in 2s\n========= ERROR SUMMARY: 2 errors", ("found 2 problems", False)),
        ("memcheck", 1, "1 failed in 2s\n========= ERROR SUMMARY: 0 errors", ("failed", False)),
        ("memcheck", 1, "Device not supported\n========= ERROR SUMMARY: 0 errors", ("could not run here", True)),
        ("memcheck", None, "..", ("did not finish in time", True)),
        ("memcheck", None, "..\n========= Invalid __global__ write of size 4", ("found 1 problems", False)),
        ("memcheck", -11, "========= Invalid __global__ read of size 2\n", ("found 1 problems", False)),
        ("memcheck", 1, "1 failed, 15 passed in 2s", ("failed", False)),
        ("racecheck", None, "========= Error: Race reported between Write access", ("found 1 problems", False)),
        ("racecheck", 1, "RACECHECK SUMMARY: 4 hazards displayed (4 errors, 0 warnings)", ("found 4 problems", False)),
        ("racecheck", 0, "2 passed in 9s\n= RACECHECK SUMMARY: 0 hazards displayed (0 errors)", ("2 passed", True)),
    ],
)
def test_how_tests_and_sanitizer_went(name, ended, log, expected):
    assert gpu.verdict(name, ended, log) == expected


def test_checks_run_beside_each_other_and_each_is_heard(monkeypatch):
    python = [sys.executable, "-c"]
    commands = {
        "tests": [*python, "print('2 passed in 1s')"],
        "memcheck": [*python, "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], 'passed in 1s')\n"
                     "print('ERROR SUMMARY: 0 errors')"],
        "racecheck": [*python, "import time; time.sleep(60)"],
    }  # fmt: skip
    monkeypatch.setattr(gpu, "check_commands", lambda: commands)
    done = gpu.checks(1.5)
    assert done["status"] == "tests: 2 passed; memcheck: 1 passed; racecheck: did not finish in time" and done["well"]


@pytest.fixture
def measured(monkeypatch):
    """Measures a size in some phases on the CPU, where nothing is timed; returns them by name, and how they ended."""
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")

    def times(works, **options):
        return {name: {"median": 1.0 + (work() is None), "p20": 1.0, "p80": 1.0} for name, work in works.items()}

    for module in (gpu_cells, gpu_problem):
        monkeypatch.setattr(module, "gpu_times", times)
    monkeypatch.setattr(gpu_cells, "host_times", times)
    monkeypatch.setattr(gpu_cells, "kernels", lambda work: ["kernel"] * (work() is not None))
    monkeypatch.setattr(gpu_cells, "waits_for_gpu", lambda work: work() is None)
    monkeypatch.setattr(gpu_cells, "peak_bytes", lambda work: work() is None)
    # A few plans fit, and compiling takes long.
    fit = (gpu_plans.SIMPLE, gpu_plans.FAST[3], gpu_plans.SLICED[0])
    monkeypatch.setattr(gpu_plans, "result_under", lambda plan, work: work() if plan in fit else None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def measure(size: tuple, names: list[str]) -> dict:
        phases = {}
        for name in names:
            rows = []
            gpu_cells.measure([size], gpu_cells.PHASES[name][0], 60, rows.append)
            assert rows.pop() == {"end": "complete"}
            phases[name] = phase(*rows)
            assert "error" not in rows[0], rows[0]
            assert gpu_report.phase_table(name, phases[name])
        return phases

    allowed = torch.backends.cuda.matmul.allow_tf32
    yield measure
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("mix", SANDWICHES)
def test_every_phase_runs_every_mix_of_a_sandwich(measured, mix):
    phases = measured((mix, *TINY), [name for name in gpu_cells.PHASES if name not in ("branches", "layers")])
    found = phases["sweep"]["rows"][0]
    assert list(found["ms"]) == ["forward simple", "forward 64 rows kept", "backward 64 rows kept", "backward 4 slices"]
    assert len(found["unfit"]) == 8 + 13 - 4
    dim, rank, tokens = TINY
    memory = phases["launches"]["rows"][0]["bytes"]
    assert memory["ours"]["saved"] == 4 * tokens * rank <= memory["eager"]["saved"]
    for each in phases["bandwidth"]["rows"]:
        each["rank"] = 8  # of the ranks with a target
    judged = gpu_report.targets(phases)
    assert all("not measured" not in each["verdict"] for each in judged)
    (saved,) = (each for each in judged if each["what"] == "saved for backward beside the inputs (MB)")
    assert saved["verdict"] == "reached"  # exactly the hidden layer, in float32


@pytest.mark.parametrize("mix", CONSOLIDATORS)
def test_every_phase_of_the_consolidator_runs_every_mix(measured, mix):
    phases = measured((mix, *TINY_BRANCHES), PHASES_OF[gpu_problem.MIXES[mix].op])
    judged = gpu_report.targets(phases)
    assert judged and all("not measured" not in each["verdict"] for each in judged)
    if "launches" in phases:
        (saved,) = (each for each in judged if each["what"] == "saved for backward beside the inputs (MB)")
        assert saved["verdict"] == "reached" and saved["target"] == 0
        shares = phases["branches"]["rows"][0]["share"]
        assert list(shares) == ["forward", "backward"] and all(share > 0 for share in shares.values())
    else:
        times = phases["layers"]["rows"][0]["ms"]
        assert list(times) == [f"both {name}" for name in ("in-weight", "beside", "eager", "plain")]


@pytest.mark.parametrize(
    ("mix", "forward", "backward"),
    [
        ("bfloat16", 4, 6),
        ("bfloat16, residual", 6, 6),
        ("float32 in bfloat16", 8, 12),
        ("bfloat16, residual float32", 10, 8),
        ("float32", 8, 12),
    ],
)
def test_compulsory_bytes(monkeypatch, mix, forward, backward):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    dim, rank, tokens = TINY
    problem = gpu_problem.problem_of(mix, *TINY)
    hidden = 4 * tokens * rank
    assert problem.compulsory_bytes == {
        "forward": forward * tokens * dim + hidden,
        "backward": backward * tokens * dim,
    }


@pytest.mark.parametrize(
    ("mix", "x", "y"),
    [("consolidator bfloat16", 2, 2), ("consolidator float32 in bfloat16", 4, 2), ("consolidator float32", 4, 4)],
)
def test_compulsory_bytes_of_branches(monkeypatch, mix, x, y):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    problem = gpu_problem.problem_of(mix, *TINY_BRANCHES)
    x, y = 6 * 16 * x, 6 * 48 * y
    assert problem.compulsory_bytes == {"forward": x + 2 * y, "backward": 2 * x + y}
    assert problem.flops == {"forward": 2 * 6 * 16 * 48 * 5 // 8, "backward": 4 * 6 * 16 * 48 * 5 // 8}


class Wrong(torch.autograd.Function):
    """The same value; a gradient that is a little too large."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def wrong(argument):
    """Eager, with a wrong gradient of one argument."""
    place = ("x", "residual", "down", "down_bias", "up", "up_bias").index(argument)

    def function(*inputs):
        return gpu_problem.eager(*inputs[:place], Wrong.apply(inputs[place]), *inputs[place + 1 :])

    return function


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("y", lambda *inputs: 1.1 * gpu_problem.eager(*inputs)),
        ("y", lambda *inputs: float("nan") * gpu_problem.eager(*inputs)),
        *((f"gradient of {name}", wrong(name)) for name in ("x", "down", "down_bias", "up", "up_bias")),
    ],
)
@pytest.mark.parametrize("mix", ["bfloat16", "float32 in TF32"])
def test_what_is_wrong_is_not_timed(monkeypatch, mix, what, function):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_cells, "gpu_times", None)
    monkeypatch.setattr(gpu_problem, "ours", function)
    rows = []
    gpu_cells.measure([(mix, *TINY)], gpu_cells.bandwidth, 60, rows.append)
    assert rows[0]["error"].startswith(f"ArithmeticError: {what} differs from eager's by ")


@pytest.mark.parametrize("what", ["y", "gradient of x", "gradient of weight 1", "gradient of bias 0"])
@pytest.mark.parametrize("mix", CONSOLIDATORS)
def test_what_is_wrong_of_branches_is_not_timed(monkeypatch, mix, what):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    problem = gpu_problem.problem_of(mix, *TINY_BRANCHES)
    expected = problem.results(problem.functions["eager"])
    found = {name: value.clone() for name, value in expected.items()}
    assert problem.compare(found, expected) == 0
    found[what] += 0.1 * (found[what] - problem.base.get(what, 0))
    with pytest.raises(ArithmeticError, match=f"{what} differs from eager's by"):
        problem.compare(found, expected)


@pytest.mark.parametrize("mix", ["bfloat16", "bfloat16, residual", "float32"])
@pytest.mark.parametrize("name", ["y", "gradient of x"])
def test_one_wrong_row_of_many_is_seen(monkeypatch, mix, name):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    problem = gpu_problem.problem_of(mix, 64, 8, 20_000)
    expected = problem.results(gpu_problem.eager)
    found = {what: value.clone() for what, value in expected.items()}
    assert problem.compare(found, expected) == 0
    own_residual = problem.mix.residual is not None
    y_base = problem.inputs["residual" if own_residual else "x"].detach()
    base = {"y": y_base, "gradient of x": 0 * problem.grad if own_residual else problem.grad}
    found[name][-1] = base[name][-1]  # as if the branch had nothing for it
    with pytest.raises(ArithmeticError, match=f"a row of {name} differs from eager's by"):
        problem.compare(found, expected)


def test_autocast_is_entered_once_for_all_calls_that_cost_the_host(monkeypatch):
    monkeypatch.setattr(gpu_problem, "DEVICE", "cpu")
    problem = gpu_problem.problem_of("float32 in bfloat16", *TINY)
    entered = []

    def times(works):
        assert torch.is_autocast_enabled("cpu") and len(entered) == 1
        return {name: work() for name, work in works.items()}

    autocast = problem.autocast
    monkeypatch.setattr(problem, "autocast", lambda: entered.append(1) or autocast())
    monkeypatch.setattr(gpu_cells, "host_times", times)
    found = gpu_cells.host(problem)["us"]
    assert list(found) == ["forward ours", "both ours", "forward eager", "both eager"] and len(entered) == 1
    for name, function in problem.functions.items():
        expected = problem.results(function)
        assert torch.equal(found[f"forward {name}"], expected["y"])
        gradients = problem.named(found[f"both {name}"])
        assert all(torch.equal(value, expected[what]) for what, value in gradients.items())


@pytest.mark.parametrize("seen", [[], ["Activity Buffer Request"], ["Activity Buffer Request", "kernel"]])
def test_a_profiler_that_sees_no_kernel_is_an_error(monkeypatch, seen):
    events = [SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA) for name in seen]
    events.append(SimpleNamespace(name="launch", device_type=torch.autograd.DeviceType.CPU))
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(gpu_timing, "profile", lambda **options: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    if "kernel" in seen:
        assert gpu_timing.kernels(lambda: None) == ["kernel"]
        return
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        gpu_timing.kernels(lambda: None)


def test_cells_need_no_pytest():
    code = "import sys; sys.modules['pytest'] = None; import benchmarks.gpu, benchmarks.gpu_cells"
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


def test_what_work_comes_after_is_captured_and_not_timed(monkeypatch):
    order = []
    events = iter(("begin", "end"))

    def event(**options):
        assert options == {"enable_timing": True, "external": True}
        name = next(events)
        return SimpleNamespace(record=lambda: order.append(name))

    @contextlib.contextmanager
    def capture(graph):
        order.clear()
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda stream: contextlib.nullcontext(),
        "Event": event, "CUDAGraph": lambda: None, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu_timing, "_cool_l2", lambda: order.append("cool"))
    gpu_timing.Replay(gpu_timing.After(lambda: order.append("first") or 3, lambda got: order.append(f"then {got}")))
    assert order == ["first", "cool", "begin", "then 3", "end"]
    events = iter(("begin", "end"))
    gpu_timing.Replay(lambda: order.append("work"))
    assert order == ["cool", "begin", "work", "end"]


def test_memory_beside_a_result_is_counted_while_it_is_held(monkeypatch):
    held = weakref.WeakSet()

    class Result:
        pass

    def work():
        result = Result()
        held.add(result)
        return result

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    stats = {"requested_bytes.all.peak": 100}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats | {"requested_bytes.all.current": 30 * len(held)})
    assert gpu_timing.peak_bytes(work) == 70


def test_cells_stop_in_time_and_go_on_after_an_error(monkeypatch):
    monkeypatch.setattr(gpu_cells, "problem_of", lambda mix, dim, rank, tokens: rank)
    sizes = [("bfloat16", 16, rank, 4) for rank in range(5)]

    def measure_one(rank):
        time.sleep(0.05)
        if rank == 1:
            raise ValueError("")
        return {"ms": rank}

    rows = []
    gpu_cells.measure(sizes, measure_one, 0.18, rows.append)
    assert rows[1]["error"] == "ValueError: ?" and rows[-1] == {"end": "out of time"} and 2 <= len(rows) < 6

    def broken(rank):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    rows = []
    with pytest.raises(torch.AcceleratorError):
        gpu_cells.measure(sizes, broken, 60, rows.append)
    assert len(rows) == 1 and "illegal memory access" in rows[0]["error"]


def test_plans_are_forced_and_given_back(monkeypatch):
    used = []
    monkeypatch.setattr(torch.ops.vitadapter, "use_cuda_plan", lambda *plan: used.append(plan), raising=False)

    def fails(error):
        def work():
            raise error

        return work

    assert gpu_plans.result_under(gpu_plans.FAST[0], lambda: 3) == 3
    assert (
        gpu_plans.result_under(gpu_plans.SIMPLE, fails(RuntimeError("adapter: no fast kernel serves this with")))
        is None
    )
    for error in (RuntimeError("adapter: down has shape (2,)"), torch.OutOfMemoryError("out of memory")):
        with pytest.raises(RuntimeError):
            gpu_plans.result_under(gpu_plans.SIMPLE, fails(error))
    assert used == [(32, 0, 0), (0, -1, 0), *[(-1, -1, 0), (0, -1, 0)] * 3]
    plans = (gpu_plans.AUTOMATIC, gpu_plans.SIMPLE, gpu_plans.FAST[3], gpu_plans.SLICED[1], gpu_plans.Plan(32, 0, 8))
    names = ["automatic", "simple", "64 rows kept", "8 slices", "32 rows streamed, 8 slices"]
    assert [str(plan) for plan in plans] == names
