"""Do consolidators come onto a ViT as the paper has them, and go into a file and into the weights with one function?"""

import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import vitadapter_ext as va
from tests.vits import ARCHITECTURES, assert_same_state, copied_state, images, make, randomise_trained, structure
from vitadapter_ext import embedded, files, reference
from vitadapter_ext.methods import make_method
from vitadapter_ext.nn.consolidator import ConsolidatedLinear, StoredConsolidator, entries
from vitadapter_ext.train import configure, fit

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
ONE_OF_EACH_BLOCK = ("siglip", "eva02", "eva02_large", "beit", "swin")
# 8 divides the sizes of every layer in tests.vits.
BRANCHES = {"one": (8,), "unequal": (8, 2, 4), "two alike": (4, 8, 4), "equal": (8, 8, 8)}
METHOD = va.Consolidator(groups=(8,), drop_path=0.0)


def attached(architecture="vit", method=METHOD, **changes):
    model = va.attach(make(architecture, **changes), method)
    randomise_trained(model)
    return model


def consolidated(model) -> dict[str, ConsolidatedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ConsolidatedLinear)}


def assert_close(found, wanted, tolerance=1e-5):
    assert (found - wanted).norm() <= tolerance * wanted.norm()


# What the paper says


def test_as_many_parameters_as_in_the_paper(tmp_path):
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    with torch.no_grad():  # or half of the fingerprint would be zeros and ones
        for p in model.parameters():
            p.add_(torch.randn(p.shape[-1:]), alpha=0.02)
    total = sum(p.numel() for p in model.parameters())
    summary = va.summary(va.attach(model, va.Consolidator()))
    assert (summary.adapter, summary.norms, summary.biases) == (304_128, 38_400, 82_944)
    assert summary.overrides == 38_400 + 82_944
    assert summary.adapter / (total - summary.head) == pytest.approx(0.0035, abs=5e-5)
    assert summary.blocks[0].method == "attn.proj 384, attn.qkv 384, mlp.fc1 384, mlp.fc2 384"
    size = va.save(model, tmp_path / "file", class_names=[f"class {i}" for i in range(10)])
    assert size - 4 * summary.head <= 1_400_000
    loaded = va.load(model := va.detach(model), tmp_path / "file")
    assert loaded is model and va.summary(loaded) == summary


def test_how_the_paper_begins():
    model, plain = va.attach(make(), METHOD), make()
    for module in consolidated(model).values():
        assert all(0 < p.abs().max() <= 1e-3 for p in module.consolidator.parameters())
    x = images(model)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert_close(model(x), plain(x), 0.05)
    assert not torch.equal(model(x), plain(x))


TARGETS = {
    "vit": {"qkv": ["attn.qkv"], "proj": ["attn.proj"], "fc1": ["mlp.fc1"], "fc2": ["mlp.fc2"]},
    "eva02_large": {
        "qkv": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "proj": ["attn.proj"],
        "fc1": ["mlp.fc1_g", "mlp.fc1_x"],
        "fc2": ["mlp.fc2"],
    },
}


@pytest.mark.parametrize("targets", [("qkv",), ("fc1", "proj"), ("fc2",), ("qkv", "proj", "fc1", "fc2")])
@pytest.mark.parametrize("architecture", TARGETS)
def test_targets_are_layers(architecture, targets):
    model = va.attach(make(architecture), va.Consolidator(groups=8, targets=targets))
    wanted = {f"blocks.{i}.{name}" for i in range(2) for target in targets for name in TARGETS[architecture][target]}
    assert consolidated(model).keys() == wanted


def test_the_gate_of_an_attention_is_no_target():
    model = make("eva02")
    for block in model.blocks:
        block.attn.gate = torch.nn.Linear(48, 48)
    va.attach(model, METHOD)
    randomise_trained(model)
    assert not any("gate" in name for name in consolidated(model))
    x = images(model)
    logits = model(x)
    assert_close(va.merge(model)(x), logits)


