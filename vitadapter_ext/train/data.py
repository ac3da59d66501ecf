"""Which images does a run see, and how do they become batches? Data sets bring splits, timm the transforms."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose, InterpolationMode, RandomAffine, RandomCrop, RandomHorizontalFlip, Resize

from ..data import catalog
from ..data.samples import Data
from .config import Config

Transform = Callable[[Image.Image], Tensor]


def data_name(config: Config) -> str:
    """A short name of the data set, for people and for folders."""
    return catalog.name_of(config.dataset, config.data)


def read_data(config: Config) -> Data:
    """The data set that the configuration names; `ValueError` in one sentence where it cannot be used."""
    options = {name: getattr(config, name) for name in ("train_split", "val_split", "test_split", "batch_size")}
    return catalog.read(config.dataset, config.data, **options)


def data_config_of(model: nn.Module, config: Config) -> dict[str, Any]:
    """Size, interpolation, crop and normalisation: the checkpoint's own, where the configuration says nothing else."""
    squash = {"crop_mode": "squash", "crop_pct": 1.0} if config.squash else {}
    return {**resolve_model_data_config(model), **squash}


def evaluation_transform(data_config: dict[str, Any]) -> Transform:
    """timm's transform for evaluation with this size, interpolation, crop and normalisation."""
    return create_transform(**data_config, is_training=False)


def training_transform(config: Config, data_config: dict[str, Any]) -> Transform:
    """What the configuration's augmentation makes of a picture: moved and cropped, recoloured by timm's policy, then a
    tensor, of which random erasing fills a part with noise.

    Raises:
        ValueError: for a policy that timm does not have.
    """
    moved = _geometry(config.augmentation, data_config)
    try:
        # What is erased is filled with noise, pixel by pixel.
        _, recoloured, as_tensor = create_transform(
            **data_config,
            is_training=True,
            separate=True,
            color_jitter=None,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        if config.auto_augment is None:
            raise
        policies = "rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5 or 3a"
        raise ValueError(f"--auto-augment takes a policy such as {policies}, got {config.auto_augment!r}") from error
    return Compose([moved, recoloured, as_tensor])


def _geometry(augmentation: str, data_config: dict[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """What `Config.augmentation` names: "none", "affine" (rotation, shift, zoom and shear), "crop-flip" (a crop of at
    least half the picture, and a flip), "random-crop" (the short side to 256/224 of the model's size, a crop of that
    size, and a flip), or "random-resized-crop" (timm's own: from 8 % of the picture on, and a flip)."""
    fitted = Compose(evaluation_transform(data_config).transforms[:-2])  # without the tensor and its normalisation
    if augmentation == "none":
        return fitted
    if augmentation == "affine":
        # On the embedded default the mean validation loss of five seeds is 0.0132 with these, 0.0151 with milder ones.
        move = RandomAffine(
            15, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=14, interpolation=InterpolationMode.BILINEAR
        )
        return Compose([move, fitted])
    if augmentation == "random-crop":
        _, height, width = data_config["input_size"]
        shorter = round(min(height, width) * 256 / 224)
        resize = Resize(shorter, str_to_interp_mode(data_config["interpolation"]))
        return Compose([resize, RandomCrop((height, width), pad_if_needed=True), RandomHorizontalFlip()])
    scale = (0.5, 1.0) if augmentation == "crop-flip" else None
    return create_transform(**data_config, is_training=True, separate=True, scale=scale, hflip=0.5)[0]


class Transformed(Dataset):
    """The pairs of `dataset` with their pictures transformed."""

    def __init__(self, dataset: Dataset, transform: Transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


class TransformedStream(IterableDataset):
    """The same for a data set that has no order to draw from, and is drawn by its reader."""

    def __init__(self, dataset: IterableDataset, transform: Transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((self.transform(image), label) for image, label in self.dataset)


def loader(
    dataset: Dataset,
    transform: Transform,
    config: Config,
    device: torch.device,
    shuffle: bool = False,
    every_epoch: bool = False,
) -> DataLoader:
    """Batches (B, 3, H, W) and labels (B,); order and augmentation depend on PyTorch's seed, in workers too.

    `every_epoch` keeps the worker processes from one epoch to the next.
    """
    streamed = isinstance(dataset, IterableDataset)
    return DataLoader(
        TransformedStream(dataset, transform) if streamed else Transformed(dataset, transform),
        batch_size=config.batch_size,
        shuffle=shuffle and not streamed,
        num_workers=config.workers,
        persistent_workers=every_epoch and config.workers > 0,
        pin_memory=device.type == "cuda",
    )
