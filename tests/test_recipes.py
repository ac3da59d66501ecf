"""Does each recipe do what it names? Two steps on its own architecture, held against the papers' numbers.

The numbers are written out here a second time, by hand, so that neither table can drift alone.
"""

import numpy as np
import pytest
import torch
from timm.data import resolve_model_data_config
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch.utils.data import TensorDataset
from torchvision.transforms import RandomCrop, RandomHorizontalFlip, Resize

import vitadapter_ext as va
from vitadapter_ext.data.samples import Data
from vitadapter_ext.train import configure
from vitadapter_ext.train.backbone import create
from vitadapter_ext.train.data import data_config_of, evaluation_transform, loader
from vitadapter_ext.train.loop import Trainer, trainable
from vitadapter_ext.train.recipes import RECIPES
from vitadapter_ext.train.study import Study

CPU = torch.device("cpu")
# The papers' numbers: what `published` gives, and a phase's epochs.
PLAIN = {
    "checkpoint": None, "method": va.Adapter(rank=8), "optimizer": "AdamW", "decay": 1e-4, "peak": 1e-3, "first": 0,
    "last": 0, "warmup": 3, "epochs": 30, "norm": None, "smoothing": 0, "drop_path": 0, "augmentation": "none",
    "squash": False, "head": "timm", "amp": "none",
}  # fmt: skip
VIT = {**PLAIN, "checkpoint": "vit_base_patch16_224.orig_in21k", "warmup": 10, "epochs": 100}
ARC = {**VIT, "method": va.Arc(rank=50, dropout=0.1), "norm": 1.0, "head": "zero"}
PAPERS = {
    "embedded": {**PLAIN, "peak": 5e-3, "augmentation": "affine"},
    "minitab": {**PLAIN, "peak": 5e-3, "warmup": 2, "epochs": 8, "squash": True},
    "general": {**PLAIN, "augmentation": "crop-flip"},
    "adapter-plus": {
        **VIT,
        "method": va.Adapter(rank=8, placement="post", scale="channel", init="houlsby", drop_path=0.1),
        "drop_path": 0.1,
        "amp": "bf16",
    },
    "arc-vtab": {**ARC, "peak": 1e-2, "decay": 0, "squash": True},
    "arc-fgvc": {**ARC, "peak": 5e-3, "decay": 1e-2, "augmentation": "random-crop"},
    "mimi": {
        **PLAIN,
        "checkpoint": "swin_tiny_patch4_window7_224.ms_in1k",
        "method": va.Mimi(sigma=8, prune=0.5, phases=4, init="trunc_normal"),
        "decay": 0.05, "peak": 5e-4 * 128 / 512, "first": 5e-7, "last": 5e-6, "warmup": 20, "epochs": 80,
        "norm": 5.0, "smoothing": 0.1, "drop_path": 0.1, "augmentation": "random-resized-crop",
    },
    "consolidator-vtab": {
        **VIT,
        "method": va.Consolidator(groups=(384,), shuffle=False, drop_path=0.5),
        "decay": 1e-2, "peak": 2e-3, "first": 1e-6, "last": 1e-5, "drop_path": 0.1, "squash": True,
    },
    "seed-project": {
        **VIT,
        "method": va.Adapter(
            rank=256, placement="houlsby-inner", activation="leaky_relu", scale=1.0, dropout=0.2, dropout_out=0.2,
            init="houlsby", train_norms=True,
        ),
        "optimizer": "Adam", "decay": 0, "peak": 1e-4, "warmup": 1, "epochs": 30, "norm": 1.0,
        "augmentation": "crop-flip",
    },
}  # fmt: skip


class TwoStepsError(Exception):
    """What was to be seen has been seen."""


