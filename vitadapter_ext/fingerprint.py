"""Is this the backbone that a file belongs to? A hash of every tensor, and a few values where the hash differs.

The hash says yes at once. Where it differs because one side was rounded to half precision (`model.half()`, weights that
were kept in float16), the values decide, compared within that rounding. Position embeddings, absolute and relative, are
left out: they are resized with the image.
"""

import base64
import bz2
import hashlib
import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 6
# bfloat16 keeps 8 significant bits: rounding moves a value by up to 2^-8 of it; float16's and the file's 5 digits add
# little to that. The absolute part is for float16's subnormal numbers.
RELATIVE, ABSOLUTE = 1.25 * 2.0**-8, 1e-7
_UNPACKED = 2**26  # bytes: far above any backbone's, so that a damaged file cannot fill the memory


def fingerprint(backbone: Mapping[str, Tensor]) -> dict[str, dict]:
    """{name: {"shape", "dtype", "hash", "values"}}, ready for JSON; equal weights give equal fingerprints.

    Args:
        backbone: tensors of the frozen backbone by state-dict name.
    """
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "hash": _hash(tensor),
            "values": _values(tensor),
        }
        for name, tensor in _compared(backbone).items()
    }


def difference(stored: Mapping[str, dict], backbone: Mapping[str, Tensor]) -> str:
    """The first thing in which `backbone` is not what `stored` was taken from, in words; "" when they match."""
    live = _compared(backbone)
    for name, entry in stored.items():
        if name not in live:
            return f"it lacks the tensor {name}"
        if list(live[name].shape) != entry["shape"]:
            return f"its {name} has shape {list(live[name].shape)} instead of {entry['shape']}"
    for name in live:
        if name not in stored:
            return f"it has the additional tensor {name}"
    differing = [name for name, entry in stored.items() if not _same_values(entry, live[name])]
    if differing:
        return f"the weights of {len(differing)} of its {len(live)} tensors differ, the first is {differing[0]}"
    return ""


def pack(fingerprint: Mapping[str, dict]) -> str:
    """The fingerprint as the text that a file holds, a third of its JSON: for some methods that is much of a file.

    By bzip2, of which there is one implementation, so that equal fingerprints give equal texts everywhere.
    """
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    return base64.b64encode(bz2.compress(text.encode())).decode()


def unpack(text: str) -> dict[str, dict]:
    """The fingerprint that `pack` made a text of; a `ValueError` where the text is another."""
    unpacker = bz2.BZ2Decompressor()
    try:
        data = unpacker.decompress(base64.b64decode(text, validate=True), _UNPACKED)
        if not unpacker.eof:
            raise ValueError("it does not end")
        return json.loads(data)
    except (OSError, EOFError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _compared(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    resized = ("pos_embed", "relative_position_")
    return {name: tensor for name, tensor in backbone.items() if not any(part in name for part in resized)}


def _same_values(entry: dict, tensor: Tensor) -> bool:
    if entry["hash"] == _hash(tensor):
        return True
    if str(tensor.dtype).removeprefix("torch.") == entry["dtype"] and not _was_half(tensor):
        return False
    values, wanted = _values(tensor), entry["values"]
    if len(values) != len(wanted):
        return False
    # The mean may be far below the elements that were rounded, so it is held against their root mean square.
    sizes = wanted[1:2] + wanted[1:]
    return all(abs(a - b) <= RELATIVE * abs(size) + ABSOLUTE for a, b, size in zip(values, wanted, sizes, strict=True))


def _was_half(tensor: Tensor) -> bool:
    """Whether every element is a float16 or every one a bfloat16, as after a round trip through that dtype."""
    return any(torch.equal(tensor.to(low).to(tensor.dtype), tensor) for low in (torch.float16, torch.bfloat16))


def _hash(tensor: Tensor) -> str:
    """Of dtype and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8, person=str(tensor.dtype).removeprefix("torch.").encode()).hexdigest()


def _values(tensor: Tensor) -> list[float]:
    """Mean, root mean square, largest magnitude, then evenly spaced elements, to 5 digits; nothing where empty."""
    flat = tensor.detach().cpu().reshape(-1).double()
    if not flat.numel():
        return []
    statistics = [flat.mean(), flat.square().mean().sqrt(), flat.abs().max()]
    places = [i * (flat.numel() - 1) // max(SAMPLES - 1, 1) for i in range(SAMPLES)]
    return [_to_5_digits(float(value)) for value in (*statistics, *flat[places])]


def _to_5_digits(value: float) -> float:
    return float(f"{value:.4e}") if math.isfinite(value) else value
