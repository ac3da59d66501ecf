"""Is a saved file whole, the same every time, and refused by any model that it does not belong to?"""

import base64
import bz2
import json
import os
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitadapter_ext as va
from tests.vits import (
    ARCHITECTURES,
    METHODS,
    assert_same_state,
    copied_state,
    images,
    make,
    randomise_trained,
    structure,
)
from vitadapter_ext import files
from vitadapter_ext.attachment import head_tensors

METHOD = va.Adapter(rank=3, train_norms=True)


def trained(architecture="vit", method=METHOD, num_classes=5, **changes):
    torch.manual_seed(5)
    model = va.attach(make(architecture, num_classes=num_classes, **changes), method)
    randomise_trained(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter.safetensors"
    va.save(trained(), path)
    return path


def rewrite(source, target, change_metadata=None, change_tensors=None):
    """A copy of a saved file with something changed in it."""
    metadata, tensors = files.read(source)
    metadata, tensors = (change_metadata or (lambda m: m))(metadata), (change_tensors or (lambda t: t))(tensors)
    safetensors.torch.save_file(tensors, target, {"vitadapter": json.dumps(metadata)})
    return target


def assert_refused(path, message, model=None):
    """Refused in one sentence that names the file, and the model is as it was."""
    model = model or make()
    state, shape = copied_state(model), structure(model)
    with pytest.raises(ValueError) as error:
        va.load(model, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert_same_state(model, state)
    assert structure(model) == shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_round_trip_gives_the_same_logits(tmp_path, architecture, method):
    model = trained(architecture, method)
    path = tmp_path / "file.safetensors"
    assert va.save(model, path) == path.stat().st_size
    x = images(model)
    loaded = make(architecture, num_classes=2)
    fresh, shape = copied_state(loaded), structure(loaded)
    assert va.load(loaded, path) is loaded
    if method == METHODS["consolidator-branches"]:  # stored as sums, with what the biases have become in theirs
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(loaded(x), model(x))
        assert_same_state(loaded, copied_state(model))
        assert va.summary(loaded) == va.summary(model)
    va.detach(loaded)
    assert_same_state(loaded, fresh)
    assert structure(loaded) == shape


def test_a_new_process_gives_the_same_logits(tmp_path):
    model = trained("dinov2")
    va.save(model, tmp_path / "file.safetensors")
    x = images(model)
    torch.save({"x": x, "logits": model(x)}, tmp_path / "answer.pt")
    code = (
        "import sys, torch, vitadapter_ext as va; from tests.vits import make\n"
        "answer = torch.load(sys.argv[2])\n"
        "assert torch.equal(va.load(make('dinov2'), sys.argv[1])(answer['x']), answer['logits'])"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "file.safetensors", tmp_path / "answer.pt"]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("architecture", ["vit", "deit_distilled"])
def test_onto_a_backbone_without_a_head(tmp_path, architecture):
    model = trained(architecture)
    va.save(model, tmp_path / "file")
    loaded = make(architecture, num_classes=0)
    state, x = copied_state(loaded), images(model)
    assert torch.equal(va.load(loaded, tmp_path / "file")(x), model(x))
    assert_same_state(va.detach(loaded), state)


def test_the_file_holds_what_was_trained_and_nothing_else(saved):
    model = trained()
    metadata, tensors = files.read(saved)
    prefixes = {"adapter": [], "head": [], "override": []}
    for name, tensor in tensors.items():
        kind, _, name = name.partition(".")
        prefixes[kind].append(name)
        assert torch.equal(tensor, model.state_dict()[name])
    assert sum(t.numel() for t in tensors.values()) == va.summary(model).trainable
    assert set(prefixes["head"]) == {"head.weight", "head.bias"}
    assert len(prefixes["override"]) == 2 * 2 * 2 + 2
    assert "blocks.1.adapter_mlp.scale" in prefixes["adapter"]
    assert metadata["method"] == "adapter"
    assert va.methods.make_method("adapter", metadata["fields"]) == METHOD
    assert saved.stat().st_size < 4 * va.summary(model).trainable + 16_000


def test_metadata_read_off_the_model(tmp_path):
    va.save(trained("deit"), tmp_path / "file")
    metadata, _ = files.read(tmp_path / "file")
    assert metadata["backbone"]["model"].startswith("deit_tiny_patch16_224.")
    assert metadata["backbone"]["arguments"]["img_size"] == [32, 32]
    assert metadata["class_names"] is None
    assert metadata["num_classes"] == 5
    assert metadata["data"]["input_size"] == [3, 32, 32]
    assert metadata["data"]["mean"] == [0.485, 0.456, 0.406]
    assert {"std", "interpolation", "crop_pct"} <= metadata["data"].keys()


def test_metadata_given_by_the_caller(tmp_path):
    backbone = {"model": "mine", "arguments": {"depth": 2}, "weights": {"file": "w.npz", "sha256": "00"}}
    names = ["a", "b", "ç", "d", "e"]
    va.save(trained(), tmp_path / "file", backbone=backbone, class_names=names, data_config={"mean": (0.1, 0.2, 0.3)})
    metadata, _ = files.read(tmp_path / "file")
    assert metadata["backbone"] == backbone
    assert metadata["class_names"] == names
    assert metadata["data"]["mean"] == [0.1, 0.2, 0.3]
    assert metadata["data"]["input_size"] == [3, 32, 32]


def test_equal_models_give_equal_bytes(tmp_path):
    for name in ("first", "second"):
        va.save(trained(), tmp_path / name, class_names=list("abcde"))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_the_fingerprint_is_packed_and_in_format_1_was_not(saved, tmp_path):
    with safetensors.safe_open(saved, "pt") as file:
        metadata = json.loads(file.metadata()["vitadapter"])
    fingerprint = files.read(saved)[0]["fingerprint"]
    assert files.pack(fingerprint) == metadata["fingerprint"]
    assert 2 * len(metadata["fingerprint"]) < len(json.dumps(json.dumps(fingerprint, separators=(",", ":"))))
    old = rewrite(saved, tmp_path / "old", lambda m: m | {"format": 1})
    x = images(make())
    assert torch.equal(va.load(make(), old)(x), va.load(make(), saved)(x))


@pytest.mark.parametrize(
    "packed",
    ["", "é", "abc", "AAAA", files.pack({})[:-8], base64.b64encode(bz2.compress(b"[1")).decode(), files.pack([1])],
    ids=["nothing", "no ascii", "no base64", "no bzip2", "cut off", "no JSON", "no mapping"],
)
def test_a_packed_fingerprint_that_is_damaged(saved, tmp_path, packed):
    path = rewrite(saved, tmp_path / "file", lambda m: m | {"fingerprint": packed})
    assert_refused(path, "is damaged: its 'vitadapter' metadata cannot be read")


def test_a_fingerprint_that_would_fill_the_memory(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("vitadapter_ext.fingerprint._UNPACKED", 100)
    assert_refused(saved, "is damaged: its 'vitadapter' metadata cannot be read")


def test_metadata_is_one_sorted_key(saved):
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["vitadapter"]
    text = metadata["vitadapter"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_tensors_in_one_storage_are_saved(tmp_path):
    model = trained()
    adapter = model.blocks[0].adapter_mlp
    flat = torch.randn(48 * 3 * 2)
    adapter.down.weight.data = flat[: 48 * 3].view(3, 48)
    adapter.up.weight.data = flat[48 * 3 :].view(3, 48).T  # not contiguous either
    va.save(model, tmp_path / "file")
    x = images(model)
    assert torch.equal(va.load(make(), tmp_path / "file").blocks[0].adapter_mlp.up.weight, adapter.up.weight)
    torch.testing.assert_close(va.load(make(), tmp_path / "file")(x), model(x))


def test_a_shared_tensor_is_stored_once(tmp_path):
    model = trained()
    model.blocks[1].adapter_mlp.down.weight = model.blocks[0].adapter_mlp.down.weight
    va.save(model, tmp_path / "file")
    _, tensors = files.read(tmp_path / "file")
    assert "adapter.blocks.0.adapter_mlp.down.weight" in tensors
    assert "adapter.blocks.1.adapter_mlp.down.weight" not in tensors


def test_ranks_come_from_the_tensors(tmp_path, saved):
    """As after MiMi's pruning: another rank in one block than the fields say."""

    def prune(tensors):
        for part, dim in (("down.weight", 0), ("down.bias", 0), ("up.weight", 1)):
            name = f"adapter.blocks.1.adapter_mlp.{part}"
            tensors[name] = tensors[name].narrow(dim, 0, 2).contiguous()
        return tensors

    model = va.load(make(), rewrite(saved, tmp_path / "file", change_tensors=prune))
    assert [block.adapter_mlp.down.weight.shape[0] for block in model.blocks] == [3, 2]
    assert model(images(model)).shape == (2, 5)


def test_trying_a_file_copies_no_weights():
    model = make()
    skeleton = files._skeleton(model)
    assert skeleton.state_dict().keys() == model.state_dict().keys()
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


# Backbones that are the same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_backbones_match(tmp_path, architecture, dtype):
    model = trained(architecture)
    va.save(model, tmp_path / "file")
    x = images(model)
    low = va.load(make(architecture).to(dtype), tmp_path / "file")
    assert {tensor.dtype for tensor in head_tensors(low).values()} == {dtype}
    assert {p.dtype for name, p in low.named_parameters() if ".adapter_" in name} == {torch.float32}
    torch.testing.assert_close(low(x.to(dtype)).float(), model(x), rtol=0.1, atol=0.2)
    va.load(make(architecture).to(dtype).float(), tmp_path / "file")


def test_a_backbone_that_differs_a_little_is_another_one(saved):
    noisy, shifted = make(), make()
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + 1e-3 * torch.randn_like(p))
        shifted.blocks[0].mlp.fc1.weight[1, 1] += 0.05
    for other in (noisy, shifted):
        assert_refused(saved, "is another one: the weights of", other)


def test_overwriting_keeps_the_permissions_and_follows_a_link(tmp_path):
    target, link = tmp_path / "file", tmp_path / "link"
    va.save(trained(), target)
    target.chmod(0o600)
    link.symlink_to(target)
    va.save(trained(), link)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o600


def test_a_file_saved_from_half_precision(tmp_path):
    model = trained().half()
    va.save(model, tmp_path / "file")
    assert torch.equal(va.load(make(), tmp_path / "file").head.weight, model.head.weight.float())
    va.load(make().bfloat16(), tmp_path / "file")


def test_a_resized_position_embedding_matches(tmp_path, saved):
    larger = make()
    larger.set_input_size(img_size=(48, 64))
    assert va.load(larger, saved)(torch.randn(2, 3, 48, 64)).shape == (2, 5)


@pytest.mark.parametrize(("architecture", "size"), [("beit", {}), ("swin", {"window_size": 8})])
def test_a_resized_relative_position_bias_matches(tmp_path, architecture, size):
    va.save(trained(architecture, va.Adapter(rank=3)), tmp_path / "file")
    larger = make(architecture, img_size=64, **size)
    shapes = {name: tensor.shape for name, tensor in larger.state_dict().items()}
    same = {name: tensor for name, tensor in make(architecture).state_dict().items() if tensor.shape == shapes[name]}
    assert all("relative_position_" in name for name in shapes.keys() - same.keys())
    assert len(same) < len(shapes)
    larger.load_state_dict(same, strict=False)
    assert va.load(larger, tmp_path / "file")(images(larger)).shape == (2, 5)


def test_overrides_do_not_change_which_backbone_it_is(tmp_path):
    model = trained(method=va.FullFineTune())
    va.save(model, tmp_path / "full")
    va.load(make(), tmp_path / "full")
    other = make()
    other.load_state_dict({name: t for name, t in model.state_dict().items() if "head" not in name}, strict=False)
    assert_refused(tmp_path / "full", "is another one: the weights of", other)


def test_onto_the_device_of_the_model(saved, plain_device):
    model = va.load(make().to(plain_device), saved)
    assert {p.device.type for p in model.parameters()} == {plain_device}
    model(images(model).to(plain_device))


# Refusals


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make("dinov2"), "this model (vit_small_patch14_dinov2"),
        (lambda: make(depth=1), "it lacks the tensor blocks.1."),
        (lambda: make(depth=3), "it has the additional tensor blocks.2."),
        (lambda: make(embed_dim=32), "has shape [32] instead of [48]"),
    ],
)
def test_another_architecture(saved, other, message):
    assert_refused(saved, "wants the backbone vit_tiny_patch16_224.augreg", other())
    assert_refused(saved, message, other())


