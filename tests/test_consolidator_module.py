"""Do `FusedConsolidator` and what a file holds of one compute the formula, say what they add, and survive all that may
happen to a module?"""

import copy
import io

import pytest
import torch
from torch import nn

import vitadapter_ext as va
from vitadapter_ext import reference
from vitadapter_ext.nn.consolidator import StoredConsolidator, entries, summed
from vitadapter_ext.ops.consolidator import MAX_BRANCHES

GROUPS = {"one": (6,), "dense": (1,), "unequal": (6, 2, 3), "two alike": (3, 3, 6), "equal": (6, 6, 6)}
every_groups = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
shuffled = pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
biased = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def fused(groups=(6, 3), shuffle=True, bias=True, sizes=(30, 42), **options):
    module = va.FusedConsolidator(*sizes, groups, shuffle, bias, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


def stored(module):
    """What a file holds of it."""
    options = (module.in_features, module.out_features, module.groups, module.shuffle)
    found = StoredConsolidator(*options, module.has_bias, dtype=module.branches[0].weight.dtype).eval()
    with torch.no_grad():
        found.weight.copy_(summed(module.weights(), module.groups, module.shuffle))
        if module.has_bias:
            found.bias.copy_(sum(module.biases()))
    return found


def dense(module):
    """Weight (out, in) and bias of a module, from what it makes of each unit vector; methods.md section 4 in full."""
    weight = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    for branch, g in zip(module.branches, module.groups, strict=True):
        width, rows = module.in_features // g, module.out_features // g
        for row in range(module.out_features):
            for k in range(width):
                place = row // rows * width + k
                # z[j·g + i] = x[i·(in/g) + j]
                column = place % g * width + place // g if module.shuffle else place
                weight[row, column] += branch.weight[row, k].item()
    biases = [branch.bias.detach().double() for branch in module.branches if branch.bias is not None]
    return weight, sum(biases, torch.zeros(module.out_features, dtype=torch.float64))


# What they compute


@biased
@shuffled
@every_groups
def test_delta_is_what_is_added_to_a_linear_layer(groups, shuffle, bias):
    module = fused(groups, shuffle, bias, drop_path=0.5, dtype=torch.float64).eval()
    weight, shift = dense(module)
    x, base = torch.randn(2, 5, 30, dtype=torch.float64), torch.randn(2, 5, 42, dtype=torch.float64)
    for found in (module, stored(module)):
        torch.testing.assert_close(found.delta(), (weight, shift), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found(x), x @ weight.T + shift)
        torch.testing.assert_close(found(x, base), base + x @ weight.T + shift)


@shuffled
@every_groups
def test_entries_are_the_places_where_any_branch_has_a_weight(groups, shuffle):
    weight, _ = dense(fused(groups, shuffle))
    assert entries(30, 42, groups, shuffle).tolist() == weight.flatten().nonzero().flatten().tolist()


def test_branches_always_have_entries_in_common():
    for groups in ((6, 2), (2, 3), (6, 6)):
        for shuffle in (True, False):
            alone = [set(entries(30, 42, (g,), shuffle).tolist()) for g in groups]
            assert 0 in alone[0] & alone[1]


def test_without_a_bias_there_is_none_to_keep():
    assert [name for name, _ in fused((6, 3), bias=False).named_parameters()] == [
        "branches.0.weight",
        "branches.1.weight",
    ]
    assert list(stored(fused((6, 3), bias=False)).state_dict()) == ["weight"]


def test_names_shapes_and_how_it_begins():
    module = va.FusedConsolidator(30, 42, (6, 3))
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "branches.0.weight": (42, 5),
        "branches.0.bias": (42,),
        "branches.1.weight": (42, 10),
        "branches.1.bias": (42,),
    }
    for parameter in module.parameters():
        assert parameter.dtype == torch.float32
        assert 5e-4 < parameter.abs().max() <= 1e-3 and parameter.min() < 0 < parameter.max()
    assert va.FusedConsolidator(768, 768).groups == (384,)
    assert va.FusedConsolidator(30, 42, 6).groups == (6,)
    assert {name: tuple(t.shape) for name, t in stored(module).state_dict().items()} == {
        "weight": (len(entries(30, 42, (6, 3), True)),),
        "bias": (42,),
    }


def test_delta_is_at_least_float32():
    low = fused().half()
    weight, bias = low.delta()
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight.double(), dense(low)[0], rtol=1e-6, atol=0)
    assert fused(dtype=torch.float64).delta()[0].dtype == torch.float64
    assert fused(device="meta").delta()[0].is_meta


# Drop-path


def test_whole_branches_are_dropped_by_sample_while_training():
    module = fused((6, 3), drop_path=0.5)
    x = torch.randn(64, 3, 30)
    parts = [reference.consolidator(x, [b.weight], [b.bias]) for b in module.branches]
    found = module(x)
    seen = set()
    for sample in range(64):
        sums = {(i, j): 2 * i * parts[0][sample] + 2 * j * parts[1][sample] for i in (0, 1) for j in (0, 1)}
        seen |= {key for key, total in sums.items() if torch.allclose(found[sample], total, rtol=1e-4, atol=1e-4)}
    assert len(seen) == 4
    torch.testing.assert_close(module.eval()(x), parts[0] + parts[1])


