"""How is the embedded backbone made? By telling letters and digits apart that are drawn afresh for every step.

    python -m vitadapter_ext.pretrain            # under 20 minutes on two cores

writes `embedded_vit.safetensors` (fp16) and `embedded_vit.sha256` into `./embedded_vit/`. The package's own files are
never touched: `vitadapter_ext.embedded.create(weights="embedded_vit/embedded_vit.safetensors")` uses the new ones, and
copying both into `vitadapter_ext/assets/` makes them the default.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn import functional as F
from tqdm import tqdm

from . import embedded
from ._atomic import write_atomically
from .cli import Parser, add_flag, run, value
from .data.glyphs import glyphs as draw

VALIDATION_GLYPHS = 6_200


def pretrain(
    out: str | Path = "embedded_vit",
    *,
    glyphs: int = 50_000,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains the embedded backbone on `glyphs` new pictures an epoch and writes its two files into the folder `out`.

    Returns `glyph_accuracy` (0 to 1, on glyphs it has not seen), `digit_accuracy` (the same on scikit-learn's
    validation digits, by its ten digit outputs) and `seconds`. `report` gets a line of text an epoch.

    Raises:
        ValueError: for a number outside its range, or where `out` has such files already; nothing is trained then.
        OSError: where `out` cannot be made or written; nothing is trained then.
    """
    for name, number in {"glyphs": glyphs, "epochs": epochs, "batch_size": batch_size, "lr": lr}.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be 0 or a positive number, got {weight_decay}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if not 0 <= seed < 2**63 - 1:
        raise ValueError(f"seed must be from 0 to 2^63 - 2, got {seed}")
    weights = Path(out) / embedded.WEIGHTS.name
    for path in (weights, embedded.checksum_path(weights)):
        if path.exists():
            raise ValueError(f"{path} exists: name a new folder with --out")
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(weights.with_suffix(".probe"), b"")  # better now than after twenty minutes
    weights.with_suffix(".probe").unlink()
    start = time.perf_counter()

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    held_out = draw(VALIDATION_GLYPHS, torch.Generator().manual_seed(seed + 1))
    model = embedded.create(pretrained=False)
    steps = math.ceil(glyphs / batch_size)
    # Muon (AdamW on what is not a matrix) was right on 70 % of the glyphs after 500 steps, where AdamW was on 34 %.
    optimizer = create_optimizer_v2(model, opt="muon", lr=lr, weight_decay=weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=steps
    )
    for epoch in range(epochs):
        model.train()
        total = 0.0
        name = f"epoch {epoch + 1}/{epochs}"
        for step in tqdm(range(steps), desc=name, leave=False, disable=not sys.stderr.isatty()):
            images, labels = draw(batch_size, generator)
            loss = F.cross_entropy(_logits(model, images), labels, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step_update(epoch * steps + step + 1)
            total += loss.item()
        accuracy, seconds = _accuracy(model, *held_out), time.perf_counter() - start
        report(f"{name}: loss {total / steps:.3f}, accuracy on new glyphs {accuracy:.1%}, {seconds:.0f} s")
    _write(model, weights)
    saved = embedded.create(weights=weights)  # what was written, read back: it is what others will run
    return {
        "glyph_accuracy": _accuracy(saved, *held_out),
        "digit_accuracy": embedded.digit_accuracy(saved, "val"),
        "seconds": time.perf_counter() - start,
    }


def _logits(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Grey images (B, 1, 32, 32) in [0, 1] to logits (B, 62)."""
    mean, std = embedded.PRETRAINED_CFG["mean"][0], embedded.PRETRAINED_CFG["std"][0]
    return model(((images - mean) / std).expand(-1, 3, -1, -1))


@torch.inference_mode()
def _accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    answers = torch.cat([_logits(model, batch).argmax(1) for batch in images.split(310)])
    return (answers == labels).double().mean().item()


def _write(model: VisionTransformer, weights: Path) -> None:
    """Both files, each whole or not at all; the checksum comes last, so that a torn pair is refused when it is read."""
    data = save({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()})
    write_atomically(weights, data)
    line = f"{hashlib.sha256(data).hexdigest()}  {weights.name}\n"  # as sha256sum writes it
    write_atomically(embedded.checksum_path(weights), line.encode())


_DESCRIPTION = """\
Pretrains the small ViT that ships with this package, on letters and digits drawn
from fonts. It writes embedded_vit.safetensors and embedded_vit.sha256; the
package's own files stay as they are. After Ctrl-C nothing is kept. Defaults
stand in brackets."""

_EPILOG = """\
To use the result:
  vitadapter_ext.embedded.create(weights="embedded_vit/embedded_vit.safetensors")
To make it the default, copy both files into the package's folder assets/."""

_FLAGS = {
    "glyphs": "pictures drawn for an epoch",
    "epochs": "each with new pictures",
    "batch_size": "pictures in a step",
    "lr": "highest learning rate (Muon, cosine)",
    "weight_decay": "on matrices only",
    "label_smoothing": "of the cross entropy",
    "seed": "of the weights and of the pictures",
}


def main(argv: list[str]) -> None:
    """Pretrains as the arguments say, and prints how well the result does."""
    parser = Parser(prog="python -m vitadapter_ext.pretrain", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--out", default="embedded_vit", metavar="DIR", help="folder for the two files [embedded_vit]")
    defaults = pretrain.__kwdefaults__
    for name, text in _FLAGS.items():
        add_flag(parser, name, type(defaults[name]), f"{text} [{defaults[name]}]")
    given = vars(parser.parse_args(argv))
    numbers = {name: value(name, given[name], type(defaults[name])) for name in _FLAGS if name in given}
    result = pretrain(given["out"], **numbers, report=tqdm.write)
    print(
        f"{Path(given['out']) / embedded.WEIGHTS.name}: {result['glyph_accuracy']:.1%} of new glyphs right, "
        f"{result['digit_accuracy']:.1%} of real validation digits, {result['seconds'] / 60:.1f} minutes"
    )


if __name__ == "__main__":
    sys.exit(run(main))
