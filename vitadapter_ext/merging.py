"""How does a method's effect get into a model's own weights, and out again? `merge` and `unmerge`."""

from collections import Counter

from torch import nn

from .attachment import attachment, release, tensors_by_kind
from .folding import Foldable, folded_modules, forget, record_of, unfold_all


def merge(model: nn.Module, keep: bool = True) -> nn.Module:
    """Folds what the method added into the frozen linear layers: in evaluation mode the same logits up to rounding,
    from a plain timm model, whose state dict has timm's own names.

    The new weights are computed in float64 and rounded once. Trained tensors of the backbone and the head stay as they
    are. `reparameterize_model` of timm does the same as keep=True. A baseline that adds nothing is merged already.

    Args:
        model: with a method attached that can be merged.
        keep: whether the original weights and the method stay in CPU memory: then `unmerge` restores them, and `save`,
            `summary`, `disabled` and `detach` go on working. Otherwise the method is gone, as after `detach`; this also
            drops them from a model that is merged.
    Returns: the model.
    Raises:
        ValueError: no method is attached, or one that is no linear map; the model is merged already; a layer lacks a
            bias that is needed, or shares its weight with another. The model is unchanged.
    """
    method = attachment(model).method
    method.check_mergeable()
    if any(isinstance(module, Foldable) for module in model.modules()):
        _fold_all(model)
    elif keep and folded_modules(model):
        raise ValueError(f"{method} is already merged into this model: unmerge(model) takes it out again")
    if not keep:
        for module in folded_modules(model).values():
            forget(module)
        release(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes `merge` exactly: the original weights, on the device and in the dtype of the present ones, and the method.

    Returns: the model.
    Raises:
        ValueError: no method is attached, as after merge(model, keep=False), or it is not merged.
    """
    method = attachment(model).method
    if tensors_by_kind(model)["adapter"] and not folded_modules(model):
        raise ValueError(f"{method} is not merged into this model: merge(model) first")
    unfold_all(model)
    return model


def _fold_all(model: nn.Module) -> None:
    before = folded_modules(model)  # by timm, where only a part of the model was reparameterized
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    try:
        for name, module in model.named_modules():
            if isinstance(module, Foldable):
                _fold(name, module, uses)
    except BaseException:
        unfold_all(model, leave=before)
        raise


def _fold(name: str, module: Foldable, uses: Counter[int]) -> None:
    try:
        module.fuse()
    except ValueError as error:
        raise ValueError(f"{name} cannot be merged: {error}") from error
    for own in record_of(module).originals:
        if uses[id(module.get_parameter(own))] > 1:
            raise ValueError(f"{name}.{own} cannot be merged: it is shared with another layer")
