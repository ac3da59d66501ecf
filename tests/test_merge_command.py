"""Does an adapter file become a checkpoint that plain timm loads, or one sentence and no file?"""

import json
import runpy
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.utils.model import reparameterize_model

import vitadapter_ext as va
from tests.vits import randomise_trained
from vitadapter_ext import checkpoint, embedded, files
from vitadapter_ext.checkpoint import merge_file
from vitadapter_ext.train.backbone import recreate

ORIGIN = {"model": "test_vit", "arguments": {}, "weights": {"random": 3}}
ARC = va.Arc(rank=4)


def adapted(method=ARC, name="test_vit", seed=3, num_classes=5, **arguments):
    torch.manual_seed(seed)
    model = timm.create_model(name, **arguments).eval()
    model.reset_classifier(num_classes)
    va.attach(model, method)
    randomise_trained(model)
    return model


@pytest.fixture
def adapter(tmp_path):
    va.save(adapted(), tmp_path / "adapter.safetensors", backbone=ORIGIN, class_names=list("abcde"))
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command in this process; returns exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["merge", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_module("vitadapter_ext.merge", run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


def test_timm_loads_what_the_command_writes(command, adapter, tmp_path):
    out = tmp_path / "merged.safetensors"
    code, printed, err = command("--adapter", adapter, "--out", out)
    assert (code, err) == (0, "")
    model = timm.create_model("test_vit", num_classes=5, checkpoint_path=str(out)).eval()
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), adapted()(x), rtol=1e-4, atol=1e-5)
    assert set(safetensors.torch.load_file(out)) == set(model.state_dict())
    # What the command says in the end is Python that makes this model.
    code = "\n".join(line.strip() for line in printed.partition("In Python:\n")[2].splitlines())
    said = {}
    exec(code, said)
    assert torch.equal(said["model"](x), model(x))


def test_the_file_says_what_it_is(adapter, tmp_path):
    done = merge_file(adapter, tmp_path / "merged.safetensors")
    with safetensors.safe_open(done.path, "pt") as file:
        metadata = json.loads(file.metadata()[checkpoint.KEY])
    assert metadata == done.metadata
    assert metadata["class_names"] == list("abcde") and metadata["method"] == "arc" and metadata["backbone"] == ORIGIN
    assert metadata["data"]["input_size"] == [3, 160, 160]
    assert done.bytes == done.path.stat().st_size
    assert 0 < done.difference < 1e-5
    again = merge_file(adapter, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == done.path.read_bytes()
    with pytest.raises(ValueError, match="is a safetensors file of another program"):
        va.load(recreate(ORIGIN), done.path)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch16_dinov3",
        "eva02_small_patch14_224",
        "swin_tiny_patch4_window7_224",
    ],
)
@torch.no_grad()
def test_the_same_logits_three_ways(name, tmp_path):
    model = timm.create_model(name, num_classes=5, img_size=224).eval()
    for own, p in model.named_parameters():
        if "gamma" in own:  # LayerScale, so small in a new model that nothing in a block matters
            p.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    x = torch.randn(2, 3, 224, 224)
    va.attach(model, va.Arc(rank=50))
    randomise_trained(model)
    logits = model(x)
    with va.disabled(model):
        assert (model(x) - logits).norm() > 0.1 * logits.norm()
    origin = {"model": name, "arguments": {"img_size": 224}, "weights": {}}
    va.save(model, tmp_path / "adapter", backbone=origin)

    def close(merged):
        torch.testing.assert_close(merged, logits, rtol=0, atol=1e-4 * logits.abs().max().item())

    close(reparameterize_model(model)(x))
    close(va.merge(model)(x))
    assert torch.equal(va.unmerge(model)(x), logits)
    done = merge_file(tmp_path / "adapter", tmp_path / "merged.safetensors", tmp_path / "weights.pth")
    close(timm.create_model(name, num_classes=5, img_size=224, checkpoint_path=str(done.path)).eval()(x))


