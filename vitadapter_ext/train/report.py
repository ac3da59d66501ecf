"""What does a person at the terminal read? The facts before the training, its progress, and how it ended."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.samples import SPLITS, Data
from ..parameters import Summary
from .backbone import Backbone
from .config import Config
from .loop import Trainer
from .run_folder import RunFolder
from .study import Trial


def reading(config: Config) -> None:
    """Before a large folder keeps one waiting."""
    if config.data is not None:
        name = f" {config.dataset}" if config.dataset else ""
        _say("data", f"reading{name} {config.data} ...")


def splits(data: Data) -> None:
    """The data set with its splits, and what one should know of it."""
    counts = ", ".join(f"{len(getattr(data, name))} {name}" for name in SPLITS)
    _say("data", f"{data.name}: {len(data.classes)} classes; {counts} images")
    for note in data.notes:
        _say("", note)


def opening(config: Config, data: Data, backbone: Backbone, data_config: dict[str, Any], device: torch.device) -> None:
    """Data, preprocessing and backbone, before anything takes long."""
    splits(data)
    _, height, width = data_config["input_size"]
    mean, std = (" ".join(f"{number:g}" for number in data_config[key]) for key in ("mean", "std"))
    _say("images", f"{height} x {width}, {data_config['interpolation']}, mean {mean}, std {std}")
    _say("backbone", backbone.description)
    amp = "" if config.amp == "none" else f", {config.amp}"
    batch = f"batch {config.batch_size}" + (f" x {config.grad_accum}" if config.grad_accum > 1 else "")
    lr = "" if {"lr", "lr_base_size"} & set(config.grid or ()) else f", lr {config.peak_lr:g}"
    _say("training", f"{config.epochs} epochs, {batch}{lr} on {device}{amp}")
    if config.grid or config.retrain:
        _say("protocol", _protocol(config, len(data.train) + len(data.val)))


def _protocol(config: Config, images: int) -> str:
    """What is chosen on validation images, and what becomes of it."""
    chosen = [name for name, values in (config.grid or {}).items() if len(values) > 1]
    names = [*chosen, *(["the epoch"] if config.select == "best" else [])]
    choice = f"val chooses {' and '.join(names)} in {_counted(len(config.trials()), 'training')}" if names else ""
    final = f"one training on all {images:,} images of train and val" if config.retrain else ""
    return ", then ".join(filter(None, (choice, final)))


def attached(parameters: Summary, folder: Path) -> None:
    """The method with what it trains, and where the results go."""
    _say("method", parameters.method)
    for line in parameters.totals():
        _say("", line)
    _say("output", f"{folder}/")


def shown(parameters: Summary, path: Path) -> None:
    """The method block by block, and where its picture is."""
    print(f"\n{parameters}\n")
    _say("picture", str(path))


class Progress:
    """Writes metrics and checkpoint after each epoch; shows a bar on a terminal and a line for each epoch elsewhere."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.on_terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.number = 0  # of the training
        self.former: list[dict[str, Any]] = []  # rows of the trainings before it
        self.rows: list[dict[str, Any]] = []  # and of all

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def training(self, number: int, count: int, trial: Trial) -> None:
        self.number = number
        if count > 1:
            settings = ", ".join(f"{name} {chosen}" for name, chosen in trial.settings.items())
            what = ("on train and val" + (f": {settings}" if settings else "")) if trial.retrained else settings
            tqdm.write(f"{f'{number} of {count}':<9} {what or 'on train, judged on val'}")

    def diverged(self, why: str) -> None:
        tqdm.write(f"{'':<9} passed over: {why}")

    def start(self, phases: list[int], steps: int) -> None:
        self.epochs, self.phases = sum(phases), len(phases)
        if self.phases > 1:
            _say("phases", f"{self.phases}: {' + '.join(map(str, phases))} = {self.epochs} epochs")
        if self.bar is not None:
            self.bar.close()
        columns = shutil.get_terminal_size().columns  # 80 where a terminal has no size, as in some containers
        self.bar = tqdm(total=self.epochs * steps, unit="batch", disable=not self.on_terminal, ncols=columns)

    def phase(self, number: int, widths: dict[str, int]) -> None:
        if widths:
            when = f"phase {number}" if number <= self.phases else "at last"
            tqdm.write(f"{when:<9} {sum(widths.values()):,} neurons in {_alive(widths)} adapters")

    def step(self) -> None:
        self.bar.update()

    def epoch(self, row: dict[str, Any], trainer: Trainer) -> None:
        if len(trainer.rows) == 1:
            self.former = self.rows
        self.rows = self.former + [{"training": self.number, **each} for each in trainer.rows]
        self.folder.write_metrics(self.rows)
        self.folder.write_checkpoint({"training": self.number, **trainer.checkpoint()})
        phase = f"phase {row['phase']}  " if self.phases > 1 else ""
        judged = row["val_accuracy"] is not None
        accuracy = f"val {_percent(row['val_accuracy'])}" if judged else f"loss {row['train_loss']:.4f}"
        self.bar.set_description(f"{phase}epoch {row['epoch']}/{self.epochs}, {accuracy}")
        if not self.on_terminal:
            losses = f"loss {row['train_loss']:.4f}"
            if judged:
                losses += f"  val loss {row['val_loss']:.4f}  {accuracy}"
            best = "  best" if judged and trainer.best.epoch == row["epoch"] else ""
            print(f"{phase}epoch {row['epoch']:>3}/{self.epochs}  {losses}  {row['seconds']:.1f} s{best}", flush=True)


