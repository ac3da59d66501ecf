"""Is a suite run with one command? All tasks, both means, missing and damaged ones, a kill between tasks, and again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import layouts
from vitadapter_ext import cli
from vitadapter_ext.data import catalog, minitab
from vitadapter_ext.train import suite as suite_module
from vitadapter_ext.train.__main__ import main
from vitadapter_ext.train.loop import Trainer
from vitadapter_ext.train.suite import Results, run_suite

TRAIN = [sys.executable, "-m", "vitadapter_ext.train"]
QUICK = {"model": "test_vit", "epochs": 1, "batch_size": 16, "rank": 2}
QUICK_FLAGS = ["--model", "test_vit", "--epochs", "1", "--batch-size", "16", "--rank", "2"]
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def domainnet(root: Path, domains=DOMAINS) -> Path:
    root.mkdir(exist_ok=True)
    for domain in domains:
        layouts.write_domainnet(root, domain, {3: "cat", 17: "dog"}, train=14, test=6)
    return root


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_suite_runs_all_tasks_and_writes_one_table(tmp_path, capsys):
    results = run_suite("domainnet", data=domainnet(tmp_path / "data"), out=tmp_path / "out", **QUICK)
    assert list(results.found) == list(DOMAINS) and not results.missing and not results.failed
    accuracies = [results.found[domain]["test_accuracy"] for domain in DOMAINS]
    assert results.means()["tasks"] == pytest.approx(sum(accuracies) / 6)
    table = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {domain} " in table for domain in DOMAINS)
    assert f"**{100 * results.means()['tasks']:.2f}**" in table and "mean over 6 tasks" in table
    assert table.split("\n\n", 1)[1] in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean_over_tasks"] == results.means()["tasks"] == summary["mean_over_groups"]
    for domain in DOMAINS:
        run = json.loads((tmp_path / "out" / domain / "summary.json").read_text())
        assert run["data"] == f"domainnet/{domain}" and run["test_accuracy"] == summary["test_accuracy"][domain]
        assert "linear_probe_accuracy" not in run


def test_both_means_by_hand():
    groups = {"a": "natural", "b": "natural", "c": "structured", "d": "specialized"}
    found = {"a": 0.9, "b": 0.7, "c": 0.3}
    shared = {"best_epoch": 3, "parameters": {"trainable": 1234}, "adapter_file_bytes": 5600, "train_seconds": 1.25}
    results = Results("vtab1k", "arc", groups, {task: {"test_accuracy": x, **shared} for task, x in found.items()})
    assert results.group_means() == pytest.approx({"natural": 0.8, "structured": 0.3})
    assert results.means() == pytest.approx({"tasks": 1.9 / 3, "groups": 0.55})
    results.missing["d"] = "no folder"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.table().splitlines()]
    assert rows[2] == ["natural", "a", "90.00", "", "3", "1,234", "5.6", "1.2"]
    assert rows[5] == ["specialized", "d", "missing", "", "", "", "", ""]
    means = {row[0]: row[2] for row in rows[6:]}
    assert means == {
        "natural, mean of 2": "80.00",
        "structured, mean of 1": "30.00",
        "**mean over 3 of 4 tasks**": "**63.33**",
        "**mean over 2 of 3 groups**": "**55.00**",
    }
    assert len({len(line) for line in results.table().splitlines()}) == 1


def test_missing_tasks_are_named_and_the_others_run(tmp_path, capsys):
    root = domainnet(tmp_path / "data", ("clipart", "real"))
    results = run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    assert list(results.found) == ["clipart", "real"]
    assert set(results.missing) == {"infograph", "painting", "quickdraw", "sketch"}
    out = capsys.readouterr().out
    assert "mean over 2 of 6 tasks" in out and "missing: sketch: " in out
    with pytest.raises(ValueError, match=r"has a result \(6 missing, 0 failed\): \S+results.md has"):
        run_suite("domainnet", data=tmp_path, out=tmp_path / "none", **QUICK)
    assert (tmp_path / "none" / "results.md").read_text().count("\nmissing: ") == 6


def test_a_damaged_task_fails_alone_and_can_be_mended(tmp_path):
    root = domainnet(tmp_path / "data")
    good = (root / "real_test.txt").read_text()
    (root / "real_test.txt").write_text(good + "real/cat/nowhere.jpg 3\n")
    with pytest.raises(ValueError, match="real of domainnet failed; the same command tries again"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "nowhere.jpg does not exist" in table and "mean over 5 of 6 tasks" in table
    (root / "real_test.txt").write_text(good)
    before = tree(tmp_path / "out" / "sketch")
    results = run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    assert len(results.found) == 6 and not results.failed
    assert tree(tmp_path / "out" / "sketch") == before


def test_a_task_that_diverges_is_the_only_one_to_fail(tmp_path, monkeypatch):
    fit = suite_module.fit

    def diverge(config, data, brief):
        return fit(suite_module.replace(config, lr=1e30) if config.dataset.endswith("real") else config, data, brief)

    monkeypatch.setattr(suite_module, "fit", diverge)
    with pytest.raises(ValueError, match="real of domainnet failed"):
        run_suite("domainnet", data=domainnet(tmp_path / "data"), out=tmp_path / "out", **QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["failed"]) == ["real"] and "loss became nan" in summary["failed"]["real"]
    assert set(summary["test_accuracy"]) == {*DOMAINS} - {"real"}


def test_settings_that_cannot_be_used_stop_the_suite_at_once(tmp_path):
    root = domainnet(tmp_path / "data")
    for settings, problem in (
        ({"model": "test_vti"}, "unknown model 'test_vti'"),
        ({"model": "test_vit", "method": "consolidator", "groups": 7}, "7 groups do not fit"),
    ):
        with pytest.raises(ValueError, match=problem):
            run_suite("domainnet", data=root, out=tmp_path / "out", epochs=1, **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        run_suite("domainnet", data=root, out=tmp_path / "none", epochs=0)
    assert not (tmp_path / "none").exists()


def test_a_killed_suite_goes_on_with_the_next_task(tmp_path):
    root = domainnet(tmp_path / "data")
    argv = [*TRAIN, "--suite", "domainnet", "--data", str(root), *QUICK_FLAGS]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    out = tmp_path / "runs" / "domainnet-adapter"
    deadline = time.monotonic() + 300
    while not (out / "painting" / "config.yaml").is_file():  # in the middle of the third
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = [domain for domain in DOMAINS if suite_module._finished(out / domain)]
    assert done[:2] == ["clipart", "infograph"] and len(done) < 6
    before = {domain: tree(out / domain) for domain in done}
    again = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all(f"found in runs/domainnet-adapter/{domain}/" in again.stdout for domain in done)
    assert "mean over 6 tasks" in again.stdout
    assert {domain: tree(out / domain) for domain in done} == before
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["test_accuracy"]) == list(DOMAINS)


def test_ctrl_c_leaves_the_table_so_far(tmp_path, monkeypatch):
    fit = suite_module.fit

    def stop(config, data, brief):
        if config.dataset == "domainnet/painting":
            raise KeyboardInterrupt
        return fit(config, data, brief)

    monkeypatch.setattr(suite_module, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        run_suite("domainnet", data=domainnet(tmp_path / "data"), out=tmp_path / "out", **QUICK)
    table = (tmp_path / "out" / "results.md").read_text()
    assert "mean over 2 of 6 tasks" in table and table.count(" to do |") == 4


def test_its_folder_is_its_own(tmp_path):
    root = domainnet(tmp_path / "data")
    run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match=r"has results of other settings \(lr 0.001 there, 0.01 here\)"):
        run_suite("domainnet", data=root, out=tmp_path / "out", lr=0.01, **QUICK)
    with pytest.raises(ValueError, match="rank 2 there, 4 here"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **{**QUICK, "rank": 4})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no suite"):
        run_suite("domainnet", data=root, out=tmp_path / "other", **QUICK)
    assert (tmp_path / "other" / "letter.txt").read_text() == "mine"
    config = suite_module.configure(dataset="domainnet/real", data=root, **QUICK)
    with (
        suite_module._held(tmp_path / "held", "domainnet", config),
        pytest.raises(ValueError, match="another process is running the suite"),
        suite_module._held(tmp_path / "held", "domainnet", config),
    ):
        pass


def test_its_settings_run_again_as_they_are(tmp_path, capsys):
    root = domainnet(tmp_path / "data", ("real",))
    first = run_suite("domainnet", data=root, out=tmp_path / "first", method="arc", **QUICK)
    settings = tmp_path / "first" / "suite.yaml"
    assert yaml.safe_load(settings.read_text())["suite"] == "domainnet"
    assert cli.run(main, ["--config", str(settings), "--out", str(tmp_path / "second")]) == 0
    files = [(tmp_path / name / "real" / "adapter.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert (tmp_path / "second" / "suite.yaml").read_text() == settings.read_text()
    assert first.method == "arc"


def test_vtab_tasks_follow_its_protocol(tmp_path, capsys):
    root = layouts.write_vtab1k_task(tmp_path / "data", "svhn", 10)
    layouts.write_vtab1k_task(root, "diabetic_retinopathy", 5)
    results = run_suite("vtab1k", data=root, out=tmp_path / "out", **QUICK)
    assert list(results.found) == ["svhn", "retinopathy"] and len(results.missing) == 17
    for task, summary in results.found.items():
        assert summary["retrained"] and summary["data"] == f"vtab1k/{task}"
    config = yaml.safe_load((tmp_path / "out" / "svhn" / "config.yaml").read_text())
    assert (config["retrain"], config["augmentation"], config["squash"]) == (True, "none", True)
    out = capsys.readouterr().out
    assert "mean over 2 of 19 tasks" in out and "mean over 2 of 3 groups" in out


def test_every_suite_has_its_tasks():
    counts = {name: len(suite.groups) for name, suite in catalog.SUITES.items()}
    assert counts == {"vtab1k": 19, "fgvc": 5, "domainnet": 6, "minitab": 8}
    groups = list(catalog.SUITES["vtab1k"].groups.values())
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]


BAD = {
    "--suite vtab": "unknown suite 'vtab': did you mean 'vtab1k'?",
    "--suite vtab1k": "--dataset vtab1k/caltech101 needs --data",
    "--suite minitab --data .": "is in the package and takes no --data",
    "--suite minitab --dataset digits": "--suite and --dataset exclude each other",
    "--suite minitab --show": "--show draws one run",
    "--suite minitab --rnk 3": "did you mean --rank?",
    "--suite minitab --method arc --placement post": "--placement is an option of the method adapter, not of arc",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_sentence(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, argv.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[argv] in err
    assert not list(tmp_path.iterdir())


def test_minitab_with_arc_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, ["--suite", "minitab", "--method", "arc", "--epochs", "1"]) == 0
    summary = json.loads((tmp_path / "runs" / "minitab-arc" / "summary.json").read_text())
    groups = catalog.SUITES["minitab"].groups
    assert list(summary["test_accuracy"]) == list(groups) == list(minitab.TASKS)
    assert all(minitab.TASKS[task].group == group for task, group in groups.items())
    assert not summary["missing"] and not summary["failed"]
    out = capsys.readouterr().out
    for name in ("tasks", "groups"):
        assert f"**{100 * summary[f'mean_over_{name}']:.2f}**" in out
    assert "mean over 8 tasks" in out and "mean over 3 groups" in out
    assert out.count("arc, train and val together, epoch 1\n") == 8
    assert json.loads((tmp_path / "runs/minitab-arc/scans/summary.json").read_text())["test_accuracy"] > 1.5 / 26


def test_what_no_run_wrote_is_not_removed(tmp_path):
    root = domainnet(tmp_path / "data", ("clipart", "real"))
    for task, make in (("clipart", Path.mkdir), ("real", Path.touch)):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "suite.yaml").touch()
        make(tmp_path / "out" / task)
    (tmp_path / "out" / "clipart" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no task of domainnet has a result"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "holds notes.txt, which is of no run" in summary["failed"]["clipart"]
    assert "is no folder of a run" in summary["failed"]["real"]
    assert (tmp_path / "out" / "clipart" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["[]", "{", '{"status": "finished"}', '{"status": "failed"}'])
def test_a_damaged_summary_is_made_again(tmp_path, text):
    root = domainnet(tmp_path / "data", ("real",))
    run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    (tmp_path / "out" / "real" / "summary.json").write_text(text)
    (tmp_path / "out" / "real" / ".vitadapter-0123").touch()  # of a killed process
    assert list(run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK).found) == ["real"]


@pytest.mark.parametrize("text", ["{", "[]", "suite: domainnet"])
def test_a_damaged_suite_file_is_one_sentence(tmp_path, text):
    root = domainnet(tmp_path / "data", ("real",))
    run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    (tmp_path / "out" / "suite.yaml").write_text(text)
    with pytest.raises(ValueError, match="its suite.yaml is damaged"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)


def test_a_lock_left_behind_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    root = domainnet(tmp_path / "data", ("real",))
    assert list(run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK).found) == ["real"]


def test_the_table_keeps_what_was_found_before(tmp_path, monkeypatch):
    root = domainnet(tmp_path / "data", ("clipart", "real"))
    (root / "clipart_test.txt").write_text("nowhere.jpg 3\n")
    with pytest.raises(ValueError, match="clipart of domainnet failed"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)

    def stop(config):
        if config.dataset == "domainnet/infograph":
            raise KeyboardInterrupt
        return read_data(config)

    read_data = suite_module.read_data
    monkeypatch.setattr(suite_module, "read_data", stop)
    with pytest.raises(KeyboardInterrupt):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["test_accuracy"]) == ["real"]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_error_in_the_training_of_one_task_fails_it_alone(tmp_path, monkeypatch, kind):
    step = Trainer._train_step

    def fail(trainer, batches, *more):
        if trainer.config.dataset == "domainnet/clipart":
            raise kind("a worker is killed")
        return step(trainer, batches, *more)

    monkeypatch.setattr(Trainer, "_train_step", fail)
    root = domainnet(tmp_path / "data", ("clipart", "real"))
    with pytest.raises(ValueError, match="clipart of domainnet failed"):
        run_suite("domainnet", data=root, out=tmp_path / "out", **QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] == {"clipart": "a worker is killed"} and list(summary["test_accuracy"]) == ["real"]
    assert (tmp_path / "out" / "clipart" / "adapter.safetensors").is_file()


def test_a_root_that_is_not_there_is_said_once(tmp_path):
    with pytest.raises(ValueError, match="^the data folder .*nowhere does not exist$"):
        run_suite("domainnet", data=tmp_path / "nowhere", out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
