"""How is a model trained, and what does a run leave behind? The loop on tiny tensors, and whole runs."""

import csv
import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitadapter_ext as va
from tests.pictures import red_and_blue
from tests.vits import ARCHITECTURES, make, randomise
from tests.vits import METHODS as METHODS_OF_THE_TESTS
from vitadapter_ext.files import read
from vitadapter_ext.methods import METHODS
from vitadapter_ext.sites import find_blocks
from vitadapter_ext.train import Config, baselines, configure, fit
from vitadapter_ext.train import pipeline as pipeline_module
from vitadapter_ext.train.data import evaluation_transform, loader, read_data
from vitadapter_ext.train.loop import DivergedError, Trainer, evaluate, seed_everything, trainable
from vitadapter_ext.train.run_folder import RunFolder

CPU = torch.device("cpu")
DROPPED = {
    "houlsby": {"dropout": 0.3, "drop_path": 0.3},
    "arc": {"dropout": 0.3},
    "consolidator": {"drop_path": 0.3},
    "mimi": {},
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"), 20)


def run(pictures, out, **given):
    return fit(configure(**{"model": "test_vit", "data": str(pictures), "out": str(out), "epochs": 1, **given}))


def batches(count: int = 24, size: int = 8, shuffle: bool = False) -> DataLoader:
    """Noise whose class is the sign of its first channel."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    images[:, 0] += 2.0 * labels.view(-1, 1, 1) - 1
    return DataLoader(TensorDataset(images, labels), batch_size=size, shuffle=shuffle)


def trainer(val: DataLoader | None = None, method=None, **given) -> Trainer:
    seed_everything(0)
    model = timm.create_model("test_vit", img_size=16, num_classes=2)
    settings = {"model": "test_vit", "epochs": 3, "lr": 5e-3, "warmup_epochs": 0, **given}
    config = Config(**settings, method=method or va.Adapter(rank=2))
    va.attach(model, config.method)
    return Trainer(model, batches(shuffle=True), val or batches(16), config, CPU)


class Silent:
    """A listener that only keeps what it hears, and may do something after an epoch."""

    def __init__(self, after_epoch=lambda trainer: None, after_step=lambda: None):
        self.rows, self.after_epoch, self.after_step = [], after_epoch, after_step

    def start(self, phases, steps):
        self.phases, self.steps = phases, steps

    def phase(self, number, widths):
        pass

    def step(self):
        self.after_step()

    def epoch(self, row, trainer):
        self.rows.append(row)
        self.after_epoch(trainer)


def test_training_learns_and_leaves_what_is_frozen():
    training = trainer(epochs=5)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    listener = Silent()
    training.run(listener)
    assert (listener.phases, listener.steps) == ([5], 3)
    assert listener.rows[-1]["train_loss"] < listener.rows[0]["train_loss"]
    assert max(row["val_accuracy"] for row in listener.rows) > 0.8
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trainable(training.model)), name


def test_only_what_is_trained_is_in_the_optimizer_and_vectors_do_not_decay():
    for weight_decay in (0.1, 0.0):
        training = trainer(weight_decay=weight_decay)
        groups = training.optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == len(trainable(training.model))
        for group in groups:
            assert all(group["weight_decay"] == (weight_decay if t.ndim > 1 else 0) for t in group["params"])


def test_the_rate_warms_up_and_falls_by_the_step():
    training = trainer(epochs=4, warmup_epochs=2, lr=0.01)
    rates = []
    training.run(Silent(after_step=lambda: rates.append(training.optimizer.param_groups[0]["lr"])))
    middles = [step + 0.5 for step in range(4 * 3)]
    assert rates[:6] == pytest.approx([0.01 * middle / 6 for middle in middles[:6]])
    assert rates[6:] == pytest.approx([0.005 * (1 + math.cos(math.pi * middle / 12)) for middle in middles[6:]])
    short = trainer(epochs=1, warmup_epochs=10, lr=0.01)
    used = []
    short.run(Silent(after_step=lambda: used.append(short.optimizer.param_groups[0]["lr"])))
    assert min(used) > 0 and max(used) > 0.002  # every step of a single epoch trains


def test_the_rate_starts_and_ends_where_it_is_told_to():
    training = trainer(epochs=4, warmup_epochs=2, lr=0.01, warmup_lr=1e-3, min_lr=2e-3)
    rates = []
    training.run(Silent(after_step=lambda: rates.append(training.optimizer.param_groups[0]["lr"])))
    middles = [step + 0.5 for step in range(4 * 3)]
    assert rates[:6] == pytest.approx([1e-3 + 9e-3 * middle / 6 for middle in middles[:6]])
    cosine = [2e-3 + 4e-3 * (1 + math.cos(math.pi * middle / 12)) for middle in middles[6:]]
    assert rates[6:] == pytest.approx(cosine)


def test_the_rate_is_in_proportion_to_the_images_of_a_step():
    config = Config(lr=5e-4, lr_base_size=512, batch_size=16, grad_accum=4)
    assert config.peak_lr == pytest.approx(5e-4 * 64 / 512)
    training = trainer(epochs=2, lr=0.01, lr_base_size=256, batch_size=64)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize("accum", [2, 3, 5])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_batches_of_a_step_together_are_one_large_batch(accum, clip):
    trained, rates = [], []
    for size, together in ((4, accum), (4 * accum, 1)):  # 22 images: the last step has fewer, and the last batch too
        training = trainer(epochs=2, grad_accum=together, clip_grad=clip, label_smoothing=0.1)
        training.train = batches(22, size)
        used = []
        step = training.optimizer.step
        training.optimizer.step = lambda step=step, t=training, u=used: (
            u.append(t.optimizer.param_groups[0]["lr"]),
            step(),
        )
        listener = Silent()
        training.run(listener)
        trained.append((training.model, listener.rows))
        rates.append(used)
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == 2 * math.ceil(22 / (4 * accum))
    (small, small_rows), (large, large_rows) = trained
    for name, tensor in trainable(small).items():
        torch.testing.assert_close(tensor, trainable(large)[name], rtol=1e-3, atol=2e-5, msg=name)
    for row, other in zip(small_rows, large_rows, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("count", [8, 7, 1])
def test_mixed_images_have_mixed_labels(mixup, cutmix, count):
    training = trainer(mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    labels = torch.randint(2, (count,))
    plain = labels.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).float()  # a picture says what share of each class it has
    for _ in range(20):
        images, shares = training._mixed(plain.clone(), labels)
        assert images.shape == plain.shape and shares.shape == (count, 2)
        assert shares.sum(1) == pytest.approx(torch.ones(count))
        torch.testing.assert_close(shares[:, 1], 0.05 + 0.9 * images.mean((1, 2, 3)), rtol=0, atol=1e-5)
        if count % 2:
            assert torch.equal(images[-1], plain[-1])


def test_mixing_trains_and_is_drawn_from_the_seed():
    losses = []
    for seed in (0, 0, 1):
        training = trainer(epochs=3, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
        seed_everything(seed)
        listener = Silent()
        training.run(listener)
        losses.append([row["train_loss"] for row in listener.rows])
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("method", ["houlsby", "arc", "mimi", "consolidator"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activation_checkpointing_changes_no_gradient(architecture, method):
    blocks, gradients = list(find_blocks(make(architecture))), []
    for checkpointing in (False, True):
        seed_everything(1)
        model = va.attach(make(architecture), replace(METHODS_OF_THE_TESTS[method], **DROPPED[method])).train()
        randomise(trainable(model).values())
        model.set_grad_checkpointing(checkpointing)
        size = ARCHITECTURES[architecture][1]["img_size"]
        calls = []
        for name in blocks:
            model.get_submodule(name).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        # What is dropped is drawn again in the backward pass.
        nn.functional.cross_entropy(model(torch.randn(4, 3, size, size)), torch.tensor([0, 1, 2, 0])).backward()
        assert len(calls) == (2 if checkpointing else 1) * len(blocks)
        gradients.append({name: tensor.grad for name, tensor in trainable(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_a_compiled_training_is_the_same_training():
    trained = []
    for compiled in (False, True):
        seed_everything(0)
        model = timm.create_model("test_vit", img_size=16, num_classes=2, depth=1)
        config = Config(
            model="test_vit", epochs=2, lr=5e-3, warmup_epochs=0, compile=compiled, method=va.Adapter(rank=2)
        )
        training = Trainer(va.attach(model, config.method), batches(), batches(16), config, CPU)
        assert (training.network is model) != compiled
        listener = Silent()
        training.run(listener)
        assert set(trainable(model)) == set(training.best.state)
        trained.append((model, listener.rows))
    for name, tensor in trainable(trained[0][0]).items():
        torch.testing.assert_close(trainable(trained[1][0])[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert trained[0][1][-1]["val_loss"] == pytest.approx(trained[1][1][-1]["val_loss"], rel=1e-4)


def test_the_best_validation_epoch_is_put_back_and_ties_go_to_the_lower_loss():
    training = trainer(epochs=6, lr=0.05)
    states = []

    def keep(trainer):
        states.append({name: tensor.detach().clone() for name, tensor in trainable(trainer.model).items()})

    listener = Silent(keep)
    training.run(listener)
    best = max(range(6), key=lambda index: (listener.rows[index]["val_accuracy"], -listener.rows[index]["val_loss"]))
    assert training.best.epoch == best + 1
    for name, tensor in trainable(training.model).items():
        assert torch.equal(tensor, states[best][name])
    assert evaluate(training.model, training.val, CPU)[1] == training.best.val_accuracy


def test_patience_stops_early():
    training = trainer(epochs=30, patience=2, lr=1e-12)  # nothing changes, so the first epoch stays the best
    listener = Silent()
    training.run(listener)
    assert len(listener.rows) - training.best.epoch == 2 and len(listener.rows) < 30


def test_clipping_bounds_the_gradient():
    training = trainer(epochs=1, clip_grad=1e-3)
    training.run(Silent())
    norm = torch.stack([tensor.grad.norm() for tensor in trainable(training.model).values()]).norm()
    assert norm <= 1.001e-3


def test_a_loss_that_is_no_number_stops_and_the_best_epoch_is_kept():
    training = trainer(epochs=5)

    def spoil(trainer):
        if trainer.epoch == 2:
            trainer.train.dataset.tensors[0].fill_(float("nan"))

    with pytest.raises(DivergedError, match="epoch 3"):
        training.run(Silent(spoil))
    assert training.best.epoch <= 2
    assert all(tensor.isfinite().all() for tensor in training.model.state_dict().values())


def test_after_an_interruption_the_best_epoch_is_put_back():
    training = trainer(epochs=5)
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 8:  # amid the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(Silent(after_step=interrupt))
    assert training.epoch == 2
    for name, tensor in trainable(training.model).items():
        assert torch.equal(tensor, training.best.state[name])


@dataclass(frozen=True)
class TwoPhases(va.Adapter):
    """An adapter that is trained twice, and loses a block's in between."""

    name: ClassVar[str] = "two-phases"

    def training_phases(self, epochs):
        return [epochs, epochs + 1]

    def after_phase(self, model, optimizer, phase):
        if phase == 2:
            return False
        assert len(optimizer.state) == len(trainable(model))
        for tensor in model.blocks[0].adapter_mlp.parameters():
            tensor.requires_grad_(False)
        return True


def test_a_phase_restarts_the_schedule_and_takes_the_optimizers_state_along():
    training = trainer(epochs=2, method=TwoPhases(rank=2), lr=0.01)
    counts, rates, steps = [], [], []

    def keep(trainer):
        counts.append(len(trainable(trainer.model)))
        rates.append(trainer.rows[-1]["lr"])
        head = trainer.optimizer.state[trainer.model.head.weight]
        steps.append(int(head["step"]))

    training.run(Silent(keep))
    assert [row["phase"] for row in training.rows] == [1, 1, 2, 2, 2]
    assert [row["epoch"] for row in training.rows] == [1, 2, 3, 4, 5]
    assert counts[0] == counts[1] > counts[2] == counts[4]
    assert rates[2] > rates[1]
    assert steps == [3, 6, 9, 12, 15]
    assert training.best.epoch > 2  # of the last phase: only its tensors fit the model as it is now


MIMI = {"method": "mimi", "start_rank": 4, "epochs": 6, "phases": 3, "batch_size": 16}


@pytest.mark.parametrize("final_training", [True, False])
def test_mimi_shrinks_between_its_phases(pictures, tmp_path, final_training):
    out = tmp_path / "run"
    result = run(pictures, out, **MIMI, final_training=final_training)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["phase"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    widths = result.summary["widths"]
    totals = [sum(phase.values()) for phase in widths]
    start = totals[0]
    assert totals == [start // 2**prunes for prunes in range(3 if final_training else 4)]
    dim = result.model.embed_dim
    assert result.summary["parameters"]["adapter"] == 2 * dim * totals[-1] == va.summary(result.model).adapter
    assert {name: result.model.get_submodule(name).down.out_features for name in widths[-1]} == widths[-1]
    with Image.open(out / "widths.png") as picture:
        picture.load()
    assert result.summary["best_epoch"] > 4
    # What the validation images say is said of the model that is saved.
    torch.manual_seed(0)
    loaded = va.load(timm.create_model("test_vit"), out / "adapter.safetensors")
    data_config = timm.data.resolve_model_data_config(loaded)
    config = configure(model="test_vit", data=str(pictures))
    held = loader(read_data(config).val, evaluation_transform(data_config), config, CPU)
    assert evaluate(loaded, held, CPU)[1] == pytest.approx(result.summary["val_accuracy"])


def test_mimi_says_its_budget_first_and_stops_within_a_phase(pictures, tmp_path, capsys):
    run(pictures, tmp_path / "run", **{**MIMI, "epochs": 20, "patience": 1, "lr": 1e-12})
    out = capsys.readouterr().out
    budget, first = "phases    3: 7 + 7 + 6 = 20 epochs\n", "phase 1   "
    assert 0 < out.index(budget) < out.index(first)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["phase"] for row in rows].count("1") < 7 and {row["phase"] for row in rows} == {"1", "2", "3"}


def test_the_optimizers_moments_stay_with_their_neurons(monkeypatch):
    training = trainer(epochs=4, method=va.Mimi(start_rank=4, phases=2), lr=0.01)
    kept, cut = {}, va.Mimi.cut

    def note(method, model, prunes, optimizer=None):
        before = {name: p for name, p in trainable(model).items() if name.endswith("down.weight")}
        moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in before.items()}
        cut(method, model, prunes, optimizer)
        for name, p in before.items():
            rows = [any(torch.equal(row, left) for left in model.get_parameter(name)) for row in p]
            kept[name] = moments[name][torch.tensor(rows)]

    monkeypatch.setattr(va.Mimi, "cut", note)
    compared = []

    def compare(number, widths):
        for name, moments in kept.items():
            if len(moments):
                state = training.optimizer.state[training.model.get_parameter(name)]
                assert torch.equal(state["exp_avg"], moments) and state["step"] == 2 * 3
                compared.append(name)

    listener = Silent()
    listener.phase = compare
    training.run(listener)
    assert compared


def test_what_an_optimizer_counts_in_its_groups_goes_along():
    training = trainer(epochs=4, method=va.Mimi(start_rank=4, phases=2), optimizer="adan")
    steps = []
    training.run(Silent(lambda trainer: steps.append([group["step"] for group in trainer.optimizer.param_groups])))
    assert steps == [[3 * epoch] * 2 for epoch in (1, 2, 3, 4)]


def test_mimi_that_diverges_after_a_prune_keeps_the_pruned_model(pictures, tmp_path, monkeypatch):
    step = Trainer._train_step
    monkeypatch.setattr(
        Trainer, "_train_step", lambda self, *batch: step(self, *batch) * (float("nan") if self.phase == 2 else 1)
    )
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="the loss became nan in epoch 3: the best epoch before is saved"):
        run(pictures, out, **MIMI)
    found = json.loads((out / "summary.json").read_text())
    assert (found["status"], found["best_epoch"], len(found["widths"])) == ("diverged", 2, 2)
    torch.manual_seed(0)
    assert va.Mimi().widths(va.load(timm.create_model("test_vit"), out / "adapter.safetensors")) == found["widths"][1]


