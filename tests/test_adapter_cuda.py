"""Is the fast CUDA kernel of the `adapter` op right, however it cuts a problem into tiles? Against float64 and the
simple kernels; and does it behave on a GPU: one kernel, no waiting, graphs, streams, large tensors, several GPUs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu_plans import AUTOMATIC, FAST, SIMPLE, Plan, result_under, using
from benchmarks.gpu_timing import kernels, waits_for_gpu
from tests.adapter_problems import converted, make, run
from tests.conftest import assert_as_good_as_eager, no_gpu, rms
from vitadapter_ext import reference
from vitadapter_ext.ops import adapter
from vitadapter_ext.ops.adapter import ACTIVATIONS

pytestmark = [pytest.mark.cuda, no_gpu]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# name: (x, residual (None: x itself), parameters, compute, TF32)
KINDS = {
    "float32": (F32, F32, F32, F32, False),
    "tf32": (F32, None, F32, F32, True),
    "bfloat16": (BF16, None, BF16, BF16, False),
    "bfloat16+residual": (BF16, BF16, F32, BF16, False),
    "bfloat16+residual32": (BF16, F32, F32, BF16, False),
    "float16": (F16, None, F16, F16, False),
    "float32-bfloat16": (F32, None, F32, BF16, False),
    "float32-float16": (F32, F32, F32, F16, False),
}
# Every rank and dim, rows around the edges of tiles of 32, 64 and 128, one row, and more rows than tiles at a time.
SIZES = [
    ((1, 1), 1), ((63, 1), 256), ((3, 7), 3), ((2, 5, 7), 64), ((257, 192), 1), ((31, 192), 5), ((33, 384), 8),
    ((8, 197, 192), 8), ((2, 65, 768), 16), ((64, 768), 50), ((3, 100, 768), 64), ((1, 768), 64), ((129, 384), 65),
    ((127, 768), 128), ((300, 192), 128), ((1, 1300), 5), ((17, 1300), 8), ((128, 1280), 3), ((300, 1280), 64),
    ((65, 1280), 256), ((130, 1300), 256), ((40, 96), 300), ((40_000, 192), 8), ((30_000, 64), 64),
]  # fmt: skip
FEW_SIZES = [((3, 7), 3), ((33, 384), 8), ((3, 100, 768), 64), ((300, 192), 65), ((17, 1300), 8), ((257, 768), 256)]


def name_of(value) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def problem(kind: str, shape, rank: int, **changes) -> dict:
    """Arguments in the dtypes of a kind, on the GPU."""
    x, residual, parameters, _, _ = KINDS[kind]
    dtypes = {"x": x, "residual": residual}
    arguments = make(shape, rank, dtype=F32, residual=residual is not None, **changes)
    return {
        k: v.detach().to("cuda", dtypes.get(k, parameters)).requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }


def outputs(arguments: dict, **options) -> dict[str, torch.Tensor]:
    """y and what the backward pass gets of the hidden layer, in memory that held NaN before."""
    for size in (arguments["x"].numel(), arguments["x"].shape[:-1].numel() * arguments["down"].shape[0]):
        torch.full((size,), float("nan"), device="cuda")  # and given back
    y = adapter(**arguments, **options)
    return {"y": y.detach(), "hidden": y.grad_fn.saved_tensors[1].float()}


def plain(arguments: dict, compute, activation="gelu", rounded=lambda t: t) -> dict[str, torch.Tensor]:
    """The same in plain PyTorch, every product in the compute dtype."""
    a = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

    def product(x, weight, bias):
        return F.linear(rounded(x.to(compute)), rounded(weight.to(compute)), None if bias is None else bias.to(compute))

    hidden = product(a["x"], a["down"], a["down_bias"])
    branch = product(reference.ACTIVATIONS[activation](hidden), a["up"], a["up_bias"]) * a["scale"]
    residual = a["x"] if a["residual"] is None else a["residual"]
    y_dtype = torch.promote_types(a["x"].dtype, residual.dtype)
    return {"y": (residual + branch).to(y_dtype), "hidden": hidden.float()}


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest, to the 10 bits of TF32's mantissa."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def exact(arguments: dict) -> dict[str, torch.Tensor]:
    return plain(converted(arguments, torch.Tensor.double), torch.float64) | {
        "hidden": F.linear(*(arguments[k].detach().double() for k in ("x", "down", "down_bias")))
    }


def check_accuracy(kind: str, shape, rank: int, plans: list[Plan]) -> list[Plan]:
    """Under each plan that fits as accurate as eager, or for TF32 as plain PyTorch on operands rounded to it; returns
    those plans. Small shapes take several draws: the error of a few numbers is mostly luck."""
    *_, compute, allowed = KINDS[kind]
    draws = min(20, max(2, 4096 // torch.Size(shape).numel()))
    ours, eager, rounded, right = {plan: [] for plan in plans}, [], [], []
    with tf32(allowed):
        for _ in range(draws):
            arguments = problem(kind, shape, rank)
            eager.append(plain(arguments, compute))
            right.append(exact(arguments))
            if allowed:
                with tf32(False):
                    rounded.append(plain(arguments, compute, rounded=to_tf32))
            for plan in plans:
                ours[plan].append(
                    result_under(plan, lambda arguments=arguments: outputs(arguments, compute_dtype=compute))
                )
    fit = [plan for plan in plans if all(ours[plan])]
    for plan in fit:
        try:
            assert_as_good_as_eager(ours[plan], eager, right)
        except AssertionError as error:
            if not allowed:
                raise AssertionError(f"{plan}: {error}") from error
            assert_as_good_as_eager(ours[plan], rounded, right)
    return fit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), SIZES, ids=name_of)
def test_as_accurate_as_eager(kind, shape, rank):
    assert check_accuracy(kind, shape, rank, [AUTOMATIC, SIMPLE]) == [AUTOMATIC, SIMPLE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), FEW_SIZES, ids=name_of)
def test_every_plan_that_fits_is_as_accurate_as_eager(kind, shape, rank):
    assert check_accuracy(kind, shape, rank, FAST), "no plan fits"


def tolerance(kind: str) -> float:
    x, _, _, compute, allowed = KINDS[kind]
    return max(torch.finfo(compute).eps, torch.finfo(x).eps, 2**-10 if allowed else 1e-5)


def assert_near(found: dict, expected: dict, kind: str, what: object = "") -> None:
    """Nowhere further apart than a few roundings of a typical element: a mask, a bias or a row that differs is."""
    for name, value in expected.items():
        limit = 4 * tolerance(kind)
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=limit,
            atol=limit * rms(value),
            msg=lambda words, name=name: f"{what} {name}: {words}",
        )


OPTIONS = [{"activation": name} for name in ACTIVATIONS] + [
    {"dropout": 0.3},
    {"dropout_out": 0.2},
    {"drop_path": 0.5},
    {"activation": "silu", "dropout": 0.1, "dropout_out": 0.1, "drop_path": 0.2},
]
# Of `make`, beside biases, a channel scale and the kind's own residual.
VARIANTS = [
    {},
    {"bias": False, "scale": 1.0},
    {"scale": "scalar"},
    {"scale": -0.3},
    {"bias": False, "scale": "channel"},
]


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "bfloat16+residual32", "float16", "float32-bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_is_that_of_the_simple_kernels(kind, options):
    seed = torch.tensor([11], device="cuda")
    for i, variant in enumerate(VARIANTS):
        shape, rank = ((7, 13, 72), 12) if i % 2 else ((5, 33, 384), 64)
        arguments = problem(kind, shape, rank, **variant)
        settings = options | {"seed": seed, "compute_dtype": KINDS[kind][3]}
        with tf32(KINDS[kind][4]):
            with using(SIMPLE):
                expected = outputs(arguments, **settings)
            fit = 0
            for plan in (AUTOMATIC, *FAST):
                found = result_under(plan, lambda a=arguments, s=settings: outputs(a, **s))
                if found is not None:
                    fit += 1
                    assert_near(found, expected, kind, f"{plan}, {variant},")
                    with torch.no_grad(), using(plan):
                        assert torch.equal(adapter(**arguments, **settings), found["y"]), "the same bits without grad"
            assert fit > 1, "no plan fits"


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float32-bfloat16"])
def test_gradients_follow(kind):
    arguments = problem(kind, (3, 50, 192), 16)
    grad = torch.randn(3, 50, 192, device="cuda")
    options = {"dropout": 0.2, "seed": torch.tensor([3], device="cuda"), "compute_dtype": KINDS[kind][3]}
    with tf32(KINDS[kind][4]):
        with using(SIMPLE):
            expected = run(adapter, arguments, grad, **options)
        assert_near(run(adapter, arguments, grad, **options), expected, kind)


def test_a_plan_that_does_not_fit_is_refused_and_the_automatic_one_comes_back():
    arguments = problem("bfloat16", (70, 768), 64)
    expected = adapter(**arguments)
    with pytest.raises(RuntimeError), using(Plan(7, 1)):
        adapter(**arguments)
    assert torch.equal(adapter(**arguments), expected)


def elsewhere(value):
    """The same tensor, contiguous, one element into its storage."""
    if not isinstance(value, torch.Tensor):
        return value
    view = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value.detach())
    return view.detach().requires_grad_()


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "bfloat16+residual32", "float16"])
@pytest.mark.parametrize(("shape", "rank"), [((3, 33, 768), 64), ((65, 7), 5), ((2, 40, 384), 8)], ids=name_of)
def test_tensors_may_begin_anywhere_and_be_strided(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    with tf32(KINDS[kind][4]):
        expected = outputs(arguments, compute_dtype=KINDS[kind][3])
        wider = torch.randn(*shape[:-1], 2 * shape[-1] + 1, device="cuda").to(arguments["x"].dtype)
        wider[..., 1 : 1 + shape[-1]] = arguments["x"].detach()
        changes = {
            "all": {name: elsewhere(value) for name, value in arguments.items()},
            "x": {"x": elsewhere(arguments["x"])},
            "weights": {name: elsewhere(arguments[name]) for name in ("down", "up")},
            "strided x": {"x": wider[..., 1 : 1 + shape[-1]].requires_grad_()},
            "transposed weights": {
                name: arguments[name].detach().t().contiguous().t().requires_grad_() for name in ("down", "up")
            },
        }
        for what, changed in changes.items():
            for plan in (AUTOMATIC, *FAST):
                call = arguments | changed
                found = result_under(plan, lambda c=call: outputs(c, compute_dtype=KINDS[kind][3]))
                assert found is not None or plan != AUTOMATIC
                if found is not None:
                    assert_near(found, expected, kind, f"{plan}, {what},")


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float32-bfloat16"])
def test_a_captured_graph_follows_its_inputs(kind):
    arguments = problem(kind, (4, 197, 384), 16)
    options = {"dropout": 0.3, "seed": torch.tensor([1], device="cuda"), "compute_dtype": KINDS[kind][3]}
    graph = torch.cuda.CUDAGraph()
    with tf32(KINDS[kind][4]):
        outputs(arguments, **options)
        with torch.cuda.graph(graph):
            y = adapter(**arguments, **options)
        for seed in (1, 2, 3):
            options["seed"].fill_(seed)
            with torch.no_grad():
                arguments["x"].normal_()
                arguments["down"].normal_(0, 0.05)
            graph.replay()
            assert torch.equal(y, adapter(**arguments, **options))


def test_work_goes_to_the_current_stream():
    arguments = problem("bfloat16", (8, 197, 768), 64)
    fresh = torch.randn_like(arguments["x"])
    expected = adapter(**arguments | {"x": fresh})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(50_000_000)  # on any other stream, the kernel would come before the copy
        arguments["x"].copy_(fresh)
        y = adapter(**arguments)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 64), ((5000, 192), 200), ((333, 1300), 8)], ids=name_of)
def test_the_same_bits_on_every_run(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    with tf32(KINDS[kind][4]):
        expected = outputs(arguments, compute_dtype=KINDS[kind][3])
        for _ in range(10):
            found = outputs(arguments, compute_dtype=KINDS[kind][3])
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 64), ((5, 192), 8), ((300, 1300), 256)], ids=name_of)
def test_forward_is_one_kernel(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    with tf32(KINDS[kind][4]):
        options = {"compute_dtype": KINDS[kind][3]}
        fit = [plan for plan in FAST if result_under(plan, lambda: outputs(arguments, **options)) is not None]
        assert fit, "no plan fits"
        for no_grad in (torch.no_grad(), contextlib.nullcontext()):
            with no_grad:
                names = kernels(lambda: adapter(**arguments, **options))
            assert len(names) == 1, names


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "bfloat16+residual32"])
def test_nothing_waits_for_the_gpu(kind):
    arguments = problem(kind, (5000, 768), 64)
    grad = torch.randn(5000, 768, device="cuda")

    def work():
        run(adapter, arguments, grad, compute_dtype=KINDS[kind][3])

    with tf32(KINDS[kind][4]):
        work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not waits_for_gpu(work)


def test_more_than_2_to_the_31_elements():
    rows, dim, rank = 2**25 + 77, 64, 64
    needed = rows * dim * 2 * 2 + rows * rank * 4 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"more than 2^31 elements of bfloat16 need {needed / 1e9:.0f} GB of free GPU memory")
    arguments = problem("bfloat16", (1, dim), rank)
    x = torch.randn(rows, dim, device="cuda", dtype=BF16)
    y = adapter(**arguments | {"x": x})
    hidden = y.grad_fn.saved_tensors[1]
    for begin in (0, 2**24 - 500, 2**25 - 500, rows - 1000):
        part = slice(begin, begin + 1000)
        expected = plain(arguments | {"x": x[part]}, BF16)
        found = {"y": y[part].detach(), "hidden": hidden[part]}
        assert_near(found, expected, "bfloat16", f"rows from {begin},")
    del x, y, hidden, found, expected
    torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_call_are_refused_and_each_serves_its_own():
    arguments = problem("bfloat16", (70, 384), 64)
    other = {k: v.detach().to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="up is on cuda:1 and x on cuda:0; all tensors"):
        adapter(**arguments | {"up": other["up"]})
    assert torch.cuda.current_device() == 0
    assert torch.equal(adapter(**other).cpu(), adapter(**arguments).cpu())


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "bfloat16+residual32", "float32-float16"])
@pytest.mark.parametrize(
    ("shape", "rank"), [((2, 20, 48), 8), ((70, 192), 64), ((33, 7), 5), ((40, 72), 130)], ids=name_of
)
def test_a_few_of_each_kind(kind, shape, rank):
    # compute-sanitizer runs this: no library's kernels beside ours, so the reference is computed on the CPU.
    arguments, grad = problem(kind, shape, rank), torch.randn(shape)
    options = {"dropout": 0.1, "drop_path": 0.2, "seed": torch.tensor([5]), "activation": "gelu_tanh"}
    wide = {k: v.detach().cpu().double().requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()}  # fmt: skip
    right = run(reference.adapter, wide, grad, **options)
    options |= {"seed": options["seed"].cuda(), "compute_dtype": KINDS[kind][3]}
    with tf32(KINDS[kind][4]):
        fit = []
        for plan in (AUTOMATIC, SIMPLE, *FAST):
            found = result_under(plan, lambda: run(adapter, arguments, grad.cuda(), **options))
            if found is not None:
                fit.append(plan)
                assert_near({k: v.cpu() for k, v in found.items()}, right, kind, f"{plan},")
        assert set(fit) & set(FAST), "no plan fits"
