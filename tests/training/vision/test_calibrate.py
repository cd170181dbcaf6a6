"""Calibration of a trained network: class weights are undone, and deviations on the validation split corrected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from training.errors import TrainingError
from training.evaluation.scaling import Calibration, fit_calibration
from training.vision.calibrate import apply, last_layer, undo_weights
from training.vision.classifier import class_weights


class Linear(nn.Module):
    """A network with a single layer."""

    def __init__(self, features: int, labels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, labels)).double()

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)  # type: ignore[no-any-return]


def trained(features: Tensor, label: Tensor, weights: Tensor) -> Linear:
    """Return a network trained to convergence with class weights as in `Classifier`."""
    torch.manual_seed(1)
    network = Linear(features.shape[1], 1 if len(weights) == 2 else len(weights))
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = network(features)
        if len(weights) == 2:
            value = binary_cross_entropy_with_logits(logits[:, 0], label.double(), pos_weight=weights[1] / weights[0])
        else:
            value = cross_entropy(logits, label, weights.double())
        value.backward()
        return value

    optimizer.step(loss)
    return network


def probabilities(network: nn.Module, features: Tensor) -> np.ndarray:
    with torch.inference_mode():
        logits = network(features)
        return (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)).numpy()


def test_undoing_class_weights_gives_the_frequencies_of_two_classes() -> None:
    rng = np.random.default_rng(2)
    label = (rng.random(20000) < 0.05).astype(np.int64)
    features = torch.from_numpy(rng.normal(label[:, None], 1, (20000, 2)))
    weights = class_weights(label, 2, balance=True)
    network = trained(features, torch.from_numpy(label), weights)
    assert probabilities(network, features).mean() > 0.25  # five times too high
    apply(network, Calibration(undo_weights(weights), 1.0, np.zeros(1)))
    assert probabilities(network, features).mean() == pytest.approx(label.mean(), abs=0.003)


def test_undoing_class_weights_gives_the_frequencies_of_several_classes() -> None:
    rng = np.random.default_rng(3)
    label = rng.choice(3, 20000, p=[0.9, 0.08, 0.02])
    features = torch.from_numpy(rng.normal(np.eye(3)[label], 1))
    weights = class_weights(label, 3, balance=True)
    network = trained(features, torch.from_numpy(label), weights)
    assert probabilities(network, features)[:, 2].mean() > 0.1
    apply(network, Calibration(undo_weights(weights), 1.0, np.zeros(3)))
    assert probabilities(network, features).mean(axis=0) == pytest.approx(np.bincount(label) / 20000, abs=0.003)


@pytest.mark.parametrize("classes", [2, 4])
def test_wrong_scale_and_shifts_are_recovered(classes: int) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (30000, 1 if classes == 2 else classes))
    whole = np.concatenate([np.zeros((30000, 1)), logits], axis=1) if classes == 2 else logits
    chance = np.exp(0.5 * whole + np.array([0.0, 1.0, -0.5, 0.2])[:classes])
    chance /= chance.sum(axis=1, keepdims=True)
    label = (rng.random((30000, 1)) > chance.cumsum(axis=1)).sum(axis=1)
    found = fit_calibration(logits, label, np.zeros(logits.shape[1]))
    assert found.scale == pytest.approx(0.5, abs=0.02)
    assert found.shift[-1] == pytest.approx([1.0, 0.2][classes > 2], abs=0.06)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_separated_alerts_do_not_give_extreme_probabilities(classes: int) -> None:
    label = np.repeat(range(classes), 4)
    logits = 40.0 * np.eye(classes)[label][:, -(1 if classes == 2 else classes) :]
    found = fit_calibration(logits, label, np.zeros(logits.shape[1]))
    calibrated = torch.from_numpy(found(logits))
    said = calibrated.sigmoid().max() if classes == 2 else calibrated.softmax(dim=1).max()
    assert 0.8 < float(said) < 0.9999


def test_the_scale_is_never_negative() -> None:
    logits = np.array([[2.0], [1.0], [-1.0], [-2.0]] * 20)
    label = np.array([0, 0, 1, 1] * 20)
    found = fit_calibration(logits, label, np.zeros(1))
    assert 0 < found.scale < 0.2
    flat = fit_calibration(np.zeros((80, 1)), label, np.zeros(1))
    assert np.isfinite([flat.scale, flat.shift[0]]).all()


def test_a_network_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(TrainingError, match="its `head` does not end with a linear layer"):
        last_layer(nn.Sequential(nn.Conv2d(3, 1, 3)))
