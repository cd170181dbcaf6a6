"""How well single scores separate known properties of alerts: features of a dictionary beside other single directions.

A score is chosen for each property on training alerts, and measured on held-out alerts of other objects, so that a
method with more scores to choose from gains nothing by chance. Every method is measured on the same resamples of the
objects, so differences of methods have paired intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from training.evaluation.bootstrap import Estimate, estimate
from training.evaluation.metrics import Values, Weights, rank
from training.interpretability.runs.quantities import Property

FEWEST_OBJECTS = 10
"""Smallest number of objects with a property, and without it, among training and among held-out alerts. The interval of
an AUC of fewer objects is wider than the differences between methods."""
CHANCE = 0.5
"""The ROC AUC of a score that tells nothing."""


def roc_aucs(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the ROC AUC of each of D scores [N, D] for `positive` bool[N], float64[D]; ties count half.

    NaN if there is no positive or no negative alert.
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return np.full(scores.shape[1], np.nan)
    ranks = rankdata(scores, axis=0)[positive].sum(axis=0)
    areas: NDArray[np.float64] = (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return areas


class Single(NamedTuple):
    """The one score that separates a property best on training alerts, and the sign with which it is high for it."""

    column: int
    sign: int


def best_single(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> Single:
    """Return the best of D scores [N, D] for `positive` bool[N]; a score that is low for it gets the sign -1."""
    areas = roc_aucs(scores, positive)
    column = int(np.argmax(np.abs(areas - 0.5)))
    return Single(column, 1 if areas[column] >= 0.5 else -1)


@dataclass(frozen=True, slots=True)
class Separation:
    """How well the best single score of each method separates each property on held-out alerts.

    `area`: the ROC AUC by property and method. `ahead`: the AUC of the first method minus that of another one, by
    property and method. `mean_area`, `mean_ahead`: their means over the properties, by method. `chosen`: the scores, by
    property and method. `objects`: held-out objects with each property.
    """

    area: dict[str, dict[str, Estimate]]
    ahead: dict[str, dict[str, Estimate]]
    mean_area: dict[str, Estimate]
    mean_ahead: dict[str, Estimate]
    chosen: dict[str, dict[str, Single]]
    objects: dict[str, int]


def separate(
    methods: Mapping[str, NDArray[np.floating]],
    properties: Mapping[str, Property],
    held: NDArray[np.bool_],
    object_id: NDArray[np.str_],
) -> Separation:
    """Choose the best single score of each method for each property on training alerts; measure it on held-out alerts.

    `methods`: scores [N, D] by name; the first one is compared with the others. `held` bool[N]: the held-out alerts; no
    object may be on both sides. The intervals are by object. Properties with too few objects (FEWEST_OBJECTS) are left
    out.
    """
    measurable = {name: values for name, values in properties.items() if _measurable(values, held, object_id)}
    chosen = {
        name: {
            method: best_single(scores[~held & ~np.isnan(values)], values[~held & ~np.isnan(values)] == 1)
            for method, scores in methods.items()
        }
        for name, values in measurable.items()
    }
    scored = {
        name: {method: one.sign * methods[method][held, one.column] for method, one in of_methods.items()}
        for name, of_methods in chosen.items()
    }
    of_held = {name: values[held] for name, values in measurable.items()}
    objects = object_id[held]
    measured = estimate(partial(_areas, scored, of_held), objects, partial(_pairs, scored, of_held))
    others = list(methods)[1:]
    return Separation(
        {name: {method: measured[_area(name, method)] for method in methods} for name in measurable},
        {name: {method: measured[_ahead(name, method)] for method in others} for name in measurable},
        {method: measured[_area(MEAN, method)] for method in methods} if measurable else {},
        {method: measured[_ahead(MEAN, method)] for method in others} if measurable else {},
        chosen,
        {name: len(np.unique(objects[values == 1])) for name, values in of_held.items()},
    )


MEAN = "mean"
"""The name of the mean over the properties, among the names of properties."""


def _measurable(values: Property, held: NDArray[np.bool_], object_id: NDArray[np.str_]) -> bool:
    return all(
        len(np.unique(object_id[side & (values == answer)])) >= FEWEST_OBJECTS
        for side in (held, ~held)
        for answer in (0, 1)
    )


def _area(name: str, method: str) -> str:
    return f"{name} {method}"


def _ahead(name: str, method: str) -> str:
    return f"{name} ahead of {method}"


def _areas(
    scored: Mapping[str, Mapping[str, NDArray[np.floating]]], properties: Mapping[str, Property], weight: Weights
) -> dict[str, Values]:
    """Return areas, leads and their means for weights [..., N] of N held-out alerts."""
    figures: dict[str, Values] = {}
    for name, values in properties.items():
        known = ~np.isnan(values)
        for method, score in scored[name].items():
            figures[_area(name, method)] = rank(values[known] == 1, score[known], weight[..., known]).roc_auc
    for method in next(iter(scored.values()), {}):
        areas = [figures[_area(name, method)] for name in properties]
        figures[_area(MEAN, method)] = np.asarray(np.mean(areas, axis=0))
    for name in [*properties, MEAN] if properties else []:
        first, *others = next(iter(scored.values()))
        for method in others:
            figures[_ahead(name, method)] = figures[_area(name, first)] - figures[_area(name, method)]
    return figures


def _pairs(
    scored: Mapping[str, Mapping[str, NDArray[np.floating]]], properties: Mapping[str, Property], weight: Weights
) -> dict[str, Values]:
    """Return the number of objects behind each area, for weights [N] that sum to 1 over each object."""
    pairs: dict[str, Values] = {}
    for name, values in properties.items():
        fewest = np.minimum(weight @ (values == 1), weight @ (values == 0))
        pairs |= {_area(name, method): fewest for method in scored[name]}
    return pairs
