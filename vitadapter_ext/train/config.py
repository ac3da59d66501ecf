"""What is a run made of? One frozen `Config`, made from a recipe and what was given on top, and written out as YAML."""

import dataclasses
import difflib
import itertools
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .._text import unknown
from ..cli import sentence, value
from ..data import catalog
from ..methods import METHODS, Adapter
from .recipes import RECIPES

AUGMENTATIONS = ("none", "affine", "crop-flip", "random-crop", "random-resized-crop")
HEAD_INITS = ("timm", "zero")
AMP = ("none", "bf16", "fp16")
SELECT = ("best", "last")

_NAMES = ("suite", "dataset", "data", "method", "recipe", "out")  # what a file must give as text
_GRID_GROUPS = ("augmentation", "training")  # what may differ between the trainings of a grid, beside the method


def _field(default: Any, group: str, text: str, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; each field but `method` is a flag of the same name.

    Raises:
        ValueError: for a value outside what its field accepts.
    """

    data: str | None = _field(None, "data", "images: a folder for each class, or lists [digits]", "FOLDER")
    dataset: str | None = _field(None, "data", "one by name, under --data [see below]", "NAME")
    train_split: str = _field("train", "data", "of timm's data sets", "SPLIT")
    val_split: str | None = _field(None, "data", "of timm's data sets [15 %% of train]", "SPLIT")
    test_split: str = _field("test", "data", "of timm's data sets", "SPLIT")
    squash: bool = _field(False, "data", "resize without the checkpoint's crop")
    workers: int = _field(0, "data", "extra processes for images; they change the draw")

    model: str | None = _field(None, "backbone", "timm name [the embedded small ViT]", "NAME")
    weights: str | None = _field(None, "backbone", ".npz, .safetensors or .pth for --model", "FILE")
    pretrained: bool = _field(False, "backbone", "timm's own weights for --model")
    backbone_drop_path: float = _field(0.0, "backbone", "of the backbone's own blocks")
    head_init: str = _field("timm", "backbone", "of the new head: " + ", ".join(HEAD_INITS))

    method: Any = Adapter()  # an instance of one of METHODS

    augmentation: str = _field("crop-flip", "augmentation", ", ".join(AUGMENTATIONS))
    auto_augment: str | None = _field(None, "augmentation", "timm's policy, such as rand-m9-mstd0.5-inc1", "POLICY")
    random_erasing: float = _field(0.0, "augmentation", "probability")
    mixup: float = _field(0.0, "augmentation", "alpha; with --cutmix, each batch gets one of both")
    cutmix: float = _field(0.0, "augmentation", "alpha")

    epochs: int = _field(30, "training", "passes over the training images")
    batch_size: int = _field(64, "training", "images in a batch")
    grad_accum: int = _field(1, "training", "batches that make one step together")
    optimizer: str = _field("adamw", "training", "timm name")
    lr: float = _field(1e-3, "training", "highest learning rate, of a cosine")
    lr_base_size: int | None = _field(None, "training", "lr is for N images a step, and scaled to yours", "N")
    min_lr: float = _field(0.0, "training", "the cosine's end")
    weight_decay: float = _field(1e-4, "training", "not on biases, norms and scales")
    warmup_epochs: int = _field(3, "training", "at most half of a phase")
    warmup_lr: float = _field(0.0, "training", "the warm-up's start")
    clip_grad: float | None = _field(None, "training", "largest norm of the gradient")
    label_smoothing: float = _field(0.0, "training", "share spread over all classes")
    patience: int | None = _field(None, "training", "end a phase after N epochs without a better one", "N")

    select: str = _field("best", "protocol", "the epoch: best on val, or last [best; in vtab1k, minitab: last]")
    grid: dict[str, list] | None = _field(
        None, "protocol", "settings to choose from on val: 'lr=1e-3,1e-2 rank=4,8'", "GRID"
    )
    retrain: bool = _field(False, "protocol", "then train on train and val [on in vtab1k, minitab]")
    seed: int = _field(0, "protocol", "of everything that is drawn")

    device: str = _field("auto", "run", "cpu, cuda, cuda:1; auto: a GPU if any")
    amp: str = _field("none", "run", "precision: none, bf16 or fp16")
    checkpointing: bool = _field(False, "run", "activations again in backward: less memory")
    compile: bool = _field(False, "run", "torch.compile the model")
    baselines: bool = _field(False, "run", "also measure the frozen backbone")
    recipe: str = _field("general", "run", "a preset; other flags win [see below]", "NAME")
    out: str | None = _field(None, "run", "new folder [runs/DATA-METHOD-N]", "FOLDER")

    def __post_init__(self):
        for name in ("epochs", "batch_size", "grad_accum", "lr_base_size", "patience"):
            self._check(name, lambda given: given is None or given >= 1, "at least 1")
        for name in ("workers", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            self._check(name, lambda given: 0 <= given < float("inf"), "0 or more")
        for name in ("data", "out", "model", "weights", "auto_augment", "train_split", "val_split", "test_split"):
            self._check(name, lambda given: given != "", "a name, not an empty word")
        self._check("seed", lambda given: 0 <= given < 2**32, "from 0 to 4294967295")
        for name in ("backbone_drop_path", "label_smoothing"):
            self._check(name, lambda given: 0 <= given < 1, "at least 0 and below 1")
        self._check("random_erasing", lambda given: 0 <= given <= 1, "from 0 to 1")
        self._check("lr", lambda given: 0 < given < float("inf"), "a positive number")
        for name in ("min_lr", "warmup_lr"):
            peak = f"from 0 to the highest learning rate, {self.peak_lr:g}"
            self._check(name, lambda given: 0 <= given <= self.peak_lr, peak)
        self._check("clip_grad", lambda given: given is None or given > 0, "a positive number")
        for name, known in (
            ("augmentation", AUGMENTATIONS),
            ("head_init", HEAD_INITS),
            ("amp", AMP),
            ("select", SELECT),
            ("recipe", RECIPES),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        try:
            self.method.training_phases(self.epochs)
        except ValueError as error:
            raise ValueError(f"--epochs is too small: {error}") from error
        catalog.check(self.dataset, self.data)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name.endswith("_split") and given != field.default and not catalog.is_timms(self.dataset):
                flag = "--" + field.name.replace("_", "-")
                raise ValueError(f"{flag} is for timm's data sets, such as --dataset torch/image_folder")
        if (self.mixup or self.cutmix) and self.batch_size == 1:
            raise ValueError("--mixup and --cutmix mix the images of a batch: --batch-size must be at least 2")
        if self.patience is not None and self.select == "last":
            raise ValueError("--patience ends at the best epoch, and --select last takes none: give one of them")
        self.trials()
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

    @property
    def peak_lr(self) -> float:
        """The highest learning rate: `lr`, in proportion to the images of a step where `lr_base_size` is given."""
        return self.lr * (self.batch_size * self.grad_accum / self.lr_base_size if self.lr_base_size else 1)

    def trials(self) -> list[tuple[dict[str, Any], "Config"]]:
        """What differs, and the whole configuration, of each training that the grid asks for; of one without a grid."""
        names = list(self.grid or {})
        return [
            (settings := dict(zip(names, values, strict=True)), self._with(settings))
            for values in itertools.product(*(self.grid[name] for name in names))
        ]

    def _with(self, settings: Mapping[str, Any]) -> "Config":
        if not settings:
            return self
        options = {name: chosen for name, chosen in settings.items() if name in field_hints(type(self.method))}
        fields = {name: chosen for name, chosen in settings.items() if name not in options}
        return dataclasses.replace(self, grid=None, method=dataclasses.replace(self.method, **options), **fields)

    def to_yaml(self) -> str:
        """The configuration as YAML, fields in their order, the method as a mapping with its `name`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["method"] = {"name": self.method.name, **dataclasses.asdict(self.method)}
        return yaml.safe_dump(_plain(fields), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """The configuration that `to_yaml` wrote."""
        return configure(**parse_settings(text, "the text"))


def configure(*, method: str | None = None, recipe: str | None = None, **given: Any) -> Config:
    """A `Config` from a recipe's settings and what is `given` on top: fields of `Config`, and of the chosen method.

    Without a recipe it is "general" with a `model`, and without one "minitab" for vtab1k and minitab, else "embedded".
    Values may be strings, as on the command line. A recipe's checkpoint gives way to a `model` or `weights` of the
    caller's.

    Raises:
        ValueError: for an unknown name, a value that is not accepted, an option of a method that was not chosen.
    """
    protocol = catalog.protocol(given.get("dataset"))
    if recipe is None:
        small = "minitab" if protocol else "embedded"
        recipe = small if given.get("model") is None else "general"
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    preset = RECIPES[recipe]
    method = method or preset.method
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    options = dict(preset.options) if method == preset.method else {}
    settings = {**protocol, **preset.settings, "recipe": recipe}
    # A recipe's patience and the protocol's last epoch give way to what was asked for.
    if given.get("select") == "last" and "patience" not in given:
        settings["patience"] = None
    elif (preset.settings | given).get("patience") is not None and "select" not in given:
        settings["select"] = "best"
    if preset.checkpoint and given.get("model") is None:
        settings |= {"model": preset.checkpoint, "pretrained": given.get("weights") is None}

    hints, method_hints = field_hints(Config), field_hints(METHODS[method])
    for name, text in {**preset.by_method.get(method, {}), **given}.items():
        if name in method_hints:
            options[name] = value(name, text, method_hints[name])
        elif name == "grid":
            settings[name] = _parse_grid(text, method)
        elif name in hints:
            settings[name] = value(name, text, hints[name])
        else:
            raise _misplaced(name, method)
    return Config(**settings, method=METHODS[method](**options))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """What a YAML file gives, as keyword arguments of `configure` (and perhaps `suite`).

    Raises:
        ValueError: for what is no mapping of settings; for a setting given twice; for an unknown one, with the nearest
            known.
        OSError: for a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    return parse_settings(text, os.fspath(path))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but for a key given twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"found {key.value!r} for the second time"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """`read_settings` of the text itself; the method is a name beside its options, or a mapping with its `name`."""
    try:
        found = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{where} is not YAML: {error.problem} in line {line}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {sentence(error)}") from error
    method = found.get("method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or (isinstance(method, dict) and "name" not in method):
        raise ValueError(f"{where} must hold settings such as 'lr: 0.01', and a method its name")
    pairs = list(found.items())
    if isinstance(method, dict):
        pairs.remove(("method", method))
        pairs += [("method" if key == "name" else key, setting) for key, setting in method.items()]
    settings: dict[str, Any] = {}
    known = [*field_hints(Config), "suite", *(name for kind in METHODS.values() for name in field_hints(kind))]
    for key, setting in pairs:
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown setting {name!r} in {where}: {hint}--help lists what there is")
        if name in settings:
            raise ValueError(f"{where} has two values for {name}")
        if name in _NAMES and not isinstance(setting, str | None):
            raise ValueError(f"{where} must hold a name for {name}, got {setting!r}")
        settings[name] = setting
    return settings


def on_top(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings with those of the command line over them.

    Another method there drops the options of the file's, and a suite there the file's data set, or the reverse.

    Raises:
        ValueError: both name a recipe, which stands under all settings.
    """
    recipe = settings.get("recipe")
    if recipe is not None and given.get("recipe", recipe) != recipe:
        raise ValueError(
            f"--recipe {given['recipe']} cannot go under the settings of a file that has the recipe {recipe}: take "
            "it out of the file, with the settings that came from it"
        )
    settings = dict(settings)
    method = settings.get("method") or (RECIPES[recipe].method if recipe in RECIPES else None)
    if method is not None and given.get("method", method) != method:
        settings = {name: setting for name, setting in settings.items() if name in (*field_hints(Config), "suite")}
    for name, other in (("suite", "dataset"), ("dataset", "suite")):
        if name in given:
            settings.pop(other, None)
    return {**settings, **given}


def _parse_grid(text: Any, method: str) -> dict[str, list] | None:
    """The settings of a grid and their values: of a mapping, or of text such as "lr=1e-3,1e-2 rank=4,8"."""
    if text is None:
        return None
    if isinstance(text, str):
        pairs = [word.partition("=") for word in text.split()]
        if len({name.replace("-", "_") for name, _, _ in pairs}) < len(pairs):
            raise ValueError(f"--grid has a setting twice: {text!r}")
        text = {name: values.split(",") if values else None for name, _, values in pairs}
    if not isinstance(text, dict) or not all(isinstance(values, list) and values for values in text.values()):
        raise ValueError(f"--grid takes settings and their values, such as 'lr=1e-3,1e-2 rank=4,8', got {text!r}")
    groups = {field.name: field.metadata.get("group") for field in dataclasses.fields(Config)}
    hints = {name: hint for name, hint in field_hints(Config).items() if groups[name] in _GRID_GROUPS}
    hints |= field_hints(METHODS[method])
    grid = {}
    for name, values in text.items():
        name = str(name).replace("-", "_")
        if name not in hints:
            raise unknown("setting of --grid", name, hints)
        grid[name] = [value(name, given, hints[name]) for given in values]
    return grid


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
