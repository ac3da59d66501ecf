"""Does the bundled backbone load, refuse damaged files, and come out of its own script?"""

import hashlib
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer

from vitadapter_ext import cli, embedded, pretrain


@pytest.fixture(scope="module")
def bundled() -> VisionTransformer:
    return embedded.create()


def test_bundled_files_are_small_and_match():
    data = embedded.WEIGHTS.read_bytes()
    assert len(data) <= 3_000_000
    line = embedded.checksum_path(embedded.WEIGHTS).read_text().split()
    assert line == [hashlib.sha256(data).hexdigest(), embedded.WEIGHTS.name]


def test_is_a_plain_timm_model_with_its_own_data_config(bundled):
    assert type(bundled) is VisionTransformer
    assert all(parameter.dtype == torch.float32 for parameter in bundled.parameters())
    assert not bundled.training
    config = resolve_model_data_config(bundled)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1.0
    assert config["interpolation"] == "bilinear"
    assert config["mean"] == embedded.PRETRAINED_CFG["mean"] and config["std"] == embedded.PRETRAINED_CFG["std"]
    assert bundled(torch.zeros(2, 3, 32, 32)).shape == (2, len(embedded.CLASSES))


def test_arguments_alone_build_the_same_architecture(bundled):
    timm.create_model(**embedded.ARGUMENTS).load_state_dict(bundled.state_dict())


def test_knows_glyphs_and_real_digits(bundled):
    images, labels = embedded_glyphs(500)
    mean, std = embedded.PRETRAINED_CFG["mean"][0], embedded.PRETRAINED_CFG["std"][0]
    with torch.inference_mode():
        answers = bundled(((images - mean) / std).expand(-1, 3, -1, -1)).argmax(1)
    assert (answers == labels).float().mean() > 0.6
    assert embedded.digit_accuracy(bundled, "val") > 0.7


def embedded_glyphs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    from vitadapter_ext.data.glyphs import glyphs

    return glyphs(count, torch.Generator().manual_seed(12345))


def copy_files(folder):
    weights = folder / embedded.WEIGHTS.name
    weights.write_bytes(embedded.WEIGHTS.read_bytes())
    embedded.checksum_path(weights).write_bytes(embedded.checksum_path(embedded.WEIGHTS).read_bytes())
    return weights


def test_one_changed_bit_is_refused(tmp_path):
    weights = copy_files(tmp_path)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or was replaced: its SHA-256 is"):
        embedded.create(weights=weights)


@pytest.mark.parametrize("text", ["", "not a checksum\n"])
def test_a_checksum_file_without_a_checksum_is_refused(tmp_path, text):
    weights = copy_files(tmp_path)
    embedded.checksum_path(weights).write_text(text)
    with pytest.raises(ValueError, match="damaged or was replaced"):
        embedded.create(weights=weights)


@pytest.mark.parametrize("missing", ["embedded_vit.safetensors", "embedded_vit.sha256"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path, missing):
    weights = copy_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing; 'python -m vitadapter_ext.pretrain'"):
        embedded.create(weights=weights)


def run_two_steps(folder):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "VALIDATION_GLYPHS", 31)
        result = pretrain.pretrain(folder, glyphs=8, epochs=2, batch_size=8, report=lines.append)
    return folder, result, lines


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return run_two_steps(tmp_path_factory.mktemp("pretrain") / "new")


def test_two_steps_of_pretraining_write_a_loadable_pair(two_steps):
    folder, result, lines = two_steps
    assert sorted(path.name for path in folder.iterdir()) == ["embedded_vit.safetensors", "embedded_vit.sha256"]
    assert len(lines) == 2 and "epoch 2/2" in lines[1]
    assert set(result) == {"glyph_accuracy", "digit_accuracy", "seconds"}
    embedded.create(weights=folder / "embedded_vit.safetensors")


def test_equal_seeds_write_equal_files(two_steps, tmp_path):
    run_two_steps(tmp_path)
    assert (tmp_path / "embedded_vit.sha256").read_bytes() == (two_steps[0] / "embedded_vit.sha256").read_bytes()


def test_pretraining_learns_its_first_glyphs(tmp_path):
    """The loop's loss falls well below that of guessing on a task small enough for a test."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "VALIDATION_GLYPHS", 1)
        batch = embedded_glyphs(16)
        patch.setattr(pretrain, "draw", lambda count, generator: tuple(part[:count] for part in batch))
        patch.setattr(pretrain, "_write", lambda model, weights: None)
        patch.setattr(embedded, "create", lambda pretrained=True, weights=None, create=embedded.create: create(False))
        pretrain.pretrain(tmp_path, glyphs=16 * 8, epochs=3, batch_size=16, report=lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--glyphs", "0"], "glyphs must be a positive number, got 0"),
        (["--epochs", "-1"], "epochs must be a positive number, got -1"),
        (["--lr", "1e999"], "lr must be a positive number, got inf"),
        (["--weight-decay", "-1"], "weight_decay must be 0 or a positive number, got -1.0"),
        (["--label-smoothing", "2"], "label_smoothing must be at least 0 and below 1, got 2.0"),
        (["--seed", "99999999999999999999"], "seed must be from 0 to 2^63 - 2, got 99999999999999999999"),
        (["--epochs", "many"], "--epochs takes a whole number, got 'many'"),
        (["--epoch", "3"], "unknown argument '--epoch': did you mean --epochs? --help lists what there is"),
    ],
)
def test_bad_arguments_end_with_one_sentence_and_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(pretrain.main, arguments) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named_before_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.run(pretrain.main, ["--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'folder'}: Not a directory\n"


def test_files_that_are_there_are_left_alone(tmp_path, capsys):
    (tmp_path / "embedded_vit.safetensors").write_text("mine")
    assert cli.run(pretrain.main, ["--out", str(tmp_path)]) == 2
    assert "exists: name a new folder with --out" in capsys.readouterr().err
    assert (tmp_path / "embedded_vit.safetensors").read_text() == "mine"


def test_ctrl_c_ends_with_130_and_no_file(tmp_path, monkeypatch, capsys):
    def interrupt(count, generator):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "draw", interrupt)
    assert cli.run(pretrain.main, ["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_reads_well():
    done = subprocess.run([sys.executable, "-m", "vitadapter_ext.pretrain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for words in ("--out DIR", "--glyphs", "--epochs", "--seed", "[10]"):
        assert words in done.stdout