@pytest.mark.parametrize("method", [va.FullFineTune(), va.BitFit(), va.LinearProbe()])
def test_a_baseline_becomes_a_checkpoint_too(method, tmp_path):
    model = adapted(method)
    va.save(model, tmp_path / "adapter", backbone=ORIGIN)
    merge_file(tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = timm.create_model("test_vit", num_classes=5, checkpoint_path=str(tmp_path / "merged.safetensors")).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(merged(x), model(x))


# Where the backbone comes from


@pytest.mark.parametrize("method", [ARC, va.Consolidator(groups=(64, 32))], ids=["arc", "consolidator"])
def test_the_embedded_backbone(method, tmp_path):
    model = embedded.create()
    va.attach(model, method)
    randomise_trained(model)
    arguments = {key: value for key, value in embedded.ARGUMENTS.items() if key not in ("model_name", "num_classes")}
    origin = {
        "model": "vit_tiny_patch16_224",
        "arguments": arguments,
        "weights": {"bundled": "embedded_vit.safetensors"},
    }
    va.save(model, tmp_path / "adapter", backbone=origin)
    done = merge_file(tmp_path / "adapter", tmp_path / "merged.safetensors")
    x = torch.randn(2, 3, 32, 32)
    merged = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=62, checkpoint_path=str(done.path))
    torch.testing.assert_close(merged.eval()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_a_file(command, adapter, tmp_path, suffix):
    torch.manual_seed(3)
    weights = tmp_path / f"weights.{suffix}"
    state = timm.create_model("test_vit").state_dict()
    safetensors.torch.save_file(state, weights) if suffix == "safetensors" else torch.save(state, weights)
    origin = {"model": "test_vit", "arguments": {}, "weights": {"file": weights.name, "sha256": "…"}}
    va.save(adapted(), tmp_path / "adapter", backbone=origin)
    out = tmp_path / "merged.safetensors"
    code, _, err = command("--adapter", tmp_path / "adapter", "--out", out)
    assert code == 2 and f"came from the file {weights.name}: name the file with --weights" in err and not out.exists()
    assert command("--adapter", tmp_path / "adapter", "--out", out, "--weights", weights)[0] == 0
    merged = timm.create_model("test_vit", num_classes=5, checkpoint_path=str(out)).eval()
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(merged(x), adapted()(x), rtol=1e-4, atol=1e-5)


# What is refused


def refused(call, message, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert message in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_input(command, adapter, tmp_path):
    out = tmp_path / "merged.safetensors"
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    for argv, message in (
        (["--adapter", adapter], "the following arguments are required: --out"),
        (["--adapter", adapter, "--out", out, "--weigths", "x"], "did you mean --weights?"),
        (["--adapter", tmp_path / "nowhere", "--out", out], "nowhere: No such file"),
        (["--adapter", taken, "--out", out], "is not a safetensors file"),
        (["--adapter", adapter, "--out", taken], "taken.safetensors exists: name a new one"),
        (["--adapter", adapter, "--out", adapter], "exists: name a new one"),
        (["--adapter", adapter, "--out", tmp_path / "merged.pth"], "must end in .safetensors"),
        (["--adapter", adapter, "--out", tmp_path / "no" / "folder.safetensors"], "No such file or directory"),
        (["--adapter", adapter, "--out", out, "--weights", tmp_path / "w.pth"], "w.pth does not exist"),
    ):
        code, printed, err = command(*argv)
        assert code == 2 and printed == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err, (
            err
        )
    assert taken.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "taken.safetensors"]


def test_another_backbone(adapter, tmp_path):
    torch.manual_seed(4)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    out = tmp_path / "merged.safetensors"
    refused(lambda: merge_file(adapter, out, tmp_path / "other.pth"), "is another one: the weights of", tmp_path)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({**ORIGIN, "weights": {}}, "the weights of its backbone, test_vit, are of unknown origin"),
        ({**ORIGIN, "model": "tset_vit"}, "unknown model 'tset_vit'"),
        ({**ORIGIN, "model": "hf-hub:someone/something"}, "unknown model 'hf-hub:someone/something'"),
        ({**ORIGIN, "model": 3}, "does not describe its backbone"),
        ({**ORIGIN, "weights": {"pretrained": 1}}, "does not describe its backbone"),
        ({**ORIGIN, "weights": {"random": "x"}}, "does not describe its backbone"),
        ({**ORIGIN, "arguments": {"depht": 3}}, "test_vit does not take depht"),
        ({**ORIGIN, "arguments": {"checkpoint_path": "x.pth"}}, "asks for its backbone with checkpoint_path, which is"),
        ({**ORIGIN, "arguments": {"pretrained_cfg_overlay": {"url": "x"}}}, "with pretrained_cfg_overlay, which is"),
    ],
)
def test_files_that_describe_no_backbone(origin, message, tmp_path):
    va.save(adapted(), tmp_path / "adapter", backbone=origin)
    refused(lambda: merge_file(tmp_path / "adapter", tmp_path / "merged.safetensors"), message, tmp_path)