class TwoSteps:
    """Ends a training after two steps, with their learning rates and what norms the gradients were cut to."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.rates = trainer, []

    def training(self, number, count, trial):
        pass

    def start(self, phases, steps):
        self.phases = phases

    def phase(self, number, widths):
        pass

    def step(self):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])
        if len(self.rates) == 3:  # the third has only been computed
            raise TwoStepsError

    def epoch(self, row, trainer):
        raise AssertionError("six images are three steps")


def noise(count: int) -> TensorDataset:
    class Noise(TensorDataset):
        def __getitem__(self, index):
            from PIL import Image

            pixels, label = super().__getitem__(index)
            return Image.fromarray(pixels.numpy()), int(label)

    pixels = np.random.default_rng().integers(0, 256, (count, 250, 230, 3), dtype=np.uint8)
    return Noise(torch.from_numpy(pixels), torch.arange(count) % 3)


def test_every_recipe_has_its_numbers_here():
    assert set(PAPERS) == set(RECIPES)


@pytest.mark.parametrize("name", PAPERS)
def test_two_steps_on_its_own_architecture(name, monkeypatch):
    paper = PAPERS[name]
    checkpoint, peak, epochs = paper["checkpoint"], paper["peak"], paper["epochs"]
    recipe = RECIPES[name]
    assert recipe.checkpoint == (checkpoint or "")
    published = configure(recipe=name, **({"dataset": "minitab/greek"} if name == "minitab" else {}))
    assert published.peak_lr == pytest.approx(peak)
    assert (published.model, published.pretrained) == (checkpoint, checkpoint is not None)
    # A processor without bfloat16 takes minutes for a step in it; test_train.py has a smaller model for that.
    small = {"batch_size": 2, "amp": "none"}
    if published.lr_base_size:  # the rate of its own batch, at this one
        small["lr_base_size"] = round(published.lr_base_size * 2 / published.batch_size)
    settings = {"recipe": name, "model": checkpoint and checkpoint.split(".")[0], "pretrained": False, **small}
    config = configure(**settings, squash=published.squash, augmentation=published.augmentation)
    assert config.method == published.method == paper["method"]
    assert (config.squash, config.head_init, published.amp) == (paper["squash"], paper["head"], paper["amp"])

    backbone = create(config)
    data_config = data_config_of(backbone.model, config)
    wanted = resolve_model_data_config(backbone.model)
    assert data_config == {**wanted, **({"crop_mode": "squash", "crop_pct": 1.0} if paper["squash"] else {})}
    data = Data("noise", ("a", "b", "c"), noise(6), noise(3), noise(3))
    val = loader(data.val, evaluation_transform(data_config), config, CPU)
    study = Study(config, backbone.model, data, data_config, val, CPU)
    trainer = study.trials[0].trainer
    for group in trainer.optimizer.param_groups:
        assert all(group["weight_decay"] == (paper["decay"] if t.ndim > 1 else 0) for t in group["params"])
    assert type(trainer.optimizer).__name__ == paper["optimizer"]

    cuts = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: (cuts.append(limit), clip(p, limit)))
    before = {key: tensor.detach().clone() for key, tensor in trainable(trainer.model).items()}
    if paper["head"] == "zero":
        assert all(not tensor.any() for key, tensor in before.items() if key.startswith("head."))
    listener = TwoSteps(trainer)
    with pytest.raises(TwoStepsError):
        study.run(listener)
    assert set(cuts) == ({paper["norm"]} if paper["norm"] else set())
    # A linear warm-up from the first rate, taken at the middle of each of an epoch's three steps.
    slope = (peak - paper["first"]) / (min(paper["warmup"], epochs / 2) * 3)
    assert listener.rates[:2] == pytest.approx([paper["first"] + 0.5 * slope, paper["first"] + 1.5 * slope], rel=1e-6)
    assert listener.phases == ([epochs] * 4 if name == "mimi" else [epochs])
    moved = [key for key, tensor in trainable(trainer.model).items() if not torch.equal(tensor, before[key])]
    assert len(moved) > 0.5 * len(before)
    assert all(torch.isfinite(tensor).all() for tensor in trainable(trainer.model).values())
    trainer.scheduler.step_update(epochs * 3)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(paper["last"], abs=1e-12)

    paths = {m.drop_prob for m in trainer.model.modules() if type(m).__name__ == "DropPath" and m.drop_prob}
    assert max(paths, default=0) == pytest.approx(paper["drop_path"])
    smoothed = trainer.mix.label_smoothing if trainer.mix else trainer.criterion.label_smoothing
    assert smoothed == paper["smoothing"]
    check_augmentation(name, paper["augmentation"], study)


def check_augmentation(name, augmentation, study):
    moved, recoloured, as_tensor = study.trials[0].trainer.train.dataset.transform.transforms
    kinds = [type(step).__name__ for step in moved.transforms]
    _, height, width = study.data_config["input_size"]
    if augmentation == "none":
        assert kinds == ["Resize", "CenterCrop"]
        if study.data_config["crop_mode"] == "squash":
            assert tuple(moved.transforms[0].size) == (height, width)
    elif augmentation == "affine":
        assert kinds == ["RandomAffine", "Compose"]
    elif augmentation == "random-crop":
        resize, crop, flip = moved.transforms
        assert (type(resize), resize.size, type(crop), tuple(crop.size)) == (Resize, 256, RandomCrop, (224, 224))
        assert (type(flip), flip.p) == (RandomHorizontalFlip, 0.5)
    else:
        assert kinds == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
        assert moved.transforms[0].scale == ((0.5, 1.0) if augmentation == "crop-flip" else (0.08, 1.0))
    erasing = [step for step in as_tensor.transforms if isinstance(step, RandomErasing)]
    mix = study.trials[0].trainer.mix
    if name == "mimi":
        (randaugment,) = recoloured.transforms
        assert isinstance(randaugment, RandAugment)
        assert {op.magnitude for op in randaugment.ops} == {9} and {op.magnitude_std for op in randaugment.ops} == {0.5}
        assert [(step.probability, step.rand_color, step.per_pixel) for step in erasing] == [(0.25, False, True)]
        assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    else:
        assert not recoloured.transforms and not erasing and mix is None
