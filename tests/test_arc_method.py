"""Does ARC come onto a ViT as the paper has it, with each basis once?"""

import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import vitadapter_ext as va
from tests.vits import ARCHITECTURES, assert_same_state, copied_state, images, make, randomise_trained, structure
from vitadapter_ext import embedded
from vitadapter_ext.methods import make_method
from vitadapter_ext.sites import WithArc
from vitadapter_ext.train import configure, fit

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def attached(architecture="vit", method=va.Arc(rank=3), **changes):  # noqa: B008 - it is frozen
    model = va.attach(make(architecture, **changes), method)
    randomise_trained(model)
    return model


def bases(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("arc_basis")}


# What the paper says


@pytest.mark.parametrize(
    ("name", "positions", "count"),
    [
        ("vit_base_patch16_224", ("attn", "mlp"), 96_432),
        ("vit_base_patch16_224", ("attn",), 48_216),
        ("vit_large_patch16_224", ("attn", "mlp"), 153_952),
        ("vit_huge_patch14_224", ("attn", "mlp"), 213_120),
        ("swin_base_patch4_window7_224", ("attn", "mlp"), 218_464),
    ],
)
def test_as_many_parameters_as_in_the_paper(name, positions, count):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert va.summary(va.attach(model, va.Arc(rank=50, positions=positions))).adapter == count


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_architecture
def test_each_place_computes_the_formula_on_its_input(architecture, training):
    model = attached(architecture, va.Arc(rank=3, dropout=0.0)).double().train(training)
    seen = []

    def note(place, args, kwargs):
        seen.append((place, args, kwargs))

    places = [module for module in model.modules() if isinstance(module, WithArc)]
    hooks = [place.register_forward_pre_hook(note, with_kwargs=True) for place in places]
    model(images(model))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * sum(name.endswith(".attn.arc.rescale") for name in model.state_dict())
    for place, (x, *args), kwargs in seen:
        u, arc = place.arc.basis.weight, place.arc
        changed = x + F.linear(x @ u * arc.rescale, u, arc.bias)
        for dropout in place.modules():
            dropout.training = False
        plain = type(place).__bases__[-1].forward(place, changed, *args, **kwargs)
        torch.testing.assert_close(place(x, *args, **kwargs), plain, rtol=1e-12, atol=1e-12)


def test_how_the_paper_begins():
    model, plain = va.attach(make(), va.Arc(rank=3)), make()
    for block in model.blocks:
        assert not block.attn.arc.rescale.any() and block.mlp.arc.rescale.all()
        assert block.mlp.arc.rescale.abs().max() <= (6 / (1 + 3)) ** 0.5  # Xavier-uniform on shape (1, 3)
        assert not block.attn.arc.bias.any() and not block.mlp.arc.bias.any()
    assert all(basis.any() for basis in bases(model).values())
    x = images(model)
    assert not torch.allclose(model(x), plain(x))


@every_architecture
def test_zero_begins_as_the_backbone(architecture):
    model, plain = make(architecture).train(), make(architecture).train()
    va.attach(model, va.Arc(rank=3, rescale_init="zero"))
    x = images(model)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x))


# One basis


def test_one_basis_for_each_position():
    model = va.attach(make(), va.Arc(rank=3))
    assert list(bases(model)) == ["arc_basis.all.attn.weight", "arc_basis.all.mlp.weight"]
    first, second = model.blocks
    assert first.attn.arc.basis is second.attn.arc.basis is model.arc_basis["all"]["attn"]
    assert first.mlp.arc.basis is second.mlp.arc.basis is model.arc_basis["all"]["mlp"]
    assert list(bases(va.attach(make(), va.Arc(rank=3, positions=("mlp",))))) == ["arc_basis.all.mlp.weight"]


def test_one_for_each_stage_of_a_swin():
    model = va.attach(make("swin"), va.Arc(rank=3))
    assert {name: tuple(basis.shape) for name, basis in bases(model).items()} == {
        "arc_basis.0.attn.weight": (24, 3),
        "arc_basis.0.mlp.weight": (24, 3),
        "arc_basis.1.attn.weight": (48, 3),
        "arc_basis.1.mlp.weight": (48, 3),
    }
    assert model.layers[0].blocks[1].attn.arc.basis is model.arc_basis["0"]["attn"]


@every_architecture
def test_a_basis_is_in_a_model_once(architecture, tmp_path):
    model = attached(architecture)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})  # as DDP and an optimizer see it
    assert not any("basis" in name for name in names if not name.startswith("arc_basis."))
    va.save(model, tmp_path / "file")
    stored = safetensors.torch.load_file(tmp_path / "file")
    assert {name for name in stored if "basis" in name} == {f"adapter.{name}" for name in bases(model)}


