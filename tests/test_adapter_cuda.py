"""Are the fast CUDA kernels of the `adapter` op right, forward and backward, however they cut a problem up? Against
float64 and the simple kernels; and do they behave on a GPU: few kernels, little memory, no waiting, graphs, streams,
large tensors, several GPUs."""

import contextlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import ROOT
from benchmarks.gpu_plans import AUTOMATIC, FAST, SIMPLE, SLICED, Plan, result_under, using
from benchmarks.gpu_timing import kernels, peak_bytes, waits_for_gpu
from tests.adapter_problems import make
from tests.conftest import assert_as_good_as_eager, no_gpu, rms
from tests.problems import converted, run, tensors_of
from vitadapter_ext import FusedAdapter, reference
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
    "bfloat16-float32": (BF16, F32, F32, F32, False),
    "float32-bfloat16 parameters": (F32, None, BF16, F32, True),
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


def grad_for(arguments: dict) -> torch.Tensor:
    """A random dy."""
    x, residual = arguments["x"], arguments["residual"]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.randn(x.shape, device=x.device).to(dtype)


@contextlib.contextmanager
def memory_of_nans():
    """Memory that nobody has written yet holds NaN, outputs and workspace alike."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def outputs(arguments: dict, **options) -> dict[str, torch.Tensor]:
    """y and what the backward pass gets of the hidden layer."""
    with memory_of_nans():
        y = adapter(**arguments, **options)
    return {"y": y.detach(), "hidden": y.grad_fn.saved_tensors[1].float()}


def gradients(y: torch.Tensor, arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """Of all tensors that want one."""
    wanted = {name: tensor for name, tensor in tensors_of(arguments).items() if tensor.requires_grad}
    with memory_of_nans():
        found = torch.autograd.grad(y, list(wanted.values()), grad, **options)
    return {f"gradient of {name}": value for name, value in zip(wanted, found, strict=True)}


def results(arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """y and all gradients. No autograd graph stays: in a later capture, it would bring its own stream along."""
    y = adapter(**arguments, **options)
    return {"y": y.detach()} | gradients(y, arguments, grad)


def under(plan: Plan, arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """What the plan fits: y and the hidden layer, the gradients (of an automatic forward pass), all or nothing."""
    y = adapter(**arguments, **options)
    forward = result_under(plan, lambda: outputs(arguments, **options)) or {}
    return forward | (result_under(plan, lambda: gradients(y, arguments, grad)) or {})


def directions(found: dict) -> set[str]:
    """In which directions a plan fits."""
    return {"backward" if name.startswith("gradient") else "forward" for name in found}


def plain(arguments: dict, grad: torch.Tensor, compute, linear=F.linear) -> dict[str, torch.Tensor]:
    """The same in plain PyTorch, every product in the compute dtype."""
    a = converted(arguments, lambda tensor: tensor)

    def product(x, weight, bias):
        return linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))

    hidden = product(a["x"], a["down"], a["down_bias"])
    branch = product(F.gelu(hidden), a["up"], a["up_bias"]) * a["scale"]
    residual = a["x"] if a["residual"] is None else a["residual"]
    y = (residual + branch).to(torch.promote_types(a["x"].dtype, residual.dtype))
    wide = torch.promote_types(F32, hidden.dtype)
    found = torch.autograd.grad(y, list(tensors_of(a).values()), grad.to(y.dtype))
    named = {f"gradient of {name}": value for name, value in zip(tensors_of(a), found, strict=True)}
    return {"y": y.detach(), "hidden": hidden.detach().to(wide)} | named


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest, to the 10 bits of TF32's mantissa."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class LinearInTf32(torch.autograd.Function):
    """F.linear whose products, forward and backward, are exact on operands rounded to TF32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = to_tf32(x), to_tf32(weight)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), to_tf32(grad).flatten(0, -2)
        bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        return (grads @ weight).view_as(x), grads.t() @ rows, bias


