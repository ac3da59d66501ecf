"""What is timed of the consolidator, on the CPU and on a GPU? On ViT-B's linear layers two things in several forms:
branches that are added to what a layer gave, and the whole layer with them."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from vitadapter_ext import reference
from vitadapter_ext.ops import consolidated_linear, consolidator
from vitadapter_ext.ops.consolidator import in_weight_is_faster

# (in, out) of ViT-B's, and one so small that a call is all that it costs.
LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768), "tiny": (16, 48)}
IMAGE = 197  # tokens

Function = Callable[..., Tensor]


def samples(tokens: int) -> tuple[int, int]:
    """Images and tokens of each: images for ViT-B/16, else one."""
    return (tokens // IMAGE, IMAGE) if tokens % IMAGE == 0 else (1, tokens)


def parameters(tensor: Function, layer: str, groups: Sequence[int]) -> list[Tensor]:
    """Of a branch for each number of groups, all weights and then all biases; tensor(*shape, spread=) makes a random
    one."""
    width, out = LAYERS[layer]
    weights = [tensor(out, width // g, spread=(g / width) ** 0.5) for g in groups]
    return weights + [tensor(out, spread=0.1) for _ in groups]


def halves(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights and the biases."""
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


# A form of the branches takes x (images, tokens, in), base (images, tokens, out) and the parameters.


def branches(shuffle: bool = True) -> dict[str, Function]:
    """Ours, and the authors' form: a grouped convolution over the tokens of each branch, channels before tokens."""

    def ours(x: Tensor, base: Tensor, *parameters: Tensor) -> Tensor:
        return consolidator(x, *halves(parameters), base=base, shuffle=shuffle)

    def conv(x: Tensor, base: Tensor, *parameters: Tensor) -> Tensor:
        channels = x.transpose(1, 2)
        for weight, bias in zip(*halves(parameters), strict=True):
            groups = x.shape[-1] // weight.shape[1]
            # (images, in, tokens) -> (images, groups, in / groups, tokens) -> (images, in / groups, groups, tokens)
            shuffled = channels.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) if shuffle else channels
            base = base + F.conv1d(shuffled, weight.unsqueeze(-1), bias, groups=groups).transpose(1, 2)
        return base

    return {"ours": ours, "conv": conv}


def exact_branches(shuffle: bool = True) -> Function:
    """For float64."""
    return lambda x, base, *parameters: reference.consolidator(x, *halves(parameters), base=base, shuffle=shuffle)


def masked(layer: str, groups: Sequence[int], shuffle: bool = True) -> Function:
    """A product with a dense matrix that is 0 but for the branches' entries; backward, all of its gradient is made and
    the entries' are taken out of it."""
    width, out = LAYERS[layer]
    places = [reference.branch_columns(width, out, g, shuffle) for g in groups]

    def product(x: Tensor, base: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = halves(parameters)
        dense = x.new_zeros(out, width)
        for weight, where in zip(weights, places, strict=True):
            dense = dense.scatter_add(1, where, weight.to(x.dtype))
        return base + F.linear(x, dense, sum(biases))

    return product


# A form of the layer takes x, the layer's own weight and bias, which are frozen, and the parameters.


def layers() -> dict[str, Function]:
    """Ours in each of its two ways, of which `auto` says one; the layer alone; the authors' form beside it."""

    def ours(in_weight: bool) -> Function:
        return lambda x, weight, bias, *parameters: consolidated_linear(
            x, weight, bias, *halves(parameters), in_weight=in_weight
        )

    conv = branches()["conv"]
    return {
        "in-weight": ours(in_weight=True),
        "beside": ours(in_weight=False),
        "plain": lambda x, weight, bias, *parameters: F.linear(x, weight, bias),
        "conv": lambda x, weight, bias, *parameters: conv(x, F.linear(x, weight, bias), *parameters),
    }


def auto(x: Tensor, weight: Tensor) -> str:
    """The way that ours chooses."""
    return "in-weight" if in_weight_is_faster(x, weight) else "beside"


def exact_layer(x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
    """For float64."""
    return reference.consolidator(x, *halves(parameters), base=F.linear(x, weight, bias))
