"""What is a method? A frozen dataclass of settings that says what it adds to a backbone and what else it trains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._text import unknown

POSITIONS = ("attn", "mlp")  # of a block's two branches
Shapes = Mapping[str, tuple[int, ...]]


def option(default: Any, text: str) -> Any:
    """A field of a method with the words that a command's `--help` says about it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Method:
    """A way to fine-tune; subclasses add fields, check them in `__post_init__`, and override the hooks they need.

    `attach` finds what `insert` added by comparing the model before and after, so a method keeps no books.
    """

    name: ClassVar[str]  # on the command line and in files
    description: ClassVar[str]

    def insert(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        """Adds the method's modules to `model`, on the devices of the modules they serve.

        Args:
            shapes: of a saved file's tensors by state-dict name; where given, sizes come from here and not from the
                fields.
        Raises:
            ValueError: the model has no place for them; nothing has been changed then.
        """

    def overrides(self, model: nn.Module) -> Iterable[str]:
        """Names of the parameters of the bare backbone that are trained too; the head's count as the head's."""
        return ()

    def stored(self, tensors: dict[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of an attached model's tensors; loading it onto the bare backbone gives the same function.

        Args:
            tensors: what was trained, by its name in a file: "adapter.…", "head.…" and "override.…" with state-dict
                names; also meta tensors. A file's own tensors are returned as they are.
            originals: the overrides as they were before, by state-dict name.
        """
        return tensors

    def check_mergeable(self) -> None:
        """Raises a `ValueError` that says why, where linear layers cannot compute what the method added.

        A method that can be merged adds to `folding.Foldable` modules alone, or nothing at all.
        """

    def training_phases(self, epochs: int) -> list[int]:
        """Epochs of each phase of a training of `epochs` in all; a phase has its own optimizer and schedule.

        Raises:
            ValueError: too few epochs.
        """
        return [epochs]

    def after_phase(self, model: nn.Module, optimizer: Optimizer, phase: int) -> bool:
        """Edits the model, and the optimizer's state to match, after each phase (from 1); returns whether it did."""
        return False

    def widths(self, model: nn.Module) -> dict[str, int]:
        """The number of neurons of each module of the method by name, where phases change it."""
        return {}


def beside(weight: Tensor) -> dict[str, Any]:
    """Device and dtype of what stands beside a backbone's weight: the kernels mix float32 with low dtypes, but not with
    float64."""
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}


def norm_names(model: nn.Module) -> list[str]:
    """The parameters of all normalisation layers."""
    # By the class's name: timm has its own norm classes, fused and not, which share no base.
    layers = {name: module for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    return [name for prefix, layer in layers.items() for name, _ in layer.named_parameters(prefix, recurse=False)]


def norms_and_biases(model: nn.Module, norms: bool, biases: bool) -> list[str]:
    """The overrides of a method that also trains every normalisation layer, or the linear biases inside the blocks."""
    from ..sites import find_blocks  # here, so that naming a method need not wait for timm

    of_norms = norm_names(model)
    names = list(of_norms) if norms else []
    if biases:
        # Not only those of `nn.Linear`: EVA's and BEiT's attentions hold the bias of `qkv` as a bare `q_bias`.
        for prefix, block in find_blocks(model).items():
            inside = (name for name, _ in block.named_parameters(prefix) if name.endswith("bias"))
            names += [name for name in inside if name not in of_norms]
    return names


def check_positions(positions: tuple[str, ...] | str) -> tuple[str, ...]:
    """The positions as a tuple; raises a `ValueError` that names what is not one of `POSITIONS`."""
    positions = tuple(positions) if isinstance(positions, (tuple, list)) else (positions,)
    for position in positions:
        if position not in POSITIONS:
            raise unknown("position", position, POSITIONS)
    if not positions or len(set(positions)) < len(positions):
        raise ValueError(f"positions are {positions}; they must be attn, mlp or both")
    return positions


def check_flags(method: Method, *names: str) -> None:
    """Raises a `ValueError` that names the first of these fields that is not True or False."""
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be True or False")
