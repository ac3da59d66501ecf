"""Which training does a run end with? The grid, the choice on val, and one more training on train and val together."""

import csv
import json

import pytest
from torch.utils.data import IterableDataset

import vitadapter_ext as va
from tests.pictures import red_and_blue
from vitadapter_ext.train import Config, configure, fit
from vitadapter_ext.train import loop as loop_module
from vitadapter_ext.train import report as report_module
from vitadapter_ext.train import study as study_module
from vitadapter_ext.train.loop import Trainer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"), 20)  # 28 train, 6 val and 6 test


def run(pictures, out, **given):
    settings = {"model": "test_vit", "data": str(pictures), "out": str(out), "epochs": 3, "batch_size": 8, "lr": 0.01}
    return fit(configure(**{**settings, **given}))


def rows_of(folder) -> list[dict]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture
def trainers(monkeypatch):
    """Every `Trainer` that a run makes, in order, with the labels' order of its loaders' data sets."""
    made = []

    class Noted(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(study_module, "Trainer", Noted)
    return made


def test_the_grid_is_every_combination_and_the_best_on_val_is_kept(pictures, tmp_path, trainers):
    result = run(pictures, tmp_path / "run", grid={"lr": [1e-9, 0.01], "rank": [2, 4]})
    assert [(t.config.lr, t.config.method.rank) for t in trainers] == [(1e-9, 2), (1e-9, 4), (0.01, 2), (0.01, 4)]
    trials = result.summary["trials"]
    assert [trial["settings"] for trial in trials] == [
        {"lr": t.config.lr, "rank": t.config.method.rank} for t in trainers
    ]
    assert all(trial["status"] == "finished" for trial in trials)
    best = max(trial["val_accuracy"] for trial in trials)
    assert result.summary["val_accuracy"] == best and best > min(trial["val_accuracy"] for trial in trials)
    assert result.summary["settings"]["lr"] == 0.01
    assert [int(row["training"]) for row in rows_of(result.folder)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    adapters = [module for module in result.model.modules() if isinstance(module, va.FusedAdapter)]
    assert {len(adapter.down.weight) for adapter in adapters} == {result.summary["settings"]["rank"]}


def test_trainings_of_a_grid_are_the_runs_of_their_settings(pictures, tmp_path):
    together = run(pictures, tmp_path / "grid", grid={"lr": [0.003, 0.01]})
    for number, lr in enumerate((0.003, 0.01), 1):
        alone = run(pictures, tmp_path / f"alone-{number}", lr=lr)
        mine = [row for row in rows_of(together.folder) if int(row["training"]) == number]
        for row, other in zip(mine, rows_of(alone.folder), strict=True):
            assert {**row, "seconds": 0, "training": 0} == {**other, "seconds": 0, "training": 0}
        if together.summary["settings"] == {"lr": lr}:
            bytes_of = lambda result: (result.folder / "adapter.safetensors").read_bytes()  # noqa: E731
            assert bytes_of(together) == bytes_of(alone)


def test_retraining_sees_train_and_val_for_the_chosen_epochs(pictures, tmp_path, trainers, capsys):
    result = run(pictures, tmp_path / "run", retrain=True, epochs=5)
    first, again = trainers
    assert (len(first.train.dataset), len(again.train.dataset)) == (28, 34) and again.val is None
    chosen = first.best.epoch
    assert again.epoch == chosen == result.summary["best_epoch"] and result.summary["retrained"]
    assert result.summary["val_accuracy"] == first.best.val_accuracy
    # Its schedule is the whole one, cut after the chosen epoch.
    rates = [float(row["lr"]) for row in rows_of(result.folder) if row["training"] == "2"]
    assert len(rates) == chosen
    assert rates[0] == pytest.approx(0.01 * (len(again.train) - 0.5) / (2.5 * len(again.train)))
    assert all(row["val_accuracy"] == "" for row in rows_of(result.folder) if row["training"] == "2")
    out = capsys.readouterr().out
    assert "val chooses the epoch in 1 training, then one training on all 34 images of train and val" in out
    assert f"adapter, train and val together, epoch {chosen}\n" in out
    assert result.model is again.model and (result.folder / "curves.png").is_file()


def test_the_grid_is_chosen_before_retraining(pictures, tmp_path, trainers):
    result = run(pictures, tmp_path / "run", retrain=True, grid={"lr": [1e-9, 0.01]})
    assert [t.config.lr for t in trainers] == [1e-9, 0.01, 0.01]
    assert trainers[-1].val is None and result.summary["settings"] == {"lr": 0.01}
    assert len(result.summary["trials"]) == 2


def test_one_setting_and_the_last_epoch_leave_nothing_to_choose(pictures, tmp_path, trainers):
    result = run(pictures, tmp_path / "run", retrain=True, select="last")
    (only,) = trainers
    assert len(only.train.dataset) == 34 and only.epoch == 3
    assert "val_accuracy" not in result.summary and "test_accuracy" in result.summary
    assert result.summary["best_epoch"] == 3


def test_the_last_epoch_counts_where_it_is_asked_for(pictures, tmp_path, trainers):
    result = run(pictures, tmp_path / "run", select="last", epochs=4)
    assert result.summary["best_epoch"] == 4
    assert result.summary["val_accuracy"] == float(rows_of(result.folder)[-1]["val_accuracy"])


def test_mimi_retrains_the_phases_that_there_were(pictures, tmp_path, trainers):
    result = run(pictures, tmp_path / "run", method="mimi", start_rank=8, phases=2, epochs=6, patience=1, retrain=True)
    first, again = trainers
    assert again.finished == [first.finished[0], first.best.epoch - first.finished[0]]
    assert sum(again.widths[-1].values()) == sum(first.widths[-1].values())
    assert result.summary["widths"] == again.widths


def test_a_training_that_diverges_is_passed_over(pictures, tmp_path, trainers, capsys):
    result = run(pictures, tmp_path / "run", grid={"lr": [1e30, 0.01]})
    assert "passed over: the loss became nan in epoch 1\n" in capsys.readouterr().out
    assert [trial["status"] for trial in result.summary["trials"]] == ["diverged", "finished"]
    assert result.summary["status"] == "finished" and result.summary["settings"] == {"lr": 0.01}
    with pytest.raises(ValueError, match="the loss became"):
        run(pictures, tmp_path / "all", grid={"lr": [1e30, 1e31]})
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("stopped", [2, 3])  # the second of the grid; the one on all images
def test_an_interrupted_study_keeps_the_best_that_has_finished(pictures, tmp_path, monkeypatch, stopped):
    step = report_module.Progress.step

    def interrupt(progress):
        step(progress)
        if progress.number == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(report_module.Progress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, tmp_path / "run", grid={"lr": [0.01, 1e-9]}, retrain=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["settings"] == {"lr": 0.01} and not summary["retrained"]
    assert (tmp_path / "run" / "adapter.safetensors").stat().st_size == summary["adapter_file_bytes"]
    assert "test_accuracy" not in summary


def test_the_test_images_are_looked_at_once(pictures, tmp_path, monkeypatch):
    looks = []
    evaluate = loop_module.evaluate

    def counting(model, loader, *more):
        looks.append(loader.dataset.dataset.samples)
        return evaluate(model, loader, *more)

    monkeypatch.setattr("vitadapter_ext.train.pipeline.evaluate", counting)
    monkeypatch.setattr(loop_module, "evaluate", counting)
    run(pictures, tmp_path / "run", grid={"lr": [0.003, 0.01]}, retrain=True)
    from vitadapter_ext.data.folder import read_folder

    test = read_folder(pictures).test.samples
    assert sum(samples == test for samples in looks) == 1 and len(looks) == 2 * 3 + 1


def test_losers_free_their_memory(pictures, tmp_path, monkeypatch):
    studies = []

    class Noted(study_module.Study):
        def __init__(self, *arguments):
            studies.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr("vitadapter_ext.train.pipeline.Study", Noted)
    run(pictures, tmp_path / "run", grid={"lr": [1e-9, 0.01, 1e-8]}, retrain=True)
    kept = [trial.model is not None for trial in studies[0].trials]
    assert kept == [False, True, False, True]


GRIDS = {
    "lr": "takes settings and their values, such as 'lr=1e-3,1e-2 rank=4,8'",
    "lr=": "takes settings and their values",
    "lr=1e-3,": "--lr takes a number, got ''",
    "lr=0": "--lr must be a positive number, got 0",
    "rnk=1,2": "unknown setting of --grid 'rnk': did you mean 'rank'?",
    "groups=64,32": "unknown setting of --grid 'groups'",
    "seed=1,2": "unknown setting of --grid 'seed'",
    "model=test_vit,test_vit2": "unknown setting of --grid 'model'",
    "rank=2,0": "rank is 0",
    "rank=2,3 rank=4": "--grid has a setting twice",
    "drop-path=0,0.1 drop_path=0.2": "--grid has a setting twice",
    "placement=post,pots": "did you mean 'post'?",
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_that_cannot_be(grid):
    with pytest.raises(ValueError) as error:
        configure(grid=grid)
    assert GRIDS[grid] in str(error.value)


def test_later_trainings_are_checked_before_the_first(pictures, tmp_path):
    for grid, problem in (
        ({"groups": [[8], [7]]}, "7 groups do not fit"),
        ({"auto_augment": [None, "rand-q9"]}, "--auto-augment takes a policy such as"),
        ({"optimizer": ["adamw", "adamx"]}, "unknown optimizer 'adamx'"),
    ):
        with pytest.raises(ValueError, match=problem):
            run(pictures, tmp_path / "run", method="consolidator", groups=(8,), grid=grid)
        assert not (tmp_path / "run").exists()


def test_a_grid_survives_its_yaml():
    config = configure(grid="lr=1e-3,1e-2 drop-path=0,0.2", retrain=True)
    assert config.grid == {"lr": [1e-3, 1e-2], "drop_path": [0.0, 0.2]}
    assert Config.from_yaml(config.to_yaml()) == config
    assert [settings for settings, _ in config.trials()][1] == {"lr": 1e-3, "drop_path": 0.2}
    assert len(config.trials()) == 4 and configure().trials() == [({}, configure())]


def test_streams_are_neither_joined_nor_dealt_anew(pictures, tmp_path, monkeypatch):
    from vitadapter_ext.data.folder import read_folder

    class Stream(IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __iter__(self):
            return (self.rows[index] for index in range(len(self.rows)))

    data = read_folder(pictures)
    data.train, data.val = Stream(data.train), Stream(data.val)
    settings = {"model": "test_vit", "data": str(pictures), "out": str(tmp_path / "run"), "epochs": 1, "batch_size": 8}
    for given, problem in (({"retrain": True}, "is a stream"), ({"grid": "batch-size=4,8"}, "read for one size")):
        with pytest.raises(ValueError, match=problem):
            fit(configure(**settings, **given), data)
        assert not (tmp_path / "run").exists()
    summary = fit(configure(**settings), data).summary
    assert summary["status"] == "finished"