@pytest.mark.parametrize("change", [0.1, -0.01])
def test_other_weights(saved, change):
    other = make()
    with torch.no_grad():
        other.blocks[1].mlp.fc2.weight.mul_(1 + change)
    assert_refused(saved, "the weights of 1 of its 29 tensors differ, the first is blocks.1.mlp.fc2.weight", other)


def test_a_permuted_weight_is_another_one(saved):
    other = make()
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.copy_(other.blocks[0].attn.qkv.weight.flip(0))
    assert_refused(saved, "blocks.0.attn.qkv.weight", other)


def test_an_attached_model(saved):
    model = va.attach(make(), va.Adapter(rank=7))
    with pytest.raises(ValueError, match=r"^Adapter\(rank=7, .* is already attached to this model: detach"):
        va.load(model, saved)
    va.detach(model)


def test_a_model_that_is_none(saved):
    with pytest.raises(ValueError, match="this Linear has no get_classifier"):
        va.load(torch.nn.Linear(3, 3), saved)


@pytest.mark.parametrize("content", [b"", b"\x00", b"hello, world, this is text", b"\xff\xd8\xff\xe0" + bytes(5000)])
def test_not_a_safetensors_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert_refused(tmp_path / "file", "is not a safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file(tmp_path, metadata):
    safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "file", metadata)
    assert_refused(tmp_path / "file", "is a safetensors file of another program")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        va.load(make(), tmp_path / "nowhere")


