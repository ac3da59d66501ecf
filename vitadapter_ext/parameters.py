"""How many parameters does a method train, and of which kind? `summary`."""

from dataclasses import dataclass

from torch import nn

from .attachment import attachment, tensors_by_kind


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
    """

    method: str
    adapter: int
    head: int
    overrides: int
    total: int
    merged: bool = False

    @property
    def trainable(self) -> int:
        """adapter + head + overrides."""
        return self.adapter + self.head + self.overrides

    def __repr__(self) -> str:
        rows = [(kind, getattr(self, kind)) for kind in ("adapter", "head", "overrides", "trainable", "total")]
        lines = [f"{kind:<10}{n:>14,}{100 * n / self.total:>10.3f} %" for kind, n in rows]
        return "\n".join([self.method + (" (merged)" if self.merged else ""), *lines])


def summary(model: nn.Module) -> Summary:
    """Counts the parameters of a model that has a method attached.

    Raises:
        ValueError: no method is attached.
    """
    record = attachment(model)
    kinds = {
        kind: sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
        for kind, tensors in tensors_by_kind(model).items()
    }
    total = sum(p.numel() for p in model.parameters())
    return Summary(str(record.method), kinds["adapter"], kinds["head"], kinds["override"], total)