@pytest.mark.parametrize("shuffle", [True, False])
@every_architecture
def test_each_layer_computes_the_formula_on_its_input(architecture, shuffle):
    model = attached(architecture, va.Consolidator(groups=(8, 4), shuffle=shuffle, drop_path=0.5)).double()
    seen = {}
    for name, layer in consolidated(model).items():
        layer.register_forward_hook(lambda layer, args, y, name=name: seen.update({name: (args[0], y.clone())}))
    model(images(model))
    assert seen.keys() == consolidated(model).keys() and len(seen) >= 4
    for name, (x, y) in seen.items():
        layer = model.get_submodule(name)
        beside = layer.consolidator
        base = F.linear(x, layer.weight, layer.bias)
        wanted = reference.consolidator(x, beside.weights(), beside.biases(), base=base, shuffle=shuffle)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(y, base, rtol=1e-2)


@every_architecture
def test_drop_path_drops_a_branch_for_a_whole_image(architecture):
    """Also where a layer sees windows: all of an image's go together."""
    batch = 12
    model = attached(architecture, va.Consolidator(groups=(8,), drop_path=0.5)).double()
    layers = consolidated(model)
    for layer in layers.values():
        layer.consolidator.train()

    def check(layer, args, y):
        change = (y - F.linear(args[0], layer.weight, layer.bias)).abs().reshape(batch, -1, y.shape[-1])
        kept = change.amax(dim=2) > 1e-9
        assert (kept == kept[:, :1]).all()
        seen.extend(kept[:, 0].tolist())

    seen = []
    for layer in layers.values():
        layer.register_forward_hook(check)
    model(images(model, batch))
    assert len(seen) == batch * len(layers)
    assert 0.3 * len(seen) < sum(seen) < 0.7 * len(seen)


# Which layers have a bias


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("vit", set()),
        ("eva02", {"attn.qkv"}),
        ("eva02_large", {"attn.k_proj"}),
        ("dinov3", {"attn.qkv"}),
        ("beit", {"attn.qkv"}),
    ],
)
def test_a_bias_where_the_layer_has_one(architecture, without):
    model = va.attach(make(architecture), METHOD)
    for name, layer in consolidated(model).items():
        assert layer.consolidator.has_bias == (layer.bias is not None) == (name.split(".", 2)[2] not in without)
    for bias in (True, False):
        model = va.attach(make(architecture), va.Consolidator(groups=(8,), bias=bias))
        assert {layer.consolidator.has_bias for layer in consolidated(model).values()} == {bias}


@pytest.mark.parametrize("architecture", ["eva02", "eva02_large", "dinov3", "beit"])
def test_a_bias_without_room_cannot_be_merged(architecture):
    model = attached(architecture, va.Consolidator(groups=(8,), bias=True))
    before = copied_state(model), structure(model)
    with pytest.raises(ValueError, match=r"attn\.(qkv|k_proj) cannot be merged: it has no bias, and its consolidator"):
        va.merge(model)
    assert_same_state(model, before[0])
    assert structure(model) == before[1]


# Both ways to train


@pytest.mark.parametrize("architecture", ONE_OF_EACH_BLOCK)
def test_inside_the_weight_is_beside_the_layer(architecture):
    gradients, logits = [], []
    for in_weight in (True, False):
        torch.manual_seed(3)
        method = va.Consolidator(groups=(8, 4), drop_path=0.0, in_weight=in_weight)
        model = attached(architecture, method).double().train()
        torch.manual_seed(4)
        logits.append(model(images(model)))
        logits[-1].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-10)
        assert gradient.any(), name


# What may happen to a model