def test_mimi_interrupted_in_a_later_phase_keeps_what_there_is(pictures, tmp_path, monkeypatch):
    began = []

    def interrupt(progress, number, widths):
        began.append(number)
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("vitadapter_ext.train.report.Progress.phase", interrupt)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(pictures, out, **MIMI)
    found = json.loads((out / "summary.json").read_text())
    assert began == [1, 2] and found["status"] == "interrupted" and len(found["widths"]) == 2
    torch.manual_seed(0)
    loaded = va.load(timm.create_model("test_vit"), out / "adapter.safetensors")
    assert va.Mimi().widths(loaded) == found["widths"][1]


def test_a_checkpoint_loads_without_executing_anything(tmp_path):
    training = trainer(epochs=2)
    folder = RunFolder(tmp_path / "run", "")
    training.run(Silent(lambda trainer: folder.write_checkpoint(trainer.checkpoint())))
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (state["phase"], state["epoch"], len(state["rows"])) == (1, 2, 2)
    assert set(state["trainable"]) == set(state["best"]["state"]) == set(trainable(training.model))
    assert {"optimizer", "scheduler", "scaler", "rng"} <= set(state)
    other = trainer(epochs=2)
    other.optimizer.load_state_dict(state["optimizer"])


def test_mixed_precision_on_the_cpu():
    training = trainer(epochs=1, amp="bf16")
    training.run(Silent())
    assert all(tensor.dtype == torch.float32 for tensor in trainable(training.model).values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_on_the_gpu(pictures, tmp_path, amp):
    result = run(pictures, tmp_path / "run", device="cuda", amp=amp, epochs=3, clip_grad=1.0)
    assert result.summary["device"] == "cuda" and result.summary["val_accuracy"] >= 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_run_folder(pictures, tmp_path, method):
    small = {"consolidator": {"groups": 32}, "mimi": {"phases": 2}}.get(method, {})
    result = run(pictures, tmp_path / "run", method=method, epochs=2, batch_size=16, **small)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "adapter.safetensors",
        "last.ckpt",
        "curves.png",
        *(["widths.png"] if method == "mimi" else []),
    }
    found = json.loads((folder / "summary.json").read_text())
    assert found == result.summary
    assert 0 <= found["test_accuracy"] <= 1 and found["status"] == "finished" and found["method"] == method
    counts = va.summary(result.model)
    assert found["parameters"] == {
        kind: getattr(counts, kind) for kind in ("adapter", "head", "overrides", "trainable", "total")
    }
    assert found["adapter_file_bytes"] == (folder / "adapter.safetensors").stat().st_size
    for key in ("train_seconds", "images_per_second", "peak_memory_mb"):
        assert found[key] > 0
    assert found["seed"] == 0 and {"torch", "timm", "vitadapter_ext"} <= set(found["versions"])
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    with Image.open(folder / "curves.png") as curves:
        curves.load()
    # It names no folder, so that it can be run again as it is.
    assert Config.from_yaml((folder / "config.yaml").read_text()) == configure(
        model="test_vit", data=str(pictures), method=method, epochs=2, batch_size=16, **small
    )
    torch.manual_seed(0)
    model = va.load(timm.create_model("test_vit"), folder / "adapter.safetensors").eval()
    image = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        if method == "consolidator":  # whose file has the trained biases in its own
            torch.testing.assert_close(model(image), result.model.cpu()(image), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(model(image), result.model.cpu()(image))


def test_the_adapter_file_knows_classes_backbone_and_preprocessing(pictures, tmp_path):
    run(pictures, tmp_path / "run")
    metadata, _ = read(tmp_path / "run" / "adapter.safetensors")
    assert metadata["class_names"] == ["blue", "red"]
    assert metadata["backbone"]["model"] == "test_vit" and metadata["backbone"]["weights"] == {"random": 0}
    assert metadata["data"]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_and_accumulation_give_the_same_run(pictures, tmp_path, checkpointing):
    plain = run(pictures, tmp_path / "plain", batch_size=8)
    other = run(pictures, tmp_path / "other", batch_size=4, grad_accum=2, checkpointing=checkpointing)
    assert other.model.blocks and getattr(other.model, "grad_checkpointing", False) == checkpointing
    for name, tensor in trainable(plain.model).items():
        torch.testing.assert_close(trainable(other.model)[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_equal_seeds_give_equal_bytes(pictures, tmp_path):
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)  # what happened before must not matter
        run(pictures, tmp_path / name, seed=seed, dropout=0.3, drop_path=0.1)
        hashes.append(hashlib.sha256((tmp_path / name / "adapter.safetensors").read_bytes()).digest())
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_test_set_is_looked_at_once_and_does_not_choose(pictures, tmp_path, monkeypatch):
    seen = []

    def counting(model, loader, device, amp="none"):
        seen.append(len(loader.dataset.dataset))
        return evaluate(model, loader, device, amp)

    monkeypatch.setattr(pipeline_module, "evaluate", counting)
    run(pictures, tmp_path / "run", epochs=3)
    assert seen == [6]  # of 40 images, 15 % of each class


def test_the_adapter_file_holds_the_best_epoch(pictures, tmp_path):
    result = run(pictures, tmp_path / "run", epochs=3, lr=0.02)
    tensors = safetensors.torch.load_file(tmp_path / "run" / "adapter.safetensors")
    best = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["best"]
    assert best["epoch"] == result.summary["best_epoch"]
    for name, tensor in best["state"].items():
        assert any(torch.equal(tensor, saved) for key, saved in tensors.items() if key.endswith(name))


def test_a_run_that_diverges_says_so_and_keeps_its_metrics(pictures, tmp_path):
    with pytest.raises(ValueError, match="the loss became nan in epoch 1: nothing is saved"):
        run(
            pictures, tmp_path / "run", method="full", lr=1e30, warmup_epochs=0, optimizer="sgd", epochs=2, batch_size=4
        )
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["status"] == "diverged" and "test_accuracy" not in found
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_refused_run_leaves_no_folder(pictures, tmp_path):
    with pytest.raises(ValueError, match="adm"):
        run(pictures, tmp_path / "run", optimizer="adm")
    assert not (tmp_path / "run").exists()


def test_runs_without_a_name_are_numbered(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "my-pets-adapter-1").mkdir(parents=True)
    assert RunFolder(None, "my pets-adapter").path.as_posix() == "runs/my-pets-adapter-2"


def test_baselines_by_hand():
    class Model(torch.nn.Module):
        """Its features are the two pixels it gets; its own outputs are called c, a, b."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward_features(self, images):
            return images * self.scale

        def forward_head(self, features, pre_logits=False):
            return features if pre_logits else torch.cat([features.sum(1, keepdim=True).abs() + 9, features], 1)

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (60,), generator=generator)
    images = 0.1 * torch.randn(60, 2, generator=generator)
    images[torch.arange(60), labels] += 1
    images[:6] = images[:6].flip(1)  # six of sixty that any reasonable answer gets wrong
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    loaders = dict.fromkeys(("train", "val", "test"), loader)
    found = baselines.measure(Model(), ("c", "a", "b"), ("a", "b"), loaders)
    assert found == {"linear_probe_accuracy": pytest.approx(0.9), "backbone_accuracy": pytest.approx(0.9)}
    assert "backbone_accuracy" not in baselines.measure(Model(), ("c", "a", "b"), ("a", "d"), loaders)


def test_the_embedded_default_in_one_epoch(tmp_path, capsys):
    result = fit(configure(epochs=1, out=str(tmp_path / "run")))
    assert result.summary["test_accuracy"] > 0.5
    assert result.summary["linear_probe_accuracy"] > 0.9
    assert result.summary["backbone_accuracy"] > 0.5
    lines = capsys.readouterr().out.splitlines()
    table = [line.split("  ")[0] for line in lines if line][-10:-4]
    assert table == ["test accuracy", "linear probe", "untouched backbone", "parameters trained", "file size", "time"]
    namespace = {}
    exec("\n".join(line.strip() for line in lines[-3:]), namespace)  # the printed lines are ones that work
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(namespace["model"](image), result.model(image))
