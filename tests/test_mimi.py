"""Does MiMi prune the neurons that its paper's score says, and shrink a model without changing what is left?"""

import copy
import pickle
from fractions import Fraction

import pytest
import safetensors.torch
import torch
from torch import tensor

import vitadapter_ext as va
from tests.conftest import no_gpu
from tests.vits import ARCHITECTURES, assert_same_state, copied_state, images, make, randomise_trained, structure
from vitadapter_ext.methods.mimi import select, shrink
from vitadapter_ext.picture import block_parts, draw, tensor_roles
from vitadapter_ext.sites import Joined

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def attached(architecture="vit", method=va.Mimi(start_rank=4), **changes):  # noqa: B008 - it is frozen
    model = va.attach(make(architecture, **changes), method)
    randomise_trained(model)
    return model


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, va.FusedAdapter)}


@torch.no_grad()
def zero_half(model):
    """Zeroes half of all neurons: the whole first adapter, and what is missing at the ends of the others."""
    found = adapters(model)
    kept = {name: [True] * adapter.down.out_features for name, adapter in found.items()}
    first, *others = kept
    kept[first] = [False] * len(kept[first])
    for turn in range(sum(map(len, kept.values())) // 2 - len(kept[first])):
        kept[others[turn % len(others)]][-1 - turn // len(others)] = False
    for name, adapter in found.items():
        mask = tensor(kept[name])
        adapter.down.weight[~mask] = 0
        adapter.up.weight[:, ~mask] = 0
    return {name: sum(mask) for name, mask in kept.items()}


def pruned(architecture="vit", **fields):
    """A model after a prune in which its first adapter has vanished."""
    method = va.Mimi(start_rank=4, **fields)
    model = attached(architecture, method)
    zero_half(model)
    method.cut(model, 1)
    return model


# Which neurons survive

DOWN = [
    tensor([[1.0, -1.0], [0.0, 2.0], [0.5, 0.0]]),
    tensor([[0.0, 0.0], [3.0, 0.0], [0.0, -1.0], [1.0, 0.0]]),
]
UP = [
    tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.5]]),
    tensor([[0.0, -3.0, 0.0, 0.0], [0.0, 2.0, 0.0, -1.0]]),
]
# Absolute rows and columns add up to (2 + 2, 2 + 1, 0.5 + 0.5) and (0 + 0, 3 + 5, 1 + 0, 1 + 1); over d_in + d_out = 4
# the importances are 1, 0.75, 0.25 and 0, 2, 0.25, 0.5; over the largest of each adapter 1, 0.75, 0.25 and
# 0, 1, 0.125, 0.25. The order in which neurons survive, with equal ones in the order of adapters:
ORDER = {False: [(1, 1), (0, 0), (0, 1), (1, 3), (0, 2), (1, 2), (1, 0)]}
ORDER[True] = [(0, 0), (1, 1), (0, 1), (0, 2), (1, 3), (1, 2), (1, 0)]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("keep", range(8))
def test_the_survivors_of_two_adapters_by_hand(keep, normalise):
    masks = select(DOWN, UP, keep, normalise)
    expected = [[(i, j) in ORDER[normalise][:keep] for j in range(rank)] for i, rank in enumerate((3, 4))]
    assert [mask.tolist() for mask in masks] == expected
    assert all(mask.dtype == torch.bool for mask in masks)


def test_an_adapter_may_vanish():
    assert [mask.any().item() for mask in select(DOWN, UP, 1)] == [False, True]
    assert [mask.any().item() for mask in select(DOWN, UP, 1, normalise=True)] == [True, False]


def test_of_equal_neurons_the_lower_survives():
    (mask,) = select([torch.ones(5, 3)], [torch.ones(3, 5)], 2)
    assert mask.tolist() == [True, True, False, False, False]


def test_importance_is_a_mean_over_both_widths():
    # 1 of 1 + 1 against 2 of 4 + 4: the larger sum is the smaller mean.
    narrow, wide = tensor([[1.0]]), tensor([[2.0, 0.0, 0.0, 0.0]])
    masks = select([narrow, wide], [torch.zeros(1, 1), torch.zeros(4, 1)], 1)
    assert [mask.tolist() for mask in masks] == [[True], [False]]


