"""What is a run made of? One frozen `Config`, made from a recipe and what was given on top, and written out as YAML."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from .._text import unknown
from ..cli import value
from ..methods import METHODS, Adapter
from .recipes import RECIPES

AUGMENTATIONS = ("none", "affine", "crop-flip", "random-crop")
HEAD_INITS = ("timm", "zero")
AMP = ("none", "bf16", "fp16")


def _field(default: Any, group: str, text: str, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; each field but `method` is a flag of the same name.

    Raises:
        ValueError: for a value outside what its field accepts.
    """

    data: str | None = _field(None, "data", "images: a folder for each class [digits]", "FOLDER")
    augmentation: str = _field("crop-flip", "data", ", ".join(AUGMENTATIONS))
    squash: bool = _field(False, "data", "resize without the checkpoint's crop")
    batch_size: int = _field(64, "data", "images in a batch")
    workers: int = _field(0, "data", "extra processes for images; they change the draw")

    model: str | None = _field(None, "backbone", "timm name [the embedded small ViT]", "NAME")
    weights: str | None = _field(None, "backbone", ".npz, .safetensors or .pth for --model", "FILE")
    pretrained: bool = _field(False, "backbone", "timm's own weights for --model")
    backbone_drop_path: float = _field(0.0, "backbone", "of the backbone's own blocks")
    head_init: str = _field("timm", "backbone", "of the new head: " + ", ".join(HEAD_INITS))

    method: Any = Adapter()  # an instance of one of METHODS

    epochs: int = _field(30, "training", "passes over the training images")
    optimizer: str = _field("adamw", "training", "timm name")
    lr: float = _field(1e-3, "training", "highest learning rate; cosine to 0")
    weight_decay: float = _field(1e-4, "training", "not on biases, norms and scales")
    warmup_epochs: int = _field(3, "training", "from 0; at most half of a phase")
    clip_grad: float | None = _field(None, "training", "largest norm of the gradient")
    label_smoothing: float = _field(0.0, "training", "share spread over all classes")
    patience: int | None = _field(None, "training", "end a phase after N epochs without a better one", "N")
    seed: int = _field(0, "training", "of everything that is drawn")

    device: str = _field("auto", "run", "cpu, cuda, cuda:1; auto: a GPU if any")
    amp: str = _field("none", "run", "precision: none, bf16 or fp16")
    baselines: bool = _field(False, "run", "also measure the frozen backbone")
    recipe: str = _field("general", "run", "a preset; other flags win [see below]", "NAME")
    out: str | None = _field(None, "run", "new folder [runs/DATA-METHOD-N]", "FOLDER")

    def __post_init__(self):
        for name in ("epochs", "batch_size", "patience"):
            self._check(name, lambda given: given is None or given >= 1, "at least 1")
        for name in ("workers", "warmup_epochs", "weight_decay"):
            self._check(name, lambda given: 0 <= given < float("inf"), "0 or more")
        for name in ("data", "out", "model", "weights"):
            self._check(name, lambda given: given != "", "a name, not an empty word")
        self._check("seed", lambda given: 0 <= given < 2**32, "from 0 to 4294967295")
        for name in ("backbone_drop_path", "label_smoothing"):
            self._check(name, lambda given: 0 <= given < 1, "at least 0 and below 1")
        self._check("lr", lambda given: 0 < given < float("inf"), "a positive number")
        self._check("clip_grad", lambda given: given is None or given > 0, "a positive number")
        for name, known in (
            ("augmentation", AUGMENTATIONS),
            ("head_init", HEAD_INITS),
            ("amp", AMP),
            ("recipe", RECIPES),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        try:
            self.method.training_phases(self.epochs)
        except ValueError as error:
            raise ValueError(f"--epochs is too small: {error}") from error
        if self.model is None and (self.weights is not None or self.pretrained):
            flag = "--pretrained" if self.pretrained else "--weights"
            raise ValueError(f"{flag} needs --model: without it the embedded backbone is used, with its own weights")
        if self.pretrained and self.weights is not None:
            raise ValueError(
                "--weights and --pretrained exclude each other: give the one that the backbone starts from"
            )

    def _check(self, name: str, holds: typing.Callable[[Any], bool], accepted: str) -> None:
        given = getattr(self, name)
        if not holds(given):
            raise ValueError(f"--{name.replace('_', '-')} must be {accepted}, got {given}")

    def to_yaml(self) -> str:
        """The configuration as YAML, fields in their order, the method as a mapping with its `name`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["method"] = {"name": self.method.name, **dataclasses.asdict(self.method)}
        return yaml.safe_dump(_plain(fields), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """The configuration that `to_yaml` wrote."""
        fields = yaml.safe_load(text)
        method = fields.pop("method")
        return configure(**fields, method=method.pop("name"), **method)


def configure(*, method: str | None = None, recipe: str | None = None, **given: Any) -> Config:
    """A `Config` from a recipe's settings and what is `given` on top: fields of `Config`, and of the chosen method.

    Without a recipe it is "embedded" where no `model` is given, "general" otherwise. Values may be strings, as on the
    command line. A recipe's checkpoint gives way to a `model` or `weights` of the caller's.

    Raises:
        ValueError: for an unknown name, a value that is not accepted, an option of a method that was not chosen.
    """
    if recipe is None:
        recipe = "embedded" if given.get("model") is None else "general"
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    preset = RECIPES[recipe]
    method = method or preset.method
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    options = dict(preset.options) if method == preset.method else {}
    settings = {**preset.settings, "recipe": recipe}
    if preset.checkpoint and given.get("model") is None:
        settings |= {"model": preset.checkpoint, "pretrained": given.get("weights") is None}

    hints, method_hints = field_hints(Config), field_hints(METHODS[method])
    for name, text in {**preset.by_method.get(method, {}), **given}.items():
        if name in method_hints:
            options[name] = value(name, text, method_hints[name])
        elif name in hints:
            settings[name] = value(name, text, hints[name])
        else:
            raise _misplaced(name, method)
    return Config(**settings, method=METHODS[method](**options))


def field_hints(kind: type) -> dict[str, Any]:
    """The fields of a dataclass that its caller gives, with their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _misplaced(name: str, method: str) -> ValueError:
    owners = [owner for owner, kind in METHODS.items() if name in field_hints(kind)]
    flag = "--" + name.replace("_", "-")
    if owners:
        return ValueError(f"{flag} is an option of the method {' and '.join(owners)}, not of {method}")
    return unknown("setting", name, [*field_hints(Config), *field_hints(METHODS[method])])


def _plain(found: Any) -> Any:
    """Tuples as lists, so that YAML stays plain."""
    if isinstance(found, dict):
        return {key: _plain(item) for key, item in found.items()}
    return [_plain(item) for item in found] if isinstance(found, (list, tuple)) else found
