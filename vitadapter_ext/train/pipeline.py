"""What happens in a run, in order? config → data → backbone → attach → loop → files; `fit` reads from top to bottom."""

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

import vitadapter_ext

from .._atomic import write_atomically
from .._text import unknown
from ..attachment import attach
from ..canvas import FORMATS
from ..data.samples import SPLITS, Data
from ..files import save
from ..parameters import summary as count_parameters
from ..picture import draw
from . import baselines, curves, report
from .backbone import create
from .config import Config
from .data import data_config_of, data_name, evaluation_transform, loader, read_data
from .loop import DivergedError, evaluate
from .run_folder import RunFolder
from .study import Study, Trial

_COUNTS = ("adapter", "head", "overrides", "trainable", "total")
DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass
class Result:
    """The trained model, what summary.json says, and the folder where it all lies."""

    model: nn.Module
    summary: dict[str, Any]
    folder: Path


def fit(config: Config, data: Data | None = None, brief: bool = False) -> Result:
    """Fine-tunes as the configuration says, tests once, and writes the run folder.

    Args:
        data: what the configuration names, where it has been read already.
        brief: do not print how to load the file.

    Whatever ends the training early (Ctrl-C, a full disk, a file that is gone), the best epoch so far (else what there
    is) is saved before the exception goes on.

    Raises:
        ValueError: for anything in the configuration or the data that cannot be used; for a loss that is no number any
            more (the best epoch before is saved); for too little memory on the GPU.
        OSError: for what cannot be read or written.
    """
    device = choose_device(config)
    for _, trial in config.trials():
        check_optimizer(trial.optimizer)
    folder = RunFolder(config.out, f"{data_name(config)}-{config.method.name}")
    try:
        if data is None:
            report.reading(config)
            data = read_data(config)
        backbone = create(config)
        data_config = data_config_of(backbone.model, config)
        model = backbone.model.to(device)
        if config.checkpointing:
            model.set_grad_checkpointing()
        report.opening(config, data, backbone, data_config, device)

        evaluation = evaluation_transform(data_config)
        held = {name: loader(getattr(data, name), evaluation, config, device) for name in SPLITS}
        measured = baselines.measure(model, backbone.classes, data.classes, held) if config.baselines else {}
        val = loader(data.val, evaluation, config, device, every_epoch=True)
        study = Study(config, model, data, data_config, val, device)
        report.attached(count_parameters(study.result.model), folder.path)
        folder.write_config(replace(config, out=None).to_yaml())
    except BaseException as error:
        folder.discard()
        if _is_out_of_memory(error):
            raise _too_little_memory(device) from error
        raise

    found = {
        "status": "finished",
        "method": config.method.name,
        "data": data.name,
        "classes": len(data.classes),
        **measured,
    }
    failure = None
    began = time.perf_counter()
    try:
        with report.Progress(folder) as progress:
            study.run(progress)
        found["train_seconds"] = round(time.perf_counter() - began, 2)
        _, found["test_accuracy"] = evaluate(study.result.model, held["test"], device, config.amp)
    except KeyboardInterrupt as error:
        found["status"], failure = "interrupted", error
    except (OSError, RuntimeError, ValueError) as error:
        found["status"] = "failed"
        failure = _too_little_memory(device) if _is_out_of_memory(error) else error
    except DivergedError as error:
        kept = "the best epoch before is saved" if study.result.best else "nothing is saved"
        found["status"], failure = "diverged", ValueError(f"{error}: {kept}; a lower --lr or --clip-grad 1 may help")

    found.setdefault("train_seconds", round(time.perf_counter() - began, 2))
    result = study.result
    model, trainer = result.model, result.trainer
    found["epochs"] = trainer.epoch
    if trainer.best:
        found["best_epoch"] = trainer.best.epoch
    if (judged := study.chosen.best) and judged.val_accuracy is not None:
        found["val_accuracy"] = judged.val_accuracy
    if trainer.best or found["status"] != "diverged":
        found["adapter_file_bytes"] = save(
            model.eval(), folder.adapter, backbone=backbone.origin, class_names=data.classes, data_config=data_config
        )
    parameters = count_parameters(model)  # phases may have changed them
    found |= {
        "retrained": result.retrained,
        **({"settings": result.settings, "trials": [_described(each) for each in study.judged]} if config.grid else {}),
        "parameters": {kind: getattr(parameters, kind) for kind in _COUNTS},
        **({"widths": trainer.widths} if any(trainer.widths) else {}),
        "images_per_second": round(study.images / max(study.seconds, 1e-9), 1),
        "peak_memory_mb": _peak_memory_mb(device),
        "seed": config.seed,
        "device": str(device),
        "versions": _versions(),
    }
    folder.write_summary(found)
    if trainer.rows:
        again = trainer.rows if result.retrained else ()
        folder.write_curves(curves.draw(study.chosen.trainer.rows, found, again))
    if "widths" in found:
        folder.write_widths(curves.draw_widths(trainer.widths))
    report.closing(config, found, folder)
    if "adapter_file_bytes" in found and not brief:
        report.how_to_load(backbone, folder)
    if failure:
        raise failure
    return Result(model, found, folder.path)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _too_little_memory(device: torch.device) -> ValueError:
    remedy = "a smaller --batch-size with --grad-accum, --checkpointing or --amp bf16 may help"
    return ValueError(f"the memory of {device} is too small: {remedy}")


def _described(trial: Trial) -> dict[str, Any]:
    """A training of a grid for the summary."""
    best = trial.best
    scores = {} if best is None else {"best_epoch": best.epoch, "val_accuracy": best.val_accuracy}
    return {"settings": trial.settings, "status": trial.status, **scores}


def show(config: Config, path: str | os.PathLike) -> None:
    """Prints what each block would train and draws it into `path`; trains nothing, and reads no weights of timm's.

    Raises:
        ValueError: for anything in the configuration or the data that cannot be used; for a path whose end names no
            format.
        OSError: for what cannot be read or written.
    """
    kind = Path(path).suffix[1:]
    if kind not in FORMATS:
        raise ValueError(f"--show takes a .png, .svg or .pdf file, got {os.fspath(path)!r}")
    report.reading(config)
    data = read_data(config)
    report.splits(data)
    model = create(replace(config, pretrained=False, weights=None)).model
    model.reset_classifier(len(data.classes))
    attach(model, config.method)
    write_atomically(path, draw(model, kind))
    report.shown(count_parameters(model), Path(path))


def choose_device(config: Config) -> torch.device:
    """The device of `Config.device`, checked together with `Config.amp`; `ValueError` where it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise unknown("device", name, DEVICES)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {name!r} is not there: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if config.amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a CUDA device, and this is {device}: use bf16 or none")
    return device


def check_optimizer(name: str) -> None:
    """Raises a `ValueError` where timm has no such optimizer, or one that this driver cannot step."""
    if name not in list_optimizers():
        raise unknown("optimizer", name, list_optimizers())
    try:
        optimizer = create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], name, lr=0.1)
    except Exception as error:  # optimizers of other packages say in their own ways that they are not installed
        raise ValueError(f"the optimizer {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"the optimizer {name!r} needs second derivatives, which the fused ops do not have")


def _peak_memory_mb(device: torch.device) -> float:
    """The most memory that was in use (MiB): the GPU's where there is one, else this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _versions() -> dict[str, str]:
    return {
        "vitadapter_ext": vitadapter_ext.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