def exact(arguments: dict, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    return plain(converted(arguments, torch.Tensor.double), grad, torch.float64)


def check_accuracy(kind: str, shape, rank: int, plans: list[Plan]) -> dict[Plan, set[str]]:
    """Under each plan that fits as accurate as eager, or for TF32 as plain PyTorch on operands rounded to it; returns
    the directions in which they fit. Few numbers take several draws: their error is mostly luck.

    Of many rows a few wrong ones hardly change an RMS: there, every number is also held against the simple kernels'.
    And a few that are lost hardly change a sum: every other dy is 0 but for the first and the last rows."""
    *_, compute, allowed = KINDS[kind]
    draws = min(20, max(2, 4096 // torch.Size(shape).numel(), 64 // rank))
    many = torch.Size(shape[:-1]).numel() > 1000
    ours, eager, rounded, right = {plan: [] for plan in plans}, [], [], []
    with tf32(allowed):
        for draw in range(draws):
            arguments = problem(kind, shape, rank)
            grad = grad_for(arguments)
            at_edges = many and draw % 2 == 1
            if at_edges:
                grad.view(-1, shape[-1])[300:-300] = 0
            eager.append(plain(arguments, grad, compute))
            right.append(exact(arguments, grad))
            if allowed:
                with tf32(False):
                    rounded.append(plain(arguments, grad, compute, linear=LinearInTf32.apply))
            for plan in plans:
                ours[plan].append(under(plan, arguments, grad, compute_dtype=compute))
            if many and SIMPLE in ours:
                # Of gradients that are mostly 0, like dy, the RMS is no measure of those that are not.
                skipped = ("gradient of x", "gradient of residual") if at_edges else ()
                expected = {name: value for name, value in ours[SIMPLE][-1].items() if name not in skipped}
                assert_near(ours[AUTOMATIC][-1], expected, kind, f"draw {draw},")
    for plan, found in ours.items():
        expected = [{name: draw[name] for name in found[0]} for draw in right]
        try:
            assert_as_good_as_eager(found, eager, expected)
        except AssertionError as error:
            if not allowed:
                raise AssertionError(f"{plan}: {error}") from error
            assert_as_good_as_eager(found, rounded, expected)
    return {plan: directions(found[0]) for plan, found in ours.items()}


BOTH = {"forward", "backward"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), SIZES, ids=name_of)
def test_as_accurate_as_eager(kind, shape, rank):
    assert check_accuracy(kind, shape, rank, [AUTOMATIC, SIMPLE]) == {AUTOMATIC: BOTH, SIMPLE: BOTH}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), FEW_SIZES, ids=name_of)
def test_every_plan_that_fits_is_as_accurate_as_eager(kind, shape, rank):
    sliced = [Plan(0, slices=slices) for slices in (1, 3)]
    fit = check_accuracy(kind, shape, rank, FAST + sliced)
    assert set.union(*(fit[plan] for plan in FAST)) == BOTH, "no plan fits"
    assert all(fit[plan] == BOTH for plan in sliced)


def tolerance(kind: str) -> float:
    x, _, parameters, compute, allowed = KINDS[kind]
    return max(*(torch.finfo(dtype).eps for dtype in (x, parameters, compute)), 2**-10 if allowed else 1e-5)


def assert_near(found: dict, expected: dict, kind: str, what: object = "", roundings: int = 4) -> None:
    """Nowhere further apart than a few roundings of a typical element: a mask, a bias or a row that differs is."""
    *_, compute, allowed = KINDS[kind]
    # Where what it is compared with does not round x and the weights themselves, as the simple kernels do not to TF32,
    # nor float64 to float16, two errors more come in: with 4, by emulation, 2 % of the runs would be false alarms.
    limit = (roundings + 2 * (allowed or compute == F16)) * tolerance(kind)
    for name, value in expected.items():
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
                y = adapter(**arguments, **settings)
                # With y in it, no sum is near 0 by chance: a scalar scale's has no others to be measured by.
                grad = grad_for(arguments) + y.detach()
                expected |= gradients(y, arguments, grad, retain_graph=True)
            fit = []
            for plan in (AUTOMATIC, *FAST, SLICED[0]):
                found = result_under(plan, lambda a=arguments, s=settings: outputs(a, **s)) or {}
                if found:
                    with torch.no_grad(), using(plan):
                        assert torch.equal(adapter(**arguments, **settings), found["y"]), "the same bits without grad"
                # All of one hidden layer: some activations have slopes that jump.
                backward = result_under(plan, lambda y=y, a=arguments, g=grad: gradients(y, a, g, retain_graph=True))
                found |= backward or {}
                assert_near(found, {name: expected[name] for name in found}, kind, f"{plan}, {variant},")
                fit.append(directions(found))
            assert fit[0] == fit[-1] == BOTH == set.union(*fit[1:-1]), "no plan fits"


