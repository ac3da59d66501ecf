"""Is the `adapter` op right? Against hand-made numbers, the float64 reference and plain PyTorch, on every device."""

import copy
import importlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import assert_as_good_as_eager, no_gpu
from vitadapter_ext import FusedAdapter, reference
from vitadapter_ext.ops import adapter
from vitadapter_ext.ops.adapter import ACTIVATIONS

TENSORS = ("x", "down", "up", "down_bias", "up_bias", "scale", "residual")


def make(shape=(2, 5, 24), rank=3, *, dtype=torch.float64, device="cpu", bias=True, scale="channel", residual=True):
    """Fresh random arguments for the op; all tensors require gradients."""
    dim = shape[-1]

    def tensor(*size, spread=1.0):
        return (spread * torch.randn(*size, dtype=torch.float64)).to(device, dtype).requires_grad_()

    return {
        "x": tensor(*shape),
        "down": tensor(rank, dim, spread=dim**-0.5),
        "up": tensor(dim, rank, spread=max(rank, 1) ** -0.5),
        "down_bias": tensor(rank) if bias else None,
        "up_bias": tensor(dim) if bias else None,
        "scale": {"channel": lambda: tensor(dim), "scalar": lambda: tensor(1)}.get(scale, lambda: scale)(),
        "residual": tensor(*shape) if residual else None,
    }


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: arguments[name] for name in TENSORS if isinstance(arguments[name], torch.Tensor)}


def converted(arguments: dict, convert) -> dict:
    """The same arguments with every tensor replaced by a fresh leaf."""
    return {
        k: convert(v.detach()).clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }


