"""How is a model trained? In phases with an optimizer and a schedule each; validation images choose the best epoch."""

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config


class DivergedError(ArithmeticError):
    """The loss is not a finite number any more."""


@dataclass
class Best:
    """The epoch of a phase that counts, and its trained tensors, on the CPU."""

    epoch: int
    val_accuracy: float | None
    val_loss: float | None
    state: dict[str, Tensor]


class Listener(Protocol):
    """What hears of a training's progress."""

    def start(self, phases: list[int], steps: int) -> None:
        """Before the first epoch: epochs of each phase, and batches of an epoch."""

    def phase(self, number: int, widths: dict[str, int]) -> None:
        """Before each phase (from 1), with the method's `widths`; also after the last, where it has changed them."""

    def step(self) -> None:
        """After each batch."""

    def epoch(self, row: dict[str, Any], trainer: "Trainer") -> None:
        """After each epoch, with its row of metrics."""


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch; PyTorch seeds its loader's workers from its own generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of `Config.amp` ("none", "bf16", "fp16")."""
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "none")


@torch.inference_mode()
def evaluate(model: nn.Module, batches: DataLoader, device: torch.device, amp: str = "none") -> tuple[float, float]:
    """Mean cross entropy (nats) and accuracy (0 to 1) over all images; leaves the model in evaluation mode.

    Raises:
        OSError: a stream gave fewer images than it has.
    """
    model.eval()
    loss = torch.zeros((), device=device)
    right = torch.zeros((), device=device, dtype=torch.int64)
    count = 0
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
        count += len(labels)
    if count != len(batches.dataset):  # a stream passes over what it cannot read, which would leave the hard ones out
        raise OSError(f"only {count:,} of {len(batches.dataset):,} images could be read")
    return loss.item() / count, right.item() / count