def test_samples_says_what_a_sample_is():
    module = fused((6,), drop_path=0.5)
    module.samples = 8
    kept = (module(torch.randn(32, 3, 30)).abs().flatten(1).sum(1) > 0).reshape(8, 4)
    assert (kept == kept[:, :1]).all() and kept.any() and not kept.all()
    module.eval()(torch.randn(3, 30))  # where nothing is dropped it says nothing


def test_gradients_reach_every_parameter():
    module = fused((6, 3), drop_path=0.2)
    x = torch.randn(64, 30, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in module.parameters())


# What may happen to a module


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, pickled, lambda m: m.double(), lambda m: m.half().float(), lambda m: copy.deepcopy(m).to("cpu")],
    ids=["deepcopy", "pickle", "double", "half", "to"],
)
@pytest.mark.parametrize("kind", [lambda m: m, stored], ids=["fused", "stored"])
def test_it_survives(kind, change):
    module = kind(fused((6, 3)).eval())
    x = torch.randn(4, 30)
    y = module(x)
    other = change(module)
    dtype = next(other.parameters()).dtype
    torch.testing.assert_close(other(x.to(dtype)).float(), y, rtol=1e-2, atol=1e-2)
    assert all(a.dtype == dtype for a in other.state_dict().values())


@pytest.mark.parametrize("kind", [lambda m: m, stored], ids=["fused", "stored"])
def test_low_precision_and_meta(kind):
    module = kind(fused((6, 3)).eval())
    x = torch.randn(4, 30)
    y = module(x)
    for dtype in (torch.float16, torch.bfloat16):
        low = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.15)
        assert module(x.to(dtype)).dtype == dtype  # float32 parameters beside a low-precision backbone
    assert module.to("meta")(x.to("meta")).shape == y.shape


@pytest.mark.parametrize("kind", [lambda m: m, stored], ids=["fused", "stored"])
def test_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    module = kind(fused((6, 3)).eval())
    x, base = torch.randn(4, 30), torch.randn(4, 42)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, base), module(x, base))


def test_what_was_added_up_is_not_trained():
    module = stored(fused((6, 3)))
    x = torch.randn(4, 30)
    y = module(x)
    module.train()
    with pytest.raises(
        RuntimeError, match=r"added up when the file was written.*last\.ckpt, attach anew, or call eval"
    ):
        module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)


def test_they_say_what_they_are():
    assert repr(va.FusedConsolidator(30, 42, (6, 3), shuffle=False, drop_path=0.5)).startswith(
        "FusedConsolidator(\n  in_features=30, out_features=42, groups=(6, 3), shuffle=False, bias=True, drop_path=0.5"
    )
    assert "groups=(6,)" in repr(StoredConsolidator(30, 42, (6,)))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": (6, 4)}, "4 groups do not fit 30 inputs and 42 outputs: they must divide both"),
        ({"groups": 5}, "5 groups do not fit 30 inputs and 42 outputs"),
        ({"groups": (7,)}, "7 groups do not fit 30 inputs and 42 outputs"),
        ({"groups": ()}, r"groups are \(\); there must be from 1 to 16, one number for each branch"),
        ({"groups": (6,) * (MAX_BRANCHES + 1)}, "there must be from 1 to 16"),
        ({"groups": (6, 0)}, r"groups are \(6, 0\); each must be a whole number of at least 1"),
        ({"groups": 6.0}, r"groups are \(6.0,\); each must be a whole number"),
        ({"groups": (True,)}, r"groups are \(True,\); each must be a whole number"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; it must be a probability in \[0, 1\)"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
        ({"in_features": 0}, "in_features is 0; it must be a whole number of at least 1"),
        ({"out_features": 42.0}, "out_features is 42.0; it must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        va.FusedConsolidator(**{"in_features": 30, "out_features": 42, "groups": (6,), **options})


@pytest.mark.parametrize("kind", [lambda m: m, stored], ids=["fused", "stored"])
def test_x_of_another_width_is_refused(kind):
    with pytest.raises(RuntimeError, match=r"^consolidator: "):
        kind(fused((6,)).eval())(torch.ones(2, 31))


def test_it_works_in_an_optimizer_on_a_model_of_ones_own():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.beside = nn.Linear(30, 42), va.FusedConsolidator(30, 42, (6, 3))

        def forward(self, x):
            return self.beside(x, base=self.linear(x))

    layer = Layer()
    optimizer = torch.optim.SGD(layer.beside.parameters(), lr=0.05)
    x, wanted = torch.randn(16, 30), torch.randn(16, 42)
    losses = []
    for _ in range(5):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
