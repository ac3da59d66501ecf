"""Where does a method sit? A picture of an attached model: the chain of its parts, and below it what is in a block.

`model_parts` and `block_parts` read the model into `Part`s, each with a role and a place; `canvas` draws them.
"""

import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor, nn

from .attachment import attachment, tensors_by_kind
from .canvas import Canvas, Part
from .nn import FusedAdapter, FusedARC, FusedConsolidator
from .nn.consolidator import ConsolidatedLinear, StoredConsolidator
from .parameters import SIZES, outermost_blocks, summary
from .sites import ADAPTED_BLOCKS, ADAPTED_MLPS, CONSOLIDATED

_ROLES = {"adapter": "added", "head": "trained", "override": "trained", "backbone": "frozen"}
# Where the loop of an adapter runs, by the join (`sites.JOINS`).
_PLACES = {"branch": "on the branch", "sum": "after the sum", "normed": "after the sum", "input": "around the branch"}


def draw(model: nn.Module, format: str = "png") -> bytes:
    """A picture of the method on its model as "png", "svg" or "pdf"; meta tensors will do.

    Raises:
        ValueError: no method is attached.
    """
    counts, roles, blocks = summary(model), tensor_roles(model), outermost_blocks(model)
    drawable = {*ADAPTED_BLOCKS, *ADAPTED_BLOCKS.values(), *CONSOLIDATED.values()}
    groups: dict[tuple, dict[str, list[Part]]] = {}  # blocks of the same structure, whatever their sizes
    strange: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        if type(block) in drawable and isinstance(block.mlp, tuple(ADAPTED_MLPS)):
            parts = block_parts(block, roles)
            groups.setdefault(tuple(replace(p, sizes=(), parameters=0) for p in parts), {})[name] = parts
        else:
            strange[name] = block
    canvas = Canvas()
    canvas.chain(model_parts(model, roles))
    for alike in groups.values():
        canvas.heading(_span_of(list(alike), list(blocks)))
        same = list(zip(*alike.values(), strict=True))
        for half, ends in {"attn": ("x", "h"), "mlp": ("h", "out")}.items():
            canvas.half([parts for parts in same if parts[0].half == half], *ends)
    if strange:
        classes = ", ".join(sorted({type(block).__name__ for block in strange.values()}))
        canvas.heading(f"{_span_of(list(strange), list(blocks))}, of class {classes}, whose inside is not drawn")
    method = attachment(model).method
    backbone = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    title = (
        f"{method.name} on {backbone}: {counts.trainable:,} of {counts.total:,} parameters trained "
        f"({counts.trainable / counts.total:.2%})"
    )
    kinds = f"adapter {counts.adapter:,}   head {counts.head:,}   overrides {counts.overrides:,}"
    return canvas.save(title, [kinds, *textwrap.wrap(str(method), 120)], format)


def tensor_roles(model: nn.Module) -> dict[int, str]:
    """The role of each parameter, by `id`."""
    kinds = {name: kind for kind, tensors in tensors_by_kind(model).items() for name in tensors}
    return {id(p): _ROLES[kinds.get(name, "backbone")] for name, p in model.named_parameters()}


def model_parts(model: nn.Module, roles: Mapping[int, str]) -> list[Part]:
    """The chain: what has parameters, in the model's order, neighbouring blocks as one."""
    parts: list[Part] = []
    for is_block, run in groupby(_steps(model, "", outermost_blocks(model)), key=lambda step: step[2]):
        steps = list(run)
        if not is_block:
            found = [_part(name, there, roles, "chain") for name, there, _ in steps]
            # What the method added to the model itself is used inside the blocks: nothing flows through it.
            parts += [replace(part, place="beside") if part.role == "added" else part for part in found]
            continue
        parents = {name.rpartition(".")[0] for name, _, _ in steps}
        name = parents.pop() if len(parents) == 1 else f"{steps[0][0]} … {steps[-1][0]}"
        inside = nn.ModuleList(block for _, block, _ in steps)
        parts.append(replace(_part(name, inside, roles, "chain", words=f"× {len(steps)}"), sizes=()))
    return parts


def _steps(module: nn.Module, path: str, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, object, bool]]:
    """(name, what is there, whether it is a block), down to where no block is inside."""
    own = dict(module.named_parameters(recurse=False))  # class token, position embedding: added after the first child
    for name, child in module.named_children():
        full = f"{path}{name}"
        if full in blocks:
            yield full, child, True
        elif any(block.startswith(f"{full}.") for block in blocks):
            yield from _steps(child, f"{full}.", blocks)
        elif any(True for _ in child.parameters()):
            yield full, child, False
        if own:
            yield "\n".join(path + key for key in own), own, False
            own = {}


