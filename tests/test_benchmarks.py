"""Do the benchmarks measure what they say, in turns, and report it with the right verdicts?"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_adapter, bench_arc, memory, program, rates, report, sandwich
from benchmarks.interleaved import OtherPrograms, summarised, take_quiet_turns, take_turns

RATES = {
    "gemm_float32_GFLOP_per_s": 100.0,
    "gemm_bfloat16_GFLOP_per_s": 200.0,
    "copy_39MB_GB_per_s": 10.0,
    "copy_5MB_GB_per_s": 40.0,
    "fresh_pages_GB_per_s": 3.0,
}


each_suite = pytest.mark.parametrize("suite", [bench_adapter, bench_arc], ids=lambda suite: suite.__name__)


def tiny_row(suite=bench_adapter, **more) -> dict:
    problem = sandwich.Problem(suite.OP, "float32", 16, 2, 5)
    _, row = sandwich.measure(problem, suite.OP.functions, rounds=3, seconds=0)
    return row | sandwich.cell_facts(problem, row, RATES) | more


def test_the_state_of_malloc_is_named(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert memory.malloc_state() == "unpinned"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert memory.malloc_state() == "all-fault"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    assert memory.malloc_state() == "unpinned"


def test_functions_take_turns():
    calls = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, seconds=0)
    assert "".join(calls) == "abc" * 4  # the first turn is not counted
    assert {name: len(its_times) for name, its_times in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_turns_go_on_for_the_seconds_asked_for():
    assert sum(take_turns({"a": lambda: None}, rounds=1, seconds=0.05)["a"]) <= 0.1
    assert len(take_turns({"a": lambda: None}, rounds=1, seconds=0.05)["a"]) > 100


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat here")
def test_other_programs_are_seen_and_this_one_is_not():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        others, ours = OtherPrograms(), torch.ones(100, 100)
        take_turns({"work": lambda: ours @ ours}, rounds=1, seconds=0.6)
        cores = others.cores()
        other.kill()
    assert cores > 0.2


def test_a_noisy_measurement_is_repeated_and_the_quietest_kept(monkeypatch):
    noise = iter([0.9, 0.3, 0.5])
    monkeypatch.setattr("benchmarks.interleaved._wait_until_quiet", lambda timeout: None)
    monkeypatch.setattr(OtherPrograms, "cores", lambda self: next(noise))
    times, cores = take_quiet_turns({"both ours": lambda: None}, rounds=2, seconds=0)
    assert cores == 0.3 and summarised(times, cores)["noisy"] and next(noise, None) is None


def test_a_row_has_medians_spreads_and_ratios():
    times = {"forward ours": [0.002, 0.001, 0.003], "forward eager": [0.004, 0.004, 0.005]}
    row = summarised(times, 0.04)
    assert row["forward_ms"]["ours"] == {"median": 2.0, "p20": 1.4, "p80": 2.6}
    assert row["ratio"] == {"forward": {"ours": 1.0, "eager": 2.0}}
    assert (row["rounds"], row["others_cores"], row["noisy"]) == (3, 0.04, False)


def test_verdicts_in_words():
    assert report.judged(1.5, 1.5)["verdict"] == "reached"
    assert report.judged(1.13, 1.25)["verdict"] == "short by 0.12"
    assert report.judged(2.999, 3.0)["verdict"] == "short by 0.001"
    assert report.judged(15.0, 15, at_most=True)["verdict"] == "reached"
    assert report.judged(18.2, 15, at_most=True)["verdict"] == "over by 3.2"


def test_every_cell_has_its_targets():
    sizes = {(state, mix, tokens, rank) for state in memory.MALLOC for mix, _, rank, tokens in sandwich.CELLS}
    assert sizes == set(sandwich.TARGETS)


def test_the_floor_is_the_larger_of_bytes_and_arithmetic():
    # float32, 1,000 × 100: a stream is 0.4 MB, the hidden layer of rank 1 is 4 KB, and the small copy is the measure.
    floor = rates.floor_ms(1_000, 100, 1, torch.float32, RATES)
    assert floor == {"forward": pytest.approx(0.804 / 40), "both": pytest.approx(2.008 / 40)}
    # At rank 100 there are 40 and 120 MFLOP.
    floor = rates.floor_ms(1_000, 100, 100, torch.float32, RATES)
    assert floor == {"forward": pytest.approx(0.4), "both": pytest.approx(1.2)}
    # In bfloat16 100,000 × 192 are 38.4 MB, which only the large copy is like.
    floor = rates.floor_ms(100_000, 192, 1, torch.bfloat16, RATES)
    assert floor["forward"] == pytest.approx((2 * 38.4 + 0.4) / 10)


@each_suite
def test_a_tiny_cell_has_every_field(suite):
    row = tiny_row(suite)
    assert (row["mix"], row["dim"], row["rank"], row["tokens"]) == ("float32", 16, 2, 5)
    for part in report.PASSES:
        assert row["floor_ms"][part] > 0 and row["ratio"][part]["eager"] > 0
        for name in ("ours", "eager"):
            spread = row[f"{part}_ms"][name]
            assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
    for name in ("ours", "eager"):
        assert all(0 < error < 1e-5 for error in row["error"][name].values()) and row["page_faults"][name] >= 0
    assert row["GFLOP_per_s"] > 0 and set(row["judged"]) == {"forward over eager"}


@each_suite
@pytest.mark.parametrize("mix", sandwich.MIXES)
def test_every_mix_runs_and_ours_is_no_worse_than_eager(suite, mix):
    problem = sandwich.Problem(suite.OP, mix, 32, 4, 40)
    errors = problem.errors()
    assert errors["ours"]["y"] <= 1.5 * errors["eager"]["y"] + 1e-6
    assert all(a.dtype == b.dtype for a, b in zip(problem.both(suite.OP.ours), problem.inputs, strict=True))


def test_slower_means_by_more_than_chance():
    def row(ours: list[float], eager: list[float]) -> dict:
        return summarised({f"{part} {n}": t for part in report.PASSES for n, t in (("ours", ours), ("eager", eager))})

    assert sandwich.slower_than_eager(row([2.0, 2.1, 2.2], [1.0, 1.1, 1.2])) == ["forward", "both"]
    assert sandwich.slower_than_eager(row([1.0, 2.0, 3.0], [0.9, 1.1, 2.9])) == []  # they overlap
    assert sandwich.slower_than_eager(row([1.02], [1.0])) == []  # by 2 % only


@each_suite
def test_pytest_benchmark_runs_a_part_and_its_file_has_the_row(suite):
    part = program.PARTS["host"]._replace(rounds=3, seconds=0.02)
    (row,), well = program._rows(suite.__file__, part, "", quick=False)
    assert well and row["state"] == "no-fault" and row["rounds"] >= 3
    assert set(row["judged"]) == {"forward (µs)", "both (µs)", "forward over eager", "both over eager"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_peak_memory_is_of_the_work_alone():
    # Something that needs no import of torch in the fresh process: filling 50 MB with one byte.
    assert 49e6 < memory.peak_growth(functools.partial, b"".ljust, 50_000_000, b"x") < 60e6


@pytest.mark.parametrize("options", [[], ["--host"], ["-k", "float32"], ["--quick"]])
def test_only_a_complete_run_is_written(monkeypatch, tmp_path, capsys, options):
    cell = tiny_row(slower=["both"], rates=RATES, state="no-fault")
    monkeypatch.setattr(program, "_rows", lambda *arguments: ([dict(cell)], True))
    monkeypatch.setattr(program, "peak_growth", lambda work, name, *size: {"ours": 2e6, "eager": 1e6}[name])
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_adapter", *options])
    sizes = [("float32", 16, 2, 5)]
    assert program.main("adapter", "", sandwich.peak_memory_work, sizes) == 0
    printed = capsys.readouterr().out
    assert "no-fault float32 5 × 16 r 2" in printed
    if options:
        assert not list(tmp_path.iterdir())
        return
    record = json.loads((tmp_path / "adapter-cpu.json").read_text())
    assert (
        record["command"] == "make bench OP=adapter" and record["cpu_level"] and record["rates"] == {"no-fault": RATES}
    )
    assert record["cells"] == [{key: value for key, value in cell.items() if key != "rates"}]
    assert record["memory"][0]["judged"]["ours (MB)"]["verdict"] == "over by 1"
    written = (tmp_path / "adapter-cpu.md").read_text()
    assert all(line in printed for line in written.splitlines())
    assert "Slower than eager:\n\n- no-fault float32 5 × 16 r 2, forward + backward" in written


def test_a_failed_part_is_not_written(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "_rows", lambda *arguments: ([], False))
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_adapter"])
    assert program.main("adapter", "", sandwich.peak_memory_work, []) == 1
    assert not list(tmp_path.iterdir())


@each_suite
def test_peak_memory_is_measured_in_a_process_of_its_own(suite):
    work = functools.partial(sandwich.peak_memory_work, suite.OP)
    assert memory.peak_growth(work, "ours", "float32", 192, 8, 2_000) > 2 * 4 * 2_000 * 192  # y and the gradient of x


@each_suite
@pytest.mark.parametrize("as_file", [False, True])
def test_help(suite, as_file):
    command = [suite.__file__] if as_file else ["-m", suite.__name__]
    run = subprocess.run([sys.executable, *command, "--help"], cwd=program.ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--quick" in run.stdout and "--grid" in run.stdout
