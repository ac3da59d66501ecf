"""How many parameters does a method train, of which kind, and in which block? `summary`."""

import textwrap
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .attachment import attachment, tensors_by_kind
from .folding import folded_modules, record_of
from .methods.base import norm_names
from .nn import FusedAdapter, FusedARC, FusedConsolidator
from .nn.consolidator import StoredConsolidator


def _groups(module: FusedConsolidator | StoredConsolidator) -> str:
    return "+".join(map(str, module.groups))


# What a table says of a method's module, beside its name.
SIZES = {
    FusedAdapter: lambda module: module.down.out_features,
    FusedARC: lambda module: len(module.rescale),
    FusedConsolidator: _groups,
    StoredConsolidator: _groups,
}
_COLUMNS = 100


@dataclass(frozen=True)
class BlockSummary:
    """A row of the table: what the method put into a transformer block, and numbers of parameters.

    Attributes:
        name: in the model.
        method: the method's modules with their ranks, such as "adapter_attn 8, mlp.adapter_inner 8"; of consolidators
            the layers and the groups of each branch, such as "attn.qkv 384, mlp.fc1 384+96".
        adapter: what the method added.
        overrides: trained tensors of the backbone.
        total: every parameter of the block.
    """

    name: str
    method: str
    adapter: int
    overrides: int
    total: int


@dataclass(frozen=True, repr=False)
class Summary:
    """Numbers of parameters, each element counted once; its text is a table.

    Attributes:
        method: with its fields.
        adapter: what the method added.
        head: the classifier, both where there are two.
        overrides: trained tensors of the backbone.
        total: every parameter of the model.
        merged: whether the method is folded into the backbone's weights at present.
        blocks: a row for each transformer block, of whatever class; none where the model has no blocks.
        norms, biases: overrides that belong to normalisation layers, and those that are biases of others.
    """

    method: str
    adapter: int
    head: int
    overrides: int
    total: int
    merged: bool = False
    blocks: tuple[BlockSummary, ...] = ()
    norms: int = 0
    biases: int = 0

    @property
    def trainable(self) -> int:
        """adapter + head + overrides."""
        return self.adapter + self.head + self.overrides

    @property
    def elsewhere(self) -> BlockSummary:
        """What is neither in a block nor in the head: embeddings, norms, poolings."""
        inside = {kind: sum(getattr(row, kind) for row in self.blocks) for kind in ("adapter", "overrides", "total")}
        return BlockSummary(
            "elsewhere",
            "",
            self.adapter - inside["adapter"],
            self.overrides - inside["overrides"],
            self.total - self.head - inside["total"],
        )

    def totals(self) -> list[str]:
        """Lines of the table's end: each kind with its share of the total, and what is in the overrides."""
        inside = ("  norms", "  biases") if self.overrides else ()
        kinds = ("adapter", "head", "overrides", *inside, "trainable", "total")
        rows = [(kind, getattr(self, kind.strip())) for kind in kinds]
        return [f"{kind:<10}{n:>14,}{100 * n / self.total:>10.3f} %" for kind, n in rows]

    def __repr__(self) -> str:
        method = textwrap.wrap(self.method + (" (merged)" if self.merged else ""), _COLUMNS, subsequent_indent="    ")
        head = BlockSummary("head", "", 0, 0, self.head)
        rows = [("block", "method", "adapter", "overrides", "total")]
        for row in (*self.blocks, self.elsewhere, head):
            rows.append((row.name, row.method, f"{row.adapter:,}", f"{row.overrides:,}", f"{row.total:,}"))
        name, words, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
        # The names and numbers stand whole; words too long for the line end in dots (`blocks` has them all).
        words = min(words, max(len("method"), _COLUMNS - name - sum(numbers) - 2 * 4))
        lines = [
            f"{first:<{name}}  {textwrap.shorten(second, words, placeholder='…'):<{words}}"
            + "".join(f"  {text:>{width}}" for text, width in zip(rest, numbers, strict=True))
            for first, second, *rest in rows
        ]
        return "\n".join([*method, "", *lines, "", *self.totals()])


def summary(model: nn.Module) -> Summary:
    """Counts the parameters of a model that has a method attached.

    Raises:
        ValueError: no method is attached.
    """
    record = attachment(model)
    blocks = outermost_blocks(model)
    counts, inside = Counter(), {name: Counter() for name in blocks}
    norms = set(norm_names(model))
    for kind, tensors in tensors_by_kind(model).items():
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                counts[kind] += tensor.numel()
                if kind == "override" and (name in norms or name.endswith("bias")):
                    counts["norms" if name in norms else "biases"] += tensor.numel()
                if kind != "head" and (owner := _owner(name, blocks)) is not None:
                    inside[owner][kind] += tensor.numel()
    rows = tuple(
        BlockSummary(name, _words(block), n["adapter"], n["override"], n.total())
        for (name, block), n in zip(blocks.items(), inside.values(), strict=True)
    )
    return Summary(
        method=str(record.method),
        adapter=counts["adapter"],
        head=counts["head"],
        overrides=counts["override"],
        total=counts.total() - counts["norms"] - counts["biases"],
        norms=counts["norms"],
        biases=counts["biases"],
        merged=bool(folded_modules(model)),
        blocks=rows,
    )


def outermost_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by name, of whatever class; of blocks inside blocks the outer ones."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and "Block" in type(module).__name__ and _owner(name, blocks) is None:
            blocks[name] = module
    return blocks


def _owner(name: str, blocks: dict[str, nn.Module]) -> str | None:
    """The block that a tensor or module lies in, by its name."""
    while name:
        if name in blocks:
            return name
        name = name.rpartition(".")[0]
    return None


def _words(block: nn.Module) -> str:
    modules = dict(block.named_modules())
    for owner, module in folded_modules(block).items():
        modules |= {f"{owner}.{name}": child for name, child in record_of(module).children.items()}
    found = {name: SIZES[type(module)](module) for name, module in modules.items() if type(module) in SIZES}
    return ", ".join(f"{name.removesuffix('.consolidator')} {size}" for name, size in sorted(found.items()))