def block_parts(block: nn.Module, roles: Mapping[int, str]) -> list[Part]:
    """What is in a block of `sites.ADAPTED_BLOCKS`, adapted or not, from left to right in each half."""
    parts: list[Part] = []
    attn, mlp = block.attn, block.mlp
    first = [name for name, _ in attn.named_children() if "norm" not in name and name not in ("arc", "proj")]
    norms = [name for name, _ in attn.named_children() if "norm" in name and name not in ("q_norm", "k_norm")]
    into = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear) and name != "fc2"]
    gated = sum(mlp.get_submodule(name).out_features for name in into) != mlp.fc2.in_features
    inside = {
        "attn": [
            ["attn.arc"],
            [f"attn.{name}" for name in first],
            ["attn.q_norm", "attn.k_norm"],
            ["attn"],
            [f"attn.{name}" for name in norms],
            ["attn.proj"],
        ],
        "mlp": [
            ["mlp.arc"],
            [f"mlp.{name}" for name in into],
            ["mlp.act"],
            ["mlp.norm"],
            ["mlp.adapter_inner"],
            ["mlp.fc2"],
        ],
    }
    words = {"attn": type(attn).__name__, "mlp.act": type(mlp.act).__name__ + (", gated" if gated else "")}
    for number, half in enumerate(inside, start=1):
        columns = [[f"norm{number}"], *inside[half], [f"ls{number}", f"gamma_{number}"]]
        join = getattr(block, f"join_{half}", "plain")
        if join != "plain":
            columns += [[f"adapter_{half}.norm"], [f"adapter_{half}"]]
        for column, names in enumerate(columns):
            for name in (part for layer in names for part in (layer, f"{layer}.consolidator")):
                found = _find(block, name)
                if name == "attn":  # the attention itself: what its children do not hold
                    found = dict(found.named_parameters(recurse=False))
                if name in words or (found is not None and _tensors(found)):
                    place = _PLACES[join] if name.startswith("adapter_") else "branch"
                    place = "on the branch" if name in ("attn.arc", "mlp.arc", "mlp.adapter_inner") else place
                    parts.append(_part(name, found, roles, place, half, column, words.get(name, "")))
    return parts


def _find(module: nn.Module, path: str) -> object:
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), module)


def _tensors(found: object) -> dict[str, Tensor]:
    if isinstance(found, nn.Module):
        # The LayerNorm of an adapter's own is a part by itself, and so is what stands beside a linear layer.
        if isinstance(found, FusedAdapter):
            return {name: p for name, p in found.named_parameters() if not name.startswith("norm.")}
        return dict(found.named_parameters(recurse=not isinstance(found, ConsolidatedLinear)))
    return found if isinstance(found, dict) else {"": found}


def _part(
    name: str, found: object, roles: Mapping[int, str], place: str, half: str = "", column: int = 0, words: str = ""
) -> Part:
    """The box of a module, of some tensors of one, or of a parameter."""
    tensors = _tensors(found)
    its = {key: roles.get(id(tensor), "frozen") for key, tensor in tensors.items()}
    role = next((role for role in ("added", "trained") if role in its.values()), "frozen")
    trained = [key for key, its_role in its.items() if its_role != "frozen"]
    last = {key: key.rpartition(".")[2] for key in its}
    kinds, others = ({last[key] for key in its if (key in trained) is whether} for whether in (True, False))
    # "bias" where it is all biases; no names where everything is trained, or something of each kind.
    only = ", ".join(sorted(kinds)) if role == "trained" and others and not kinds & others else ""
    parameters = sum(tensors[key].numel() for key in trained)
    if isinstance(found, FusedAdapter):
        sizes, words = (found.down.in_features, found.down.out_features, found.up.out_features), found.activation
    elif isinstance(found, FusedARC):
        dim, rank = found.basis.weight.shape
        sizes, words = (dim, rank, dim), "over a shared basis"
    elif isinstance(found, (FusedConsolidator, StoredConsolidator)):
        sizes, words = (found.in_features, found.out_features), f"{SIZES[type(found)](found)} groups"
    else:
        linears = [m for m in found.modules() if isinstance(m, nn.Linear)] if isinstance(found, nn.Module) else []
        sizes = (linears[0].in_features, linears[0].out_features) if len(linears) == 1 else ()
        if not sizes and name != "attn" and tensors and all(t.ndim == 1 for t in tensors.values()):
            sizes = (next(iter(tensors.values())).numel(),)
    return Part(name, role, place, half, column, words, only, sizes, parameters)


def _span_of(names: Sequence[str], order: Sequence[str]) -> str:
    """Such as "12 blocks: blocks.0 … blocks.11"."""
    indices = [order.index(name) for name in names]
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])]
    spans = [order[run[0]] + (f" … {order[run[-1]]}" if len(run) > 1 else "") for run in runs]
    return f"{len(names)} block{'s' if len(names) > 1 else ''}: {', '.join(spans)}"
