"""How is a whole suite of tasks run? One run a task, in one folder; the same command again goes on where it stopped.

SUITE-METHOD/suite.yaml     the settings of all its runs, for --config
SUITE-METHOD/TASK/          the run of a task, as any run leaves it
SUITE-METHOD/results.md     the table, with both means: over the tasks, and over the groups' means
SUITE-METHOD/summary.json   the same numbers
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from .._atomic import write_atomically
from .._text import unknown
from ..cli import sentence
from ..data.catalog import SUITES
from ..data.samples import MissingDataError, existing_folder
from . import report
from .config import Config, configure
from .data import read_data
from .pipeline import fit
from .run_folder import clear

# Of a run's summary, what the table needs.
_KEYS = {"test_accuracy", "best_epoch", "parameters", "adapter_file_bytes", "train_seconds"}


@dataclass
class Results:
    """What is known of a suite so far.

    Attributes:
        groups: the group of each task, in the suite's order.
        found: the summary of each finished task.
        missing, failed: why a task was not run, or came to no result.
    """

    suite: str
    method: str
    groups: dict[str, str]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def group_means(self) -> dict[str, float]:
        """The mean test accuracy (0 to 1) of each group that has a finished task."""
        groups: dict[str, list[float]] = {}
        for task, group in self.groups.items():
            if task in self.found:
                groups.setdefault(group, []).append(self.found[task]["test_accuracy"])
        return {group: fmean(accuracies) for group, accuracies in groups.items()}

    def means(self) -> dict[str, float]:
        """Mean test accuracies (0 to 1): "tasks", and "groups", the mean of the groups' means."""
        if not self.found:
            return {}
        return {
            "tasks": fmean(summary["test_accuracy"] for summary in self.found.values()),
            "groups": fmean(self.group_means().values()),
        }

    def table(self) -> str:
        """The Markdown table, accuracies in percent."""
        rows = [("group", "task", "test (%)", "val (%)", "epoch", "trained", "file (KB)", "seconds")]
        for task, group in self.groups.items():
            rows.append((group, task, *self._cells(task)))
        blank = ("",) * 5
        for group, mean in self.group_means().items():
            count = self._count([task for task, of in self.groups.items() if of == group])
            rows.append((f"{group}, mean of {count}", "", f"{100 * mean:.2f}", *blank))
        if means := self.means():
            rows.append(
                (f"**mean over {self._count(self.groups)} tasks**", "", f"**{100 * means['tasks']:.2f}**", *blank)
            )
            groups, done = len(set(self.groups.values())), len(self.group_means())
            if groups > 1:
                what = f"**mean over {done}{f' of {groups}' if done < groups else ''} groups**"
                rows.append((what, "", f"**{100 * means['groups']:.2f}**", *blank))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        rule = "|".join(
            ["", "-" * (widths[0] + 2), "-" * (widths[1] + 2), *("-" * (w + 1) + ":" for w in widths[2:]), ""]
        )
        return "\n".join([lines[0], rule, *lines[1:]]) + "\n"

    def notes(self) -> list[str]:
        """Sentences on the tasks that have no result."""
        missing = [f"missing: {task}: {why}" for task, why in self.missing.items()]
        return missing + [f"failed: {task}: {why}" for task, why in self.failed.items()]

    def _cells(self, task: str) -> tuple[str, ...]:
        if task not in self.found:
            state = "missing" if task in self.missing else "failed" if task in self.failed else "to do"
            return (state, *("",) * 5)
        summary = self.found[task]
        val = summary.get("val_accuracy")
        return (
            f"{100 * summary['test_accuracy']:.2f}",
            "" if val is None else f"{100 * val:.2f}",
            str(summary["best_epoch"]),
            f"{summary['parameters']['trainable']:,}",
            f"{summary['adapter_file_bytes'] / 1000:,.1f}",
            f"{summary['train_seconds']:.1f}",
        )

    def _count(self, tasks: Iterable[str]) -> str:
        tasks = list(tasks)
        done = sum(task in self.found for task in tasks)
        return str(done) if done == len(tasks) else f"{done} of {len(tasks)}"


