"""What do the ops compute? The same mathematics in plain PyTorch: the oracle of the tests, and the fallback where no
kernel exists. Everything here is differentiable and runs in any floating dtype, float64 included."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "leaky_relu": lambda u: F.leaky_relu(u, 0.01),
    "silu": F.silu,
    "identity": lambda u: u,
}

# Each use of one seed draws from its own Philox stream, so that the masks are independent of one another.
STREAM_DROPOUT, STREAM_DROPOUT_OUT, STREAM_DROP_PATH = 0, 1, 2

_MASK32 = 0xFFFFFFFF


def _philox4x32(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64
    tensors that hold 32-bit words; int64 products wrap modulo 2^64, which keeps both halves right."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor, rows: int, columns: int, stream: int, p: float) -> Tensor:
    """The dropout mask of `stream`: True where an element is kept, which happens with probability 1 - p.

    Element (row, column) takes word `column % 4` of Philox(key = seed, counter = (column // 4, row, row >> 32, stream))
    and is kept when that word is at least p·2^32.

    Args:
        seed: (1,) int64.
        rows, columns: shape of the result.
    Returns: (rows, columns) bool on the seed's device.
    """
    device = seed.device
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    quad = torch.arange((columns + 3) // 4, device=device, dtype=torch.int64)[None, :]
    zero = torch.zeros_like(row + quad)
    counter = [zero + quad, zero + (row & _MASK32), zero + (row >> 32), zero + stream]
    words = _philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    words = torch.stack(words, dim=-1).reshape(rows, -1)[:, :columns]
    return words >= math.floor(p * 2**32)


def adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    dropout_out: float = 0.0,
    drop_path: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + keep ∘ scale ∘ drop_out(drop(act(x·downᵀ + down_bias))·upᵀ + up_bias), see `ops.adapter`.

    Operands are read in `compute_dtype` (default: x's); all that follows is float32, or float64 when x is.
    """
    dim, rank = x.shape[-1], down.shape[0]
    compute_dtype = compute_dtype or x.dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = x if residual is None else residual

    def read(t: Tensor) -> Tensor:
        return t.to(compute_dtype).to(wide)

    rows = x.reshape(-1, dim)
    hidden = read(rows) @ read(down).T
    if down_bias is not None:
        hidden = hidden + down_bias.to(wide)
    hidden = ACTIVATIONS[activation](hidden)
    if dropout > 0:
        hidden = hidden * keep_mask(seed, rows.shape[0], rank, STREAM_DROPOUT, dropout) / (1 - dropout)
    out = hidden @ read(up).T
    if up_bias is not None:
        out = out + up_bias.to(wide)
    if dropout_out > 0:
        out = out * keep_mask(seed, rows.shape[0], dim, STREAM_DROPOUT_OUT, dropout_out) / (1 - dropout_out)
    out = out * (scale.to(wide) if isinstance(scale, Tensor) else scale)
    if drop_path > 0:
        samples = x.shape[0] if x.dim() > 1 else 1
        keep = keep_mask(seed, samples, 1, STREAM_DROP_PATH, drop_path).to(wide) / (1 - drop_path)
        out = out * keep.repeat_interleave(rows.shape[0] // max(samples, 1), dim=0)
    out = residual.to(wide) + out.reshape(x.shape)
    return out.to(torch.promote_types(x.dtype, residual.dtype))


def arc(
    x: Tensor,
    basis: Tensor,
    rescale: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x + drop((x·basis) ∘ rescale)·basisᵀ + bias, see `ops.arc`.

    Operands are read in `compute_dtype` (default: x's); all that follows is float32, or float64 when x is.
    """
    dim, rank = basis.shape
    compute_dtype = compute_dtype or x.dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, shared = (t.to(compute_dtype).to(wide) for t in (x.reshape(-1, dim), basis))
    hidden = (rows @ shared) * rescale.to(wide)
    if dropout > 0:
        hidden = hidden * keep_mask(seed, rows.shape[0], rank, STREAM_DROPOUT, dropout) / (1 - dropout)
    out = x.to(wide) + (hidden @ shared.T).reshape(x.shape)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(x.dtype)


def consolidator(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    base: Tensor | None = None,
    shuffle: bool = True,
    drop_path: float = 0.0,
    samples: int | None = None,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """base + Σ_i keep_i ∘ (G_i·shuffle_i(x) + bias_i), see `ops.consolidator`.

    Operands are read in `compute_dtype` (default: x's); all that follows is float32, or float64 when x is.
    """
    compute_dtype = compute_dtype or x.dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    width, out = x.shape[-1], weights[0].shape[0]
    rows = x.reshape(x.numel() // width, width).to(compute_dtype).to(wide)
    samples = samples or (x.shape[0] if x.dim() > 1 else 1)
    total = rows.new_zeros(len(rows), out) if base is None else base.reshape(len(rows), out).to(wide)
    for number, weight in enumerate(weights):
        groups = width // weight.shape[1]
        grouped = (shuffled(rows, groups) if shuffle else rows).reshape(len(rows), groups, weight.shape[1])
        blocks = weight.to(compute_dtype).to(wide).reshape(groups, out // groups, -1)
        branch = torch.einsum("ngi,goi->ngo", grouped, blocks).reshape(len(rows), out)
        if biases:
            branch = branch + biases[number].to(wide)
        if drop_path > 0:
            keep = keep_mask(seed, samples, len(weights), STREAM_DROP_PATH, drop_path)[:, number : number + 1]
            branch = branch * (keep.to(wide) / (1 - drop_path)).repeat_interleave(len(rows) // max(samples, 1), dim=0)
        total = total + branch
    return total.reshape(*x.shape[:-1], out).to(x.dtype if base is None else base.dtype)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """x's last dimension seen as (groups, n / groups), transposed: place j·groups + i holds x[i·(n / groups) + j]."""
    return x.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)


def consolidated_weight(weight: Tensor, weights: Sequence[Tensor], shuffle: bool = True) -> Tensor:
    """weight (out, in) + Σ_i G_i, every entry of a branch where it meets x: what a linear layer with the branches in it
    has; float64 for float64, else float32."""
    out, width = weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.to(wide)
    for branch in weights:
        columns = branch_columns(width, out, width // branch.shape[1], shuffle).to(weight.device)
        total = total.scatter_add(1, columns, branch.to(wide))
    return total


def branch_columns(in_features: int, out_features: int, groups: int, shuffle: bool) -> Tensor:
    """(out, in / groups) int64, on the CPU: which of the inputs each weight of a branch meets."""
    inputs = torch.arange(in_features, device="cpu")  # whatever `torch.device` is around
    inputs = shuffled(inputs, groups) if shuffle else inputs
    return inputs.reshape(groups, 1, -1).expand(-1, out_features // groups, -1).reshape(out_features, -1)
