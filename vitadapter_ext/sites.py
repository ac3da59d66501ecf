"""Where do methods attach? Tables from the exact class of a timm module to the adapted subclass that takes its place.

`module.__class__ = ADAPTED_BLOCKS[type(module)]` keeps the module's identity, names and weights: no wrapper and no hook
enters the path, so state dicts, pickle, deepcopy, `torch.compile` and export see an ordinary timm model. An adapted
module reads plain attributes that the method has set (the joins, `adapted`): `disabled` takes them away, which a
compiled model sees where it does not see the class. What the backbone scales or drops of a branch (LayerScale, gammas,
drop-path) stays inside it: an adapter sees it afterwards.
"""

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import beit, vision_transformer
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from .folding import Foldable, behind
from .nn import FusedConsolidator


def _plain(x: Tensor, branch: Tensor, adapter: None) -> Tensor:
    return x + branch


def _sum(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(x + branch)


def _normed(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    x = x + branch
    # The norm is float32 on a low-precision backbone too; the stream keeps its dtype.
    return adapter(adapter.norm(x.to(adapter.norm.weight.dtype)).to(x.dtype), residual=x)


def _branch(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(branch, residual=x + branch)


def _input(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(x, residual=x + branch)


# How the end of a residual branch, x + branch, is made; the adapters add their residual themselves.
JOINS = {"plain": _plain, "sum": _sum, "normed": _normed, "branch": _branch, "input": _input}


class Joined:
    """What the adapted blocks share: the ends of their two branches, and the width of their stream."""

    def put(self, branch: str, join: str, adapter: nn.Module | None) -> None:
        """Ends a branch, "attn" or "mlp", with one of `JOINS` and its adapter; without one, or without neurons in it,
        as the backbone does."""
        self.register_module(f"adapter_{branch}", adapter)
        setattr(self, f"join_{branch}", join if adapter is not None and adapter.down.out_features else "plain")

    def add_attn(self, x: Tensor, branch: Tensor) -> Tensor:
        return JOINS[self.join_attn](x, branch, self.adapter_attn)

    def add_mlp(self, x: Tensor, branch: Tensor) -> Tensor:
        return JOINS[self.join_mlp](x, branch, self.adapter_mlp)

    @property
    def width(self) -> int:
        return self.attn.proj.out_features


class AdaptedBlock(Joined, vision_transformer.Block):
    """The pre-norm block of plain ViT, DeiT, DeiT-3, DINOv2, CLIP and SigLIP."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # timm passes attn_mask and is_causal on to the attention; older releases have the first or neither.
        x = self.add_attn(x, self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs))))
        return self.add_mlp(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class AdaptedEvaBlock(Joined, EvaBlock):
    """EVA, EVA-02 and DINOv3: `rope` is for the attention, and either gamma may be missing."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        branch = self.attn(self.norm1(x), *args, **kwargs)
        if self.gamma_1 is not None:
            branch = self.gamma_1 * branch
        x = self.add_attn(x, self.drop_path1(branch))
        branch = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            branch = self.gamma_2 * branch
        return self.add_mlp(x, self.drop_path2(branch))


class AdaptedBeitBlock(Joined, beit.Block):
    """BEiT's block is EVA's, with `shared_rel_pos_bias` for the attention."""

    forward = AdaptedEvaBlock.forward


class AdaptedSwinBlock(Joined, SwinTransformerBlock):
    """Swin: x is (B, H, W, C), and an index of B is a sample; the windows are the attention's own affair."""

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        x = self.add_attn(x, self.drop_path1(self._attn(self.norm1(x))))
        x = x.reshape(B, -1, C)
        x = self.add_mlp(x, self.drop_path2(self.mlp(self.norm2(x))))
        return x.reshape(B, H, W, C)


ADAPTED_BLOCKS = {
    vision_transformer.Block: AdaptedBlock,
    EvaBlock: AdaptedEvaBlock,
    beit.Block: AdaptedBeitBlock,
    SwinTransformerBlock: AdaptedSwinBlock,
}


# An MLP with an adapter at the input of its last linear layer.


class WithInnerAdapter(Foldable):
    """What the adapted MLPs share: without an activation the adapter folds into the layer behind it."""

    added = ("adapter_inner",)

    def inner(self, x: Tensor) -> Tensor:
        return self.adapter_inner(x) if self.adapted else x

    def can_fold(self) -> bool:
        return self.adapter_inner.activation == "identity"

    def folded(self) -> dict[str, Tensor]:
        return behind(self.fc2, "fc2", self.adapter_inner.linear_map())


class AdaptedMlp(WithInnerAdapter, Mlp):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(self.inner(x)))


class AdaptedGluMlp(WithInnerAdapter, GluMlp):
    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.fc1(x).chunk(2, dim=self.chunk_dim)
        x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
        return self.drop2(self.fc2(self.inner(self.norm(self.drop1(x)))))


class AdaptedSwiGLU(WithInnerAdapter, SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.inner(self.norm(self.drop1(x)))))


ADAPTED_MLPS = {Mlp: AdaptedMlp, GluMlp: AdaptedGluMlp, SwiGLU: AdaptedSwiGLU}


# An attention or an MLP with ARC on its input. Swin pads its windows with zeros before its attention: there ARC's bias
# comes to the padding too, as in the merged layer.

_READERS = ("qkv", "q_proj", "k_proj", "v_proj", "gate", "fc1", "fc1_g", "fc1_x")


def readers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that read the input of an attention or an MLP: those of q, k, v and gates too, by name."""
    found = {name: getattr(module, name, None) for name in _READERS}
    return {name: linear for name, linear in found.items() if linear is not None}


class WithArc(Foldable):
    """What these classes share: ARC folds into all layers that read it."""

    added = ("arc",)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(self.arc(x) if self.adapted else x, *args, **kwargs)

    def folded(self) -> dict[str, Tensor]:
        seen = self.arc.linear_map()
        return {
            key: value for name, linear in readers(self).items() for key, value in behind(linear, name, seen).items()
        }


class ArcAttention(WithArc, vision_transformer.Attention):
    pass


class ArcEvaAttention(WithArc, EvaAttention):
    """Where q, k and v are one layer their biases are bare parameters, and k's is not saved: no bias to fold into."""


class ArcBeitAttention(WithArc, beit.Attention):
    """As EVA's."""


class ArcWindowAttention(WithArc, WindowAttention):
    pass


class ArcMlp(WithArc, Mlp):
    pass


class ArcGluMlp(WithArc, GluMlp):
    pass


class ArcSwiGLU(WithArc, SwiGLU):
    pass


ARC_PLACES = {
    "attn": {
        vision_transformer.Attention: ArcAttention,
        EvaAttention: ArcEvaAttention,
        beit.Attention: ArcBeitAttention,
        WindowAttention: ArcWindowAttention,
    },
    "mlp": {Mlp: ArcMlp, GluMlp: ArcGluMlp, SwiGLU: ArcSwiGLU},
}


# Around consolidated linear layers: what keeps a layer's `forward` from being called, or from knowing its images.


class AroundLayers(Foldable):
    """What these classes share: there is nothing of their own to fold, the layers in them fold themselves."""

    added = ()

    def folded(self) -> dict[str, Tensor]:
        return {}


class CallsQkv(AroundLayers):
    """EVA's and BEiT's attention, which calls `qkv` only where it adds the biases of q, k and v after it."""

    @property
    def qkv_bias_separate(self) -> bool:
        return True  # whatever the instance's attribute says, which `detach` leaves as it was


class ConsolidatedEvaAttention(CallsQkv, EvaAttention):
    pass


class ConsolidatedBeitAttention(CallsQkv, beit.Attention):
    pass


class ConsolidatedSwinBlock(AroundLayers, SwinTransformerBlock):
    """Swin's attention sees windows: its block says how many images they are of."""

    def _attn(self, x: Tensor) -> Tensor:
        for module in self.attn.modules():
            if isinstance(module, FusedConsolidator) and module.training:
                module.samples = len(x)
        return super()._attn(x)


CONSOLIDATED = {
    EvaAttention: ConsolidatedEvaAttention,
    beit.Attention: ConsolidatedBeitAttention,
    SwinTransformerBlock: ConsolidatedSwinBlock,
}


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's transformer blocks by name.

    Raises:
        ValueError: there are none, or some are of a class that is not in `ADAPTED_BLOCKS`; both are named.
    """
    blocks = {name: module for name, module in model.named_modules() if "Block" in type(module).__name__}
    _check_classes("blocks", blocks, ADAPTED_BLOCKS, model)
    return blocks


def find_parts(model: nn.Module, part: str, table: dict[type, type]) -> dict[str, nn.Module]:
    """The attentions ("attn") or the MLPs ("mlp") of the model's transformer blocks by name; those elsewhere, as in an
    attention pooling, are not meant.

    Raises:
        ValueError: as `find_blocks`, and for `table`.
    """
    parts = {f"{name}.{part}": getattr(block, part) for name, block in find_blocks(model).items()}
    if len(set(parts.values())) < len(parts):
        raise ValueError(f"blocks of this {type(model).__name__} share their {part}: each needs its own")
    _check_classes({"attn": "attentions", "mlp": "MLPs"}[part], parts, table, model)
    return parts


def _check_classes(kind: str, found: dict[str, nn.Module], table: dict[type, type], model: nn.Module) -> None:
    if not found or any(type(module) not in table for module in found.values()):
        raise ValueError(
            f"this method attaches to {kind} of class {_class_names(table)}, "
            f"but this {type(model).__name__} has {_class_names(map(type, found.values())) or f'no {kind}'}"
        )


def _class_names(classes) -> str:
    # With the module: timm has several classes that are called Block.
    return ", ".join(sorted({f"{cls.__module__}.{cls.__qualname__}" for cls in classes}))
