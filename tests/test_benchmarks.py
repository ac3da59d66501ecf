"""Do the benchmarks measure what they say, in turns, and report it with the right verdicts?"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_adapter,
    bench_arc,
    bench_consolidator,
    consolidator,
    memory,
    problem,
    program,
    rates,
    report,
    sandwich,
)
from benchmarks.interleaved import OtherPrograms, summarised, take_quiet_turns, take_turns

RATES = {
    "gemm_float32_GFLOP_per_s": 100.0,
    "gemm_bfloat16_GFLOP_per_s": 200.0,
    "copy_39MB_GB_per_s": 10.0,
    "copy_5MB_GB_per_s": 40.0,
    "fresh_pages_GB_per_s": 3.0,
}


each_sandwich = pytest.mark.parametrize("suite", [bench_adapter, bench_arc], ids=lambda suite: suite.__name__)
each_suite = pytest.mark.parametrize(
    "suite", [bench_adapter, bench_arc, bench_consolidator], ids=lambda suite: suite.__name__
)


def tiny_row(suite=bench_adapter, **more) -> dict:
    tiny = sandwich.SandwichProblem(suite.OP, "float32", 16, 2, 5)
    _, row = problem.measure(tiny, tiny.works(tiny.functions), rounds=3, seconds=0)
    return row | sandwich.cell_facts(tiny, row, RATES) | more


def tiny_branches(*shuffle: str) -> dict:
    tiny = bench_consolidator.BranchProblem("float32", "tiny", (8, 2), 5, *shuffle)
    functions = tiny.functions | {"masked": consolidator.masked("tiny", (8, 2), not shuffle)}
    _, row = problem.measure(tiny, tiny.works(functions), rounds=3, seconds=0)
    return row | bench_consolidator.cell_facts(tiny, row, RATES)


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
    floor = rates.floor_ms(rates.sandwich(1_000, 100, 1, torch.float32), torch.float32, RATES)
    assert floor == {"forward": pytest.approx(0.804 / 40), "both": pytest.approx(2.008 / 40)}
    # At rank 100 there are 40 and 120 MFLOP.
    floor = rates.floor_ms(rates.sandwich(1_000, 100, 100, torch.float32), torch.float32, RATES)
    assert floor == {"forward": pytest.approx(0.4), "both": pytest.approx(1.2)}
    # In bfloat16 100,000 × 192 are 38.4 MB, which only the large copy is like.
    floor = rates.floor_ms(rates.sandwich(100_000, 192, 1, torch.bfloat16), torch.bfloat16, RATES)
    assert floor["forward"] == pytest.approx((2 * 38.4 + 0.4) / 10)


def test_the_floor_of_branches():
    # bfloat16, 1,000 rows of 100 → 300: x is 0.2 MB, base and y 0.6 MB each.
    cost = rates.consolidator(1_000, 100, 300, (50, 20), torch.bfloat16)
    assert cost.moved == {"forward": 1_400_000, "both": 2_400_000} and cost.stream == 600_000
    assert cost.flops == {"forward": 1_200_000 + 3_000_000, "both": 3 * 4_200_000}
    floor = rates.floor_ms(cost, torch.bfloat16, RATES)
    assert floor == {"forward": pytest.approx(1.4 / 40), "both": pytest.approx(12.6 / 200)}  # bytes, arithmetic
    # Where bfloat16 has no product, it is multiplied in float32.
    slow = RATES | {"gemm_float32_GFLOP_per_s": 0.05}
    del slow["gemm_bfloat16_GFLOP_per_s"]
    assert rates.floor_ms(cost, torch.bfloat16, slow)["forward"] == pytest.approx(4.2 / 0.05)


@each_sandwich
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


def tiny_problem(suite, mix: str) -> problem.Problem:
    if suite is bench_consolidator:
        return bench_consolidator.BranchProblem(mix, "tiny", (8, 2), 40)
    return sandwich.SandwichProblem(suite.OP, mix, 32, 4, 40)


@each_suite
@pytest.mark.parametrize("mix", problem.MIXES)
def test_every_mix_runs_and_ours_is_no_worse_than_the_other(suite, mix):
    tiny = tiny_problem(suite, mix)
    ours, other = tiny.errors().values()
    assert ours["y"] <= 1.5 * other["y"] + 1e-6
    assert all(a.dtype == b.dtype for a, b in zip(tiny.both(tiny.functions["ours"]), tiny.inputs, strict=True))


@pytest.mark.parametrize("shuffle", [(), ("unshuffled",)])
def test_a_tiny_cell_of_branches_has_every_field(shuffle):
    row = tiny_branches(*shuffle)
    assert (row["layer"], row["groups"], row["tokens"], row.get("shuffle", "")) == ("tiny", [8, 2], 5, "".join(shuffle))
    for part in report.PASSES:
        assert row["floor_ms"][part] > 0 and set(row["ratio"][part]) == {"ours", "conv", "masked"}
    assert set(row["error"]) == set(row["page_faults"]) == {"ours", "conv"} and row["judged"] == {}
    assert all(0 < error < 1e-5 for errors in row["error"].values() for error in errors.values())
    table = bench_consolidator.cells_table([row])
    assert f"float32 5 tiny g 8 + 2{' unshuffled' if shuffle else ''} " in table and "conv / ours" in table
    judged = bench_consolidator.cell_facts(
        bench_consolidator.BranchProblem("float32", "tiny", (8,), 5), row | {"layer": "qkv", "groups": [384]}, RATES
    )["judged"]
    assert judged["both over conv"]["target"] == 4


def test_a_dense_product_of_masked_weights_is_the_same_function():
    for shuffle in ((), ("unshuffled",)):
        tiny = bench_consolidator.BranchProblem("float32", "tiny", (8, 2), 5, *shuffle)
        found = tiny.both(consolidator.masked("tiny", (8, 2), not shuffle))
        for a, b in zip(found, tiny.both(tiny.functions["ours"]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mix", problem.MIXES)
def test_a_tiny_layer_is_right_in_every_form(mix):
    tiny = bench_consolidator.LayerProblem(mix, "tiny", (8,), 5)
    works = {name: work for name, work in tiny.works(tiny.all_functions).items() if name.startswith("both")}
    _, row = problem.measure(tiny, works, rounds=3, seconds=0, to="plain")
    row |= tiny.accuracy() | {"judged": bench_consolidator.layer_verdicts(row)}
    errors = row["error"]
    assert list(row["both_ms"]) == ["in-weight", "beside", "plain", "conv"]
    assert list(errors) == ["in-weight", "beside", "conv"]
    assert all(errors[name]["y"] <= 2 * errors["conv"]["y"] + 1e-6 for name in errors)
    assert row["judged"]["auto over the faster way"]["target"] == 1.03
    gradients = tiny.both(tiny.all_functions["plain"])
    assert gradients[0] is not None and set(gradients[1:]) == {None}
    assert row["ratio"]["both"]["plain"] == 1 and "in-weight / plain" in bench_consolidator.layers_table([row])


def test_the_way_that_is_chosen_is_judged():
    ratio = {"both": {"in-weight": 1.5, "beside": 1.2, "plain": 1.0}}
    for auto, verdict in (("beside", "reached"), ("in-weight", "over by 0.22")):
        row = {"ratio": ratio, "auto": auto}
        assert bench_consolidator.layer_verdicts(row)["auto over the faster way"]["verdict"] == verdict


def test_what_is_slower_than_another_form_is_listed():
    times = {"forward ours": [2.0, 2.1], "forward conv": [1.0, 1.1], "both ours": [1.0, 1.1], "both conv": [2.0, 2.1]}
    row = {"mix": "float32", "layer": "qkv", "groups": [12], "tokens": 1_576, **summarised(times)}
    listed = report.slower([row], ["conv", "masked"])
    assert listed == "Slower than conv or masked:\n\n- float32 1,576 qkv g 12, forward: 0.51 of the speed of conv"
    assert report.slower([row], ["masked"]) == "Nothing is slower than masked."


def test_the_cells_of_the_consolidator_have_every_layer_group_and_number_of_branches():
    cells = bench_consolidator.CELLS
    for mix, tokens in ((mix, tokens) for mix in ("float32", "bfloat16") for tokens in (1_576, 12_608)):
        of_mix = {size[1:3] for size in cells if (size[0], size[3]) == (mix, tokens)}
        assert of_mix >= {(layer, (g,)) for layer in ("qkv", "proj", "fc1", "fc2") for g in (384, 96, 12)}
    several = {(layer, len(groups)) for _, layer, groups, *_ in cells}
    assert several == {(layer, branches) for layer in ("qkv", "proj", "fc1", "fc2") for branches in (1, 2, 4)}
    assert len({*cells}) == len(cells)


def test_slower_means_by_more_than_chance():
    def row(ours: list[float], eager: list[float]) -> dict:
        return summarised({f"{part} {n}": t for part in report.PASSES for n, t in (("ours", ours), ("eager", eager))})

    assert report.slower_than(row([2.0, 2.1, 2.2], [1.0, 1.1, 1.2]), "eager") == ["forward", "both"]
    assert report.slower_than(row([1.0, 2.0, 3.0], [0.9, 1.1, 2.9]), "eager") == []  # they overlap
    assert report.slower_than(row([1.02], [1.0]), "eager") == []  # by 2 % only
    assert report.slower_than(row([2.0], [1.0]), "masked") == []  # it was not measured


@each_suite
def test_pytest_benchmark_runs_a_part_and_its_file_has_the_row(suite, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would switch itself off
    part = program.PARTS["host"]._replace(rounds=3, seconds=0.02)
    (row,), well = program._rows(suite.__file__, part, "", quick=False)
    assert well and row["state"] == "no-fault" and row["rounds"] >= 3
    assert well and set(row["judged"]) >= {"forward (µs)", "both (µs)"}
    assert [name.removeprefix("both over ") for name in row["judged"]][-1] in row["ratio"]["both"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_peak_memory_is_of_the_work_alone():
    # Something that needs no import of torch in the fresh process: filling 50 MB with one byte.
    assert 49e6 < memory.peak_growth(functools.partial, b"".ljust, 50_000_000, b"x") < 60e6


@pytest.mark.parametrize("options", [[], ["--host"], ["-k", "float32"], ["--quick"]])
def test_only_a_complete_run_is_written(monkeypatch, tmp_path, capsys, options):
    cell = tiny_row(slower=["both"], rates=RATES, state="no-fault")
    monkeypatch.setattr(program, "_rows", lambda *arguments: ([dict(cell)], True))
    monkeypatch.setattr(program, "peak_growth", lambda work, name, size: {"ours": 2e6, "eager": 1e6}[name])
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_adapter", *options])
    sizes = [{"mix": "float32", "dim": 16, "rank": 2, "tokens": 5}]
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


# 37 MB for each of y and the gradient of x: above malloc's 32, so that both are new pages.
TOKENS, DIM = 12_000, 768


def grown_by_ours(work: Callable, **size: Any) -> float:
    """In tensors like y and the gradient of x."""
    return memory.peak_growth(work, "ours", {"mix": "float32", "tokens": TOKENS, **size}) / (4 * TOKENS * DIM)


@each_sandwich
def test_peak_memory_is_measured_in_a_process_of_its_own(suite):
    work = functools.partial(sandwich.peak_memory_work, suite.OP)
    assert 2 < grown_by_ours(work, dim=DIM, rank=8) < 2.1


def test_peak_memory_of_branches():
    assert 2 < grown_by_ours(bench_consolidator.peak_memory_work, layer="proj", groups=(384,)) < 2.1


@each_suite
@pytest.mark.parametrize("as_file", [False, True])
def test_help(suite, as_file):
    command = [suite.__file__] if as_file else ["-m", suite.__name__]
    run = subprocess.run([sys.executable, *command, "--help"], cwd=program.ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--quick" in run.stdout and "--cells" in run.stdout
