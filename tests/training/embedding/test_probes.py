"""Probes: separable classes are recognised, every class counts the same, and an object counts once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from training.embedding.probes import balanced_accuracy, fit_classes, linear_probe, nearest, object_weights
from training.embedding.train_embedder import Classify

PROBES = [linear_probe, nearest]
CENTRES = np.eye(3, 5, dtype=np.float32)


def around(label: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """Return vectors near one direction per class."""
    noise = np.random.default_rng(seed).normal(0, 0.15, (len(label), 5))
    return (CENTRES[label] + noise).astype(np.float32)


@pytest.mark.parametrize("probe", PROBES)
def test_classes_with_different_directions_are_recognised(probe: Classify) -> None:
    label = np.arange(60) % 3
    objects = np.arange(60).astype(np.str_)
    said = probe(around(label, 1), label, objects, around(label, 2))
    assert (said == label).mean() > 0.95


@pytest.mark.parametrize("probe", PROBES)
def test_a_rare_class_is_recognised_as_well(probe: Classify) -> None:
    label = np.repeat([0, 1, 2], [100, 100, 6])
    said = probe(around(label, 1), label, np.arange(206).astype(np.str_), around(label, 2))
    assert balanced_accuracy(said == label, label, np.ones(206)) > 0.9


def test_alerts_of_one_object_share_one_vote() -> None:
    label = np.array([1] * 10 + [0] * 3 + [1] * 2)
    objects = np.array(["often"] * 10 + ["a", "b", "c", "d", "e"])
    weights = object_weights(objects, label)
    np.testing.assert_allclose([weights[label == c].sum() for c in (0, 1)], 1)
    np.testing.assert_allclose(weights[:10].sum(), weights[-1])


def test_balanced_accuracy_is_the_mean_recall_and_undefined_without_a_class() -> None:
    label, right = np.array([0, 0, 0, 1]), np.array([True, True, False, False])
    weights = np.array([[1.0, 1, 1, 1], [0, 3, 1, 2], [1, 1, 1, 0]])
    np.testing.assert_allclose(balanced_accuracy(right, label, weights), [1 / 3, 3 / 8, np.nan])


def test_separable_classes_are_separated() -> None:
    told = torch.tensor([[0.0, 0.0], [9.0, 0.1], [0.2, 7.0]]).repeat(8, 1) + torch.rand(24, 2)
    label = np.arange(24) % 3
    layer = nn.Linear(2, 3)
    fit_classes(layer, told, np.arange(24).astype(np.str_), label)
    with torch.inference_mode():
        assert np.array_equal(layer(told).argmax(dim=1).numpy(), label)


def test_an_object_counts_once_however_many_alerts_it_has() -> None:
    told = torch.from_numpy(np.random.default_rng(6).normal(size=(30, 2)))
    label = np.arange(30) % 2
    once, often = nn.Linear(2, 2), nn.Linear(2, 2)
    # Twelve equal alerts of object 0 change the mean and deviation of every column, but not the classes.
    rows = np.array([*[0] * 12, *range(1, 30)])
    fit_classes(once, told, np.arange(30).astype(np.str_), label)
    fit_classes(often, told[rows], rows.astype(np.str_), label[rows])
    with torch.inference_mode():
        torch.testing.assert_close(once(told.float()).softmax(1), often(told.float()).softmax(1), atol=0.01, rtol=0)
