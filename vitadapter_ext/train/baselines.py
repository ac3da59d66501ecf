"""What can the frozen backbone do by itself? Its own class outputs, and a linear probe on its features."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

REGULARISATION = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the linear probe, as scikit-learn's C; the validation images choose


def measure(
    model: nn.Module, own_classes: tuple[str, ...], classes: tuple[str, ...], loaders: dict[str, DataLoader]
) -> dict[str, float]:
    """Test accuracies (0 to 1) of a backbone that has no method attached yet.

    Args:
        own_classes: what the model's outputs are called; where all of `classes` are among them, `backbone_accuracy` is
            the share of test images whose largest output among those is the right one.
        loaders: "train", "val" and "test", without augmentation.
    Returns: `linear_probe_accuracy`, and `backbone_accuracy` where it can be measured.
    """
    features = {name: _features(model, batches) for name, batches in loaders.items()}
    found = {"linear_probe_accuracy": _linear_probe(features)}
    if set(classes) <= set(own_classes):
        rows = [own_classes.index(name) for name in classes]
        _, logits, labels = features["test"]
        found["backbone_accuracy"] = float((logits[:, rows].argmax(1) == labels).mean())
    return found


@torch.inference_mode()
def _features(model: nn.Module, batches: DataLoader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the head sees (N, dim), what it answers (N, own classes), and the labels (N,)."""
    device = next(model.parameters()).device
    collected: list[tuple[Any, ...]] = []
    for images, labels in batches:
        features = model.forward_features(images.to(device))
        pooled = model.forward_head(features, pre_logits=True)
        collected.append((pooled.cpu(), model.forward_head(features).cpu(), labels))
    return tuple(torch.cat(part).numpy() for part in zip(*collected, strict=True))


def _linear_probe(features: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, _, y), (x_val, _, y_val), (x_test, _, y_test) = (features[name] for name in ("train", "val", "test"))
    probes = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x, y) for c in REGULARISATION]
    return float(max(probes, key=lambda probe: probe.score(x_val, y_val)).score(x_test, y_test))
