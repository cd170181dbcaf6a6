"""What a frozen embedding is worth: how well classes that it never saw are read from it, by a plane and by neighbours.

Both count every class the same, and every object of a class, however many alerts it has. Trains nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.bundles.train_classes import fit_classes
from training.evaluation.metrics import Values, Weights, ratio

NEIGHBOURS = 5
"""Whose votes count: of 5, 10 and 20 the best on training objects, whatever the embedding."""


def linear_probe(
    train: NDArray[np.float32], label: NDArray[np.int64], object_id: NDArray[np.str_], test: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The class of each of `test` [K, D], by multinomial logistic regression on `train` [N, D] with its labels [N]."""
    layer = nn.Linear(train.shape[1], int(label.max()) + 1)
    fit_classes(layer, torch.from_numpy(train), object_id, label)
    with torch.inference_mode():
        classes: NDArray[np.int64] = layer(torch.from_numpy(test)).argmax(dim=1).numpy()
    return classes


def nearest(
    train: NDArray[np.float32], label: NDArray[np.int64], object_id: NDArray[np.str_], test: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The class of each of `test` [K, D], by the votes of its NEIGHBOURS in `train` [N, D], by cosine."""
    weight = object_weights(object_id, label)
    unit_train, unit_test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    near = np.argsort(-(unit_test @ unit_train.T), axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.stack([(weight[near] * (label[near] == c)).sum(axis=1) for c in range(int(label.max()) + 1)], axis=1)
    classes: NDArray[np.int64] = votes.argmax(axis=1)
    return classes


def object_weights(object_id: NDArray[np.str_], label: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each alert counts [N], so that every class counts 1, and in it every object the same."""
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    share = 1 / alerts_of[index]
    weights: NDArray[np.float64] = share / np.bincount(label, share)[label]
    return weights


def balanced_accuracy(right: NDArray[np.bool_], label: NDArray[np.int64], weight: Weights) -> Values:
    """The mean of the classes' recalls, for weights [..., N]; NaN where a class is absent."""
    recalls = [ratio(weight @ (right & (label == c)), weight @ (label == c)) for c in np.unique(label).tolist()]
    return np.asarray(np.mean(recalls, axis=0))
