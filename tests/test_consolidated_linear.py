"""Are the two ways of a linear layer with branches, beside it and in its weight, the same function with the same
gradients, and is what cannot be refused?"""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import assert_as_good_as_eager
from tests.problems import LOW, short
from vitadapter_ext import ops, reference
from vitadapter_ext.ops import _common, consolidated_linear
from vitadapter_ext.ops.consolidator import in_weight_is_faster

F32 = torch.float32


def make(dtype=F32, device="cpu", groups=(12, 6), parameters=F32, rows=(3, 37), width=24, out=36):
    def tensor(*shape, spread=1.0, kind=parameters):
        return (spread * torch.randn(*shape, device=device)).to(kind).requires_grad_()

    tensors = {
        "x": tensor(*rows, width, kind=dtype),
        "weight": tensor(out, width, spread=width**-0.5, kind=dtype),
        "bias": tensor(out, kind=dtype),
    }
    tensors |= {f"weights{i}": tensor(out, width // g, spread=0.5) for i, g in enumerate(groups)}
    return tensors | {f"biases{i}": tensor(out) for i in range(len(groups))}


def listed(op, tensors, **options):
    weights, biases = ([t for name, t in tensors.items() if name.startswith(kind)] for kind in ("weights", "biases"))
    return op(tensors["x"], tensors["weight"], tensors["bias"], weights, biases, **options)


def run(op, tensors, grad, **options):
    y = listed(op, tensors, **options)
    grads = torch.autograd.grad(y, list(tensors.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True))}


def plain(x, weight, bias, weights, biases, shuffle=True, compute_dtype=None, **_):
    """In PyTorch's own operators: the layer with the branches in its weight."""
    compute = compute_dtype or x.dtype
    whole = reference.consolidated_weight(weight, weights, shuffle)
    return F.linear(x.to(compute), whole.to(compute), (bias + sum(biases)).to(compute))


@pytest.mark.parametrize("in_weight", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_float64(plain_device, in_weight, shuffle):
    tensors = make(torch.float64, plain_device, parameters=torch.float64)
    grad = torch.randn(3, 37, 36, dtype=torch.float64, device=plain_device)
    found = run(consolidated_linear, tensors, grad, in_weight=in_weight, shuffle=shuffle)
    for name, value in run(plain, tensors, grad, shuffle=shuffle).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("in_weight", [True, False])
@pytest.mark.parametrize("kind", [(F32, F32), *((low, low) for low in LOW), *((F32, low) for low in LOW)], ids=str)
def test_both_ways_are_as_accurate_as_plain_pytorch(device, in_weight, kind):
    dtype, compute = kind
    draws = [], [], []
    for _ in range(6):
        tensors = make(dtype, device)
        grad = torch.randn(3, 37, 36, device=device).to(compute)
        wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
        draws[0].append(run(consolidated_linear, tensors, grad, compute_dtype=compute, in_weight=in_weight))
        draws[1].append(run(plain, tensors, grad, compute_dtype=compute))
        draws[2].append(run(plain, wide, grad))
    assert_as_good_as_eager(*draws)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weights1", "biases0"])
@pytest.mark.parametrize("in_weight", [True, False])
def test_each_gradient_alone(device, wanted, in_weight):
    tensors = {name: t.detach() for name, t in make(device=device).items()}
    tensors[wanted].requires_grad_()
    (found,) = torch.autograd.grad(
        listed(consolidated_linear, tensors, in_weight=in_weight).square().sum(), tensors[wanted]
    )
    (expected,) = torch.autograd.grad(listed(plain, tensors).square().sum(), tensors[wanted])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [None, *LOW], ids=str)
def test_autocast_is_as_of_a_linear_layer(device, low):
    tensors = make(device=device)
    with torch.autocast(device, dtype=low, enabled=low is not None):
        for in_weight in (True, False):
            y = listed(consolidated_linear, tensors, in_weight=in_weight)
            assert y.dtype == (low or F32)
            with torch.no_grad():
                assert torch.equal(listed(consolidated_linear, tensors, in_weight=in_weight), y)
            with torch.autocast(device, enabled=False):
                torch.testing.assert_close(y.float(), listed(plain, tensors), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_beside_is_the_op_on_the_layers_output(device, drop_path):
    tensors = {name: t.detach() for name, t in make(device=device).items()}
    seed = torch.tensor([3], device=device)
    weights, biases = ([tensors[f"{kind}{i}"] for i in (0, 1)] for kind in ("weights", "biases"))
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    expected = ops.consolidator(tensors["x"], weights, biases, base=base, drop_path=drop_path, seed=seed)
    options = {"in_weight": False, "drop_path": drop_path, "seed": seed}
    assert torch.equal(listed(consolidated_linear, tensors, **options), expected)
    for t in tensors.values():
        t.requires_grad_()
    assert torch.equal(listed(consolidated_linear, tensors, **options), expected)


@pytest.mark.parametrize("rows", [(0, 4), (1,), ()], ids=str)
@pytest.mark.parametrize("in_weight", [True, False])
def test_few_rows(device, rows, in_weight):
    tensors = make(device=device, rows=rows)
    grad = torch.randn(*rows, 36, device=device)
    found = run(consolidated_linear, tensors, grad, in_weight=in_weight)
    for name, value in run(plain, tensors, grad).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("in_weight", [True, False])
def test_it_compiles_whole(in_weight):
    tensors, grad = make(), torch.randn(3, 37, 36)
    compiled = torch.compile(lambda t: listed(consolidated_linear, t, in_weight=in_weight), fullgraph=True)
    expected = run(consolidated_linear, tensors, grad, in_weight=in_weight)
    y = compiled(tensors)
    grads = torch.autograd.grad(y, list(tensors.values()), grad)
    for name, value in zip(expected, (y, *grads), strict=True):
        torch.testing.assert_close(value, expected[name], msg=name)


def test_auto_is_in_the_weight_from_so_many_rows_on_and_never_with_drop_path():
    few, many = (make(rows=(rows,)) for rows in (2, 400))
    assert not in_weight_is_faster(few["x"], few["weight"]) and in_weight_is_faster(many["x"], many["weight"])
    for tensors, way in ((few, False), (many, True)):
        assert torch.equal(listed(consolidated_linear, tensors), listed(consolidated_linear, tensors, in_weight=way))
    seed = torch.tensor([1])
    dropped = [listed(consolidated_linear, many, drop_path=0.5, seed=seed, in_weight=way) for way in ("auto", False)]
    assert torch.equal(*dropped)


def test_drop_path_in_the_weight_is_refused():
    with pytest.raises(ValueError, match="in_weight=True needs drop_path=0: in a weight, no sample's branch can be"):
        listed(consolidated_linear, make(), drop_path=0.1, in_weight=True)
    for given in ("yes", 1, None):
        with pytest.raises(ValueError, match=f"in_weight is {given!r}; it must be 'auto', True or False"):
            listed(consolidated_linear, make(), in_weight=given)


@pytest.mark.parametrize("in_weight", [True, False])
def test_biases_add_up_in_float32_and_the_layer_needs_none(device, in_weight):
    low = torch.bfloat16
    x, weight = torch.zeros(5, 24, device=device, dtype=low), torch.zeros(36, 24, device=device, dtype=low)
    weights = [torch.zeros(36, 4, device=device, dtype=low)] * 8
    biases = [torch.randn(36, device=device).to(low) for _ in weights]
    y = consolidated_linear(x, weight, None, weights, biases, in_weight=in_weight)
    expected = sum(bias.float() for bias in biases).to(low).expand(5, -1)
    ulp = expected.float().abs() * 2**-7
    assert ((y.float() - expected.float()).abs() <= ulp * (0 if in_weight else 1)).all()
    assert torch.equal(consolidated_linear(x, weight, None, weights, in_weight=in_weight), torch.zeros_like(y))


@pytest.mark.parametrize("in_weight", [True, False])
def test_under_autocast_x_is_kept_in_the_low_dtype(in_weight):
    tensors, kept = make(), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = listed(consolidated_linear, tensors, in_weight=in_weight)
    assert [t.dtype for t in kept if t.shape == tensors["x"].shape] == [torch.bfloat16]
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in tensors.values())


@pytest.mark.parametrize("in_weight", [True, False])
def test_without_kernels_it_is_the_same(in_weight, monkeypatch):
    tensors, grad = make(), torch.randn(3, 37, 36)
    expected = run(consolidated_linear, tensors, grad, in_weight=in_weight)
    monkeypatch.setattr(_common, "has_kernels", lambda device: False)
    monkeypatch.setattr(_common, "warn_without_kernels", lambda device: None)
    for name, value in run(consolidated_linear, tensors, grad, in_weight=in_weight).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("in_weight", ["auto", True, False])
def test_it_exports_for_any_number_of_images(in_weight):
    tensors = {name: t.detach() for name, t in make(rows=(2, 197), width=768, out=768).items()}

    class Layer(torch.nn.Module):
        def forward(self, x):
            return listed(consolidated_linear, tensors | {"x": x}, in_weight=in_weight)

    dynamic = {"x": {0: torch.export.Dim("images")}}
    with torch.no_grad():
        exported = torch.export.export(Layer(), (tensors["x"],), dynamic_shapes=dynamic).module()
        x = torch.randn(5, 197, 768)
        torch.testing.assert_close(exported(x), Layer()(x))


@pytest.mark.parametrize("in_weight", [True, False])
def test_double_backward_is_refused_clearly(in_weight):
    tensors = make()
    y = listed(consolidated_linear, tensors, in_weight=in_weight)
    gradients = torch.autograd.grad(y.square().sum(), [tensors["x"], tensors["weights0"]], create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no double backward pass; use vitadapter_ext.reference.consolidator"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize(("dtype", "parameters"), [(F32, F32), (torch.bfloat16, F32)], ids=short)
def test_the_weight_is_rounded_once(device, dtype, parameters):
    weight, branch = torch.randn(36, 24, device=device).to(dtype), torch.randn(36, 4, device=device).to(parameters)
    found = torch.ops.vitadapter.consolidator_weight.default(weight, [branch], True, dtype)
    assert torch.equal(found, reference.consolidated_weight(weight, [branch]).to(dtype))


BAD = {
    r"a weight has shape \(36, 5\) for 24 inputs and 36 outputs; expected \(out, in / groups\)": {
        "weights0": (36, 5)
    },
    r"a weight has shape \(35, 2\) for 24 inputs": {"weights1": (35, 2)},
    r"(biases\[1\]|a bias) has shape \(24,\); expected (\(out,\) = )?\(36,\)": {"biases1": (24,)},
    r"weight has shape \(36, 23\); expected \(out, in\) with in = 24": {"weight": (36, 23)},
    r"weight has shape \(36,\); expected \(out, in\) with in = 24": {"weight": (36,)},
    r"weight has shape \(35, 24\) and a branch's weight \(36, 2\); expected as many outputs": {"weight": (35, 24)},
    r"bias has shape \(1,\); expected \(36,\)": {"bias": (1,)},
    r"bias has shape \(35,\); expected \(36,\)": {"bias": (35,)},
}  # fmt: skip


@pytest.mark.parametrize("in_weight", [True, False])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_say_what_was_given_and_what_is_accepted(message, in_weight):
    tensors = {name: t.detach() for name, t in make().items()}
    for name, shape in BAD[message].items():
        tensors[name] = torch.ones(shape)
    with pytest.raises(RuntimeError, match=f"^consolidator: {message}"):
        listed(consolidated_linear, tensors, in_weight=in_weight)


OPTIONS = {
    r"there are 0 branches; from 1 to 16": {"weights": []},
    r"there are 17 branches; from 1 to 16": {"weights": [torch.ones(36, 2)] * 17},
    r"there are 1 biases; expected none, or one for each of 2 branches": {"biases": [torch.ones(36)]},
    r"base has shape \(2, 36\); expected \(4, 36\)": {"base": torch.ones(2, 36)},
    r"drop_path is 1; it must be a probability in \[0, 1\)": {"drop_path": 1.0},
    r"samples is 3; it must divide the 4 rows of x": {"samples": 3},
    r"samples is 0; it must divide": {"samples": 0},
    r"seed is int64 of shape \(2,\)": {"drop_path": 0.5, "seed": torch.zeros(2).long()},
    r"a weight is float64 and x is float32; float64 cannot be mixed": {"weights": [torch.ones(36, 2).double()] * 2},
}


def test_no_inputs_are_refused():
    for op in (
        lambda: consolidated_linear(torch.zeros(2, 0), torch.zeros(4, 0), None, [torch.zeros(4, 2)], in_weight=True),
        lambda: torch.ops.vitadapter.consolidator_weight(torch.zeros(4, 0), [torch.zeros(4, 2)], True, torch.float32),
    ):
        with pytest.raises(RuntimeError, match=r"consolidator: (x has shape \(2, 0\)|there are no inputs)"):
            op()


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options_of_the_op(message):
    arguments = {"weights": [torch.ones(36, 2)] * 2, "biases": [torch.ones(36)] * 2} | OPTIONS[message]
    if len(arguments["weights"]) != 2:
        arguments["biases"] = []
    with pytest.raises(RuntimeError, match=f"^consolidator: {message}"):
        ops.consolidator(torch.ones(4, 24), **arguments)
