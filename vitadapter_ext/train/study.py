"""Which training does a run end with? Those of its grid are judged on val; the chosen one may train again on all.

With `Config.retrain` this is VTAB-1k's protocol: settings and epoch are chosen on train and val, one more training with
them sees both, and the test images are looked at once, by whoever asks for them afterwards.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..attachment import attach, head_tensors
from ..data.samples import Data
from .config import Config
from .data import loader, training_transform
from .loop import Best, DivergedError, Listener, Trainer, seed_everything


@dataclass
class Trial:
    """One training: the settings that set it apart, its whole configuration, its model and how far it came.

    Attributes:
        model, trainer: None once another one was better.
        best: its epoch that counts, once it has ended, however it did.
        status: "begun", "finished" or "diverged".
        retrained: it saw train and val together.
    """

    settings: dict[str, Any]
    config: Config
    model: nn.Module | None
    trainer: Trainer | None
    best: Best | None = None
    status: str = "begun"
    retrained: bool = False

    @property
    def score(self) -> tuple[bool, float, float]:
        """What trials are compared by, the higher the better: those that finished come first."""
        judged = self.best is not None and self.best.val_accuracy is not None
        accuracy, loss = (self.best.val_accuracy, self.best.val_loss) if judged else (-1.0, 0.0)
        return self.status == "finished", accuracy, -loss


class StudyListener(Listener, Protocol):
    """What hears of several trainings."""

    def training(self, number: int, count: int, trial: Trial) -> None:
        """Before each training (from 1) of so many."""

    def diverged(self, why: str) -> None:
        """After a training that is passed over."""


class Study:
    """The trainings of a run, one after the other, from one backbone and one seed.

    Args:
        model: the backbone on its device, nothing attached. The last training is its own; the others have copies.
        val: batches of `data.val`, without augmentation.
    Attributes:
        trials: those begun so far.
        images, seconds: of all of them, as the trainers'.
    Raises:
        ValueError: for a method or an augmentation of any of the trainings that cannot be; for a stream, which cannot
            be joined with another and drawn together, or dealt in other batches than it was read for.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        data: Data,
        data_config: dict[str, Any],
        val: DataLoader,
        device: torch.device,
    ):
        self.config, self.model, self.data, self.data_config, self.val, self.device = (
            config, model, data, data_config, val, device,
        )  # fmt: skip
        planned = config.trials()
        if isinstance(data.train, IterableDataset):
            if config.retrain:
                raise ValueError(f"--retrain draws train and val together, and {data.name} is a stream")
            if "batch_size" in (config.grid or ()):
                raise ValueError(f"--grid cannot vary batch-size: {data.name} is a stream, read for one size")
        # One setting and its last epoch leave nothing to choose.
        self.only_final = config.retrain and config.select == "last" and len(planned) == 1
        self.planned = [] if self.only_final else planned
        self.count = len(self.planned) + config.retrain
        for _, each in planned[1:]:
            training_transform(each, data_config)
            if each.method != planned[0][1].method:
                attach(copy.deepcopy(model), each.method)
        self.trials: list[Trial] = []
        self.images, self.seconds = 0, 0.0
        self._begin(*planned[0], retrained=self.only_final)

    @property
    def result(self) -> Trial:
        """What counts: the training on all images once it has finished, else the best so far."""
        last = self.trials[-1]
        return last if last.retrained and last.status == "finished" else self.chosen

    @property
    def chosen(self) -> Trial:
        """The best on val; the only one there is where nothing is chosen."""
        return max(self.judged or self.trials, key=lambda trial: trial.score)

    @property
    def judged(self) -> list[Trial]:
        """Those that val chooses from."""
        return [trial for trial in self.trials if not trial.retrained]

    def run(self, listener: StudyListener) -> None:
        """Runs all trainings; one that diverges is passed over where another does not.

        Raises:
            DivergedError: all of them did, or the last one, on all images.
            KeyboardInterrupt: passed on; `result` is the best so far.
        """
        for number in range(1, self.count + 1):
            again = number > len(self.planned)
            if len(self.trials) < number:
                chosen = self.chosen
                self._begin(*((chosen.settings, chosen.config) if again else self.planned[number - 1]), retrained=again)
            trial = self.trials[-1]
            listener.training(number, self.count, trial)
            try:
                trial.trainer.run(listener)
                trial.status = "finished"
            except DivergedError as error:
                trial.status = "diverged"
                if again or (number == len(self.planned) and all(each.status == "diverged" for each in self.trials)):
                    raise
                listener.diverged(str(error))
            finally:
                trial.best = trial.trainer.best
                self.images += trial.trainer.images
                self.seconds += trial.trainer.seconds

    def _begin(self, settings: dict[str, Any], config: Config, retrained: bool) -> None:
        for trial in self.trials:
            if trial is not self.chosen and trial.trainer is not None:
                trial.model = trial.trainer = None
                if trial.best is not None:
                    trial.best.state.clear()
        model = self.model if len(self.trials) == self.count - 1 else copy.deepcopy(self.model)
        seed_everything(config.seed)
        reset_head(model, len(self.data.classes), config.head_init)
        attach(model.to(self.device), config.method)
        images, val, lengths = (self.data.train, self.val, ())
        if retrained:
            images, val = images + self.data.val, None
            if not self.only_final:
                former = self.chosen.trainer
                *earlier, _ = former.finished
                lengths = (*earlier, former.best.epoch - sum(earlier))
        batches = loader(
            images, training_transform(config, self.data_config), config, self.device, shuffle=True, every_epoch=True
        )
        trainer = Trainer(model, batches, val, config, self.device, lengths)
        self.trials.append(Trial(settings, config, model, trainer, retrained=retrained))


def reset_head(model: nn.Module, classes: int, init: str) -> None:
    """A new head for so many classes, with one of `HEAD_INITS`."""
    model.reset_classifier(classes)
    if init == "zero":
        with torch.no_grad():
            for tensor in head_tensors(model).values():
                tensor.zero_()
