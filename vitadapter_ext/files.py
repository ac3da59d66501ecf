"""What is in an adapter file? `save` and `load`: safetensors with one JSON metadata key, bound to one backbone.

Tensors are `adapter.<name>`, `head.<name>` and `override.<name>` with state-dict names. All metadata is one JSON text,
for safetensors writes several keys in random order, and equal runs shall leave equal bytes. Loading executes nothing.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ._atomic import write_atomically
from .attachment import (
    attach_resized,
    attachment,
    backbone_tensors,
    check_bare,
    count_classes,
    tensors_by_kind,
)
from .fingerprint import difference, fingerprint, pack, unpack
from .methods import Method, make_method

FORMAT = 2  # 1 had the fingerprint as it is, where now it is packed
KEY = "vitadapter"

_METADATA_TYPES = {
    "method": str,
    "fields": dict,
    "num_classes": int,
    "class_names": (list, type(None)),
    "backbone": dict,
    "data": dict,
    "fingerprint": dict,
}
_FINGERPRINT_TYPES = {"shape": list, "dtype": str, "hash": str, "values": list}


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    backbone: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> int:
    """Writes what `attach` and training changed: the method's tensors, the head, the overrides, and which backbone they
    belong to. Either the whole file is written or the old one stays.

    Args:
        backbone: {"model": timm name, "arguments": of `create_model` but num_classes, "weights": where they came from};
            what is not given is read off the model, where the weights' origin is not known.
        class_names: in the order of the head's outputs.
        data_config: "input_size" (channels, height, width), "mean", "std", "interpolation", "crop_pct", "crop_mode";
            what is not given is timm's `resolve_model_data_config`.
    Returns: the number of bytes written.
    Raises:
        ValueError: no method is attached, or as many class names as the head has classes are not given.
        OSError: the file cannot be written.
    """
    record = attachment(model)
    num_classes = count_classes(model)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"there are {len(class_names)} class names, but the head has {num_classes} classes")
    metadata = {
        "format": FORMAT,
        "method": record.method.name,
        "fields": dataclasses.asdict(record.method),
        "num_classes": num_classes,
        "class_names": None if class_names is None else list(class_names),
        "backbone": {**_describe_backbone(model), **(backbone or {})},
        "data": {**_describe_data(model), **(data_config or {})},
        "fingerprint": pack(fingerprint({**tensors_by_kind(model)["backbone"], **record.originals})),
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in _by_file_name(model).items()}
    tensors = record.method.stored(tensors, record.originals)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"backbone, class_names and data_config must hold what JSON can: {error}") from error
    data = safetensors.torch.save(tensors, {KEY: text})
    write_atomically(path, data)
    return len(data)


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Puts a saved file onto a fresh backbone: attaches its method, fills its tensors, sets the classifier's size.

    Everything is checked before the model is changed. Tensors take the devices and dtypes of the model's.

    Args:
        model: the backbone that the file belongs to, with a head of any size.
    Returns: the model.
    Raises:
        ValueError: not a file of `save`, a damaged one or one of a newer version; another backbone; tensors that do not
            fit; a model that already has a method.
        OSError: the file cannot be read.
    """
    check_bare(model)
    metadata, tensors = read(path)
    method = method_of(path, metadata)
    if metadata["num_classes"] not in {len(t) for name, t in tensors.items() if name.startswith("head.") and t.dim()}:
        raise ValueError(f"{path} is damaged: it speaks of {metadata['num_classes']} classes, but its head has others")
    problem = difference(metadata["fingerprint"], backbone_tensors(model))
    if problem:
        wanted, given = metadata["backbone"].get("model"), _describe_backbone(model)["model"]
        raise ValueError(f"{path} wants the backbone {wanted}, and this model ({given}) is another one: {problem}")
    shapes = {name.partition(".")[2]: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Tried first on a copy without storage, so that a file that does not fit leaves the model as it was.
    try:
        skeleton = attach_resized(_skeleton(model), method, shapes, metadata["num_classes"])
    except (ValueError, TypeError, RuntimeError) as error:  # torch's, of many lines, for sizes that no tensor can have
        raise ValueError(f"{path} does not fit this model: {str(error).partition(chr(10))[0]}") from error
    _check_fit(path, tensors, method.stored(_by_file_name(skeleton), attachment(skeleton).originals))
    attach_resized(model, method, shapes, metadata["num_classes"])
    with torch.no_grad():
        for name, tensor in _by_file_name(model).items():
            if name in tensors:  # an override that the file has in another form stays as it was
                tensor.copy_(tensors[name])
    return model


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file that `save` wrote, on the CPU; no model is needed.

    Raises:
        ValueError: not such a file, a damaged one, or one of a newer format.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    header = _header(path, data)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # of several types, all about what is in the file
        raise ValueError(f"{path} is damaged: {error}") from error
    text = (header.get("__metadata__") or {}).get(KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file of another program: it has no {KEY!r} metadata")
    return _checked_metadata(path, text), tensors


def method_of(path: str | os.PathLike, metadata: Mapping[str, Any]) -> Method:
    """The method that the metadata of the file at `path` describe; a `ValueError` where there is no such method."""
    try:
        return make_method(metadata["method"], metadata["fields"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a method that this version does not know: {error}") from error


def _header(path: str | os.PathLike, data: bytes) -> dict[str, Any]:
    """Also tells a file that was cut off from one that never was safetensors, which safetensors' own words do not."""
    if data[8:9] != b"{":
        raise ValueError(f"{path} is not a safetensors file ({len(data):,} bytes)")
    needed = header_end = 8 + int.from_bytes(data[:8], "little")
    header = {}
    if len(data) >= header_end:
        try:
            header = json.loads(data[8:header_end])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed += max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from error
    if len(data) < needed:
        raise ValueError(f"{path} is truncated: it has {len(data):,} of at least {needed:,} bytes")
    return header


def _checked_metadata(path: str | os.PathLike, text: str) -> dict[str, Any]:
    damaged = ValueError(f"{path} is damaged: its {KEY!r} metadata cannot be read")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise damaged
    if metadata["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {metadata['format']}, this version of vitadapter_ext reads up to {FORMAT}: upgrade it"
        )
    if isinstance(packed := metadata.get("fingerprint"), str):
        try:
            metadata["fingerprint"] = unpack(packed)
        except ValueError as error:
            raise damaged from error
    if not _has_types(metadata, _METADATA_TYPES):
        raise damaged
    for entry in metadata["fingerprint"].values():
        if not _has_types(entry, _FINGERPRINT_TYPES) or not all(isinstance(v, (int, float)) for v in entry["values"]):
            raise damaged
    return metadata


def _has_types(mapping: Any, types: Mapping[str, type | tuple[type, ...]]) -> bool:
    return isinstance(mapping, dict) and all(isinstance(mapping.get(key), type_) for key, type_ in types.items())


def _check_fit(path: str | os.PathLike, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path} is damaged: it lacks the tensor {name}")
        if tensors[name].shape != tensor.shape or not tensors[name].is_floating_point():
            given = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            raise ValueError(f"{path} does not fit: its {name} is {given} where {tuple(tensor.shape)} is needed")
    for name in tensors:
        if name not in wanted:
            raise ValueError(f"{path} does not fit: it has the tensor {name}, for which the model has no place")


def _by_file_name(model: nn.Module) -> dict[str, Tensor]:
    kinds = tensors_by_kind(model)
    return {
        f"{kind}.{name}": tensor for kind in ("adapter", "head", "override") for name, tensor in kinds[kind].items()
    }


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are meta tensors: deepcopy takes from its memo what is there."""
    memo = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _describe_backbone(model: nn.Module) -> dict[str, Any]:
    """timm's name of the model and the arguments it was created with, as far as timm has kept them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag")))) or type(model).__name__
    arguments = {
        key: value
        for key, value in getattr(model, "_model_args", {}).items()
        if key != "num_classes" and not key.endswith("_rate") and isinstance(value, (int, float, str, list, tuple))
    }
    image_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is not None:
        arguments["img_size"] = list(image_size)
    return {"model": name, "arguments": arguments, "weights": {}}


def _describe_data(model: nn.Module) -> dict[str, Any]:
    data = resolve_model_data_config(model)
    # timm's is the size of the pretrained weights' images, also where the model was made for another one.
    image_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is not None:
        data["input_size"] = (data["input_size"][0], *image_size)
    return data
