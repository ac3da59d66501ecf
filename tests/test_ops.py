"""What holds for every op: autograd, strides, edge cases, devices without kernels, fake tensors, CUDA graphs."""

import re
from pathlib import Path

import pytest
import torch

from tests.adapter_problems import ADAPTER
from tests.arc_problems import ARC
from tests.conftest import no_gpu
from tests.consolidator_problems import CONSOLIDATOR
from tests.problems import detached, run, tensors_of
from vitadapter_ext.ops import _common


@pytest.fixture(params=[ADAPTER, ARC, CONSOLIDATOR], ids=lambda op: op.name)
def op(request):
    return request.param


def test_each_gradient_alone(op, plain_device):
    for wanted in tensors_of(op.make()):
        arguments = detached(op.make((40, 24), 9, device=plain_device))
        arguments[wanted].requires_grad_()
        (got,) = torch.autograd.grad(op.function(**arguments).square().sum(), arguments[wanted])
        (expected,) = torch.autograd.grad(op.reference(**arguments).square().sum(), arguments[wanted])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_double_backward_is_refused_clearly(op):
    arguments = op.make()
    (gx,) = torch.autograd.grad(op.function(**arguments).sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"no double backward pass; use vitadapter_ext.reference.{op.name} for"):
        gx.sum().backward()


def test_forward_mode_is_refused_clearly(op):
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        arguments = detached(op.make())
        arguments["x"] = torch.autograd.forward_ad.make_dual(arguments["x"], torch.ones(2, 5, 24).double())
        with pytest.raises(NotImplementedError, match="jvp"):
            op.function(**arguments)


def test_strided_arguments_equal_contiguous_ones(op, device):
    arguments = detached(op.make(dtype=torch.float32, device=device))
    strided = {
        k: torch.stack([v, v + 1], dim=-1)[..., 0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    assert not strided["x"].is_contiguous()
    strided["x"] = strided["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for a in (arguments, strided):
        a["x"].requires_grad_()
    assert torch.equal(op.function(**strided), op.function(**arguments))
    # A gradient that is expanded, as sum() makes it.
    grads = [torch.autograd.grad(op.function(**a).sum(), a["x"])[0] for a in (arguments, strided)]
    assert torch.equal(*grads)


def test_no_rows(op, device):
    arguments = op.make((0, 5, 24), dtype=torch.float32, device=device)
    results = run(op.function, arguments, torch.empty(0, 5, 24, device=device), **{op.probabilities[0]: 0.5})
    assert results["y"].shape == (0, 5, 24)
    for name, tensor in tensors_of(arguments).items():
        assert results[name].shape == tensor.shape and not results[name].any()


def test_a_call_changes_no_argument(op, device):
    arguments = op.make(dtype=torch.float32, device=device)
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(arguments).items()}
    run(op.function, arguments, torch.randn(2, 5, 24, device=device))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(arguments).items())


def test_two_low_dtypes_do_not_mix(op):
    arguments = detached(op.make(dtype=torch.float16))
    arguments["x"] = arguments["x"].bfloat16()
    with pytest.raises(RuntimeError, match=f"{op.name}: .* is float16 beside .* of bfloat16; float32 mixes with one"):
        op.function(**arguments)


def test_a_device_without_kernels_gets_the_reference_with_one_warning(op, monkeypatch):
    monkeypatch.setattr(_common, "has_kernels", lambda device: False)
    _common.warn_without_kernels.cache_clear()
    arguments = op.make()
    with pytest.warns(UserWarning, match="plain PyTorch instead of its kernels") as caught:
        y = op.function(**arguments)
        op.function(**arguments)
    assert len(caught) == 1 and Path(caught[0].filename).parent == Path(__file__).parent  # not in the package
    assert torch.equal(y, op.reference(**arguments))
    # Autocast chooses the compute dtype and nothing else.
    arguments = detached(op.make(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = op.function(**arguments)
    assert torch.equal(low, op.reference(**arguments, compute_dtype=torch.bfloat16))


def test_fake_tensors_have_the_right_shapes_and_dtypes(op):
    arguments = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in op.make().items()}
    y = op.function(**arguments)
    assert (y.shape, y.dtype) == ((2, 5, 24), torch.float64)
    assert op.function(**{k: v.bfloat16() for k, v in tensors_of(arguments).items()}).dtype == torch.bfloat16


def test_fake_tensors_are_refused_as_the_kernels_refuse_them(op):
    arguments = detached(op.make())
    fake = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for name, tensor in tensors_of(fake).items():
        if name == "x":
            continue
        with pytest.raises(RuntimeError, match=f"^{op.name}: {re.escape(name)} is on meta and x on cpu; all"):
            op.function(**arguments | {name: tensor})
        for shape in ((*tensor.shape, 2), (), (tensor.shape[0] + 1,)):
            with pytest.raises(RuntimeError, match=f"^{op.name}: .* has shape .*; expected"):
                op.function(**fake | {name: tensor.new_empty(shape)})
    with pytest.raises(RuntimeError, match=rf"^{op.name}: x has shape \(\); expected \(..., dim\)"):
        op.function(**fake | {"x": fake["x"].new_empty(())})


@pytest.mark.cuda
@no_gpu
def test_cuda_graphs_streams_and_repeated_runs_give_the_same_bits(op):
    arguments = op.make((2, 65, 48), 5, dtype=torch.float32, device="cuda")
    grad = torch.randn(2, 65, 48, device="cuda")
    expected = run(op.function, arguments, grad)
    for _ in range(3):
        assert all(torch.equal(value, expected[name]) for name, value in run(op.function, arguments, grad).items())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(op.function, arguments, grad)
    side.synchronize()
    assert all(torch.equal(value, expected[name]) for name, value in on_side.items())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op.function, arguments, grad)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected[name]) for name, value in captured.items())
