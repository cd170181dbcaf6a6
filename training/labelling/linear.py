"""A linear classifier on embeddings: logistic regression, regularised as cross-validation over objects prefers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold

from broker_filter.anomalies.neighbours import Embeddings
from training.errors import DatasetError

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Inverse strengths of the L2 regularisation, `C` of scikit-learn, of which one is chosen."""
FOLDS = 5
LEAST_OBJECTS = 2
"""Least number of objects of a class: one to learn from and one to validate with."""
MOST_ITERATIONS = 2000


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A fitted classifier of C classes. P = 1 logit, that of the second class, for two classes, else P = C logits."""

    weight: NDArray[np.float64]  # [P, D]
    bias: NDArray[np.float64]  # [P]
    strength: float
    """The chosen value of STRENGTHS."""
    crossed: NDArray[np.float64]  # [N, P] probabilities of the training alerts by classifiers of other objects

    def probabilities(self, embedding: Embeddings) -> NDArray[np.float64]:
        """Return the probabilities of the last P classes, float64[M, P], for embeddings [M, D]."""
        logits = embedding.astype(np.float64) @ self.weight.T + self.bias
        if logits.shape[1] == 1:
            return np.asarray(1 / (1 + np.exp(-logits)))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def fit_linear(
    embedding: Embeddings, label: NDArray[np.int64], object_id: NDArray[np.str_], classes: Sequence[str]
) -> LinearHead:
    """Fit a classifier to embeddings [N, D] of alerts with class indices `label` [N].

    The strength of the regularisation is the one with the lowest log loss in a cross-validation in which all alerts of
    an object are in one fold. Raises DatasetError if a class has fewer than LEAST_OBJECTS objects.
    """
    objects = [len(np.unique(object_id[label == c])) for c in range(len(classes))]
    if few := [f"{name} has {n}" for name, n in zip(classes, objects, strict=True) if n < LEAST_OBJECTS]:
        raise DatasetError(f"each class needs at least {LEAST_OBJECTS} labelled objects, but {', '.join(few)}")
    folds = StratifiedGroupKFold(min(FOLDS, *objects), shuffle=True, random_state=0)
    doubles = embedding.astype(np.float64)
    parts = [
        (train, test)
        for train, test in folds.split(embedding, label, object_id)
        if len(np.unique(label[train])) == len(classes)
    ]
    crossed = {strength: _crossed(doubles, label, parts, strength, len(classes)) for strength in STRENGTHS}
    known = np.concatenate([test for _, test in parts])
    strength = min(STRENGTHS, key=lambda one: log_loss(label[known], crossed[one][known], labels=range(len(classes))))
    fitted = _fit(doubles, label, strength)
    outputs = fitted.coef_.shape[0]
    return LinearHead(fitted.coef_, fitted.intercept_, strength, crossed[strength][:, -outputs:])


def _fit(embedding: NDArray[np.float64], label: NDArray[np.int64], strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=MOST_ITERATIONS).fit(embedding, label)


def _crossed(
    embedding: NDArray[np.float64],
    label: NDArray[np.int64],
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    strength: float,
    classes: int,
) -> NDArray[np.float64]:
    """Return the probabilities [N, C] of each alert by the classifier that did not see the alert's object.

    Alerts of a fold without which a class would be absent keep the shares of the classes.
    """
    probabilities = np.tile(np.bincount(label, minlength=classes) / len(label), (len(label), 1))
    for train, test in parts:
        probabilities[test] = _fit(embedding[train], label[train], strength).predict_proba(embedding[test])
    return probabilities
