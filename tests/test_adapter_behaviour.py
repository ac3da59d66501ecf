"""What does the `adapter` op do besides the mathematics? Seeds, strides, edge cases, devices, refusals."""

import subprocess
import sys

import pytest
import torch

from tests.adapter_problems import make
from tests.conftest import no_gpu
from tests.problems import tensors_of
from vitadapter_ext import FusedAdapter
from vitadapter_ext.ops import _common, adapter
from vitadapter_ext.ops.adapter import ACTIVATIONS


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


def test_rank_zero_leaves_residual_and_scaled_bias(device):
    arguments = make((3, 8), 0, dtype=torch.float32, device=device)
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


def test_without_kernels_the_op_still_compiles_checks_and_ignores_autocast(monkeypatch):
    monkeypatch.setattr(_common, "has_kernels", lambda device: False)
    module = FusedAdapter(24, 5, scale="channel", init="bert")
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    with pytest.raises(RuntimeError, match=r"residual has shape \(7, 24\); expected \(3, 7, 24\)"):
        module(x, x[0])
    with pytest.raises(RuntimeError, match="adapter: dropout is 1; it must be a probability"):
        adapter(x, module.down.weight, module.up.weight, dropout=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    expected = adapter(x, **{k: v.detach() for k, v in {"down": module.down.weight, "up": module.up.weight}.items()},
                       scale=module.scale, compute_dtype=torch.bfloat16)  # fmt: skip
    assert torch.equal(low, expected)


def test_tf32_is_read_whichever_way_it_was_set():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert _common.allow_tf32(torch.device("cuda")) is allowed
            assert _common.allow_tf32(torch.device("cpu")) is False
        code = (
            "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'; from vitadapter_ext.ops import _common; "
            "assert _common.allow_tf32(torch.device('cuda')) is True"
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
def test_a_parameter_on_another_device_is_refused():
    x = torch.randn(2, 24, device="cuda")
    with pytest.raises(RuntimeError, match="down is on cpu and x on cuda:0; all tensors"):
        adapter(x, torch.randn(3, 24), torch.randn(24, 3, device="cuda"))


def test_fake_tensors_have_the_right_shapes_and_dtypes():
    arguments = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in make().items()}
    assert adapter(**arguments).shape == (2, 5, 24)
    low = {k: v.to(torch.bfloat16) for k, v in tensors_of(arguments).items()}
    assert adapter(**low | {"residual": arguments["residual"].float()}).dtype == torch.float32
