"""Which backbones do the tests use? Small timm models of each supported architecture, with no weight left at 0 or 1
in their backbones."""

import timm
import torch
from torch import Tensor, nn

import vitadapter_ext as va

# Blocks, MLPs, registers, position embeddings, LayerScale and heads are real, widths and depths are not.
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
# No window of a single token, where attention has no gradient; the second block shifts its windows.
SMALL_SWIN = {"depths": (2, 1), "embed_dim": 24, "num_heads": (2, 2), "window_size": 4, "drop_path_rate": 0.0}
ARCHITECTURES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, **SMALL}),
    "deit": ("deit_tiny_patch16_224", {"img_size": 32, **SMALL}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, **SMALL}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 32, **SMALL}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 28, **SMALL}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, **SMALL}),
    "dinov2_giant": ("vit_giant_patch14_dinov2", {"img_size": 28, **SMALL}),  # GluMlp
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32, **SMALL}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 32, **SMALL}),  # attention pooling, with an MLP of its own
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 28, **SMALL}),  # qkv in one, GluMlp
    "eva02_large": ("eva02_large_patch14_224", {"img_size": 28, **SMALL}),  # qkv in three, SwiGLU with a norm
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 32, **SMALL}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "use_shared_rel_pos_bias": True, **SMALL}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, **SMALL_SWIN}),
}
PLACEMENTS = ("post", "houlsby", "intermediate", "pfeiffer", "parallel", "pre", "inner", "houlsby-inner")
METHODS = {
    **{placement: va.Adapter(rank=3, placement=placement) for placement in PLACEMENTS},
    "norms": va.Adapter(rank=3, scale="scalar", train_norms=True),
    "biases": va.Adapter(rank=3, scale=0.1, bias=False, train_biases=True),
    "mimi": va.Mimi(start_rank=3),
    "mimi-attn": va.Mimi(sigma=16, positions=("attn",), init="trunc_normal"),
    "arc": va.Arc(rank=3, rescale_init="zero"),
    "arc-attn": va.Arc(rank=2, positions=("attn",)),
    # 8 divides the sizes of every layer above.
    "consolidator": va.Consolidator(groups=(8,), drop_path=0.0, train_norms=False, train_biases=False),
    "consolidator-branches": va.Consolidator(groups=(8, 4), drop_path=0.0, shuffle=False, in_weight=True),
    "linear-probe": va.LinearProbe(),
    "full": va.FullFineTune(),
    "bitfit": va.BitFit(),
}


def make(architecture: str = "vit", num_classes: int = 3, **changes) -> nn.Module:
    """The same backbone on every call, whatever the number of classes, in eval mode."""
    name, arguments = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **{**arguments, **changes})
        randomise(model.parameters())
        model.reset_classifier(num_classes)
    return model.eval()


@torch.no_grad()
def randomise(parameters) -> None:
    """Moves the parameters far enough that each of them matters."""
    for p in parameters:
        p.add_(torch.randn_like(p), alpha=0.2)


def randomise_trained(model: nn.Module) -> None:
    randomise(p for p in model.parameters() if p.requires_grad)


def same_requires_grad(model: nn.Module, other: nn.Module) -> None:
    """Gives `model` the flags of `other`: torch 2.11 takes another path through attention where a parameter has one."""
    for name, p in model.named_parameters():
        p.requires_grad_(other.get_parameter(name).requires_grad)


def images(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=next(model.parameters()).dtype)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(state)
    for name, tensor in now.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def structure(model: nn.Module) -> dict:
    """All that `detach` and a failed `attach` must leave as it was, but for the values of tensors."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "num_classes": model.num_classes,
    }
