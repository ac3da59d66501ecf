"""Which backbone works with no network? A small ViT that ships in this package, made by `vitadapter_ext.pretrain`.

It is a plain timm VisionTransformer that tells 62 letters and digits apart, drawn from fonts (`data/glyphs.py`):
nothing that a person wrote by hand has been in its training.
"""

import hashlib
from pathlib import Path

import timm
import torch
from safetensors.torch import load
from timm.data import create_transform, resolve_model_data_config
from timm.models import VisionTransformer

from .data.digits import Digits
from .data.glyphs import CLASSES, SIZE

# What `timm.create_model` is called with.
ARGUMENTS = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": SIZE,
    "patch_size": 8,  # 16 tokens: pretraining and adapting fit into minutes and seconds
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 2,
    "num_classes": len(CLASSES),
}

# What `timm.data.resolve_model_data_config` reads: the glyphs' own grey mean and spread, three times.
PRETRAINED_CFG = {
    "architecture": ARGUMENTS["model_name"],
    "tag": "embedded",
    "input_size": (3, SIZE, SIZE),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.3, 0.3, 0.3),
    "std": (0.3, 0.3, 0.3),
    "num_classes": len(CLASSES),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}

WEIGHTS = Path(__file__).parent / "assets" / "embedded_vit.safetensors"
REGENERATE = "python -m vitadapter_ext.pretrain"


def create(pretrained: bool = True, weights: str | Path = WEIGHTS) -> VisionTransformer:
    """The small ViT, images (B, 3, 32, 32) to logits (B, 62) over `CLASSES`, in evaluation mode when it is pretrained.

    `weights` is a safetensors file with its SHA-256 beside it, as `vitadapter_ext.pretrain` writes them.

    Raises:
        FileNotFoundError: where either file is missing.
        ValueError: where the file is not the one that the SHA-256 was made of.
    """
    model = timm.create_model(**ARGUMENTS, pretrained_cfg=dict(PRETRAINED_CFG))
    if not pretrained:
        return model
    tensors = load(_checked(Path(weights)))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})  # stored as fp16
    return model.eval()


def checksum_path(weights: str | Path) -> Path:
    """Where the SHA-256 of a weights file stands: beside it, `.sha256` in place of `.safetensors`."""
    return Path(weights).with_suffix(".sha256")


def _checked(weights: Path) -> bytes:
    """The bytes of `weights`, once their SHA-256 is what the file beside it says."""
    for path in (weights, checksum_path(weights)):
        if not path.is_file():
            raise FileNotFoundError(f"the embedded backbone's file {path} is missing; '{REGENERATE}' makes it again")
    data = weights.read_bytes()
    expected = checksum_path(weights).read_text().split()[:1]
    found = hashlib.sha256(data).hexdigest()
    if expected != [found]:
        raise ValueError(
            f"{weights} is damaged or was replaced: its SHA-256 is {found}, "
            f"and {checksum_path(weights).name} says {''.join(expected) or 'nothing'}"
        )
    return data


@torch.inference_mode()
def digit_accuracy(model: VisionTransformer, split: str = "test") -> float:
    """The share (0 to 1) of scikit-learn's digits that the backbone itself names right, by its ten digit outputs."""
    digits = Digits(split, create_transform(**resolve_model_data_config(model), is_training=False))
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    images = torch.stack([image for image, _ in digits]).to(device)
    # CLASSES starts with the digits; the other outputs are left out of the choice.
    answers = torch.cat([model(batch)[:, :10].argmax(1) for batch in images.split(250)])
    model.train(training)
    return (answers.cpu() == torch.tensor(digits.targets)).double().mean().item()