class Trainer:
    """One training: where it stands, and how it goes on.

    Args:
        val: batches that choose the epoch that counts; without any it is the last.
        lengths: epochs of each phase after which it ends, before its schedule does.

    Attributes:
        finished: epochs of each phase that has ended.
        phase, epoch: how many have begun and been finished; epochs count on through all phases.
        best: of the present phase; a phase may change the model, so an earlier one's tensors may not fit it any more.
        rows: the metrics of every finished epoch.
        widths: the method's `widths` in each phase, and at the end where they have changed after the last.
        images, seconds: seen in training, and spent on it, evaluation excluded.
    """

    def __init__(
        self,
        model: nn.Module,
        train: DataLoader,
        val: DataLoader | None,
        config: Config,
        device: torch.device,
        lengths: Sequence[int] = (),
    ):
        self.model, self.train, self.val, self.config, self.device = model, train, val, config, device
        self.network = torch.compile(model) if config.compile else model
        self.lengths = lengths
        self.finished: list[int] = []
        self.phase = self.epoch = self.images = 0
        self.seconds = 0.0
        self.best: Best | None = None
        self.rows: list[dict[str, Any]] = []
        self.widths = [config.method.widths(model)]
        self.optimizer = self._make_optimizer()
        self.scheduler = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.mix = None
        if config.mixup or config.cutmix:
            self.criterion = nn.CrossEntropyLoss()  # what it then sees are smoothed shares of classes
            self.mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=model.num_classes
            )

    def run(self, listener: Listener) -> None:
        """Trains all phases and leaves the model with the last one's best tensors, also where it is interrupted; what
        the method makes of them after the last phase takes their place.

        Raises:
            DivergedError: the loss became infinite or NaN.
            KeyboardInterrupt: passed on.
        """
        phases = self.config.method.training_phases(self.config.epochs)
        lengths = list(self.lengths) or phases
        listener.start(lengths, len(self.train))
        try:
            for epochs, length in zip(phases, lengths, strict=True):
                self._run_phase(epochs, length, listener)
        finally:
            self.restore_best()
        best, self.best = self.best, None
        if self._edit(best.epoch):
            listener.phase(self.phase + 1, self.widths[-1])
        else:
            self.best = best

    def restore_best(self) -> None:
        """Puts the best epoch's tensors back; without one the model stays as it is."""
        if self.best is not None:
            with torch.no_grad():
                for name, tensor in trainable(self.model).items():
                    tensor.copy_(self.best.state[name])

    def checkpoint(self) -> dict[str, Any]:
        """All that going on from here in this training needs, in types that `torch.load(weights_only=True)` admits."""
        python, numpy = random.getstate(), np.random.get_state()
        return {
            "phase": self.phase,
            "epoch": self.epoch,
            "finished": self.finished,
            "lengths": list(self.lengths),
            "rows": self.rows,
            "widths": self.widths,
            "trainable": {name: tensor.detach() for name, tensor in trainable(self.model).items()},
            "best": None if self.best is None else vars(self.best),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "python": python,
                "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            },
        }

    def _run_phase(self, epochs: int, length: int, listener: Listener) -> None:
        if self.phase:
            self.best = None
            self._edit(self.epoch)
            self.optimizer = self._make_optimizer(self.optimizer)
        self.phase += 1
        listener.phase(self.phase, self.widths[-1])
        warmup = min(self.config.warmup_epochs, epochs / 2)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=epochs,
            min_lr=self.config.min_lr,
            warmup_epochs=warmup,
            warmup_lr=self.config.warmup_lr,
            step_on_epochs=False,
            updates_per_epoch=self._steps,
        )
        began = self.epoch
        for epoch in range(length):
            row = self._run_epoch(epoch * self._steps, listener)
            self.epoch += 1
            self.rows.append(row)
            self._choose(row)
            listener.epoch(row, self)
            if self.config.patience is not None and self.epoch - self.best.epoch >= self.config.patience:
                break
        self.finished.append(self.epoch - began)

    def _edit(self, epoch: int) -> bool:
        """Lets the method edit the model after a phase. What it leaves is the best so far, for nothing else fits the
        model any more; `epoch` is where it came from."""
        if not self.config.method.after_phase(self.model, self.optimizer, self.phase):
            return False
        self.widths.append(self.config.method.widths(self.model))
        self._keep(epoch, *self._validate())
        return True

    def _validate(self) -> tuple[float | None, float | None]:
        """Accuracy and loss of the validation images, where there are any."""
        if self.val is None:
            return None, None
        loss, accuracy = evaluate(self.network, self.val, self.device, self.config.amp)
        return accuracy, loss

    def _make_optimizer(self, former: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
        """timm's optimizer over what is trained; what a former one knows of a tensor, or counts of a group, goes
        along."""
        optimizer = create_optimizer_v2(
            self.model,
            self.config.optimizer,
            lr=self.config.peak_lr,
            weight_decay=self.config.weight_decay,
            param_group_fn=self._param_groups,  # without weight decay older timm would take the frozen ones in
        )
        if former is not None:
            known = former.state
            optimizer.state.update({t: known[t] for t in trainable(self.model).values() if t in known})
            by_decay = {group["weight_decay"]: group for group in former.param_groups}
            for group in optimizer.param_groups:
                for key, counted in by_decay.get(group["weight_decay"], {}).items():
                    group.setdefault(key, counted)  # such as the step, which some of timm's optimizers keep there
        return optimizer

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        exempt = getattr(model, "no_weight_decay", set)()
        return param_groups_weight_decay(model, self.config.weight_decay, no_weight_decay_list=exempt)

    @property
    def _steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.train) / self.config.grad_accum)

    def _run_epoch(self, step: int, listener: Listener) -> dict[str, Any]:
        began = time.perf_counter()
        self.network.train()
        total, seen = torch.zeros((), device=self.device), 0
        batches = iter(self.train)
        for count in itertools.count(1):
            # What makes a step is read before it, so that each image weighs the same in a last one of fewer batches.
            together = list(itertools.islice(batches, self.config.grad_accum))
            if together:
                # The schedule at the middle of the step: at its ends the first or the last step would have lr 0.
                self.scheduler.step_update(step + count - 0.5)
                lr = self.optimizer.param_groups[0]["lr"]
                images = sum(len(labels) for _, labels in together)
                total += self._train_step(together, images, listener) * images
                seen += images
            # NaN stays in the sum, so looking now and then is enough and the GPU is not kept waiting.
            if (count % 20 == 0 or not together) and not math.isfinite(total.item()):
                raise DivergedError(f"the loss became {total.item()} in epoch {self.epoch + 1}")
            if not together:
                break
        self.images += seen
        seconds = time.perf_counter() - began
        self.seconds += seconds
        val_accuracy, val_loss = self._validate()
        if val_loss is not None and not math.isfinite(val_loss):
            raise DivergedError(f"the validation loss became {val_loss} in epoch {self.epoch + 1}")
        return {
            "phase": self.phase,
            "epoch": self.epoch + 1,
            "lr": lr,
            "train_loss": total.item() / seen,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": round(seconds, 3),
        }

    def _train_step(self, batches: list[tuple[Tensor, Tensor]], count: int, listener: Listener) -> Tensor:
        """One step of the optimizer on some batches of `count` images together; returns their mean loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for images, labels in batches:
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            share = len(labels) / count
            if self.mix is not None:
                images, labels = self._mixed(images, labels)
            with autocast(self.device, self.config.amp):
                loss = self.criterion(self.network(images), labels) * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
            listener.step()
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(trainable(self.model).values(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) mixed in pairs by timm, and the shares (B, classes) of their labels; an odd one out stays
        as it is."""
        even = len(labels) - len(labels) % 2
        alone = mixup_target(labels[even:], self.mix.num_classes, smoothing=self.config.label_smoothing)
        if even == 0:
            return images, alone
        mixed, shares = self.mix(images[:even], labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([shares, alone])

    def _choose(self, row: dict[str, Any]) -> None:
        accuracy, loss, best = row["val_accuracy"], row["val_loss"], self.best
        newest = self.val is None or self.config.select == "last" or best is None
        if newest or (accuracy, -loss) > (best.val_accuracy, -best.val_loss):
            self._keep(self.epoch, accuracy, loss)

    def _keep(self, epoch: int, val_accuracy: float | None, val_loss: float | None) -> None:
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainable(self.model).items()}
        self.best = Best(epoch, val_accuracy, val_loss, state)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that ask for gradients, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
