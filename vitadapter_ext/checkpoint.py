"""How does an adapter file become an ordinary timm checkpoint? `merge_file`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import files
from ._atomic import write_atomically
from .merging import merge
from .train.backbone import recreate

KEY = "vitadapter_merged"
TOLERANCE = 1e-4  # of the merged model's logits, relative to the adapted model's


@dataclass
class Merged:
    """What `merge_file` wrote.

    Attributes:
        path, bytes: the file and its size.
        metadata: the adapter file's: "method", "fields", "num_classes", "class_names", "backbone", "data".
        difference: of the merged and the adapted model's logits on random images, root mean squares, relative.
    """

    path: Path
    bytes: int
    metadata: dict[str, Any]
    difference: float


def merge_file(adapter: str | os.PathLike, out: str | os.PathLike, weights: str | os.PathLike | None = None) -> Merged:
    """Writes the backbone with the method folded in and the head, under timm's own names, as safetensors, with the
    adapter file's description as JSON metadata. Either the whole file is written or none.

    The merged model is compared with the adapted one before anything is written.

    Args:
        adapter: a file of `save`, or of a training run.
        out: the new file, ending in .safetensors.
        weights: the backbone's .npz, .safetensors or .pth; by default they are taken where the adapter file says that
            they came from.
    Raises:
        ValueError: `out` exists or has another ending; not an adapter file, one of a method that cannot be merged or of
            another backbone; weights of unknown origin; logits that differ.
        OSError: a file cannot be read or written, or weights cannot be fetched.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"the merged file must end in .safetensors, got {out}")
    if out.exists():
        raise ValueError(f"the file {out} exists: name a new one")
    metadata, _ = files.read(adapter)
    files.method_of(adapter, metadata).check_mergeable()
    images = torch.randn(4, *_input_size(adapter, metadata), generator=torch.Generator().manual_seed(0))
    model = recreate(metadata["backbone"], weights)
    files.load(model, adapter).eval()
    adapted = _logits(model, images)
    merged = _logits(merge(model, keep=False), images)
    difference = float((merged - adapted).norm() / adapted.norm().clamp(min=1e-30))
    if not difference <= TOLERANCE:  # written so that a NaN fails
        raise ValueError(
            f"the merged model's logits differ by {difference:.2g} of the adapted model's: nothing is written"
        )
    kept = ("method", "fields", "num_classes", "class_names", "backbone", "data")
    described = {key: metadata[key] for key in kept}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors, {KEY: text})
    write_atomically(out, data)
    return Merged(out, len(data), described, difference)


def _input_size(adapter: str | os.PathLike, metadata: dict[str, Any]) -> list[int]:
    size = metadata["data"].get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) and 0 < n < 10_000 for n in size):
        raise ValueError(f"{adapter} is damaged: the size of its images is {size!r}")
    return size


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return model(images).double()
    except (RuntimeError, AssertionError) as error:  # timm asserts the size that the model was made for
        raise ValueError(f"the backbone does not take images of {tuple(images.shape[1:])}: {error}") from error