def run_suite(suite: str, *, out: str | os.PathLike | None = None, **given: Any) -> Results:
    """Runs every task of a suite that has no result yet, and writes one table.

    Args:
        out: its folder, by default `runs/SUITE-METHOD`; one that holds a part of the same suite with the same settings
            is gone on with.
        given: as for `configure`; `baselines` are off unless asked for.
    Raises:
        ValueError: for settings that cannot be used; for a folder of another suite or other settings; at the end, where
            a task failed or none is there.
        OSError: for what cannot be read or written.
    """
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    if given.get("dataset") is not None:
        raise ValueError("--suite and --dataset exclude each other: a suite names its own data sets")
    if given.get("data") is not None:
        existing_folder(given["data"])
    if out == "":
        raise ValueError("--out must be a name, not an empty word")
    given = {"baselines": False, **given}
    groups = SUITES[suite].groups
    configs = {task: configure(**{**given, "dataset": f"{suite}/{task}", "out": None}) for task in groups}
    results = Results(suite, next(iter(configs.values())).method.name, groups)
    folder = Path(out) if out is not None else Path("runs") / f"{suite}-{results.method}"
    with _held(folder, suite, next(iter(configs.values()))):
        results.found = {task: summary for task in groups if (summary := _finished(folder / task))}
        for number, (task, config) in enumerate(configs.items(), 1):
            report.task(number, len(configs), f"{suite}/{task}", groups[task])
            _run_task(results, task, config, folder / task)
            _write(results, folder)
    report.suite(results.table(), results.notes(), folder)
    if not results.found:
        why = f"{len(results.missing)} missing, {len(results.failed)} failed"
        raise ValueError(f"no task of {suite} has a result ({why}): {folder / 'results.md'} has the reasons")
    if results.failed:
        raise ValueError(f"{', '.join(results.failed)} of {suite} failed; the same command tries again")
    return results


def _run_task(results: Results, task: str, config: Config, folder: Path) -> None:
    """Fills in one task: with the result that its folder has, or else with one more run."""
    if task in results.found:
        report.done_before(results.found[task], folder)
        return
    try:
        clear(folder)
        report.reading(config)
        data = read_data(config)
    except MissingDataError as error:
        results.missing[task] = report.skipped(sentence(error))
        return
    except (ValueError, OSError) as error:
        results.failed[task] = report.skipped(sentence(error))
        return
    try:
        results.found[task] = fit(replace(config, out=str(folder)), data, brief=True).summary
    except (ValueError, OSError, RuntimeError) as error:
        if not (folder / "summary.json").is_file():
            raise  # nothing was trained: the settings are at fault, and every task would say so
        results.failed[task] = report.skipped(sentence(error))


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that came to its end."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(summary, dict) and summary.get("status") == "finished" and summary.keys() >= _KEYS
    return summary if whole else None


def _settings(suite: str, config: Config) -> str:
    """What all runs of the suite share, as YAML."""
    shared = {
        name: setting for name, setting in yaml.safe_load(config.to_yaml()).items() if name not in ("dataset", "out")
    }
    return yaml.safe_dump({"suite": suite, **shared}, sort_keys=False)


@contextlib.contextmanager
def _held(folder: Path, suite: str, config: Config) -> Iterator[None]:
    """The folder, made or found with these settings, for this process alone; gone again where it stays empty."""
    settings, path, lock = _settings(suite, config), folder / "suite.yaml", folder / ".lock"
    if folder.exists() and not path.is_file() and (not folder.is_dir() or _visible(folder)):
        raise ValueError(f"the output folder {folder} exists and holds no suite: name a new one with --out")
    if any(folder.glob("*/summary.json")) and (differing := _differing(path.read_text(), settings)):
        raise ValueError(f"{folder} has results of other settings ({differing}): name a new folder with --out")
    made = [each for each in (*reversed(folder.parents), folder) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is running the suite in {folder}") from error
        try:
            write_atomically(path, settings.encode())
            yield
        finally:
            if not set(_visible(folder)) - {path}:
                path.unlink(missing_ok=True)
                lock.unlink()
                for each in reversed(made):
                    if not any(each.iterdir()):
                        each.rmdir()


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock and what a killed process may have left of a file."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _differing(there: str, here: str) -> str:
    """The settings in which two suite.yaml differ, in words; empty where they are the same."""
    try:
        before, now = (yaml.safe_load(text) for text in (there, here))
    except yaml.YAMLError:
        return "its suite.yaml is damaged"
    if not isinstance(before, dict) or not isinstance(before.get("method"), dict):
        return "its suite.yaml is damaged"
    for settings in (before, now):
        method = settings.pop("method")
        settings |= {**method, "method": method.get("name")}
    return ", ".join(
        f"{name} {before.get(name)} there, {now.get(name)} here"
        for name in {**before, **now}
        if name != "name" and before.get(name) != now.get(name)
    )


def _write(results: Results, folder: Path) -> None:
    heading = f"# {results.suite}, {results.method}\n\n"
    notes = "".join(f"\n{note}\n" for note in results.notes())
    write_atomically(folder / "results.md", (heading + results.table() + notes).encode())
    summary = {
        "suite": results.suite,
        "method": results.method,
        "test_accuracy": {task: found["test_accuracy"] for task, found in results.found.items()},
        "group_means": results.group_means(),
        "mean_over_tasks": results.means().get("tasks"),
        "mean_over_groups": results.means().get("groups"),
        "missing": results.missing,
        "failed": results.failed,
    }
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"