def run(op, arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of all tensors, by name."""
    y = op(**arguments, **options)
    names, tensors = zip(*tensors_of(arguments).items(), strict=True)
    return {"y": y, **dict(zip(names, torch.autograd.grad(y, tensors, grad.to(y.dtype)), strict=True))}


def eager(x, down, up, down_bias, up_bias, scale, residual, activation="gelu", compute_dtype=None):
    """What a user would write with torch.nn: every product in the compute dtype."""
    compute = compute_dtype or x.dtype

    def cast(t):
        return None if t is None else t.to(compute)

    hidden = reference.ACTIVATIONS[activation](F.linear(cast(x), cast(down), cast(down_bias)))
    out = F.linear(hidden, cast(up), cast(up_bias)) * scale
    residual = x if residual is None else residual
    return (residual + out).to(torch.promote_types(x.dtype, residual.dtype))


# --- the reference itself ---------------------------------------------------------------------------------------------


def test_reference_on_numbers_worked_out_by_hand():
    # hidden = relu([1·1 + 2·3 - 8, 1·2 - 2·1 + 1]) = relu([-1, 1]) = [0, 1]; out = [5, 7] + [1, -1] = [6, 6]
    y = reference.adapter(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 3.0], [2.0, -1.0]]),
        torch.tensor([[4.0, 5.0], [6.0, 7.0]]),
        down_bias=torch.tensor([-8.0, 1.0]),
        up_bias=torch.tensor([1.0, -1.0]),
        scale=torch.tensor([0.5, 2.0]),
        residual=torch.tensor([[10.0, 20.0]]),
        activation="relu",
    )
    assert y.tolist() == [[13.0, 32.0]]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = reference._philox4x32([torch.tensor(c) for c in counter], tuple(torch.tensor(k) for k in key))
    assert [int(word) for word in words] == expected


def test_masks_keep_the_right_share_and_streams_differ():
    seed = torch.tensor([-(2**62) + 12345])
    masks = [reference.keep_mask(seed, 400, 251, stream, 0.3) for stream in range(3)]
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.7) < 0.01
    for a, b in itertools.combinations(masks, 2):
        assert abs((a == b).double().mean().item() - (0.49 + 0.09)) < 0.01


# --- the op against the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 33), (3, 50, 96), (2, 3, 11, 16), (257,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_blocks_of_rows_in_float64(device, shape, activation):
    check_float64(device, shape, 9, activation, True, "channel", True, (0.2, 0.1, 0.5), 7)


def check_float64(device, shape, rank, activation, bias, scale, residual, probabilities, seed):
    arguments = make(shape, rank, device=device, bias=bias, scale=scale, residual=residual)
    options = dict(zip(("dropout", "dropout_out", "drop_path"), probabilities, strict=True))
    options |= {"activation": activation, "seed": torch.tensor([seed], device=device)}
    grad = torch.randn(shape, dtype=torch.float64, device=device)
    ours, exact = run(adapter, arguments, grad, **options), run(reference.adapter, arguments, grad, **options)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        assert torch.equal(adapter(**arguments, **options), ours["y"]), "without gradients the same bits"


LOW = (torch.bfloat16, torch.float16)
# (x, residual, parameters, compute): what autocast and half-precision models make, one low dtype at a time.
MIXES = [(torch.float32,) * 4] + [
    mix
    for low in LOW
    for mix in itertools.product((torch.float32, low), (torch.float32, low, None), (torch.float32, low), (low,))
]


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_accuracy(shape, rank, device, dtypes=None, default=torch.float32, draws=1, residual=True, **options):
    """Ours, eager and float64 on the same numbers, each argument in its own dtype (`dtypes`, else `default`)."""
    results = [], [], []
    for _ in range(draws):
        arguments = {
            k: v.detach().to((dtypes or {}).get(k, default)).requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in make(shape, rank, device=device, residual=residual).items()
        }
        with torch.no_grad():
            grad = torch.randn(shape, device=device).to(reference.adapter(**arguments).dtype)
        wide = converted(arguments, torch.Tensor.double)
        exact_options = {k: v for k, v in options.items() if k != "compute_dtype"}
        results[0].append(run(adapter, arguments, grad, **options))
        results[1].append(run(eager, arguments, grad, **options))
        results[2].append(run(reference.adapter, wide, grad, **exact_options))
    assert_as_good_as_eager(*results)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(short, mix)))
@pytest.mark.parametrize(("shape", "rank"), [((3, 37, 96), 8), ((130, 45), 5), ((2, 65, 192), 64)])
def test_dtype_mixes_are_as_accurate_as_eager(device, mix, shape, rank):
    x, residual, parameters, compute = mix
    dtypes = {"x": x, "residual": residual}
    has_residual = residual is not None
    check_accuracy(shape, rank, device, dtypes, parameters, 10, residual=has_residual, compute_dtype=compute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=short)
def test_activations_are_as_accurate_as_eager(device, dtype, activation):
    check_accuracy((64, 80), 16, device, default=dtype, draws=10, activation=activation)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((20_000, 48), 4), ((256, 1536), 16), ((256, 3072), 8), ((64, 96), 768)],
    ids=["rows", "dim 1536", "dim 3072", "rank 768"],
)
def test_long_sums_lose_no_accuracy(device, shape, rank):
    check_accuracy(shape, rank, device, draws=4, residual=False)


def test_every_float16_and_bfloat16_is_read_and_written_exactly(device):
    bits = torch.from_numpy(np.arange(65536, dtype=np.uint16)).to(device)
    empty = {"down": torch.empty(0, 65536, device=device), "up": torch.empty(65536, 0, device=device)}
    for low in LOW:
        every = bits.view(low)
        finite_only = torch.where(every.isnan(), 0, every)
        read = adapter(torch.zeros(65536, device=device), **empty, residual=finite_only)
        assert torch.equal(read, finite_only.float())
        # Halfway between two neighbours, just below and just above it, and beyond the largest.
        wide = finite_only.float()
        for other in (wide * (1 + 2**-9), wide * (1 + 2**-12), wide * (1 + 2**-9 + 2**-20), wide * 0.75):
            written = adapter(torch.zeros(65536, dtype=low, device=device), **empty, up_bias=other)
            assert torch.equal(written, other.to(low))


# --- autograd, compile, autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["channel", "scalar", 0.7])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "identity"])
def test_gradcheck(device, activation, scale):
    arguments = make((2, 3, 5), 4, device=device, scale=scale)
    seed = torch.tensor([5], device=device)

    def op(*tensors):
        named = dict(zip(tensors_of(arguments), tensors, strict=True))
        return adapter(**(arguments | named), activation=activation, dropout=0.3, drop_path=0.3, seed=seed)

    assert torch.autograd.gradcheck(op, tuple(tensors_of(arguments).values()))


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(device, save):
    a = {k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in make(device=device).items()}
    seed = torch.tensor([3], device=device)
    settings = (1.0, 0, 0.1, 0.1, 0.1, torch.float32, False)
    operands = (a["down"], a["down_bias"], a["up"], a["up_bias"], a["scale"], seed)
    forward = (a["x"], a["residual"], *operands, *settings, save)
    torch.library.opcheck(torch.ops.vitadapter.adapter_forward.default, forward)
    _, hidden = torch.ops.vitadapter.adapter_forward.default(*forward[:-1], True)
    backward = (torch.randn_like(a["x"]), a["x"], hidden, *operands, False, *settings, 0b111111 if save else 0b010010)
    torch.library.opcheck(torch.ops.vitadapter.adapter_backward.default, backward)


def test_only_the_gradients_that_are_asked_for():
    everything = tensors_of(make())
    for wanted in everything:
        arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in make().items()}
        arguments[wanted].requires_grad_()
        (got,) = torch.autograd.grad(adapter(**arguments).square().sum(), arguments[wanted])
        (expected,) = torch.autograd.grad(reference.adapter(**arguments).square().sum(), arguments[wanted])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    a = make(bias=False, scale=2.0, residual=False)
    operands = (a["down"], None, a["up"], None, None, None)
    settings = (2.0, 0, 0.0, 0.0, 0.0, torch.float64, False)
    with torch.no_grad():
        _, hidden = torch.ops.vitadapter.adapter_forward.default(a["x"], None, *operands, *settings, True)
        grads = torch.ops.vitadapter.adapter_backward.default(
            torch.randn_like(a["x"]), a["x"], hidden, *operands, True, *settings, 0b001000
        )
    assert [g.numel() for g in grads] == [0, 0, 0, a["up"].numel(), 0, 0]


def test_double_backward_is_refused_clearly():
    arguments = make()
    (gx,) = torch.autograd.grad(adapter(**arguments).sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward pass"):
        gx.sum().backward()


def test_forward_mode_is_refused_clearly():
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in make().items()}
        arguments["x"] = torch.autograd.forward_ad.make_dual(arguments["x"], torch.ones(2, 5, 24).double())
        with pytest.raises(NotImplementedError, match="jvp"):
            adapter(**arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dropout, dynamic):
    module = FusedAdapter(24, 5, scale="channel", dropout=dropout, drop_path=dropout, init="bert").to(device)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    x = torch.randn(3, 7, 24, device=device)
    out = compiled(x)
    out.square().sum().backward()
    if dropout:
        # Eager and compiled draw different seeds; both keep some and drop some.
        assert out.shape == x.shape and not torch.equal(out, compiled(x))
        return
    expected = twin(x)
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("low", LOW, ids=short)
def test_autocast_gives_the_compute_dtype(device, low):
    module = FusedAdapter(24, 5, scale="channel", init="bert").to(device)
    x, branch = torch.randn(4, 24, device=device), torch.randn(4, 24, device=device).to(low)
    arguments = {"down": module.down.weight, "up": module.up.weight, "scale": module.scale}
    with torch.autocast(device, dtype=low):
        assert module(x).dtype == torch.float32
        assert module(branch).dtype == low
        mixed = module(branch, residual=x)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, adapter(branch, **arguments, residual=x, compute_dtype=low))
        assert module.double()(x.double()).dtype == torch.float64


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_the_same_bits_for_any_number_of_threads():
    arguments = make((1900, 40), 6, dtype=torch.float32)
    grad = torch.randn(1900, 40)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(run(adapter, arguments, grad, dropout=0.1, seed=torch.tensor([1])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_seeds_come_from_the_generator_and_drop_whole_samples(device):
    module = FusedAdapter(16, 4, drop_path=0.5, init="bert").to(device)
    x = torch.randn(64, 3, 16, device=device)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    dropped = (first == x).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    full = module.eval()(x)
    torch.testing.assert_close((first - x)[~dropped], 2 * (full - x)[~dropped], rtol=1e-4, atol=1e-5)


def test_strided_arguments_equal_contiguous_ones(device):
    arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in make(device=device).items()}
    strided = {
        k: torch.stack([v, v + 1], dim=-1)[..., 0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    assert not strided["x"].is_contiguous()
    strided["x"] = strided["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for a in (arguments, strided):
        a["x"].requires_grad_()
    assert torch.equal(adapter(**strided), adapter(**arguments))
    # A gradient that is expanded, as sum() makes it.
    grads = [torch.autograd.grad(adapter(**a).sum(), a["x"])[0] for a in (arguments, strided)]
    assert torch.equal(*grads)


def test_no_rows(device):
    arguments = make((0, 5, 24), device=device)
    results = run(adapter, arguments, torch.empty(0, 5, 24, device=device), drop_path=0.5)
    assert results["y"].shape == (0, 5, 24)
    assert all(not results[name].any() for name in ("down", "up", "down_bias", "up_bias", "scale"))


def test_rank_zero_leaves_residual_and_scaled_bias(device):
    arguments = make((3, 8), 0, device=device)
    expected = arguments["residual"] + arguments["scale"] * arguments["up_bias"]
    torch.testing.assert_close(adapter(**arguments), expected)
    assert torch.equal(adapter(arguments["x"], arguments["down"], arguments["up"]), arguments["x"])


def test_nan_and_infinity_pass_through(device):
    x, residual = torch.zeros(5, 16, device=device), torch.zeros(5, 16, device=device)
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    for activation in ACTIVATIONS:
        module = FusedAdapter(16, 4, activation, init="bert").to(device)
        module.down.weight.data.abs_()
        y = module(x, residual)
        assert y[1].isnan().all(), activation
        assert not y[3].isfinite().any(), activation
        assert y[[0, 2, 4]].isfinite().all()


def refusal(**changes):
    return lambda a: a | changes


BAD = {
    "activation 'geluu'.*did you mean 'gelu'": (ValueError, refusal(activation="geluu")),
    r"down has shape \(3, 23\); expected \(rank, dim\) = \(3, 24\)": refusal(down=torch.ones(3, 23).double()),
    r"down has shape \(24,\); expected \(rank, dim\)": refusal(down=torch.ones(24).double()),
    r"up has shape \(24, 4\); expected \(dim, rank\) = \(24, 3\)": refusal(up=torch.ones(24, 4).double()),
    r"down_bias has shape \(24,\); expected \(rank,\) = \(3,\)": refusal(down_bias=torch.ones(24).double()),
    r"up_bias has shape \(3,\); expected \(dim,\) = \(24,\)": refusal(up_bias=torch.ones(3).double()),
    r"scale has shape \(2,\); expected \(1,\) or \(dim,\)": refusal(scale=torch.ones(2).double()),
    r"residual has shape \(2, 24\); expected x's, \(2, 5, 24\)": refusal(residual=torch.ones(2, 24).double()),
    r"x has shape \(\); expected \(..., dim\)": refusal(x=torch.ones(()).double(), residual=None),
    "down is float32 and x is float64; float64 cannot be mixed": refusal(down=torch.ones(3, 24)),
    "residual is float32 and x is float64": refusal(residual=torch.ones(2, 5, 24)),
    "up is int64; float32, bfloat16, float16 and float64 are accepted": refusal(up=torch.ones(24, 3).long()),
    r"dropout is 1; it must be a probability in \[0, 1\)": refusal(dropout=1.0),
    r"drop_path is -0.5": refusal(drop_path=-0.5),
    r"seed is int64 of shape \(2,\); expected int64 of shape \(1,\)": refusal(dropout=0.5, seed=torch.zeros(2).long()),
    "seed is float32 of shape": refusal(dropout=0.5, seed=torch.zeros(1)),
    "the compute dtype is bfloat16 and x is float64": refusal(compute_dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_say_what_was_given_and_what_is_accepted(message):
    kind, change = BAD[message] if isinstance(BAD[message], tuple) else (RuntimeError, BAD[message])
    with pytest.raises(kind, match=message):
        adapter(**change(make()))


def test_two_low_dtypes_do_not_mix():
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="float32 mixes with one of them only"):
        adapter(x.bfloat16(), torch.ones(2, 8).half(), torch.ones(8, 2))


def test_a_device_without_kernels_gets_the_reference_with_one_warning(monkeypatch):
    ops = importlib.import_module("vitadapter_ext.ops.adapter")
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    ops.warn_without_kernels.cache_clear()
    arguments = make()
    with pytest.warns(UserWarning, match="plain PyTorch instead of its kernels") as caught:
        y = adapter(**arguments)
        adapter(**arguments)
    assert len(caught) == 1
    assert torch.equal(y, reference.adapter(**arguments))


def test_without_kernels_the_op_still_compiles_checks_and_ignores_autocast(monkeypatch):
    ops = importlib.import_module("vitadapter_ext.ops.adapter")
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    module = FusedAdapter(24, 5, scale="channel", init="bert")
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    with pytest.raises(RuntimeError, match=r"residual has shape \(7, 24\); expected \(3, 7, 24\)"):
        module(x, x[0])
    with pytest.raises(RuntimeError, match="a dropout probability is 1"):
        adapter(x, module.down.weight, module.up.weight, dropout=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    expected = adapter(x, **{k: v.detach() for k, v in {"down": module.down.weight, "up": module.up.weight}.items()},
                       scale=module.scale, compute_dtype=torch.bfloat16)  # fmt: skip
    assert torch.equal(low, expected)


def test_tf32_is_read_whichever_way_it_was_set():
    ops = importlib.import_module("vitadapter_ext.ops.adapter")
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert ops._allow_tf32() is allowed
        code = (
            "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'; import importlib; "
            "assert importlib.import_module('vitadapter_ext.ops.adapter')._allow_tf32() is True"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    finally:
        matmul.allow_tf32 = before


def test_float16_subnormals_survive_flushing_of_float32_ones():
    x = torch.full((1, 4), 2.0**-20, dtype=torch.float16)
    empty = torch.empty(0, 4), torch.empty(4, 0)
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(adapter(x, *empty, residual=x.float() * 0 + 2.0**-20), torch.full((1, 4), 2.0**-20))
        assert torch.equal(adapter(torch.zeros(1, 4), *empty, residual=x), torch.full((1, 4), 2.0**-20))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.cuda
@no_gpu
def test_cuda_graphs_streams_and_repeated_runs_give_the_same_bits():
    arguments = make((2, 65, 48), 5, dtype=torch.float32, device="cuda", residual=False)
    grad = torch.randn(2, 65, 48, device="cuda")
    expected = run(adapter, arguments, grad)
    for _ in range(3):
        assert all(torch.equal(value, expected[name]) for name, value in run(adapter, arguments, grad).items())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(adapter, arguments, grad)
    side.synchronize()
    assert all(torch.equal(value, expected[name]) for name, value in on_side.items())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(adapter, arguments, grad)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected[name]) for name, value in captured.items())


@pytest.mark.cuda
@no_gpu
def test_a_parameter_on_another_device_is_refused():
    x = torch.randn(2, 24, device="cuda")
    with pytest.raises(RuntimeError, match="down and x are on different devices"):
        adapter(x, torch.randn(3, 24), torch.randn(24, 3, device="cuda"))


def test_fake_tensors_have_the_right_shapes_and_dtypes():
    arguments = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in make().items()}
    assert adapter(**arguments).shape == (2, 5, 24)
    low = {k: v.to(torch.bfloat16) for k, v in tensors_of(arguments).items()}
    assert adapter(**low | {"residual": arguments["residual"].float()}).dtype == torch.float32