# Several slices, of few rows too.
CUT = Plan(0, slices=3)
SUBSETS = [
    ("x",), ("residual",), ("down",), ("down_bias",), ("up",), ("up_bias",), ("scale",), ("x", "down_bias"),
    ("x", "up_bias"), ("down_bias", "up_bias"), ("down", "up"), ("up", "scale"), ("down", "down_bias", "scale"),
    ("down", "down_bias", "up", "up_bias", "scale"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["channel", "scalar"])
def test_only_the_gradients_that_are_asked_for(kind, scale):
    for shape, rank in (((3, 300, 192), 64), ((40, 72), 12)):
        arguments = problem(kind, shape, rank, scale=scale)
        with tf32(KINDS[kind][4]):
            options = {"compute_dtype": KINDS[kind][3]}
            grad = grad_for(arguments) + adapter(**arguments, **options).detach()
            everything = {}
            for plan in (AUTOMATIC, CUT):
                with using(plan):
                    everything[plan] = results(arguments, grad, **options)
            for wanted in SUBSETS:
                some = {
                    name: value.detach() if isinstance(value, torch.Tensor) and name not in wanted else value
                    for name, value in arguments.items()
                }
                if not any(value.requires_grad for value in tensors_of(some).values()):
                    continue  # this kind has no residual of its own
                for plan, expected in everything.items():
                    with using(plan):
                        found = results(some, grad, **options)
                    assert found.keys() == {"y", *(f"gradient of {name}" for name in wanted if some[name] is not None)}
                    assert all(torch.equal(value, expected[name]) for name, value in found.items()), (plan, wanted)


def test_a_plan_that_does_not_fit_is_refused_and_the_automatic_one_comes_back():
    arguments = problem("bfloat16", (70, 768), 64)
    expected = adapter(**arguments)
    for plan in (Plan(7, 1), Plan(7, 1, 3)):
        with pytest.raises(RuntimeError, match="no fast kernel serves this with tile_rows 7"), using(plan):
            adapter(**arguments)
        y = adapter(**arguments)
        with pytest.raises(RuntimeError, match="no fast kernel serves this with tile_rows 7"), using(plan):
            gradients(y, arguments, grad_for(arguments))
    assert torch.equal(adapter(**arguments), expected)
    # With a residual of its own, no kernel keeps dy for it.
    apart = problem("bfloat16+residual", (70, 768), 64)
    y = adapter(**apart)
    with pytest.raises(RuntimeError, match="keep 1"), using(Plan(0, 1)):
        gradients(y, apart, grad_for(apart))
    # The sums of 1.6 MB each that the slices leave behind are more than 16 MB.
    large = problem("bfloat16", (3000, 768), 256)
    y = adapter(**large)
    with pytest.raises(RuntimeError, match="keep -1 and slices 40"), using(Plan(0, slices=40)):
        gradients(y, large, grad_for(large))
    for wrong in (Plan(-2), Plan(0, 2), Plan(0, -1, -1), Plan(0, -1, 10_001)):
        with pytest.raises(RuntimeError, match="use_cuda_plan: tile_rows is"), using(wrong):
            pass


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
    grad = grad_for(arguments)

    def strided(tensor):
        wider = torch.randn(*shape[:-1], 2 * shape[-1] + 1, device="cuda").to(tensor.dtype)
        wider[..., 1 : 1 + shape[-1]] = tensor.detach()
        return wider[..., 1 : 1 + shape[-1]]

    same = grad.new_ones(()).expand(shape)  # as y.sum().backward() brings it
    changes = {
        "all": ({name: elsewhere(value) for name, value in arguments.items()}, elsewhere(grad).detach()),
        "x": ({"x": elsewhere(arguments["x"])}, grad),
        "weights": ({name: elsewhere(arguments[name]) for name in ("down", "up")}, grad),
        "grad": ({}, elsewhere(grad).detach()),
        "strided x": ({"x": strided(arguments["x"]).requires_grad_()}, grad),
        "strided grad": ({}, strided(grad)),
        "one number as grad": ({}, same),
        "transposed weights": (
            {name: arguments[name].detach().t().contiguous().t().requires_grad_() for name in ("down", "up")}, grad
        ),
    }  # fmt: skip
    with tf32(KINDS[kind][4]):
        options = {"compute_dtype": KINDS[kind][3]}
        expected = under(AUTOMATIC, arguments, grad, **options)
        for what, (changed, dy) in changes.items():
            right = under(AUTOMATIC, arguments, dy.contiguous(), **options) if dy is same else expected
            for plan in (AUTOMATIC, *FAST):
                found = under(plan, arguments | changed, dy, **options)
                assert plan != AUTOMATIC or directions(found) == BOTH
                assert_near(found, {name: right[name] for name in found}, kind, f"{plan}, {what},")


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float32-bfloat16"])
def test_a_captured_graph_follows_its_inputs(kind):
    arguments = problem(kind, (4, 197, 384), 16)
    grad = grad_for(arguments)
    options = {"dropout": 0.3, "seed": torch.tensor([1], device="cuda"), "compute_dtype": KINDS[kind][3]}
    graph = torch.cuda.CUDAGraph()
    with tf32(KINDS[kind][4]):
        results(arguments, grad, **options)
        with torch.cuda.graph(graph):
            found = results(arguments, grad, **options)
        for seed in (1, 2, 3):
            options["seed"].fill_(seed)
            grad.normal_()
            with torch.no_grad():
                arguments["x"].normal_()
                arguments["down"].normal_(0, 0.05)
            graph.replay()
            expected = results(arguments, grad, **options)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_capture_may_hold_the_first_call_of_a_shape():
    # Not of the library: CUDA may refuse to load its kernels during a capture. A call on another shape loads them.
    code = """
import torch
from tests.test_adapter_cuda import grad_for, problem, results
other = problem("bfloat16", (33, 192), 8)
results(other, grad_for(other))
arguments = problem("bfloat16", (4, 197, 384), 16)
grad = grad_for(arguments)
torch.autograd.grad(arguments["x"].square().sum(), arguments["x"])  # autograd has its threads from now on
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    found = results(arguments, grad)
graph.replay()
expected = results(arguments, grad)
assert all(torch.equal(found[name], value) for name, value in expected.items())
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_work_goes_to_the_current_stream():
    arguments = problem("bfloat16", (8, 197, 768), 64)
    grad = grad_for(arguments)
    fresh, fresh_grad = torch.randn_like(arguments["x"]), torch.randn_like(grad)
    expected = results(arguments | {"x": fresh.clone().requires_grad_()}, fresh_grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # on any other stream, the kernels would come before the copies
        with torch.no_grad():
            arguments["x"].copy_(fresh)
            grad.copy_(fresh_grad)
        found = results(arguments, grad)
    side.synchronize()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 64), ((5000, 192), 200), ((333, 1300), 8)], ids=name_of)
def test_the_same_bits_on_every_run(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    grad = grad_for(arguments)
    with tf32(KINDS[kind][4]):
        options = {"compute_dtype": KINDS[kind][3]}
        expected = under(AUTOMATIC, arguments, grad, **options)
        for _ in range(20):
            found = under(AUTOMATIC, arguments, grad, **options)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [*FEW_SIZES, ((12_608, 768), 64)], ids=name_of)
def test_the_same_bits_under_every_plan(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    grad = grad_for(arguments)
    with tf32(KINDS[kind][4]):
        options = {"compute_dtype": KINDS[kind][3]}
        expected = under(AUTOMATIC, arguments, grad, **options)
        for plan in FAST:
            found = under(plan, arguments, grad, **options)
            assert all(torch.equal(value, expected[name]) for name, value in found.items()), plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 64), ((5, 192), 8), ((300, 1300), 256)], ids=name_of)
def test_forward_is_one_kernel_and_backward_at_most_three(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    grad = grad_for(arguments)
    only_x = {k: v.detach() if isinstance(v, torch.Tensor) and k != "x" else v for k, v in arguments.items()}
    with tf32(KINDS[kind][4]):
        options = {"compute_dtype": KINDS[kind][3]}

        def step(arguments):
            y = adapter(**arguments, **options)
            return torch.autograd.grad(y, [t for t in tensors_of(arguments).values() if t.requires_grad], grad)

        fit = [under(plan, arguments, grad, **options) for plan in FAST]
        assert set.union(*map(directions, fit)) == BOTH, "no plan fits"
        for no_grad in (torch.no_grad(), contextlib.nullcontext()):
            with no_grad:
                names = kernels(lambda: adapter(**arguments, **options))
            assert len(names) == 1, names
        names = kernels(lambda: step(arguments))
        assert len(names) <= 4 and all("vitadapter" in name for name in names), names
        names = kernels(lambda: step(only_x))
        assert len(names) == 2 and all("vitadapter" in name for name in names), names


@pytest.mark.parametrize("scale", [1.0, "scalar", "channel"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_module_uses_nothing_but_these_kernels(scale, autocast, dropout):
    module = FusedAdapter(192, 8, scale=scale, dropout=dropout, device="cuda")
    x = torch.randn(4, 50, 192, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)

    def step():
        with torch.autocast("cuda", BF16, enabled=autocast):
            y = module(x)
        return torch.autograd.grad(y, [x, *module.parameters()], grad)

    names = kernels(step)
    ours = [name for name in names if "vitadapter" in name]
    assert 2 <= len(ours) <= 4, names
    assert len(names) - len(ours) == (dropout > 0), names  # PyTorch draws the seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((12_608, 768), 64), ((12_608, 768), 8), ((3000, 1300), 200)], ids=name_of)
def test_backward_takes_little_memory(kind, shape, rank):
    arguments = problem(kind, shape, rank)
    grad = grad_for(arguments)
    wanted = list(tensors_of(arguments).values())
    with tf32(KINDS[kind][4]):
        y = adapter(**arguments, compute_dtype=KINDS[kind][3])
        saved = y.grad_fn.saved_tensors[1]
        assert saved.dtype == F32 and saved.shape == (*shape[:-1], rank)
        workspace = peak_bytes(lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True))
        assert workspace <= (16 << 20) + 4 * shape[0] * rank


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "bfloat16+residual32"])
def test_nothing_waits_for_the_gpu(kind):
    arguments = problem(kind, (5000, 768), 64)
    grad = grad_for(arguments)

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
    needed = 4 * rows * dim * 2 + rows * rank * (4 + 2 + 2) + (4 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"more than 2^31 elements of bfloat16 need {needed / 1e9:.0f} GB of free GPU memory")
    arguments = problem("bfloat16", (1, dim), rank)
    arguments["x"] = torch.randn(rows, dim, device="cuda", dtype=BF16).requires_grad_()
    # Around 2^30 and 2^31 elements. Elsewhere dy is 0, or the last rows would be lost in the sums over all.
    windows = [slice(begin, begin + 1000) for begin in (0, 2**24 - 500, rows - 1000)]
    grad = torch.zeros(rows, dim, device="cuda", dtype=BF16)
    for window in windows:
        grad[window].normal_()

    def of_windows(tensor):
        return torch.cat([tensor.detach()[window] for window in windows])

    y = adapter(**arguments)
    hidden = y.grad_fn.saved_tensors[1]
    # Without NaN in fresh memory: to fill it takes long.
    wanted = tensors_of(arguments)
    found = torch.autograd.grad(y, list(wanted.values()), grad)
    found = {f"gradient of {name}": value for name, value in zip(wanted, found, strict=True)}
    found |= {"y": y, "hidden": hidden}
    found |= {name: of_windows(found[name]) for name in ("y", "hidden", "gradient of x")}
    few = converted(arguments | {"x": of_windows(arguments["x"])}, torch.Tensor.float)
    assert_near(found, plain(few, of_windows(grad).float(), F32), "bfloat16")
    del arguments, wanted, grad, y, hidden, found
    torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_call_are_refused_and_each_serves_its_own():
    arguments = problem("bfloat16", (70, 384), 64)
    other = {k: v.detach().to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="up is on cuda:1 and x on cuda:0; all tensors"):
        adapter(**arguments | {"up": other["up"]})
    assert torch.cuda.current_device() == 0
    other = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in other.items()}
    grad = grad_for(arguments)
    expected, found = results(arguments, grad), results(other, grad.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(found[name].cpu(), value.cpu()) for name, value in expected.items())


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
        for plan in (AUTOMATIC, SIMPLE, *FAST, CUT):
            found = result_under(plan, lambda: run(adapter, arguments, grad.cuda(), **options))
            if found is not None:
                fit.append(plan)
                assert_near({k: v.cpu() for k, v in found.items()}, right, kind, f"{plan},")
        assert set(fit) & set(FAST), "no plan fits"
        for wanted in (("x",), ("up_bias",), ("down_bias", "up"), ("down", "scale")):
            some = {
                k: v.detach() if isinstance(v, torch.Tensor) and k not in wanted else v for k, v in arguments.items()
            }
            y = adapter(**some, **options)
            found = torch.autograd.grad(y, [some[name] for name in wanted], grad.to("cuda", y.dtype))
            found = {name: value.cpu() for name, value in zip(wanted, found, strict=True)}
            assert_near(found, {name: right[name] for name in wanted}, kind, f"only {wanted},")
