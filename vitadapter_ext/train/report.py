"""What does a person at the terminal read? The facts before the training, its progress, and how it ended."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..parameters import Summary
from .backbone import Backbone
from .config import Config
from .data import Data
from .loop import Trainer
from .run_folder import RunFolder


def reading(config: Config) -> None:
    """Before a large folder keeps one waiting."""
    if config.data is not None:
        _say("data", f"reading {config.data} ...")


def splits(data: Data) -> None:
    """The data set with its splits, and what one should know of it."""
    counts = ", ".join(f"{len(getattr(data, name))} {name}" for name in ("train", "val", "test"))
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
    _say("training", f"{config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g} on {device}{amp}")


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

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def start(self, phases: list[int], steps: int) -> None:
        self.epochs, self.phases = sum(phases), len(phases)
        if self.phases > 1:
            _say("phases", f"{self.phases}: {' + '.join(map(str, phases))} = {self.epochs} epochs")
        columns = shutil.get_terminal_size().columns  # 80 where a terminal has no size, as in some containers
        self.bar = tqdm(total=self.epochs * steps, unit="batch", disable=not self.on_terminal, ncols=columns)

    def phase(self, number: int, widths: dict[str, int]) -> None:
        if widths:
            when = f"phase {number}" if number <= self.phases else "at last"
            tqdm.write(f"{when:<9} {sum(widths.values()):,} neurons in {_alive(widths)} adapters")

    def step(self) -> None:
        self.bar.update()

    def epoch(self, row: dict[str, Any], trainer: Trainer) -> None:
        self.folder.write_metrics(trainer.rows)
        self.folder.write_checkpoint(trainer.checkpoint())
        phase = f"phase {row['phase']}  " if self.phases > 1 else ""
        accuracy = f"val {100 * row['val_accuracy']:.2f} %"
        self.bar.set_description(f"{phase}epoch {row['epoch']}/{self.epochs}, {accuracy}")
        if not self.on_terminal:
            losses = f"loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  {accuracy}"
            best = "  best" if trainer.best.epoch == row["epoch"] else ""
            print(f"{phase}epoch {row['epoch']:>3}/{self.epochs}  {losses}  {row['seconds']:.1f} s{best}", flush=True)


def closing(found: dict[str, Any], backbone: Backbone, folder: RunFolder) -> None:
    """How it ended, as a small table, and how to use what it left."""
    rows = []
    if "test_accuracy" in found:
        rows.append(
            ("test accuracy", _percent(found["test_accuracy"]), f"{found['method']}, best epoch {found['best_epoch']}")
        )
    elif "val_accuracy" in found:
        rows.append(
            ("val accuracy", _percent(found["val_accuracy"]), f"{found['status']}; best epoch {found['best_epoch']}")
        )
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
    if "adapter_file_bytes" in found:
        print(f"\n{_how_to_load(backbone, folder.adapter)}", flush=True)


def _alive(widths: Mapping[str, int]) -> int:
    return sum(width > 0 for width in widths.values())


def _how_to_load(backbone: Backbone, adapter: Path) -> str:
    lines = ["In Python:", *backbone.code, f"vitadapter_ext.load(model, {str(adapter)!r}).eval()"]
    return "\n    ".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _say(what: str, text: str) -> None:
    print(f"{what:<9} {text}", flush=True)
