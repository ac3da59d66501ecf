"""How does a method get onto a model and off again? `attach`, `detach`, `disabled`, and the record they leave there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .folding import folded_modules, original_parameters, record_of, to_cpu, unfold_all
from .methods.base import Method, Shapes

_KEY = "_vitadapter"  # of the record in the model's __dict__


@dataclass
class Attachment:
    """What `attach` did. Names and copies only, no modules: so it goes along with deepcopy and pickle."""

    method: Method
    requires_grad: dict[str, bool]  # of every parameter, as it was
    originals: dict[str, Tensor]  # CPU copies of the overrides
    head: dict[str, Tensor]  # CPU copy of the head's tensors
    num_classes: int
    classes: dict[str, type] = field(default_factory=dict)  # module → the class it had
    added: dict[str, list[str]] = field(default_factory=dict)  # module → the attributes and children it got
    disabled: bool = False


def attach(model: nn.Module, method: Method) -> nn.Module:
    """Puts `method` onto a timm model in place, and freezes all but the method's tensors and the head.

    Pass the model itself where it runs under `torch.compile`, not the wrapper, which sees the change by itself.

    Args:
        model: a timm model with a head and without batch statistics; for adapters, of `sites.ADAPTED_BLOCKS`.
        method: such as `Adapter(rank=8)`.
    Returns: the model.
    Raises:
        ValueError: a model that has no place for the method, has no head, or already has a method; it is unchanged.
    """
    return attach_resized(model, method)


def attach_resized(
    model: nn.Module, method: Method, shapes: Shapes | None = None, num_classes: int | None = None
) -> nn.Module:
    """`attach` with the sizes of a saved file: `shapes` of its tensors and `num_classes` of its head."""
    if not isinstance(method, Method):
        raise ValueError(f"method is {method!r}; it must be an instance such as Adapter(rank=8)")
    check_bare(model)
    head = head_tensors(model)
    if not head and not num_classes:
        raise ValueError(f"this {type(model).__name__} has no classifier: create it with num_classes=N")
    overrides = set(method.overrides(model)) - set(head)
    record = Attachment(
        method,
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        originals={name: to_cpu(p).clone() for name, p in model.named_parameters() if name in overrides},
        head={name: to_cpu(t).clone() for name, t in head.items()},
        num_classes=count_classes(model),
    )
    before = {name: (module, type(module), _attributes(module)) for name, module in model.named_modules()}
    try:
        method.insert(model, shapes)
        _check_no_running_statistics(model)
        record.classes, record.added = _changes(before)
        if num_classes is not None and num_classes != record.num_classes:
            _set_classes(model, num_classes)
    except BaseException:
        record.classes, record.added = _changes(before)
        _undo(model, record)
        raise
    model.__dict__[_KEY] = record
    for name, added in record.added.items():
        module = model.get_submodule(name)
        for child in filter(None, map(module._modules.get, added)):
            child.train(module.training)
    trained = tensors_by_kind(model)
    for name, p in model.named_parameters():
        if name not in trained["adapter"]:  # those ask for what the method has them ask
            p.requires_grad_(name in trained["head"] or name in trained["override"])
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes `attach` exactly: classes, children, head, overridden tensors and `requires_grad` are as they were.

    A merged model is unmerged first.

    Returns: the model.
    Raises:
        ValueError: no method is attached, or a tensor that it trained has been resized with the images since.
    """
    record = attachment(model)
    _check_sizes(model, record.originals)
    unfold_all(model)
    _undo(model, record)
    del model.__dict__[_KEY]
    return model


