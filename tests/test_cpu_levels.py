"""Do all CPU levels compute the same, whatever the threads and wherever the tensors lie, and can one be chosen?"""

import pytest
import torch

from tests.adapter_problems import ADAPTER
from tests.arc_problems import ARC
from tests.conftest import at_level, on_levels, rms
from tests.consolidator_problems import CONSOLIDATOR
from tests.problems import LOW, run, short
from vitadapter_ext import _C
from vitadapter_ext.ops import adapter

each_op = pytest.mark.parametrize("op", [ADAPTER, ARC, CONSOLIDATOR], ids=lambda op: op.name)
# (x and the parameters, compute)
KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


def kind_name(kind) -> str:
    return "-".join(map(short, kind))


@each_op
@pytest.mark.parametrize("kind", [*KINDS, (torch.float16, torch.float16)], ids=kind_name)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((3, 37, 96), 8), ((2, 500, 40), 20), ((4, 197, 192), 64), ((16, 768), 100), ((30, 33), 150)],
    ids=str,
)
def test_all_levels_agree(op, kind, shape, rank):
    dtype, compute = kind
    dropout = dict(zip(op.probabilities, (0.1, 0.2, 0.1), strict=False))
    arguments, grad = op.make(shape, rank, dtype=dtype), torch.randn(shape).to(dtype)
    results = {}
    for level in _C.cpu_levels():
        with at_level(level):
            seed = torch.tensor([1])
            results[level] = run(op.function, arguments, grad, seed=seed, compute_dtype=compute, **dropout)
    # At the level bf16 the hidden layer goes on in the compute dtype.
    tolerance = max(torch.finfo(compute).eps, torch.finfo(dtype).eps, 1e-6)
    for level, result in results.items():
        for name, expected in results["portable"].items():
            error = rms(result[name].double() - expected.double())
            assert error <= tolerance * rms(expected), f"{level}, {name}: {error / rms(expected):.3g} of its RMS"


@each_op
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 100])
@pytest.mark.parametrize("shape", [(8, 197, 64), (5000, 24), (16, 768)], ids=str)
def test_the_same_bits_for_any_number_of_threads(cpu_level, op, shape, rank, kind):
    dtype, compute = kind
    arguments, grad = op.make(shape, rank, dtype=dtype), torch.randn(shape).to(dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            seed = torch.tensor([1])
            dropped = {op.probabilities[0]: 0.1}
            results.append(run(op.function, arguments, grad, seed=seed, compute_dtype=compute, **dropped))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def at_odd_address(value):
    """The same tensor, contiguous, one element into its storage."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(value.numel() + 1, dtype=value.dtype)
    view = storage[1:].view(value.shape).copy_(value.detach())
    assert view.is_contiguous() and view.data_ptr() % (2 * view.element_size()) == view.element_size()
    return view.requires_grad_()


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=short)
@pytest.mark.parametrize(
    ("shape", "rank"), [((2, 50, 64), 8), ((3, 33, 33), 5), ((130, 96), 64), ((16, 192), 100), ((7, 63), 31)], ids=str
)
def test_tensors_may_begin_anywhere(cpu_level, op, shape, rank, dtype):
    arguments, grad = op.make(shape, rank, dtype=dtype), torch.randn(shape).to(dtype)
    expected = run(op.function, arguments, grad)
    odd = run(op.function, {k: at_odd_address(v) for k, v in arguments.items()}, at_odd_address(grad).detach())
    for name, value in expected.items():
        assert torch.equal(value, odd[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_an_output_larger_than_the_caches_has_the_same_bits(cpu_level, dtype):
    # Such an output is written past the caches, and on huge pages.
    rows = 48_000 if dtype == torch.float32 else 96_000
    arguments = ADAPTER.make((rows, 192), 4, dtype=dtype, residual=False)
    x, weights = arguments.pop("x"), {k: v for k, v in arguments.items() if k != "residual"}
    grad = torch.randn(rows, 192).to(dtype)

    def run_rows(some):
        part = x.detach()[some].requires_grad_()
        y = adapter(part, **weights)
        return y, *torch.autograd.grad(y, part, grad[some])

    whole = run_rows(slice(None))
    parts = [run_rows(slice(begin, begin + 3001)) for begin in range(0, rows, 3001)]
    for ours, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(pieces))


def test_a_level_that_is_not_there_is_refused_and_changes_nothing(cpu_level):
    has = ", ".join(_C.cpu_levels())
    with pytest.raises(RuntimeError, match=f"^the CPU level is 'avx1024', but this machine has: {has}$"):
        _C.use_cpu_level("avx1024")
    assert _C.cpu_level() == cpu_level


def test_levels_are_named_lowest_first():
    assert [level.values[0] for level in on_levels()][: len(_C.cpu_levels())] == _C.cpu_levels()
