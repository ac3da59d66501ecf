"""Are ARC's CUDA kernels right under every plan, for any choice of gradients, and without waiting for the GPU? Needs a
GPU; tests/test_arc.py says of every device whether the mathematics is right."""

import pytest
import torch

from benchmarks.gpu_plans import AUTOMATIC, FAST, SIMPLE, SLICED, result_under
from benchmarks.gpu_timing import kernels, waits_for_gpu
from tests.arc_problems import make
from tests.conftest import no_gpu
from tests.problems import detached, run, tensors_of
from tests.test_adapter_cuda import KINDS as ADAPTER_KINDS
from tests.test_adapter_cuda import assert_near, name_of, tf32
from vitadapter_ext import reference
from vitadapter_ext.ops import arc

pytestmark = [pytest.mark.cuda, no_gpu]

F32 = torch.float32
# Of the adapter's (x, residual, parameters, compute, TF32), those that ARC has: x is the residual.
KINDS = ["tf32", "bfloat16", "float16", "float32-bfloat16", "float32-bfloat16 parameters"]
# The gradient of the basis is a sum of two products, of factors that are rounded each.
ROUNDINGS = 6
GRADIENTS = [("x",), ("basis",), ("rescale",), ("bias",), ("basis", "rescale"), ("x", "bias")]


def problem(kind: str, shape, rank: int) -> dict:
    """Arguments in the dtypes of a kind, on the GPU."""
    x, _, parameters, _, _ = ADAPTER_KINDS[kind]
    return {
        name: tensor.detach().to("cuda", x if name == "x" else parameters).requires_grad_()
        for name, tensor in make(shape, rank, dtype=F32).items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "rank"), [((2, 20, 48), 8), ((70, 192), 50), ((33, 7), 5), ((40, 72), 130)], ids=name_of
)
def test_a_few_of_each_kind(kind, shape, rank):
    # compute-sanitizer runs this: no library's kernels beside ours, so the reference is computed on the CPU.
    arguments, grad = problem(kind, shape, rank), torch.randn(shape)
    grad = grad.to(arguments["x"].dtype)
    options = {"dropout": 0.1, "seed": torch.tensor([5])}
    wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in arguments.items()}
    right = run(reference.arc, wide, grad, **options)
    options |= {"seed": options["seed"].cuda(), "compute_dtype": ADAPTER_KINDS[kind][3]}
    with tf32(ADAPTER_KINDS[kind][4]):
        fit = []
        for plan in (AUTOMATIC, SIMPLE, *FAST, SLICED[0]):
            found = result_under(plan, lambda: run(arc, arguments, grad.cuda(), **options))
            if found is not None:
                fit.append(plan)
                assert_near({name: value.cpu() for name, value in found.items()}, right, kind, f"{plan},", ROUNDINGS)
        assert set(fit) & set(FAST), "no plan fits"
        for wanted in GRADIENTS:
            some = {name: tensor if name in wanted else tensor.detach() for name, tensor in arguments.items()}
            found = torch.autograd.grad(arc(**some, **options), [some[name] for name in wanted], grad.cuda())
            found = {name: value.cpu() for name, value in zip(wanted, found, strict=True)}
            assert_near(found, {name: right[name] for name in wanted}, kind, f"only {wanted},", ROUNDINGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 50), ((333, 1300), 200)], ids=name_of)
def test_the_same_bits_on_every_run_and_by_every_plan(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    grad = torch.randn(shape, device="cuda").to(arguments["x"].dtype)
    options = {"dropout": 0.1, "seed": torch.tensor([5], device="cuda"), "compute_dtype": ADAPTER_KINDS[kind][3]}
    with tf32(ADAPTER_KINDS[kind][4]):
        first = run(arc, arguments, grad, **options)
        for plan in (AUTOMATIC, AUTOMATIC, *FAST):
            found = result_under(plan, lambda: run(arc, arguments, grad, **options))
            for name, value in (found or {}).items():
                assert torch.equal(value, first[name]), f"{name} differs under {plan}"


def test_one_kernel_forward_three_backward_and_no_waiting():
    arguments = problem("bfloat16", (12_608, 768), 50)
    grad = torch.randn(12_608, 768, device="cuda", dtype=torch.bfloat16)

    def forward():
        return arc(**arguments)

    def both():
        return torch.autograd.grad(forward(), list(tensors_of(arguments).values()), grad)

    both()
    assert not waits_for_gpu(forward) and not waits_for_gpu(both)
    assert len(kernels(lambda: arc(**detached(arguments)))) == len(kernels(forward)) == 1
    assert len(kernels(both)) == 4 and all("vitadapter" in name for name in kernels(both))