@every_architecture
def test_a_copy_is_whole_and_its_own(architecture):
    model = attached(architecture)
    x = images(model)
    logits = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), logits)
        shape = structure(va.detach(twin))
        fresh = structure(make(architecture))
        assert (shape["classes"], shape["attributes"]) == (fresh["classes"], fresh["attributes"])
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_architecture
def test_low_precision_before_and_after(architecture, dtype):
    before = va.attach(make(architecture).to(dtype), METHOD)  # the branches are float32
    after = va.attach(make(architecture), METHOD).to(dtype)
    for model in (before, after):
        logits = model(images(model))
        logits.float().square().mean().backward()
        assert logits.dtype == dtype
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_architecture
def test_gradients_under_autocast_and_checkpointing(architecture):
    model = attached(architecture, va.Consolidator(groups=(8,), drop_path=0.5), drop_path_rate=0.1).train()
    x = images(model)
    gradients = []
    for use in (False, True):
        model.set_grad_checkpointing(use)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize(("architecture", "drop_path"), [("vit", 0.0), ("eva02", 0.0), ("swin", 0.0), ("swin", 0.5)])
def test_one_graph_trains_it(architecture, drop_path):
    torch._dynamo.reset()
    small = {"depths": (1, 1)} if architecture == "swin" else {"depth": 1}
    model = attached(architecture, va.Consolidator(groups=(8,), drop_path=drop_path), **small).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (4, 6) if drop_path else (4,):  # of another size too
        x = images(model, batch)
        model.zero_grad()
        compiled(x).sum().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        if drop_path:  # of which each mode draws its own
            assert model.layers[0].blocks[0].attn.qkv.consolidator.samples == batch
            assert all(gradient.isfinite().all() for gradient in found.values())
        else:
            model.zero_grad()
            model(x).sum().backward()
            for name, gradient in found.items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-3)


# Files: stage 1 and stage 2


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize("groups", BRANCHES.values(), ids=BRANCHES)
@every_architecture
def test_both_stages_keep_the_function(architecture, groups, shuffle, tmp_path):
    model = attached(architecture, va.Consolidator(groups=groups, shuffle=shuffle))
    x = images(model)
    logits = model(x)
    before = copied_state(model), structure(model)
    va.save(model, tmp_path / "file")
    loaded = va.load(make(architecture), tmp_path / "file")
    assert_close(loaded(x), logits)
    va.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()

    assert_close(va.merge(loaded)(x), logits)
    assert_close(va.merge(model)(x), logits)
    va.save(model, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "file").read_bytes()
    va.unmerge(model)
    assert_same_state(model, before[0])
    assert structure(model) == before[1]
    va.unmerge(loaded)
    assert_close(loaded(x), logits)
    assert_same_state(va.detach(loaded), make(architecture).state_dict())


@pytest.mark.parametrize("groups", BRANCHES.values(), ids=BRANCHES)
def test_what_a_file_holds(groups, tmp_path):
    model = attached(method=va.Consolidator(groups=groups))
    va.save(model, tmp_path / "file")
    metadata, tensors = files.read(tmp_path / "file")
    assert metadata["fields"]["groups"] == list(groups)
    assert not any(name.startswith("override.blocks.") and "norm" not in name for name in tensors)
    assert {name for name in tensors if name.startswith("override.")} == {
        f"override.{norm}.{kind}"
        for norm in ("norm", *(f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)))
        for kind in ("weight", "bias")
    }
    original = make()
    for name, layer in consolidated(model).items():
        beside = layer.consolidator
        change = layer.bias - original.get_parameter(f"{name}.bias")
        its = f"adapter.{name}.consolidator"
        its += ".branches.0" if len(groups) == 1 else ""
        torch.testing.assert_close(tensors[f"{its}.bias"], sum(beside.biases()) + change)
        if len(groups) == 1:
            assert torch.equal(tensors[f"{its}.weight"], beside.branches[0].weight)
        else:
            places = entries(layer.in_features, layer.out_features, groups, True)
            torch.testing.assert_close(tensors[f"{its}.weight"], beside.delta()[0].flatten()[places])
            assert not any(key.startswith(f"{its}.branches") for key in tensors)