def test_adapters_without_neurons_and_without_weight():
    down = [torch.zeros(0, 2), torch.zeros(2, 2), torch.ones(1, 2)]
    up = [torch.zeros(2, 0), torch.zeros(2, 2), torch.ones(2, 1)]
    for normalise in (False, True):
        assert [mask.tolist() for mask in select(down, up, 2, normalise)] == [[], [True, False], [True]]
    assert select([], [], 0) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_random_weights_against_a_sort_in_python(dtype):
    down = [torch.randn(rank, 6, dtype=dtype) for rank in (5, 1, 8)]
    up = [torch.randn(6, rank, dtype=dtype) for rank in (5, 1, 8)]
    scores = {
        (i, j): (sum(abs(float(v)) for v in down[i][j]) + sum(abs(float(v)) for v in up[i][:, j])) / 12
        for i in range(3)
        for j in range(len(down[i]))
    }
    best = sorted(scores, key=lambda place: -scores[place])[:9]
    masks = select(down, up, 9)
    assert {(i, j) for i, mask in enumerate(masks) for j in mask.nonzero().flatten().tolist()} == set(best)


@pytest.mark.parametrize(
    ("down", "up", "keep", "message"),
    [
        (DOWN, UP, 8, "keep is 8; it must be from 0 to the 7 neurons that there are"),
        (DOWN, UP, -1, "keep is -1"),
        (DOWN, UP[:1], 1, "there are 2 down-projections and 1 up-projections"),
        (DOWN, UP[::-1], 1, "adapter 0 has down (3, 2) and up (2, 4); they must be (rank, d_in) and (d_out, rank)"),
        ([DOWN[0] * float("nan")], UP[:1], 1, "the weights of adapter 0 are not all finite"),
    ],
)
def test_what_select_refuses(down, up, keep, message):
    with pytest.raises(ValueError) as error:
        select(down, up, keep)
    assert message in str(error.value)


# How many


def test_counts_are_exact():
    assert [va.Mimi(prune=0.2).neurons(100, t) for t in range(4)] == [100, 80, 64, 51]
    share = 1 - 0.2
    assert int(100 * (1 - (0.2 + share * 0.2))) == 63  # what floats make of it
    for prune in (0.1, 0.3, 0.5, 0.9, 1 / 3):
        removed = a = Fraction(str(prune))
        for prunes in range(1, 6):
            expected = 1000 * (1 - removed)
            assert va.Mimi(prune=prune).neurons(1000, prunes) == expected.numerator // expected.denominator
            removed += (1 - removed) * a  # the recursion of the paper's schedule


def test_counts_never_go_below_the_least():
    assert [va.Mimi(min_total=100).neurons(384, t) for t in range(4)] == [384, 192, 100, 100]


@pytest.mark.parametrize(("final_training", "prunes"), [(True, 3), (False, 4)])
def test_as_many_prunes_as_the_phases_say(final_training, prunes):
    method = va.Mimi(start_rank=32, final_training=final_training)
    model = va.attach(make(), method)
    edited = [method.after_phase(model, torch.optim.SGD(model.parameters()), phase) for phase in range(1, 5)]
    assert sum(edited) == prunes and edited[:3] == [True] * 3
    assert sum(method.widths(model).values()) == 4 * 32 // 2**prunes


def test_epochs_are_shared_by_the_phases():
    assert va.Mimi().training_phases(30) == [8, 8, 7, 7]
    assert va.Mimi(phases=1).training_phases(3) == [3]
    with pytest.raises(ValueError, match="4 phases need as many epochs or more, got 3"):
        va.Mimi().training_phases(3)


# Where it begins


@every_architecture
def test_it_is_houlsbys_adapter_without_bias_and_scale(architecture):
    model = attached(architecture, va.Mimi(start_rank=3))
    twin = va.attach(make(architecture), va.Adapter(rank=3, placement="houlsby", bias=False, scale=1.0))
    twin.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("position", ["attn", "mlp"])
def test_one_position(position):
    model = attached(method=va.Mimi(start_rank=3, positions=(position,)))
    assert {name.rpartition("_")[2] for name in adapters(model)} == {position}
    twin = va.attach(make(), va.Adapter(rank=3, placement="houlsby", bias=False, scale=1.0, init="zero"))
    twin.load_state_dict(model.state_dict(), strict=False)
    x = images(model)
    torch.testing.assert_close(model(x), twin(x))


