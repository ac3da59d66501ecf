"""Does the command line behave? Help, bad input, Ctrl-C, recipes, and a saved file in a new process."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import vitadapter_ext as va
from tests.pictures import red_and_blue
from vitadapter_ext import cli
from vitadapter_ext.methods import METHODS
from vitadapter_ext.train import Config, configure
from vitadapter_ext.train.__main__ import main
from vitadapter_ext.train.backbone import create
from vitadapter_ext.train.config import field_hints, on_top
from vitadapter_ext.train.recipes import RECIPES

TRAIN = [sys.executable, "-m", "vitadapter_ext.train"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"), 12)


@pytest.fixture
def command(capsys):
    """Runs the command in this process; returns exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(main, [str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_help_reads_well_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, ["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    names = {*field_hints(Config), *(name for kind in METHODS.values() for name in field_hints(kind))}
    flags, recipes = out.split("\nrecipes:")
    for name in names:
        flag = name.replace("_", "-")
        lines = [line for line in flags.splitlines() if line.startswith((f"  --{flag} ", f"  --[no-]{flag} "))]
        assert len(lines) == 1 and not lines[0].rstrip().endswith(flag), name
    assert all(f"\n  {name}\n" in recipes for name in RECIPES)
    assert "\n  --show [FILE] " in flags


def test_no_option_of_a_method_hides_one_of_the_run():
    for kind in METHODS.values():
        assert not set(field_hints(kind)) & set(field_hints(Config))


BAD = {
    "--rnk 3": "did you mean --rank?",
    "stray": "unknown argument 'stray'",
    "--rank": "expected one argument",
    "--rank 0": "rank is 0",
    "--rank -1": "rank is -1",
    "--rank 2.5": "--rank takes a whole number, got '2.5'",
    "--rank eight": "--rank takes a whole number, got 'eight'",
    "--method adaptor": "did you mean 'adapter'?",
    "--method consolidator --groups 0": "groups are (0,); each must be a whole number of at least 1",
    "--method consolidator --groups 64,x": "groups are ('64', 'x'); each must be a whole number of at least 1",
    "--method consolidator --groups 48": "48 groups do not fit 128 inputs and 384 outputs: they must divide both",
    "--method consolidator --targets fc1,fc3": "unknown target 'fc3': did you mean 'fc2'?",
    "--method consolidator --in-weight --drop-path 0.5": "in_weight is True and drop_path",
    "--placement pots": "did you mean 'post'?",
    "--method mimi --prune 1": "prune is 1.0; it must be a share between 0 and 1",
    "--method mimi --phases 0": "phases is 0; it must be a whole number of at least 1",
    "--method mimi --epochs 3": "--epochs is too small: 4 phases need as many epochs or more, got 3",
    "--method mimi --min-total 385": "min_total is 385, but this model starts with 384 neurons",
    "--method mimi --sigma 129": "sigma is 129, which leaves blocks.0 no neuron: it must be 128 or less",
    "--method mimi --score best": "unknown score 'best'",
    "--method arc --positions atn": "unknown position 'atn': did you mean 'attn'?",
    "--method arc --positions mlp,mlp": "positions are ('mlp', 'mlp'); they must be attn, mlp or both",
    "--method arc --rescale-init xavier": "unknown rescale_init 'xavier'",
    "--head-init ones": "unknown head_init 'ones': known: timm, zero",
    "--method linear-probe --rank 4": "--rank is an option of the method adapter and arc, not of linear-probe",
    "--model vit_tiny_patch16_242": "did you mean 'vit_tiny_patch16_224'?",
    "--model test_vit.r16_in1k": "did you mean 'test_vit.r160_in1k'?",
    "--recipe adapter_plus": "did you mean 'adapter-plus'?",
    "--weights some.pth": "--weights needs --model",
    "--pretrained": "--pretrained needs --model",
    "--model test_vit --pretrained --weights x.pth": "exclude each other",
    "--model test_vit --weights nowhere.pth": "the weights file nowhere.pth does not exist",
    "--model test_vit --weights weights.txt": "takes a .npz, .safetensors or .pth file",
    "--data nowhere": "the data folder nowhere does not exist",
    "--epochs 0": "--epochs must be at least 1",
    "--batch-size 0": "--batch-size must be at least 1",
    "--lr 0": "--lr must be a positive number",
    "--clip-grad -1": "--clip-grad must be a positive number",
    "--mixup -1": "--mixup must be 0 or more",
    "--random-erasing 1.5": "--random-erasing must be from 0 to 1",
    "--min-lr 0.1": "--min-lr must be from 0 to the highest learning rate, 0.005, got 0.1",
    "--warmup-lr -1": "--warmup-lr must be from 0 to the highest learning rate, 0.005, got -1",
    "--grad-accum 0": "--grad-accum must be at least 1",
    "--lr-base-size 0": "--lr-base-size must be at least 1",
    "--train-split foo": "--train-split is for timm's data sets",
    "--test-split foo": "--test-split is for timm's data sets",
    "--mixup 0.8 --batch-size 1": "--batch-size must be at least 2",
    "--rank 300000000": "the memory of cpu is too small",
    "--select first": "unknown select 'first': known: best, last",
    "--select last --patience 3": "--patience ends at the best epoch, and --select last takes none",
    "--grid lr": "--grid takes settings and their values",
    "--grid lr=1e-3,high": "--lr takes a number, got 'high'",
    "--grid seed=1,2": "unknown setting of --grid 'seed'",
    "--label-smoothing 1": "--label-smoothing must be at least 0 and below 1",
    "--amp fp8": "known: bf16, fp16, none",
    "--amp fp16 --device cpu": "--amp fp16 needs a CUDA device",
    "--augmentation flip": "unknown augmentation",
    "--device gpu": "unknown device 'gpu'",
    "--device meta": "unknown device 'meta'",
    "--device cuda:99": "the device 'cuda:99' is not there",
    "--optimizer adamx": "unknown optimizer 'adamx': did you mean 'adamax'?",
    "--optimizer adahessian": "needs second derivatives",
    "--weight-decay 1e999": "--weight-decay must be 0 or more, got inf",
    "--data None": "the data folder None does not exist",
    "--data=": "--data must be a name, not an empty word",
    "--seed -1": "--seed must be from 0",
    "--show picture.jpg": "--show takes a .png, .svg or .pdf file, got 'picture.jpg'",
    "--show picture": "--show takes a .png, .svg or .pdf file, got 'picture'",
    "--show=": "--show takes a .png, .svg or .pdf file, got ''",
    "--show nowhere/picture.png": "nowhere/picture.png: No such file or directory",
    "--show --rank 0": "rank is 0",
    "--show --data nowhere": "the data folder nowhere does not exist",
    "--show --model vit_tiny_patch16_242": "did you mean 'vit_tiny_patch16_224'?",
    "--show --model swinv2_tiny_window8_256": "SwinTransformerV2Block",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(command, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*argv.split())
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[argv] in err
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert not list(tmp_path.glob("runs/*"))


def test_settings_from_python_are_checked_like_flags(tmp_path):
    assert configure(data=tmp_path / "pictures", out=tmp_path).data == str(tmp_path / "pictures")
    with pytest.raises(ValueError, match="--epochs takes a whole number, got 1.5"):
        configure(epochs=1.5)
    with pytest.raises(ValueError, match="--rank takes a whole number, got True"):
        configure(rank=True)
    assert Config.from_yaml(configure(data=tmp_path, lr=1).to_yaml()) == configure(data=str(tmp_path), lr=1.0)


def test_a_refused_run_leaves_no_folder_behind(command, tmp_path):
    assert command("--data", tmp_path / "nowhere", "--out", tmp_path / "pa" / "rent" / "run")[0] == 2
    assert not list(tmp_path.iterdir())


def test_a_traceback_only_when_asked_for(tmp_path):
    plain, asked = (
        subprocess.run([*TRAIN, "--data", "nowhere", *more], cwd=tmp_path, capture_output=True, text=True)
        for more in ([], ["--traceback"])
    )
    assert plain.returncode == asked.returncode == 2
    assert plain.stderr == "error: the data folder nowhere does not exist\n"
    assert "Traceback (most recent call last)" in asked.stderr and asked.stderr.endswith(plain.stderr)


def weights_file(path: Path, **arguments) -> Path:
    torch.manual_seed(7)
    state = timm.create_model("test_vit", **arguments).state_dict()
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("classes", [0, 5, 1000])
def test_weights_from_a_file(tmp_path, suffix, classes):
    path = weights_file(tmp_path / f"w{suffix}", num_classes=classes)
    backbone = create(configure(model="test_vit", weights=str(path), backbone_drop_path=0.1))
    torch.manual_seed(7)
    wanted = timm.create_model("test_vit", num_classes=classes).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in backbone.model.state_dict().items())
    assert backbone.origin["weights"]["file"] == path.name and len(backbone.origin["weights"]["sha256"]) == 64
    found = {}
    exec("\n".join(backbone.code), found)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found["model"].state_dict().items())


class Harm:
    """What a pickle could run."""

    def __reduce__(self):
        return (Path("/tmp/vitadapter-harm").touch, ())


def test_weights_that_do_not_fit(command, pictures, tmp_path):
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    torch.save({"weight": Harm()}, tmp_path / "harm.pth")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    (tmp_path / "junk.pth").write_bytes(b"no weights")
    (tmp_path / "junk.safetensors").write_bytes(b"no weights")
    for path in sorted(tmp_path.iterdir()):
        code, _, err = command("--model", "test_vit", "--data", pictures, "--weights", path, "--out", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1
        assert f"{path} is not a file of weights for test_vit" in err
    assert not (tmp_path / "run").exists() and not Path("/tmp/vitadapter-harm").exists()


def test_google_weights_of_another_depth_are_refused(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    arrays = as_google(model)
    np.savez(tmp_path / "fits.npz", **arrays)
    backbone = create(configure(model="test_vit", weights=str(tmp_path / "fits.npz")))
    wanted = model.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    last = f"Transformer/encoderblock_{len(model.blocks) - 1}/"
    more = {key.replace(last, "Transformer/encoderblock_99/"): array for key, array in arrays.items() if last in key}
    np.savez(tmp_path / "deeper.npz", **arrays, **more)
    with pytest.raises(ValueError, match=f"it has {len(model.blocks) + 1} blocks and the model {len(model.blocks)}"):
        create(configure(model="test_vit", weights=str(tmp_path / "deeper.npz")))


def as_google(model) -> dict[str, np.ndarray]:
    """A plain ViT's tensors under the names and in the layouts of Google's .npz files."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        heads, dim = block.attn.num_heads, block.attn.proj.in_features
        attention = theirs + "MultiHeadDotProductAttention_1/"
        qkv = zip(
            ("query", "key", "value"),
            np.split(state[ours + "attn.qkv.weight"], 3),
            np.split(state[ours + "attn.qkv.bias"], 3),
            strict=True,
        )
        for name, weight, bias in qkv:
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(dim, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for number, name in enumerate(("mlp.fc1", "mlp.fc2")):
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}{name}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}{name}.bias"]
        for number, name in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{name}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{name}.bias"]
    return arrays


def test_an_output_folder_that_cannot_be_used(command, pictures, tmp_path):
    start = ["--model", "test_vit", "--data", pictures, "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    code, _, err = command(*start, tmp_path / "full")
    assert code == 2 and "exists and is not empty" in err
    code, _, err = command(*start, tmp_path / "full" / "something")
    assert code == 2 and "exists and is not a folder" in err
    code, out, err = command(*start, tmp_path / "full" / "something" / "run")
    assert code == 2 and "Not a directory" in err and err.count("\n") == 1
    assert out == ""  # before anything else


@pytest.mark.parametrize("for_good", [True, False])
def test_a_full_disk_is_one_sentence_and_loses_nothing(command, pictures, tmp_path, monkeypatch, for_good):
    calls = []

    def fsync(handle):
        calls.append(handle)
        # Written by now: config.yaml, and the first epoch's metrics and checkpoint. The fifth is the second checkpoint.
        if len(calls) > 3 if for_good else len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "run"
    code, _, err = command("--model", "test_vit", "--data", pictures, "--epochs", 3, "--out", out)
    assert code == 2 and err.endswith(": No space left on device\n") and err.count("\n") == 1
    assert torch.load(out / "last.ckpt", weights_only=True)["epoch"] == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert (out / "adapter.safetensors").exists() is not for_good
    if not for_good:
        assert json.loads((out / "summary.json").read_text())["status"] == "failed"
        torch.manual_seed(0)
        va.load(timm.create_model("test_vit"), out / "adapter.safetensors")


def test_an_image_that_vanishes_while_training_is_named_and_loses_nothing(command, pictures, tmp_path, monkeypatch):
    from vitadapter_ext.train.loop import Trainer

    choose = Trainer._choose

    def then_delete(self, row):
        choose(self, row)
        for path, _ in self.train.dataset.dataset.samples[:1]:
            path.unlink(missing_ok=True)

    monkeypatch.setattr(Trainer, "_choose", then_delete)
    for workers in (0, 1):
        out = tmp_path / f"run{workers}"
        copy = shutil.copytree(pictures, tmp_path / f"pictures{workers}")
        code, _, err = command(
            "--model", "test_vit", "--data", copy, "--epochs", 3, "--out", out, "--workers", workers
        )  # fmt: skip
        assert code == 2 and "cannot be read any more" in err and err.count("\n") == 1 and "Traceback" not in err
        assert (out / "adapter.safetensors").exists()


FRESH = """
import sys, timm, torch, vitadapter_ext as va
from vitadapter_ext.files import read
_, weights, adapter, images, logits = sys.argv
arguments = read(adapter)[0]["backbone"]["arguments"]
model = timm.create_model("test_vit", **arguments)
model.load_state_dict(torch.load(weights, weights_only=True))
va.load(model, adapter).eval()
with torch.no_grad():
    torch.save(model(torch.load(images)), logits)
"""


def test_a_folder_of_jpegs_and_the_saved_file_in_a_new_process(pictures, tmp_path):
    weights, out = weights_file(tmp_path / "w.pth"), tmp_path / "run"
    argv = [*TRAIN, "--model", "test_vit", "--weights", str(weights), "--data", str(pictures), "--out", str(out)]
    done = subprocess.run([*argv, "--epochs", "2", "--rank", "4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("data") and "2 classes; 16 train, 4 val, 4 test images" in lines[1]
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert lines[-1].endswith(f"vitadapter_ext.load(model, '{out}/adapter.safetensors').eval()")

    images = torch.rand(3, 3, 160, 160)
    torch.save(images, tmp_path / "images.pt")
    files = [weights, out / "adapter.safetensors", tmp_path / "images.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, files)], cwd=tmp_path, check=True)
    model = timm.create_model("test_vit")
    model.load_state_dict(torch.load(weights, weights_only=True))
    va.load(model, out / "adapter.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(model(images), torch.load(tmp_path / "logits.pt"))
    # The trained model itself: what the last checkpoint calls best, on the same backbone.
    best = torch.load(out / "last.ckpt", weights_only=True)["best"]["state"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in best.items())


def test_ctrl_c_saves_what_is_trained_so_far(pictures, tmp_path):
    out = tmp_path / "run"
    argv = [*TRAIN, "--model", "test_vit", "--data", pictures, "--epochs", "9999", "--out", out]
    process = subprocess.Popen(
        list(map(str, argv)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background may ignore it, which a process inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not (out / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "stopped by Ctrl-C\n"
    assert str(out / "adapter.safetensors") in stdout
    found = json.loads((out / "summary.json").read_text())
    assert found["status"] == "interrupted" and "test_accuracy" not in found
    assert (out / "metrics.csv").read_text().count("\n") == found["epochs"] + 1
    torch.manual_seed(0)
    va.load(timm.create_model("test_vit"), out / "adapter.safetensors")


def test_unreadable_images_are_left_out_and_named(command, pictures, tmp_path):
    for path in sorted(pictures.rglob("*.jpg")):
        target = tmp_path / "data" / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    whole = (tmp_path / "data" / "red" / "3.jpg").read_bytes()
    (tmp_path / "data" / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    start = ["--model", "test_vit", "--data", tmp_path / "data", "--epochs", 1, "--out", tmp_path / "run"]
    code, out, err = command(*start)
    assert (code, err) == (0, "")
    assert "1 of 25 images" in out and "red/cut.jpg" in out
    (tmp_path / "data" / "red" / "empty.jpg").touch()
    code, _, err = command(*start[:-1], tmp_path / "second")
    assert code == 2 and "2 of 26 images" in err and "more than 5%" in err


def test_show_draws_and_trains_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--show", "--rank", 4)
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["attached.png"]
    assert (tmp_path / "attached.png").read_bytes().startswith(b"\x89PNG")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("data digits: 10 classes")
    assert "blocks.5 adapter_mlp 4 1,284 0 199,556" in lines
    assert lines[-1] == "picture attached.png"
    assert not any(line.startswith("epoch") for line in lines)


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")], ids=["png", "svg", "pdf"]
)
def test_show_counts_classes_and_reads_no_weights(command, pictures, tmp_path, monkeypatch, suffix, start):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(b"what was there before")
    out = tmp_path / "run"
    options = ("--model", "test_vit.r160_in1k", "--pretrained", "--data", pictures, "--out", out)
    code, stdout, err = command(*options, "--show", path, "--method", "bitfit")
    assert (code, err) == (0, "")
    assert path.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [path]
    head = timm.create_model("test_vit", num_classes=2).head
    (row,) = (line.split() for line in stdout.splitlines() if line.startswith("head ") and "%" not in line)
    assert row == ["head", "0", "0", str(sum(p.numel() for p in head.parameters()))]


def test_show_leaves_what_it_cannot_replace(command, tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    code, _, err = command("--show", folder)
    assert code == 2 and err == f"error: {folder}: Is a directory\n"
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())


def test_command_line_over_recipe_over_defaults():
    config = configure(recipe="adapter-plus", rank="16", lr="2e-3", data="pets")
    assert (config.method.rank, config.method.drop_path, config.lr, config.epochs) == (16, 0.1, 2e-3, 100)
    assert (config.model, config.pretrained) == ("vit_base_patch16_224.orig_in21k", True)
    own = configure(recipe="adapter-plus", model="vit_small_patch16_224")
    assert (own.model, own.pretrained) == ("vit_small_patch16_224", False)
    file = configure(recipe="adapter-plus", weights="w.npz")
    assert (file.model, file.weights, file.pretrained) == ("vit_base_patch16_224.orig_in21k", "w.npz", False)
    probe = configure(recipe="adapter-plus", method="linear-probe")
    assert probe.method == va.LinearProbe() and probe.epochs == 100
    assert configure().recipe == "embedded" and configure(model="test_vit").recipe == "general"
    assert configure(model="test_vit", scale="0.5").method.scale == 0.5
    assert configure(model="test_vit", scale="scalar").method.scale == "scalar"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_whole_and_survive_yaml(recipe, method):
    config = configure(recipe=recipe, method=method)
    assert Config.from_yaml(config.to_yaml()) == config
    if method == RECIPES[recipe].method:
        assert RECIPES[recipe].options.items() <= dataclasses.asdict(config.method).items()
    assert RECIPES[recipe].description and RECIPES[recipe].source


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if name != "embedded"])
def test_recipes_run(command, pictures, tmp_path, recipe):
    out = tmp_path / "run"
    small = {"consolidator": ("--groups", 32), "mimi": ("--epochs", 4)}.get(RECIPES[recipe].method, ())
    code, stdout, err = command(
        *("--recipe", recipe, "--model", "test_vit", "--data", pictures, "--epochs", 1, "--out", out, *small)
    )
    assert (code, err) == (0, "")
    assert f"recipe: {recipe}\n" in (out / "config.yaml").read_text()


FILES = {
    "rnk: 3": "unknown setting 'rnk' in run.yaml: did you mean 'rank'?",
    "learning_rate: 3": "unknown setting 'learning_rate' in run.yaml",
    "{": "run.yaml is not YAML",
    "- lr": "run.yaml must hold settings such as 'lr: 0.01'",
    "": "run.yaml must hold settings such as 'lr: 0.01'",
    "method: {rank: 4}": "and a method its name",
    "lr: 1\nepochs: [": "run.yaml is not YAML: expected the node content, but found '<stream end>' in line 2",
    "lr: \x01": "run.yaml is not YAML: unacceptable character",
    "lr: high": "--lr takes a number, got 'high'",
    "epochs: [1, 2]": "--epochs takes a whole number, got [1, 2]",
    "method: arc\nplacement: post": "--placement is an option of the method adapter, not of arc",
    "!!python/object/apply:os.mkdir [harm]": "run.yaml is not YAML",
    "\xff": "run.yaml is no text",
    "suite: vtab": "unknown suite 'vtab'",
    "suite: [vtab]": "run.yaml must hold a name for suite, got ['vtab']",
    "dataset: 5": "run.yaml must hold a name for dataset, got 5",
    "recipe: [x]": "run.yaml must hold a name for recipe",
    "method: [arc]": "run.yaml must hold a name for method",
    "grid: {1: [2]}": "unknown setting of --grid '1'",
    "lr: 1\nepochs: 2\nlr: 2": "run.yaml is not YAML: found 'lr' for the second time in line 3",
    "method: {name: arc, rank: 1, rank: 2}": "run.yaml is not YAML: found 'rank' for the second time in line 1",
    "grid: {lr: [1], lr: [2]}": "run.yaml is not YAML: found 'lr' for the second time in line 1",
    "lr: 1\nmethod: {name: arc, lr: 2}": "run.yaml has two values for lr",
    "batch-size: 3\nbatch_size: 4": "run.yaml has two values for batch_size",
}


@pytest.mark.parametrize("text", FILES)
def test_a_config_file_that_cannot_be_used(command, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(text.encode("latin-1"))
    code, _, err = command("--config", "run.yaml")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and FILES[text] in err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert command("--config", "nowhere.yaml")[2] == "error: nowhere.yaml: No such file or directory\n"


def test_the_command_line_stands_over_a_file_and_a_file_over_the_recipe(command, pictures, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"data: {pictures}\nmodel: test_vit\nrecipe: arc-vtab\nmethod: arc\nrank: 3\n"
        "epochs: 1\nbatch-size: 7\nlr: 2e-3\n"
    )
    assert command("--config", file, "--lr", "5e-3", "--out", tmp_path / "run")[0] == 0
    config = Config.from_yaml((tmp_path / "run" / "config.yaml").read_text())
    assert (config.lr, config.batch_size, config.method.rank) == (5e-3, 7, 3)
    assert (config.clip_grad, config.head_init, config.method.dropout) == (1.0, "zero", 0.1)  # the recipe's
    # Options of a recipe's method in the file stay with it.
    file.write_text(file.read_text().replace("method: arc\n", ""))
    assert command("--config", file, "--method", "arc", "--out", tmp_path / "same")[0] == 0
    assert Config.from_yaml((tmp_path / "same" / "config.yaml").read_text()).method.rank == 3
    code, _, err = command("--config", file, "--recipe", "arc-fgvc")
    assert code == 2 and "cannot go under the settings of a file that has the recipe arc-vtab" in err
    # Another method takes none of the file's options along.
    assert command("--config", file, "--method", "adapter", "--out", tmp_path / "other")[0] == 0
    config = Config.from_yaml((tmp_path / "other" / "config.yaml").read_text())
    assert config.method == va.Adapter() and config.batch_size == 7


def test_what_a_run_resolved_runs_again_as_it_is(command, pictures, tmp_path):
    flags = ("--model", "test_vit", "--data", pictures, "--epochs", 2, "--grid", "lr=1e-3,1e-2 rank=2,3", "--retrain")
    assert command(*flags, "--mixup", 0.5, "--random-erasing", 0.3, "--out", tmp_path / "first")[0] == 0
    assert command("--config", tmp_path / "first" / "config.yaml", "--out", tmp_path / "second")[0] == 0
    for name in ("config.yaml", "adapter.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_policy_that_timm_lacks_is_refused_before_training(command, pictures, tmp_path):
    for policy in ("rand-q9", "best"):
        code, _, err = command(
            *("--model", "test_vit", "--data", pictures, "--auto-augment", policy, "--out", tmp_path / "run")
        )
        assert code == 2 and "--auto-augment takes a policy such as rand-m9-mstd0.5-inc1" in err and policy in err
        assert not (tmp_path / "run").exists()


def test_a_flag_for_a_suite_or_a_data_set_takes_the_place_of_the_files():
    assert on_top({"suite": "vtab1k", "lr": 1}, {"dataset": "digits"}) == {"lr": 1, "dataset": "digits"}
    assert on_top({"dataset": "digits", "lr": 1}, {"suite": "vtab1k"}) == {"lr": 1, "suite": "vtab1k"}
    assert on_top({"rank": 4}, {"method": "adapter"}) == {"rank": 4, "method": "adapter"}


def test_vtabs_protocol_is_the_default_of_its_tasks_with_every_backbone():
    for given in ({"data": "x"}, {"data": "x", "model": "test_vit"}):
        config = configure(dataset="vtab1k/dsprites_ori", **given)
        assert (config.retrain, config.select, config.augmentation, config.squash) == (True, "last", "none", True)
        assert not config.baselines
    patient = configure(dataset="vtab1k/svhn", data="x", recipe="seed-project", weights="x.npz")
    assert (patient.patience, patient.select, patient.retrain) == (10, "best", True)
    assert configure(recipe="seed-project", select="last").patience is None
    assert configure(dataset="fgvc/dogs120", data="x").retrain is False
