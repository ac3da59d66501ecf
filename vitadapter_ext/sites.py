"""Where do methods attach? A table from the exact class of a timm module to the adapted subclass that takes its place.

`module.__class__ = ADAPTED_BLOCKS[type(module)]` keeps the module's identity, names and weights: no wrapper and no hook
enters the path, so state dicts, pickle, deepcopy, `torch.compile` and export see an ordinary timm model. An adapted
forward reads a plain attribute that the method has set (here the joins): that is how a compiled model sees `disabled`.
"""

from timm.models.vision_transformer import Block
from torch import Tensor, nn


def _plain(x: Tensor, branch: Tensor, adapter: None) -> Tensor:
    return x + branch


def _sum(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(x + branch)


def _branch(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(branch, residual=x + branch)


def _input(x: Tensor, branch: Tensor, adapter: nn.Module) -> Tensor:
    return adapter(x, residual=x + branch)


# How the end of a residual branch, x + branch, is made; the adapters add their residual themselves.
JOINS = {"plain": _plain, "sum": _sum, "branch": _branch, "input": _input}


class AdaptedBlock(Block):
    """timm's pre-norm block (plain ViT, DeiT, DINOv2); its LayerScale and drop-path stay inside the branches."""

    @property
    def dim(self) -> int:
        return self.attn.proj.out_features

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # timm passes attn_mask and is_causal on to the attention; older releases have the first or neither.
        branch = self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        x = JOINS[self.join_attn](x, branch, self.adapter_attn)
        branch = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return JOINS[self.join_mlp](x, branch, self.adapter_mlp)


ADAPTED_BLOCKS = {Block: AdaptedBlock}


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's transformer blocks by name.

    Raises:
        ValueError: there are none, or some are of a class that is not in `ADAPTED_BLOCKS`; both are named.
    """
    found = {name: module for name, module in model.named_modules() if "Block" in type(module).__name__}
    if not found or any(type(block) not in ADAPTED_BLOCKS for block in found.values()):
        raise ValueError(
            f"this method attaches to blocks of class {_class_names(ADAPTED_BLOCKS)}, "
            f"but this {type(model).__name__} has {_class_names(map(type, found.values())) or 'no blocks'}"
        )
    return found


def _class_names(classes) -> str:
    # With the module: timm has several classes that are called Block.
    return ", ".join(sorted({f"{cls.__module__}.{cls.__qualname__}" for cls in classes}))