def closing(config: Config, found: dict[str, Any], folder: RunFolder) -> None:
    """How it ended, as a small table."""
    rows = []
    if "test_accuracy" in found:
        how = "train and val together, epoch" if found["retrained"] else f"{config.select} epoch"
        rows.append(
            ("test accuracy", _percent(found["test_accuracy"]), f"{found['method']}, {how} {found['best_epoch']}")
        )
    elif "val_accuracy" in found:
        rows.append(
            (
                "val accuracy",
                _percent(found["val_accuracy"]),
                f"{found['status']}; {config.select} epoch {found['best_epoch']}",
            )
        )
    if found.get("settings") and "val_accuracy" in found:
        settings = ", ".join(f"{name} {chosen}" for name, chosen in found["settings"].items())
        rows.append(("chosen", _percent(found["val_accuracy"]), f"on val by {settings}"))
    if "linear_probe_accuracy" in found:
        rows.append(("linear probe", _percent(found["linear_probe_accuracy"]), "on the frozen backbone's features"))
    if "backbone_accuracy" in found:
        rows.append(("untouched backbone", _percent(found["backbone_accuracy"]), "its own outputs for these classes"))
    counts = found["parameters"]
    share = f"{counts['trainable'] / counts['total']:.2%} of {counts['total']:,}"
    rows.append(("parameters trained", f"{counts['trainable']:,}", share))
    if "widths" in found:
        first, last = found["widths"][0], found["widths"][-1]
        text = f"in {_alive(last)} adapters, of {sum(first.values()):,} in {_alive(first)} at the start"
        rows.append(("neurons", f"{sum(last.values()):,}", text))
    if "adapter_file_bytes" in found:
        rows.append(("file size", f"{found['adapter_file_bytes'] / 1000:,.1f} KB", str(folder.adapter)))
    rows.append(("time", f"{found['train_seconds']:.1f} s", f"{found['images_per_second']:,.0f} images/s in training"))
    width = max(len(number) for _, number, _ in rows)
    print()
    for name, number, text in rows:
        print(f"{name:<19} {number:>{width}}   {text}")


def how_to_load(backbone: Backbone, folder: RunFolder) -> None:
    """The lines of Python that use what a run left."""
    lines = ["In Python:", *backbone.code, f"vitadapter_ext.load(model, {str(folder.adapter)!r}).eval()"]
    print("\n" + "\n    ".join(lines), flush=True)


def task(number: int, count: int, name: str, group: str) -> None:
    """Before each task of a suite."""
    print(f"\n{number} of {count}: {name} ({group})", flush=True)


def done_before(summary: dict[str, Any], folder: Path) -> None:
    """A task that has its result already."""
    _say("result", f"test accuracy {_percent(summary['test_accuracy'])}, found in {folder}/")


def skipped(why: str) -> str:
    """A task that cannot be run; returns why."""
    _say("no result", why)
    return why


def suite(table: str, notes: Sequence[str], folder: Path) -> None:
    """All results of a suite."""
    print(f"\n{table}")
    for note in notes:
        print(note)
    _say("results", str(folder / "results.md"))


def _alive(widths: Mapping[str, int]) -> int:
    return sum(width > 0 for width in widths.values())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _say(what: str, text: str) -> None:
    print(f"{what:<9} {text}", flush=True)
