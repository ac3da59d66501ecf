"""Where does the backbone come from? The package's own small ViT, or a timm name with timm's weights or a file's."""

import difflib
import hashlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import embedded
from .config import Config


@dataclass
class Backbone:
    """A timm model with the head that it came with, and what is needed to build it again.

    Attributes:
        origin: for the adapter file: {"model": timm name, "arguments": of `create_model`, "weights": where from}.
        code: Python lines that make the same `model`.
        classes: the names of the model's own outputs, where they have any.
    """

    model: nn.Module
    origin: dict[str, Any]
    description: str
    code: list[str]
    classes: tuple[str, ...] = ()


def create(config: Config) -> Backbone:
    """The backbone that the configuration names, in evaluation mode on the CPU.

    Raises:
        ValueError: for an unknown name, or weights that are of another architecture or no weights at all.
        OSError: for weights that are missing or cannot be read or fetched.
    """
    # Drop-path acts in training only, so it is no part of what a saved adapter needs.
    arguments = {"drop_path_rate": config.backbone_drop_path} if config.backbone_drop_path else {}
    name = config.model
    if name is None:
        return _embedded(arguments)
    _check_name(name)
    code = ["import timm, torch, vitadapter_ext"]
    if config.weights is not None:
        path = Path(config.weights)
        model, loading = _from_file(name, path, arguments)
        weights = {"file": path.name, "sha256": _sha256(path)}
        description = f"{name} with the weights of {path}"
        given = ", ".join(f"{key}={value!r}" for key, value in loading.items())
        code.append(f"model = timm.create_model({name!r}, {given})")
    elif config.pretrained:
        model = _pretrained(name, arguments)
        tag = model.pretrained_cfg["tag"]
        weights = {"pretrained": tag}
        description = f"{name} with timm's pretrained weights ({tag or 'default'})"
        code.append(f"model = timm.create_model({name!r}, pretrained=True)")
    else:
        torch.manual_seed(config.seed)
        model = _create(name, arguments)
        weights = {"random": config.seed}
        description = f"{name} with random weights (give --pretrained or --weights FILE for trained ones)"
        code += [f"torch.manual_seed({config.seed})  # its weights are random", f"model = timm.create_model({name!r})"]
    return Backbone(model.eval(), {"model": name, "arguments": {}, "weights": weights}, description, code)


def recreate(origin: Mapping[str, Any], weights: str | os.PathLike | None = None) -> nn.Module:
    """The backbone that an adapter file describes, in evaluation mode on the CPU, with a head of any size.

    Args:
        origin: `Backbone.origin`, or what `save` reads off a model.
        weights: a file, in place of where `origin` says that they came from.
    Raises:
        ValueError: as `create`; weights of an unknown origin.
        OSError: as `create`.
    """
    name, arguments, source = origin.get("model"), origin.get("arguments"), origin.get("weights")
    kinds = {"pretrained": str, "random": int}
    if (
        not isinstance(name, str)
        or not isinstance(arguments, dict)
        or not isinstance(source, dict)
        or not all(isinstance(source[key], kind) for key, kind in kinds.items() if key in source)
    ):
        raise ValueError("the adapter file does not describe its backbone")
    # Those of the architecture only: a file has no say in what is downloaded or read.
    foreign = sorted(set(arguments) & set(inspect.signature(timm.create_model).parameters))
    if foreign:
        raise ValueError(f"the adapter file asks for its backbone with {', '.join(foreign)}, which is refused")
    if weights is None and "bundled" in source:
        return embedded.create()
    _check_name(name)
    if weights is not None:
        model, _ = _from_file(name, Path(weights), arguments)
    elif "pretrained" in source:
        model = _pretrained(".".join(filter(None, (name.partition(".")[0], source["pretrained"]))), arguments)
    elif "random" in source:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source["random"])
            model = _create(name, arguments)
    else:
        came = f"came from the file {source['file']}" if "file" in source else "are of unknown origin"
        raise ValueError(f"the weights of its backbone, {name}, {came}: name the file with --weights")
    return model.eval()


def _embedded(arguments: dict[str, Any]) -> Backbone:
    model = embedded.create()
    if arguments:
        trained = model.state_dict()
        model = timm.create_model(
            **embedded.ARGUMENTS, **arguments, pretrained_cfg=dict(embedded.PRETRAINED_CFG)
        ).eval()
        model.load_state_dict(trained)
    kept = {key: given for key, given in embedded.ARGUMENTS.items() if key not in ("model_name", "num_classes")}
    weights = {"bundled": embedded.WEIGHTS.name}
    origin = {"model": embedded.ARGUMENTS["model_name"], "arguments": kept, "weights": weights}
    description = "the embedded small ViT of this package (no --model given)"
    code = ["import vitadapter_ext, vitadapter_ext.embedded", "model = vitadapter_ext.embedded.create()"]
    return Backbone(model, origin, description, code, tuple(embedded.CLASSES))


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        family = timm.list_models(architecture.split("_")[0] + "*") or timm.list_models()
        near = difflib.get_close_matches(architecture, family, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}timm.list_models() lists all that timm {timm.__version__} has")
    known = timm.list_pretrained(architecture + ".*")
    if tag and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)
        hint = f"did you mean {near[0]!r}?" if near else "it has no pretrained weights"
        raise ValueError(f"model {architecture!r} has no weights called {tag!r}: {hint}")


def _create(name: str, arguments: dict[str, Any], **loading: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments, **loading)
    except TypeError as error:
        raise ValueError(f"{name} does not take {', '.join(arguments)}: {error}") from error


def _pretrained(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return _create(name, arguments, pretrained=True)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise OSError(
            f"timm's weights for {name} cannot be fetched ({_first_line(error)}); --weights takes a file"
        ) from error


def _from_file(name: str, path: Path, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments of `create_model` that load the file.

    The model gets a head of the file's size first, for then timm insists that every tensor finds its place.
    """
    if path.suffix not in (".npz", ".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"--weights takes a .npz, .safetensors or .pth file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"the weights file {path} does not exist")
    npz = path.suffix == ".npz"
    overlay = {"file": str(path), "custom_load": npz}
    loading = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        if not npz:
            loading["num_classes"] = overlay["num_classes"] = _rows_of_head(name, path)
        model = _create(name, arguments, **loading)
        if npz:
            _check_depth(model, path)
    except OSError:
        raise
    except Exception as error:  # damaged files and foreign tensors raise errors of half a dozen types
        raise ValueError(f"{path} is not a file of weights for {name}: {_first_line(error)}") from error
    return model, loading


def _rows_of_head(name: str, path: Path) -> int:
    """How many classes the file's own head has, 0 where it has none."""
    classifier = timm.get_pretrained_cfg(name).classifier
    first = classifier if isinstance(classifier, str) else classifier[0]
    weight = timm.models.load_state_dict(str(path), weights_only=True).get(f"{first}.weight")
    return 0 if weight is None else len(weight)


def _check_depth(model: nn.Module, path: Path) -> None:
    """timm reads the blocks that the model has; a file of a deeper model would be cut without a word."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        blocks = {part for key in arrays.files for part in key.split("/") if part.startswith("encoderblock_")}
    if blocks and len(blocks) != len(model.blocks):
        raise ValueError(f"it has {len(blocks)} blocks and the model {len(model.blocks)}")


def _first_line(error: Exception) -> str:
    """The part of a loader's error that says what is wrong, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading"):
        lines = lines[1:]
    text = lines[0] if lines and " " in lines[0] else repr(error)  # a KeyError's text is the key alone
    return text if len(text) <= 200 else text[:200] + "…"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