def release(model: nn.Module) -> None:
    """Ends an attachment and leaves all weights as they are."""
    record = attachment(model)
    _take_off(model, record)
    _restore_requires_grad(model, record)
    del model.__dict__[_KEY]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with`, `model` answers as the frozen backbone under the present head.

    Raises:
        ValueError: as `detach`, or the model is inside another `disabled`.
    """
    record = attachment(model)
    originals = {**original_parameters(model), **record.originals}
    _check_sizes(model, originals)
    parameters = {name: model.get_parameter(name) for name in originals}
    trained = {name: p.data for name, p in parameters.items()}
    adapted = {name: type(model.get_submodule(name)) for name in record.classes}
    # torch 2.11 compiles on past a changed class, but sees that an attribute which it has read is gone.
    attributes = [
        (module.__dict__, name, module.__dict__[name])
        for module, names in ((model.get_submodule(owner), added) for owner, added in record.added.items())
        for name in names
        if name in module.__dict__
    ]
    try:
        record.disabled = True
        for name, cls in record.classes.items():
            model.get_submodule(name).__class__ = cls
        for owner, name, _ in attributes:
            del owner[name]
        for name, p in parameters.items():
            # Through .data, so that a graph built before still has its backward afterwards.
            p.data = originals[name].detach().to(p.device, p.dtype, copy=True)
        yield model
    finally:
        for name, p in parameters.items():
            p.data = trained[name]
        for name, cls in adapted.items():
            model.get_submodule(name).__class__ = cls
        for owner, name, value in attributes:
            owner[name] = value
        record.disabled = False


def attachment(model: nn.Module) -> Attachment:
    """The record on a model that has a method attached and is not inside `disabled`; a `ValueError` otherwise."""
    _check_unwrapped(model)
    record = model.__dict__.get(_KEY)
    if record is None:
        raise ValueError(f"no method is attached to this {type(model).__name__}: attach(model, method) first")
    if record.disabled:
        raise ValueError("the model is inside `with disabled(model)`: leave it first")
    return record


def tensors_by_kind(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters and saved buffers by state-dict name, a shared one once, under four kinds: "adapter" (what the method
    added), "head", "override" (trained tensors of the backbone) and "backbone" (frozen ones); of a merged model what
    they were before."""
    record = attachment(model)
    added = tuple(_join(module, name) for module, names in record.added.items() for name in names)
    tensors = {**_saved_tensors(model), **original_parameters(model)}
    for owner, module in folded_modules(model).items():
        for child, taken in record_of(module).children.items():
            tensors |= {_join(owner, child, name): tensor for name, tensor in _saved_tensors(taken).items()}
    head = head_tensors(model)
    kinds = {"adapter": {}, "head": {}, "override": {}, "backbone": {}}
    for name, tensor in tensors.items():
        if name in added or name.startswith(tuple(f"{prefix}." for prefix in added)):
            kind = "adapter"
        elif name in head:
            kind = "head"
        else:
            kind = "override" if name in record.originals else "backbone"
        kinds[kind][name] = tensor
    return kinds


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `get_classifier()`, of both heads where there are two, by state-dict name."""
    heads = [module for module in _heads(model) if isinstance(module, nn.Module)]
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(head)]}.{name}": tensor for head in heads for name, tensor in _saved_tensors(head).items()}


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model without a method, its head's left out, by state-dict name."""
    head = head_tensors(model)
    return {name: tensor for name, tensor in _saved_tensors(model).items() if name not in head}


def count_classes(model: nn.Module) -> int:
    """How many classes the head tells apart; a head that was put there by hand is believed before `num_classes`."""
    return getattr(_heads(model)[0], "out_features", getattr(model, "num_classes", 0))


def _heads(model: nn.Module) -> tuple:
    if not hasattr(model, "get_classifier"):
        raise ValueError(f"this {type(model).__name__} has no get_classifier(): a timm model is needed")
    heads = model.get_classifier()
    return heads if isinstance(heads, tuple) else (heads,)


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict().keys()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def _check_unwrapped(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is wrapped by torch.compile: pass the model itself")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be a timm model")


def check_bare(model: nn.Module) -> None:
    """Raises a `ValueError` that names the method where one is attached already."""
    _check_unwrapped(model)
    if _KEY in model.__dict__:
        raise ValueError(f"{model.__dict__[_KEY].method} is already attached to this model: detach(model) first")


def _check_no_running_statistics(model: nn.Module) -> None:
    for name, _ in model.named_buffers():
        if name.endswith("running_mean"):
            raise ValueError(
                f"this {type(model).__name__} keeps batch statistics ({name}), which training changes though they are "
                "frozen: a model without batch normalisation is needed"
            )


def _attributes(module: nn.Module) -> set[str]:
    return {*module.__dict__, *module._modules, *module._parameters, *module._buffers}


def _changes(before: dict[str, tuple[nn.Module, type, set[str]]]) -> tuple[dict[str, type], dict[str, list[str]]]:
    """What a method did to the modules it found: the classes that they had, and the attributes that are new."""
    classes = {name: cls for name, (module, cls, _) in before.items() if type(module) is not cls}
    added = {name: sorted(_attributes(module) - had) for name, (module, _, had) in before.items()}
    return classes, {name: new for name, new in added.items() if new}


def _undo(model: nn.Module, record: Attachment) -> None:
    _take_off(model, record)
    if {n: t.shape for n, t in head_tensors(model).items()} != {n: t.shape for n, t in record.head.items()}:
        _set_classes(model, record.num_classes)
    with torch.no_grad():
        for name, tensor in _saved_tensors(model).items():
            original = record.head.get(name, record.originals.get(name))
            if original is not None:
                tensor.copy_(original)
    _restore_requires_grad(model, record)


def _take_off(model: nn.Module, record: Attachment) -> None:
    for owner, names in record.added.items():
        module = model.get_submodule(owner)
        for name in _attributes(module).intersection(names):  # folding has taken some away
            delattr(module, name)
    for module, cls in record.classes.items():
        model.get_submodule(module).__class__ = cls


def _restore_requires_grad(model: nn.Module, record: Attachment) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))


def _check_sizes(model: nn.Module, originals: dict[str, Tensor]) -> None:
    for name, original in originals.items():
        now = model.get_parameter(name)
        if now.shape != original.shape:
            raise ValueError(
                f"{name} was {tuple(original.shape)} when the method was attached and is {tuple(now.shape)} now: "
                "give the model its former input size first"
            )


def _set_classes(model: nn.Module, num_classes: int) -> None:
    """timm's `reset_classifier`, with the new head where the backbone is and in its dtype (older timm forgets both)."""
    backbone = next(model.parameters())
    model.reset_classifier(num_classes)
    for head in _heads(model):
        head.to(backbone.device, backbone.dtype)


def _join(*names: str) -> str:
    """A state-dict name from its parts, of which the model's own is empty."""
    return ".".join(filter(None, names))