def test_its_gradient_is_the_sum_over_all_layers():
    model = attached().double()
    x = images(model)
    model(x).sum().backward()
    summed = model.arc_basis["all"]["attn"].weight.grad.clone()
    parts = []
    for block in model.blocks:  # each layer with a basis of its own
        alone = copy.deepcopy(model)
        alone.zero_grad()
        own = copy.deepcopy(alone.arc_basis["all"]["attn"])
        for other, twin in zip(model.blocks, alone.blocks, strict=True):
            if other is block:
                object.__setattr__(twin.attn.arc, "basis", own)
        alone(x).sum().backward()
        parts.append(own.weight.grad)
    torch.testing.assert_close(sum(parts), summed)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize(
    "changed",
    [copy.deepcopy, through_pickle, averaged, lambda m: m.double(), lambda m: m.half().float(), lambda m: m.to("meta")],
    ids=["deepcopy", "pickle", "average", "double", "half", "meta"],
)
def test_sharing_survives(changed):
    model = attached()
    logits, x = model(images(model)), images(model)
    other = changed(model)
    for position in ("attn", "mlp"):
        places = [getattr(block, position).arc.basis for block in other.blocks]
        assert all(basis is other.arc_basis["all"][position] for basis in places)
    if other is not model:
        with torch.no_grad():
            other.arc_basis["all"]["attn"].weight.zero_()
        assert not torch.equal(other(x), model(x)) and bases(model)["arc_basis.all.attn.weight"].any()
    assert logits.shape == (2, 3)


def test_sharing_survives_distributed_data_parallel():
    """A group of one process: DDP finds each basis once, and its gradient is the whole one."""
    model = attached()
    x = images(model)
    model(x).sum().backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in alone.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_sharing_survives_loading(tmp_path):
    model = attached(method=va.Arc(rank=3))
    va.save(model, tmp_path / "file")
    other = va.load(make(), tmp_path / "file")
    assert other.blocks[0].attn.arc.basis is other.blocks[1].attn.arc.basis is other.arc_basis["all"]["attn"]
    x = images(model)
    assert torch.equal(other(x), model(x))


# What is refused


def test_a_files_rank_wins(tmp_path):
    """As after shrinking; what was trained is what is loaded."""
    model = attached(method=va.Arc(rank=5))
    va.save(model, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data.replace(b'\\"rank\\":5', b'\\"rank\\":4'))
    other = va.load(make(), tmp_path / "file")
    x = images(model)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "adapter.arc_basis.all.attn.weight",
            (47, 3),
            "its adapter.arc_basis.all.attn.weight is torch.float32 (47,",
        ),
        ("adapter.arc_basis.all.attn.weight", (48,), "its adapter.arc_basis.all.attn.weight is torch.float32 (48,"),
        ("adapter.arc_basis.all.attn.weight", (48, 4), "its adapter.blocks.0.attn.arc.rescale is torch.float32 (3,)"),
        ("adapter.blocks.1.mlp.arc.rescale", (4,), "its adapter.blocks.1.mlp.arc.rescale is torch.float32 (4,)"),
        ("adapter.blocks.1.mlp.arc.bias", None, "it lacks the tensor adapter.blocks.1.mlp.arc.bias"),
        ("adapter.arc_basis.all.mlp.weight", None, "it lacks the tensor adapter.arc_basis.all.mlp.weight"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, name, shape, message):
    va.save(attached(), tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "file")
    tensors.pop(name)
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"positions": ()}, "positions are (); they must be attn, mlp or both"),
        ({"positions": ("attn", "attn")}, "they must be attn, mlp or both"),
        ({"positions": ("attn", "fc2")}, "unknown position 'fc2'"),
        ({"positions": 3}, "unknown position 3"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a probability in [0, 1)"),
        ({"rescale_init": "ones"}, "unknown rescale_init 'ones'"),
        ({"bias": "yes"}, "bias is 'yes'; it must be 'auto', True or False"),
        ({"bias": 1}, "bias is 1; it must be 'auto', True or False"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError) as error:
        va.Arc(**fields)
    assert message in str(error.value)


def test_fields_as_a_file_holds_them():
    assert make_method("arc", {"positions": ["attn"], "bias": False}) == va.Arc(positions=("attn",), bias=False)


def test_layers_that_are_not_linear_are_named():
    model = make()
    model.blocks[1].mlp.fc1 = torch.nn.Sequential(torch.nn.Linear(48, 192))
    before = structure(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1 is a Sequential; ARC needs an nn.Linear there"):
        va.attach(model, va.Arc())
    assert structure(model) == before


@pytest.mark.parametrize("method", [va.Arc(), va.Adapter(placement="inner")])
def test_blocks_that_share_a_module_are_refused(method):
    model = make()
    model.blocks[1].mlp = model.blocks[0].mlp
    before = structure(model)
    with pytest.raises(ValueError, match="blocks of this VisionTransformer share their mlp"):
        va.attach(model, method)
    assert structure(model) == before


def test_a_training_run(tmp_path):
    done = fit(configure(method="arc", epochs=1, baselines=False, out=tmp_path / "run"))
    assert done.summary["parameters"]["adapter"] == 2 * 128 * 16 + 12 * (16 + 128)
    assert done.summary["test_accuracy"] > 0.5
    again = va.load(embedded.create(), tmp_path / "run" / "adapter.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), done.model.eval()(x))
