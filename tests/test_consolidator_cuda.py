"""Are the consolidator's CUDA kernels right, fast and simple ones, in every mix of dtypes and for any choice of
gradients, and without waiting for the GPU? Needs a GPU; tests/test_consolidator.py says of every device whether the
mathematics is right."""

import pytest
import torch

from benchmarks.gpu_plans import AUTOMATIC, SIMPLE, result_under
from benchmarks.gpu_timing import kernels, waits_for_gpu
from tests.conftest import no_gpu
from tests.consolidator_problems import listed, make_branches
from tests.problems import converted, detached, run, tensors_of
from tests.test_adapter_cuda import BF16, F16, F32, assert_near, name_of
from vitadapter_ext import ops, reference

pytestmark = [pytest.mark.cuda, no_gpu]

consolidator, exact = listed(ops.consolidator), listed(reference.consolidator)
# name, by which test_adapter_cuda.py has the tolerance: (x, base, parameters, compute)
KINDS = {
    "float32": (F32, F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16, BF16),
    "bfloat16+residual": (BF16, BF16, F32, BF16),
    "float16": (F16, F16, F16, F16),
    "float32-bfloat16": (F32, BF16, F32, BF16),  # what autocast gives
    "float32-float16": (F32, F16, F32, F16),
    "bfloat16-float32": (BF16, F32, F32, F32),
}
# in, out, groups of each branch, rows: ViT-B's, wider, odd ones, one group and groups of one input; 1 to 4 branches.
SIZES = [
    (768, 2304, (384,), (2, 197)),
    (3072, 768, (384, 96, 12), (70,)),
    (30, 42, (6,), (3, 7)),
    (48, 48, (48, 1), (33,)),
    (192, 576, (96, 48, 24, 3), (2, 50)),
]
# Sums over many rows are made in another order than the reference's.
ROUNDINGS = 6


def problem(kind: str, width: int, out: int, groups: tuple[int, ...], rows: tuple[int, ...], **options) -> dict:
    """Arguments in the dtypes of a kind, on the GPU."""
    x, base, parameters, _ = KINDS[kind]
    dtypes = {"x": x, "base": base}
    return {
        name: None if tensor is None else tensor.detach().to("cuda", dtypes.get(name, parameters)).requires_grad_()
        for name, tensor in make_branches(width, out, groups, rows, **options).items()
    }


def on_cpu(found: dict) -> dict:
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, (size[0], size[1], len(size[2])))))
def test_a_few_of_each_kind(kind, size):
    # compute-sanitizer runs this: no library's kernels beside ours, so the reference is computed on the CPU.
    arguments, compute = problem(kind, *size), KINDS[kind][3]
    grad = torch.randn(*size[3], size[1]).to(arguments["base"].dtype)
    wide = converted(arguments, lambda tensor: tensor.cpu().double())
    for shuffle, drop_path in ((True, 0.0), (False, 0.5)):
        options = {"shuffle": shuffle, "drop_path": drop_path, "seed": torch.tensor([5]) if drop_path else None}
        right = run(exact, wide, grad.double(), **options)
        options |= {"seed": options["seed"].cuda() if drop_path else None, "compute_dtype": compute}
        for plan in (AUTOMATIC, SIMPLE):
            found = result_under(plan, lambda options=options: run(consolidator, arguments, grad.cuda(), **options))
            what = f"{plan}, shuffle {shuffle}, drop_path {drop_path},"
            assert_near(on_cpu(found), right, kind, what, ROUNDINGS)
    for wanted in (("x",), ("weights[0]",), ("biases[0]",), ("base", "weights[0]")):
        some = {name: tensor if name in wanted else tensor.detach() for name, tensor in arguments.items()}
        y = consolidator(**some, **options)
        found = dict(zip(wanted, torch.autograd.grad(y, [some[name] for name in wanted], grad.cuda()), strict=True))
        assert_near(on_cpu(found), {name: right[name] for name in wanted}, kind, f"only {wanted},", ROUNDINGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [True, False], ids=["base", "alone"])
def test_without_biases(kind, base):
    arguments = problem(kind, 768, 2304, (384, 96), (70,), bias=False, base=base)
    wide = converted(arguments, lambda tensor: tensor.cpu().double())
    grad = torch.randn(70, 2304).to(arguments["base" if base else "x"].dtype)
    right = run(exact, wide, grad.double())
    found = run(consolidator, arguments, grad.cuda(), compute_dtype=KINDS[kind][3])
    assert_near(on_cpu(found), right, kind, "", ROUNDINGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [(384,), (12,), (384, 192, 96, 48)], ids=name_of)
def test_the_same_bits_on_every_run(kind, groups):
    arguments = problem(kind, 768, 2304, groups, (64, 197))
    grad = torch.randn(64, 197, 2304, device="cuda").to(arguments["base"].dtype)
    options = {"drop_path": 0.5, "seed": torch.tensor([5], device="cuda"), "compute_dtype": KINDS[kind][3]}
    first = run(consolidator, arguments, grad, **options)
    for _ in range(3):
        for name, value in run(consolidator, arguments, grad, **options).items():
            assert torch.equal(value, first[name]), f"{name} differs"


@pytest.mark.parametrize("groups", [(384,), (384, 192, 96, 48)], ids=name_of)
def test_one_kernel_forward_at_most_three_backward_and_no_waiting(groups):
    arguments = problem("bfloat16", 768, 2304, groups, (64, 197))
    grad = torch.randn(64, 197, 2304, device="cuda", dtype=BF16)

    def forward():
        return consolidator(**arguments)

    def both():
        return torch.autograd.grad(forward(), list(tensors_of(arguments).values()), grad)

    both()
    assert not waits_for_gpu(forward) and not waits_for_gpu(both)
    assert len(kernels(lambda: consolidator(**detached(arguments)))) == len(kernels(forward)) == 1
    assert len(kernels(both)) <= 4 and all("vitadapter" in name for name in kernels(both))