def test_images_that_the_backbone_does_not_take(tmp_path):
    file, out = tmp_path / "adapter", tmp_path / "out.safetensors"
    name, arguments = "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 1}
    origin = {"model": name, "arguments": arguments, "weights": {"random": 3}}
    model = adapted(name=name, **arguments)
    model.set_input_size((64, 64))
    va.save(model, file, backbone=origin)
    refused(lambda: merge_file(file, out), "the backbone does not take images of (3, 64, 64)", tmp_path)
    va.save(model, file, backbone=origin, data_config={"input_size": None})
    refused(lambda: merge_file(file, out), "adapter is damaged: the size of its images is None", tmp_path)


@pytest.mark.parametrize("fields", [{"positions": 3}, {"positions": []}, {"rank": "x"}, {"depth": 3}])
def test_methods_that_cannot_be_made(adapter, tmp_path, monkeypatch, fields):
    metadata, tensors = files.read(adapter)
    monkeypatch.setattr(files, "read", lambda path: ({**metadata, "fields": fields}, tensors))
    message = "adapter.safetensors holds a method that this version does not know"
    refused(lambda: merge_file(adapter, tmp_path / "out.safetensors"), message, tmp_path)


def test_a_random_backbone_leaves_the_callers_random_numbers():
    before = torch.get_rng_state()
    recreate(ORIGIN)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_with_an_activation_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    va.save(adapted(va.Adapter(rank=4)), tmp_path / "adapter", backbone=ORIGIN)
    monkeypatch.setattr(checkpoint, "recreate", None)
    refused(lambda: merge_file(tmp_path / "adapter", tmp_path / "out.safetensors"), "cannot be merged", tmp_path)


def test_logits_that_differ_are_not_written(adapter, tmp_path, monkeypatch):
    def wrong(model, keep):
        torch.nn.init.normal_(va.merge(model, keep=keep).head.bias)
        return model

    monkeypatch.setattr(checkpoint, "merge", wrong)
    refused(lambda: merge_file(adapter, tmp_path / "out.safetensors"), "the merged model's logits differ by", tmp_path)


# The command's file has the function's name


def test_importing_the_command_leaves_the_function(adapter, tmp_path):
    code = """
import runpy, sys
import vitadapter_ext.merge, vitadapter_ext as va
try:
    va.merge(3)
except ValueError as error:
    print(error)
runpy.run_module("vitadapter_ext.merge", run_name="__main__")
"""
    command = [sys.executable, "-c", code, "--adapter", adapter, "--out", tmp_path / "merged.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("model is a int; it must be a timm model\nmethod    arc, folded into test_vit\n")


def test_help(command):
    code, out, _ = command("--help")
    assert code == 0 and all(flag in out for flag in ("--adapter FILE", "--out FILE", "--weights FILE"))
    assert all(len(line) <= 80 for line in out.splitlines())