def test_equal_groups_are_one_grouped_form(tmp_path):
    model = attached(method=va.Consolidator(groups=(8, 8)))
    va.save(model, tmp_path / "file")
    _, tensors = files.read(tmp_path / "file")
    assert tensors["adapter.blocks.0.attn.qkv.consolidator.weight"].shape == (48 * 144 // 8,)


@pytest.mark.parametrize("groups", BRANCHES.values(), ids=BRANCHES)
def test_biases_that_have_no_place_in_c_stay_overrides(groups, tmp_path):
    va.save(attached("eva02", va.Consolidator(groups=groups)), tmp_path / "file")
    _, tensors = files.read(tmp_path / "file")
    own = {name for name in tensors if name.startswith("override.blocks.0.") and "norm" not in name}
    assert own == {f"override.blocks.0.attn.{name}" for name in ("q_bias", "v_bias")}
    model = attached(method=va.Consolidator(groups=groups, bias=False))
    va.save(model, tmp_path / "file")
    _, tensors = files.read(tmp_path / "file")
    assert {f"override.{name}.bias" for name in consolidated(model)} <= tensors.keys()
    assert not any("consolidator" in name and name.endswith("bias") for name in tensors)
    x = images(model)
    assert_close(va.load(make(), tmp_path / "file")(x), model(x))


def test_a_file_of_one_branch_can_be_trained_on(tmp_path):
    va.save(attached(method=va.Consolidator(groups=(8,), drop_path=0.5)), tmp_path / "file")
    model = va.load(make(), tmp_path / "file").train()
    assert all(layer.consolidator.drop_path == 0.5 for layer in consolidated(model).values())
    x = images(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    logits = model.eval()(x)
    va.save(model, tmp_path / "file")
    assert_close(va.load(make(), tmp_path / "file")(x), logits)


def test_a_file_of_several_branches_is_not_trained(tmp_path):
    model = attached(method=va.Consolidator(groups=(8, 4)))
    va.save(model, tmp_path / "file")
    x = images(model)
    loaded = va.load(make().train(), tmp_path / "file")
    assert loaded.training
    with pytest.raises(RuntimeError, match=r"added up when the file was written, .*last\.ckpt"):
        loaded(x)
    with torch.no_grad():
        assert_close(loaded(x), model(x))
    assert torch.equal(loaded.eval()(x), loaded(x))
    stored = sum(layer.consolidator.weight.numel() + layer.out_features for layer in consolidated(loaded).values())
    assert va.summary(loaded).adapter == stored < va.summary(model).adapter
    assert va.summary(loaded).blocks[0].method == va.summary(model).blocks[0].method


@pytest.mark.parametrize("groups", [(8,), (8, 4)])
def test_a_file_on_a_low_precision_backbone(groups, tmp_path):
    model = attached(method=va.Consolidator(groups=groups))
    va.save(model, tmp_path / "file")
    x = images(model)
    for dtype in (torch.float16, torch.bfloat16):
        low = va.load(make().to(dtype), tmp_path / "file")
        torch.testing.assert_close(low(x.to(dtype)).float(), model(x), rtol=0.1, atol=0.2)
        va.save(low, tmp_path / "low")
        va.load(make().to(dtype), tmp_path / "low")
    va.save(copy.deepcopy(model).half(), tmp_path / "half")
    torch.testing.assert_close(va.load(make(), tmp_path / "half")(x), model(x), rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["eva02", "swin"])
def test_a_compiled_model_sees_what_was_loaded_and_merged(architecture, tmp_path):
    torch._dynamo.reset()
    small = {"depths": (1, 1)} if architecture == "swin" else {"depth": 1}
    va.save(attached(architecture, va.Consolidator(groups=(8, 4)), **small), tmp_path / "file")
    model = make(architecture, **small)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model)
    compiled(x)
    va.load(model, tmp_path / "file")
    torch.testing.assert_close(compiled(x), model(x))
    va.merge(model)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_groups_of_a_files_one_branch_win(tmp_path):
    model = attached()
    va.save(model, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    assert data.count(b'\\"groups\\":[8]') == 1
    (tmp_path / "file").write_bytes(data.replace(b'\\"groups\\":[8]', b'\\"groups\\":[4]'))
    other = va.load(make(), tmp_path / "file")
    x = images(model)
    assert_close(other(x), model(x))


QKV = "adapter.blocks.0.attn.qkv.consolidator"


@pytest.mark.parametrize(
    ("groups", "name", "shape", "message"),
    [
        ((8,), f"{QKV}.branches.0.weight", (144, 7), f"its {QKV}.branches.0.weight is torch.float32 (144, 7)"),
        ((8,), f"{QKV}.branches.0.weight", (144, 0), f"its {QKV}.branches.0.weight is torch.float32 (144, 0)"),
        ((8,), f"{QKV}.branches.0.weight", (144,), f"its {QKV}.branches.0.weight is torch.float32 (144,)"),
        ((8,), f"{QKV}.branches.0.bias", None, f"it lacks the tensor {QKV}.branches.0.bias"),
        ((8,), f"{QKV}.branches.1.weight", (144, 6), f"it has the tensor {QKV}.branches.1.weight, for which"),
        ((8,), "override.blocks.0.attn.qkv.bias", (144,), "it has the tensor override.blocks.0.attn.qkv.bias"),
        ((8, 4), f"{QKV}.weight", (5,), f"its {QKV}.weight is torch.float32 (5,) where ("),
        ((8, 4), f"{QKV}.weight", None, f"it lacks the tensor {QKV}.weight"),
        ((8, 4), f"{QKV}.bias", None, f"it lacks the tensor {QKV}.bias"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, groups, name, shape, message):
    va.save(attached(method=va.Consolidator(groups=groups)), tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "file")
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.randn(shape)
    safetensors.torch.save_file(tensors, tmp_path / "file", metadata)
    model = make()
    state, shapes = copied_state(model), structure(model)
    with pytest.raises(ValueError) as error:
        va.load(model, tmp_path / "file")
    assert message in str(error.value)
    assert_same_state(model, state)
    assert structure(model) == shapes


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ()}, "groups are (); there must be from 1 to 16"),
        ({"groups": (384, 0)}, "groups are (384, 0); each must be a whole number of at least 1"),
        ({"groups": "384"}, "groups are ('384',); each must be a whole number"),
        ({"drop_path": 1.0}, "drop_path is 1.0; it must be a probability in [0, 1)"),
        ({"drop_path": -0.5}, "drop_path is -0.5"),
        ({"targets": ()}, "targets are (); they must be some of qkv, proj, fc1, fc2, each once"),
        ({"targets": ("qkv", "qkv")}, "targets are ('qkv', 'qkv'); they must be some of"),
        ({"targets": ("fc3",)}, "unknown target 'fc3'"),
        ({"targets": 3}, "unknown target 3"),
        ({"shuffle": 1}, "shuffle is 1; it must be True or False"),
        ({"train_norms": "yes"}, "train_norms is 'yes'; it must be True or False"),
        ({"train_biases": None}, "train_biases is None"),
        ({"bias": 1}, "bias is 1; it must be 'auto', True or False"),
        ({"in_weight": "never"}, "in_weight is 'never'; it must be 'auto', True or False"),
        ({"in_weight": True}, "in_weight is True and drop_path 0.5: in a weight no image's branch can be dropped"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError) as error:
        va.Consolidator(**fields)
    assert message in str(error.value)


def test_fields_as_a_file_and_the_command_line_hold_them():
    method = make_method("consolidator", {"groups": [8, 4], "targets": ["qkv"], "bias": False})
    assert method == va.Consolidator(groups=(8, 4), targets=("qkv",), bias=False)
    assert va.Consolidator(groups=8, targets="qkv") == va.Consolidator(groups=(8,), targets=("qkv",))
    for text, groups in (("64", (64,)), ("64,32", (64, 32))):
        assert configure(method="consolidator", groups=text).method.groups == groups
    given = configure(method="consolidator", targets="qkv,fc2", in_weight="False", drop_path="0")
    assert (given.method.targets, given.method.in_weight, given.method.drop_path) == (("qkv", "fc2"), False, 0.0)
    assert type(given).from_yaml(given.to_yaml()) == given


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        (None, va.Consolidator(), r"blocks\.0\.attn\.qkv: 384 groups do not fit 48 inputs and 144 outputs: they must"),
        (None, va.Consolidator(groups=(8, 9)), r"blocks\.0\.attn\.qkv: 9 groups do not fit 48 inputs and 144 outputs"),
        ("Sequential", METHOD, r"blocks\.1\.mlp\.fc2 is a Sequential; Consolidator needs a plain nn\.Linear there"),
        ("Odd", METHOD, r"blocks\.1\.mlp\.fc2: 8 groups do not fit 192 inputs and 47 outputs"),
        ("shared", METHOD, "blocks of this VisionTransformer share their mlp"),
    ],
)
def test_models_that_have_no_place_are_left_alone(change, method, message):
    model = make()
    if change == "Sequential":
        model.blocks[1].mlp.fc2 = torch.nn.Sequential(torch.nn.Linear(192, 48))
    elif change == "Odd":
        model.blocks[1].mlp.fc2 = torch.nn.Linear(192, 47)
    elif change == "shared":
        model.blocks[1].mlp = model.blocks[0].mlp
    before = structure(model)
    with pytest.raises(ValueError, match=message):
        va.attach(model, method)
    assert structure(model) == before