def without(key):
    return lambda mapping: {k: v for k, v in mapping.items() if k != key}


HEAD, DOWN = "head.head.weight", "adapter.blocks.0.adapter_mlp.down.weight"


@pytest.mark.parametrize(
    ("change_metadata", "change_tensors", "message"),
    [
        (
            lambda m: m | {"format": 3, "method": None},
            None,
            "has format 3, this version of vitadapter_ext reads up to 2",
        ),
        (lambda m: m | {"method": "adaptr"}, None, "did you mean 'adapter'"),
        (lambda m: m | {"fields": {"rank": "eight"}}, None, "rank is 'eight'"),
        (lambda m: m | {"fields": {"init": ["a"]}}, None, "holds a method that this version does not know"),
        (lambda m: m | {"fields": {"width": 3}}, None, "unknown field of method 'adapter' 'width'"),
        (
            lambda m: m | {"num_classes": 6},
            None,
            "is damaged: it speaks of 6 classes, but its head has others",
        ),
        (lambda m: m | {"num_classes": -1}, None, "is damaged: it speaks of -1 classes"),
        (lambda m: m | {"fields": {"rank": 10**30}}, without(DOWN), "does not fit"),
        (lambda m: m | {"num_classes": 10**30}, None, "is damaged: it speaks of 10"),
        (lambda m: m | {"fingerprint": {}}, None, "it has the additional tensor"),
        (lambda m: m | {"fingerprint": {"norm.weight": {"shape": 3}}}, None, "is damaged"),
        (lambda m: m | {"class_names": 3}, None, "is damaged"),
        (lambda m: [m], None, "is damaged"),
        (without("format"), None, "is damaged"),
        (without("fields"), None, "is damaged"),
        (None, without(HEAD), f"is damaged: it lacks the tensor {HEAD}"),
        (None, without(DOWN), f"is damaged: it lacks the tensor {DOWN}"),
        (None, without("override.norm.weight"), "it lacks the tensor override.norm.weight"),
        (None, lambda t: t | {"adapter.more": torch.ones(1)}, "it has the tensor adapter.more, for which"),
        (None, lambda t: t | {DOWN: torch.ones(3, 47)}, f"its {DOWN} is torch.float32 (3, 47) where (3, 48)"),
        (None, lambda t: t | {DOWN: torch.ones(0, 48)}, "does not fit this model: rank is 0"),
        (None, lambda t: t | {DOWN: torch.ones(3, 48, dtype=torch.int64)}, f"its {DOWN} is torch.int64"),
    ],
)
def test_files_that_do_not_fit(tmp_path, saved, change_metadata, change_tensors, message):
    assert_refused(rewrite(saved, tmp_path / "file", change_metadata, change_tensors), message)


