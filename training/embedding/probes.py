"""Probes: classifiers on a frozen embedding, linear or by nearest neighbours.

They measure how well classes can be read from the embedding. Both weight all classes equally, and all objects of a
class equally, however many alerts they have.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.evaluation.metrics import Values, Weights, ratio

L2 = 1e-3
"""Weight of the squared coefficients, for columns of unit variance; chosen by cross-validation, with little effect."""
ITERATIONS = 300
"""Maximum number of L-BFGS iterations; some dozens are enough."""
NEIGHBOURS = 5
"""Number of neighbours that vote. Of 5, 10 and 20, it is the best value on training objects for every embedding."""


def linear_probe(
    train: NDArray[np.float32], label: NDArray[np.int64], object_id: NDArray[np.str_], test: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the class of each of `test` [K, D], int64[K], by multinomial logistic regression on `train` [N, D].

    `label` int64[N] and `object_id` [N] belong to `train`.
    """
    layer = nn.Linear(train.shape[1], int(label.max()) + 1)
    fit_classes(layer, torch.from_numpy(train), object_id, label)
    with torch.inference_mode():
        classes: NDArray[np.int64] = layer(torch.from_numpy(test)).argmax(dim=1).numpy()
    return classes


def fit_classes(layer: nn.Linear, features: Tensor, object_id: NDArray[np.str_], label: NDArray[np.int64]) -> None:
    """Fit `layer` so that the softmax of its output for `features` [N, D] predicts the class indices `label` [N].

    All classes have the same total weight, and so have all objects of a class, however many alerts they have.
    """
    features, truth = features.double(), torch.from_numpy(label)
    mean, deviation = features.mean(0), features.std(0)
    deviation = deviation.masked_fill(deviation == 0, 1.0)  # a column that is constant tells nothing
    unit = (features - mean) / deviation
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    share = 1 / alerts_of[index]
    weight = torch.from_numpy(share / np.bincount(label, share)[label] / len(np.unique(label)))
    fitted = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        distance = (weight * cross_entropy(fitted(unit), truth, reduction="none")).sum()
        distance = distance + L2 * fitted.weight.square().sum()
        distance.backward()  # type: ignore[no-untyped-call]
        return distance

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(fitted.weight / deviation)
        layer.bias.copy_(fitted.bias - fitted.weight @ (mean / deviation))


def nearest(
    train: NDArray[np.float32], label: NDArray[np.int64], object_id: NDArray[np.str_], test: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the class of each embedding of `test` [K, D], int64[K], by its NEIGHBOURS nearest in `train` [N, D].

    The neighbours, by cosine similarity, have a weighted vote. `label` int64[N] and `object_id` [N] belong to `train`.
    """
    weight = object_weights(object_id, label)
    unit_train, unit_test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    near = np.argsort(-(unit_test @ unit_train.T), axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.stack([(weight[near] * (label[near] == c)).sum(axis=1) for c in range(int(label.max()) + 1)], axis=1)
    classes: NDArray[np.int64] = votes.argmax(axis=1)
    return classes


def object_weights(object_id: NDArray[np.str_], label: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weight of each alert, float64[N]: each class has a total of 1, shared equally by its objects."""
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    share = 1 / alerts_of[index]
    weights: NDArray[np.float64] = share / np.bincount(label, share)[label]
    return weights


def balanced_accuracy(right: NDArray[np.bool_], label: NDArray[np.int64], weight: Weights) -> Values:
    """Return the mean recall over the classes for weights [..., N]; NaN if a class is absent."""
    recalls = [ratio(weight @ (right & (label == c)), weight @ (label == c)) for c in np.unique(label).tolist()]
    return np.asarray(np.mean(recalls, axis=0))
