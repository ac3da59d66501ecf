"""How does what a method added to one module go into that module's linear layers, and come out again?

An adapted module that owns the layers is `Foldable`: `fuse()` gives them new weights, takes the method's children away
and gives the module timm's class back. timm's `reparameterize_model` calls `fuse()` on every module that has one, and
`merge` does the same. The way back is kept in the module's `__dict__`: outside the state dict, along with deepcopy and
pickle.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "_vitadapter_folded"  # of the record in the __dict__ of a folded module


@dataclass
class Folded:
    """What it takes to unfold a module."""

    adapted: type  # its class before
    originals: dict[str, nn.Parameter]  # CPU copies of the parameters that have another value now
    children: dict[str, nn.Module]  # what the method had added


@dataclass
class LinearMap:
    """x ↦ x + (x·first)·second + shift, for x (..., dim); float64 on the CPU.

    Attributes:
        first: (dim, rank); second: (rank, dim); shift: (dim,).
    """

    first: Tensor
    second: Tensor
    shift: Tensor


class Foldable:
    """A mixin for adapted modules, in front of timm's class, which is to be their last base."""

    added: Sequence[str]  # the names of the method's children

    def can_fold(self) -> bool:
        """Whether there are weights with which timm's class computes the same."""
        return True

    def folded(self) -> dict[str, Tensor]:
        """Those weights: new values of the module's own parameters, by name.

        Raises:
            ValueError: a layer has no bias where one is needed.
        """
        raise NotImplementedError

    @torch.inference_mode(False)
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Folds the module in place and returns it; one that cannot be folded stays as it is."""
        if not self.can_fold():
            return self
        values = self.folded()
        parameters = {name: self.get_parameter(name) for name in values}
        # First of all, so that `unfold_all` can also end what was interrupted.
        self.__dict__[_KEY] = Folded(
            type(self),
            {name: nn.Parameter(to_cpu(p).clone(), p.requires_grad) for name, p in parameters.items()},
            {name: self._modules[name] for name in self.added},
        )
        for name, p in parameters.items():
            p.data = values[name].to(p.device, p.dtype)
            p.requires_grad_(False)  # unfolding would lose what it learns now
            p.grad = None
        for name in self.added:
            delattr(self, name)
        self.__class__ = type(self).__bases__[-1]
        return self


@torch.inference_mode(False)
def unfold_all(model: nn.Module, leave: Container[str] = ()) -> None:
    """The reverse of every `fuse()`, but of the modules named in `leave`, exactly: original weights, on the devices and
    in the dtypes of the present ones."""
    modules = {name: module for name, module in folded_modules(model).items() if name not in leave}
    moves = {name: _move(module) for name, module in modules.items()}
    first = next(filter(None, moves.values()), {})
    # What has no layers of its own goes where the first of the others is; and before them, so that after an
    # interruption there is still one to say it.
    for name in sorted(modules, key=lambda name: bool(moves[name])):
        _unfold(modules[name], moves[name] or first)


def _move(module: nn.Module) -> dict[str, Any]:
    """Arguments of `to()` that bring what was taken away to where the module's layers have gone since."""
    for name, original in record_of(module).originals.items():
        p = module.get_parameter(name)
        return {"device": p.device, "dtype": p.dtype if p.dtype != original.dtype else None}
    return {}


def _unfold(module: nn.Module, move: dict[str, Any]) -> None:
    record = record_of(module)
    for name, original in record.originals.items():
        p = module.get_parameter(name)
        p.data = original.data.to(p.device, p.dtype)
        p.requires_grad_(original.requires_grad)
    for name, child in record.children.items():
        # `model.to(...)` and `model.train()` have not reached it in the meantime.
        module.add_module(name, child.to(**move).train(module.training))
    module.__class__ = record.adapted
    del module.__dict__[_KEY]


def folded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The folded modules of a model by name."""
    return {name: module for name, module in model.named_modules() if _KEY in module.__dict__}


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the parameters were that folding has given new values, by their names in the model."""
    return {
        f"{owner}.{name}" if owner else name: original
        for owner, module in folded_modules(model).items()
        for name, original in record_of(module).originals.items()
    }


def record_of(module: nn.Module) -> Folded:
    """What a folded module was before."""
    return module.__dict__[_KEY]


def forget(module: nn.Module) -> None:
    """Makes it impossible to unfold the module, and frees what that needed."""
    del module.__dict__[_KEY]


def behind(linear: nn.Linear, name: str, seen: LinearMap) -> dict[str, Tensor]:
    """New parameters, by name behind `name`, with which `linear` makes of x what it makes of `seen`'s image of x:
    W + (W·secondᵀ)·firstᵀ and b + W·shift, computed in float64.

    Raises:
        ValueError: it is no plain linear layer, or has no bias, and the shift is not 0.
    """
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__}, and only a plain nn.Linear can be given new weights")
    weight = to_cpu(linear.weight).double()
    values = {f"{name}.weight": weight + (weight @ seen.second.T) @ seen.first.T}
    if linear.bias is not None:
        values[f"{name}.bias"] = to_cpu(linear.bias).double() + weight @ seen.shift
    elif seen.shift.any():
        raise ValueError(f"{name} has no bias, and what comes before it adds a constant that has to go there")
    return values


def to_cpu(tensor: Tensor) -> Tensor:
    """Without its graph, on the CPU; a meta tensor, which holds nothing to be moved, as it is."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()