def test_broken_json(tmp_path):
    for text in ("{", "[" * 100_000, "null", '{"format": 1e999}'):
        safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "file", {"vitadapter": text})
        assert_refused(tmp_path / "file", "is damaged: its 'vitadapter' metadata cannot be read")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_file(saved, data):
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # As often within the header as within the tensors.
    length = data.draw(st.integers(0, header) | st.integers(header, len(whole) - 1))
    cut = saved.with_name("cut")
    cut.write_bytes(whole[:length])
    with pytest.raises(ValueError) as error:
        files.read(cut)
    assert ("is truncated" if length >= 9 else "is not a safetensors file") in str(error.value)


FRESH = make()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_loads_other_numbers(saved, data):
    """Bits flip: never anything but a ValueError."""
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(content)
    try:
        va.detach(va.load(FRESH, damaged))
    except ValueError as error:
        assert str(damaged) in str(error)


# Writing


def test_only_an_attached_model_is_saved(tmp_path):
    with pytest.raises(ValueError, match="no method is attached"):
        va.save(make(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_class_names_of_another_number(tmp_path):
    with pytest.raises(ValueError, match="there are 3 class names, but the head has 5 classes"):
        va.save(trained(), tmp_path / "file", class_names=list("abc"))


def test_metadata_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="must hold what JSON can"):
        va.save(trained(), tmp_path / "file", data_config={"mean": torch.ones(3)})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """In a process of its own that may not write files above 8 kB, which fails as a full disk does: in write()."""
    path = tmp_path / "file"
    va.save(trained(num_classes=2), path)
    old = path.read_bytes()
    assert len(old) > 8_000
    code = (
        "import resource, signal, sys, vitadapter_ext as va; from tests.test_files import trained\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = trained()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))\n"
        "try: va.save(model, sys.argv[1])\n"
        "except OSError as error: assert sys.argv[1] in str(error) and 'File too large' in str(error), error\n"
        "else: sys.exit('saved')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=environment)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