def test_widths_at_the_start():
    assert set(va.Mimi().widths(va.attach(make(), va.Mimi())).values()) == {48 // 16}
    assert set(va.Mimi().widths(va.attach(make(), va.Mimi(sigma=5))).values()) == {48 // 5}
    swin = va.Mimi(sigma=6).widths(va.attach(make("swin"), va.Mimi(sigma=6)))
    assert [swin[f"layers.{stage}.blocks.0.adapter_attn"] for stage in (0, 1)] == [4 * 24 // 6, 4 * 48 // 6]


def test_how_weights_begin():
    torch.manual_seed(0)
    linear = next(iter(adapters(va.attach(make(embed_dim=192), va.Mimi(start_rank=64))).values()))
    for layer in (linear.down, linear.up):
        bound = layer.in_features**-0.5
        assert layer.bias is None and 0.9 * bound < layer.weight.abs().max() <= bound
    normal = next(iter(adapters(va.attach(make(embed_dim=192), va.Mimi(start_rank=64, init="trunc_normal"))).values()))
    for layer in (normal.down, normal.up):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


# Shrinking


@every_architecture
def test_neurons_of_zero_weight_leave_no_trace(architecture):
    method = va.Mimi(start_rank=4)
    model = attached(architecture, method).double()
    widths = zero_half(model)
    x = images(model)
    before, counts = model(x), va.summary(model)
    method.cut(model, 1)
    assert method.widths(model) == widths and min(widths.values()) == 0
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    now = va.summary(model)
    assert now.adapter == sum(2 * widths[name] * adapter.up.out_features for name, adapter in adapters(model).items())
    assert counts.total - counts.adapter == now.total - now.adapter
    for name, adapter in adapters(model).items():
        rank, dim = widths[name], adapter.up.out_features
        assert adapter.down.weight.shape == (rank, dim) and adapter.up.weight.shape == (dim, rank)
        assert adapter.down.out_features == adapter.up.in_features == rank


def test_a_vanished_adapter_is_not_called(monkeypatch):
    model = pruned()
    called = []
    monkeypatch.setattr(va.FusedAdapter, "forward", lambda self, x, residual=None: called.append(self) or residual)
    model(images(model))
    found = list(adapters(model).values())
    assert called == found[1:]
    assert model.blocks[0].join_attn == "plain" and model.blocks[0].join_mlp == "branch"
    assert not any(p.requires_grad for p in found[0].parameters())


@every_architecture
def test_training_goes_on_with_what_is_left(architecture):
    model = pruned(architecture)
    randomise_trained(model)
    model(images(model)).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad.abs().sum() > 0 for p in trained.values())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("random", [False, True], ids=["score", "random"])
def test_the_optimizers_next_steps_are_those_of_a_run_with_masks(optimizer, random):
    method = va.Mimi(start_rank=4, score="random" if random else "paper")
    ours = attached(method=method).double()
    x = images(ours, 4)
    masked = copy.deepcopy(ours)
    runs = {}
    for model in (ours, masked):
        runs[model] = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])

    def step(model, masks=None):
        runs[model].zero_grad()
        model(x).square().mean().backward()
        for name, mask in (masks or {}).items():
            adapter = model.get_submodule(name)
            for p, part in ((adapter.down.weight, mask[:, None]), (adapter.up.weight, mask[None])):
                p.grad.mul_(part)
        runs[model].step()
        with torch.no_grad():
            for name, mask in (masks or {}).items():
                adapter = model.get_submodule(name)
                adapter.down.weight.mul_(mask[:, None])
                adapter.up.weight.mul_(mask[None])

    for model in (ours, masked):
        for _ in range(3):
            step(model)
    weights = {name: adapter.down.weight.detach().clone() for name, adapter in adapters(ours).items()}
    method.cut(ours, 1, runs[ours])
    masks = {}
    for name, adapter in adapters(ours).items():
        masks[name] = tensor([any(torch.equal(row, kept) for kept in adapter.down.weight) for row in weights[name]])
        assert masks[name].sum() == adapter.down.out_features
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_submodule(name).down.weight.mul_(mask[:, None])
            masked.get_submodule(name).up.weight.mul_(mask[None])
    for _ in range(3):
        step(ours)
        step(masked, masks)
        for name, adapter in adapters(ours).items():
            twin = masked.get_submodule(name)
            torch.testing.assert_close(adapter.down.weight, twin.down.weight[masks[name]], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(adapter.up.weight, twin.up.weight[:, masks[name]], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.head.weight, masked.head.weight, rtol=1e-9, atol=1e-12)


def test_an_optimizer_with_other_state_starts_anew():
    adapter = va.FusedAdapter(6, 4)
    optimizer = torch.optim.Adafactor(adapter.parameters())
    x = torch.randn(5, 6)
    adapter(x).sum().backward()
    optimizer.step()
    known = {key for key, state in optimizer.state[adapter.down.weight].items() if state.ndim}
    assert known and "exp_avg" not in known
    bias = optimizer.state[adapter.up.bias]
    shrink(adapter, tensor([True, False, True, False]), optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(adapter.parameters())
    assert adapter.down.weight not in optimizer.state and optimizer.state[adapter.up.bias] is bias
    adapter(x).sum().backward()
    optimizer.step()


def test_shrinking_takes_the_bias_along():
    adapter = va.FusedAdapter(6, 4, scale="channel").double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        adapter.up.weight[:, 1] = 0
    x = torch.randn(5, 6, dtype=torch.float64)
    before = adapter(x)
    shrink(adapter, tensor([True, False, True, True]))
    torch.testing.assert_close(adapter(x), before)
    assert adapter.down.bias.shape == (3,) and adapter.up.bias.shape == (6,)
    with pytest.raises(ValueError, match=r"survivors are torch.bool \(4,\); a boolean mask of \(3,\) is needed"):
        shrink(adapter, tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=r"torch.int64 \(3,\)"):
        shrink(adapter, tensor([0, 1, 2]))


def test_cut_by_each_score():
    models = {}
    for score in ("paper", "paper-normalised", "random"):
        torch.manual_seed(3)
        method = va.Mimi(start_rank=8, score=score)
        model = attached(method=method)
        first = next(iter(adapters(model).values()))
        with torch.no_grad():
            first.down.weight.mul_(100)
        method.cut(model, 1)
        models[score] = method.widths(model)
    assert all(sum(widths.values()) == 16 for widths in models.values())
    assert models["paper"]["blocks.0.adapter_attn"] == 8  # its weights are the largest
    assert models["paper-normalised"]["blocks.0.adapter_attn"] < 8
    method = va.Mimi(start_rank=8, score="random")
    draws = []
    for seed in (0, 0, 1):
        model = attached(method=method)
        torch.manual_seed(seed)
        method.cut(model, 1)
        draws.append(method.widths(model))
    assert draws[0] == draws[1] != draws[2]


def test_all_adapters_may_vanish(tmp_path):
    method = va.Mimi(start_rank=1, prune=0.9)
    model = attached(method=method)
    method.cut(model, 1)
    assert set(method.widths(model).values()) == {0} and va.summary(model).adapter == 0
    x = images(model)
    model(x).sum().backward()
    va.save(model, tmp_path / "empty.safetensors")
    assert torch.equal(va.load(make(), tmp_path / "empty.safetensors")(x), model(x))


@pytest.mark.cuda
@no_gpu
def test_the_cut_on_a_gpu():
    method = va.Mimi(start_rank=4)
    model = attached(method=method).cuda()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    x = images(model).cuda()
    for prunes in (1, 2):
        model(x).square().mean().backward()
        optimizer.step()
        method.cut(model, prunes, optimizer)
        optimizer.zero_grad()
    assert sum(method.widths(model).values()) == 4
    assert all(p.device.type == "cuda" for p in model.parameters())


# What may happen to a pruned model


@every_architecture
def test_a_file_carries_the_widths(architecture, tmp_path):
    model = pruned(architecture)
    path = tmp_path / "pruned.safetensors"
    va.save(model, path)
    loaded = va.load(make(architecture), path)
    x = images(model)
    assert torch.equal(loaded(x), model(x))
    assert va.Mimi().widths(loaded) == va.Mimi().widths(model)
    assert structure(loaded)["requires_grad"] == structure(model)["requires_grad"]
    first = next(block for block in loaded.modules() if isinstance(block, Joined))
    assert (first.join_attn, first.join_mlp) == ("plain", "branch")
    va.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_that_lacks_an_adapter_is_refused(tmp_path):
    path = tmp_path / "pruned.safetensors"
    va.save(pruned(), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    assert tensors["adapter.blocks.0.adapter_attn.down.weight"].shape == (0, 48)
    for name in ("adapter.blocks.0.adapter_attn.down.weight", "adapter.blocks.1.adapter_mlp.up.weight"):
        safetensors.torch.save_file({key: t for key, t in tensors.items() if key != name}, path, metadata)
        model = make()
        with pytest.raises(ValueError, match="pruned.safetensors"):
            va.load(model, path)
        assert structure(model) == structure(make())


@every_architecture
def test_it_is_shown_disabled_copied_and_detached(architecture):
    model = pruned(architecture)
    x = images(model)
    logits = model(x)
    plain = make(architecture)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "adapter_" not in name})
    with va.disabled(model):
        torch.testing.assert_close(model(x), plain(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), logits)
    words = va.summary(model).blocks[0].method
    assert words.startswith("adapter_attn 0, adapter_mlp ")
    assert draw(model)
    first = next(block for block in model.modules() if isinstance(block, Joined))
    assert [part.name for part in block_parts(first, tensor_roles(model)) if part.role == "added"] == ["adapter_mlp"]
    va.detach(model)
    assert structure(model) == structure(make(architecture))
    assert_same_state(model, copied_state(make(architecture)))
    with pytest.raises(ValueError, match="cannot be merged: its adapters have an activation inside"):
        va.merge(attached(architecture))


def test_a_compiled_model_sees_the_cut():
    torch._dynamo.reset()
    method = va.Mimi(start_rank=4)
    model = attached(method=method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        zero_half(model)
        method.cut(model, 1)
        randomise_trained(model)
        torch.testing.assert_close(compiled(x), model(x))


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prune": 0}, "prune is 0; it must be a share between 0 and 1, both excluded"),
        ({"prune": 1.0}, "prune is 1.0"),
        ({"prune": -0.5}, "prune is -0.5"),
        ({"prune": "half"}, "prune is 'half'"),
        ({"prune": float("nan")}, "prune is nan"),
        ({"phases": 0}, "phases is 0; it must be a whole number of at least 1"),
        ({"start_rank": 0}, "start_rank is 0"),
        ({"sigma": 2.5}, "sigma is 2.5"),
        ({"sigma": None}, "sigma is None"),
        ({"min_total": 0}, "min_total is 0"),
        ({"score": "papre"}, "unknown score 'papre': did you mean 'paper'"),
        ({"final_training": 1}, "final_training is 1; it must be True or False"),
        ({"positions": ("atn",)}, "unknown position 'atn': did you mean 'attn'"),
        ({"positions": ()}, "positions are (); they must be attn, mlp or both"),
        ({"init": "liner"}, "unknown init 'liner': did you mean 'linear'"),
    ],
)
def test_bad_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        va.Mimi(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (va.Mimi(start_rank=4, min_total=17), "min_total is 17, but this model starts with 16 neurons"),
        (va.Mimi(sigma=49), "sigma is 49, which leaves blocks.0 no neuron: it must be 48 or less"),
    ],
)
def test_what_a_model_has_no_place_for(method, message):
    model = make()
    with pytest.raises(ValueError) as error:
        va.attach(model, method)
    assert message in str(error.value)
    assert structure(model) == structure(make())
    va.attach(model, va.Mimi(start_rank=4, min_total=16))


def test_only_its_own_models_are_cut_and_each_time_once():
    method = va.Mimi(start_rank=4)
    model = attached(method=method)
    method.cut(model, 2)
    other = va.attach(make(), va.Adapter(rank=8))
    for refused, prunes, message in (
        (model, 1, "prune 1 leaves 8 neurons, but there are only 4"),
        (model, 0, "prunes is 0; it must be a whole number of at least 1"),
        (model, 1.5, "prunes is 1.5"),
        (make(), 1, "no method is attached"),
        (other, 1, "Adapter(rank=8, placement='post', "),
    ):
        state, shape = copied_state(refused), structure(refused)
        with pytest.raises(ValueError) as error:
            method.cut(refused, prunes)
        assert message in str(error.value)
        assert_same_state(refused, state)
        assert structure(refused) == shape
    with va.disabled(model), pytest.raises(ValueError, match="leave it first"):
        method.cut(model, 3)