def test_meta_tensors():
    with torch.device("meta"):
        model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=3)
        va.attach(model, va.Consolidator(groups=(8, 4)))
    va.unmerge(va.merge(model))
    assert all(p.is_meta for p in model.parameters())
    stored = StoredConsolidator(30, 42, (6, 3), device="meta")
    assert stored.delta()[0].shape == (42, 30)
    for method in (va.Consolidator(groups=(8, 4), drop_path=0.0), va.Adapter(rank=3), va.Arc(rank=3)):
        for training in (False, True):
            model = va.attach(make().to("meta"), method).train(training)
            with torch.autocast("cpu", torch.bfloat16):  # which knows no meta device
                assert model(images(model).to("meta")).shape == (2, 3)


@pytest.mark.parametrize("architecture", ["eva02", "beit"])
def test_an_attention_whose_qkv_has_no_branches_is_as_it_was(architecture):
    model = va.attach(make(architecture), va.Consolidator(groups=(8,), targets=("proj", "fc1")))
    assert type(model.blocks[0].attn) is type(make(architecture).blocks[0].attn)
    assert isinstance(model.blocks[0].attn.proj, ConsolidatedLinear)


# The driver


def test_a_training_run(tmp_path):
    done = fit(configure(method="consolidator", epochs=1, baselines=False, out=tmp_path / "run"))
    (groups,) = done.model.blocks[0].attn.qkv.consolidator.groups
    weights = 128 * (384 + 128 + 512 + 512) // groups
    assert done.summary["parameters"]["adapter"] == 6 * (weights + 384 + 128 + 512 + 128)
    assert done.summary["parameters"].keys() == {"adapter", "head", "overrides", "trainable", "total"}
    assert done.summary["test_accuracy"] > 0.5
    again = va.load(embedded.create(), tmp_path / "run" / "adapter.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(again.eval()(x), done.model.eval()(x))


def test_its_recipe():
    recipe = configure(recipe="consolidator-vtab")
    assert recipe.method == va.Consolidator(groups=(384,), shuffle=False, drop_path=0.5)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size, recipe.squash) == (100, 10, 64, True)
