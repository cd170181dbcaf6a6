"""Intervals by resampling objects, never alerts: an object's alerts are no independent trials.

The percentile bootstrap (Efron & Tibshirani 1993, chapter 13), with an object and all its alerts as the unit. A
resample is how often each object was drawn, so that thousands of them are one array of weights and no loop.

A share that every object agrees on, such as a purity of 1, is the same in every resample: the bootstrap would give an
interval of no width. The interval is then that of Clopper & Pearson (1934, Biometrika 26, 404), with as many trials as
there are objects that the share is of. For a ROC AUC these are the objects of the rarer side: so many pairs of one
positive and one negative object have no object in common, and each is a trial of whether the positive one ranks higher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.special import betaincinv

from training.evaluation.metrics import Values, Weights

RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)
"""Of the resampled figures: a 95 % interval."""
SEED = 2026
"""The same for every model: the same objects are drawn for all, so that differences between models are paired."""
ALIKE = 1e-9
"""Figures that are nearer to each other differ by the rounding of sums alone."""
ELEMENTS_AT_ONCE = 2**21
"""Weights that are held at a time: 16 MB, and a dozen arrays of that size beside them."""

INTERVALS = "95 %, bootstrap by object; Clopper-Pearson, an object a trial, where all resamples are alike"
"""What a card says of its intervals."""

Measure = Callable[[Weights], dict[str, Values]]
"""Figures by name, [...], for weights [..., N]."""
Trials = Callable[[Weights], dict[str, Values]]
"""How many objects each figure that is a share is of, by name, for weights [N] that sum to 1 over each object."""


class Estimate(BaseModel):
    """A figure and its interval; None where it is not defined."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float | Values, resampled: Values, trials: float | Values | None = None) -> Self:
        """From the figure and its resamples [R]: those in which it is not defined are left out.

        `trials`: of a share, the number of objects that it is of. Where all resamples are alike, the interval is the
        exact one of so many trials.
        """
        known = resampled[~np.isnan(resampled)]
        low, high = np.percentile(known, PERCENTILES) if len(known) else (np.nan, np.nan)
        if trials is not None and len(known) and np.ptp(known) < ALIKE:
            low, high = exact_interval(float(value), float(trials))
        return cls(
            **{
                name: None if np.isnan(number) else float(number)
                for name, number in (("value", value), ("low", low), ("high", high))
            }
        )

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        return f"{self.value:.4f}" if self.low is None else f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


def resample(measure: Measure, object_id: NDArray[np.str_]) -> dict[str, Values]:
    """Each figure in RESAMPLES resamples of the objects, [R]. The same objects give the same resamples, whatever the
    measure and the order of the alerts."""
    objects, index = np.unique(object_id, return_inverse=True)
    rng = np.random.default_rng(SEED)
    share = np.full(len(objects), 1 / len(objects))
    at_once = max(1, ELEMENTS_AT_ONCE // len(object_id))
    parts = []
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.multinomial(len(objects), share, size=min(at_once, RESAMPLES - start))
        parts.append(measure(drawn[:, index].astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def exact_interval(share: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of Clopper & Pearson for a share of so many trials, which need not be whole numbers."""
    tail, successes = PERCENTILES[0] / 100, share * trials
    failures = trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures > 0 else 1.0
    return float(low), float(high)


def weights_by_object(object_id: NDArray[np.str_]) -> Weights:
    """What each alert counts [N] so that every object counts 1."""
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    weights: Weights = 1 / alerts_of[index]
    return weights


def estimate(measure: Measure, object_id: NDArray[np.str_], trials: Trials | None = None) -> dict[str, Estimate]:
    """Each figure with its interval. `trials`: of the figures that are shares; where absent, every figure is taken for
    a share of all objects."""
    resampled, whole = resample(measure, object_id), measure(np.ones(len(object_id)))
    each = weights_by_object(object_id)
    known = trials(each) if trials else dict.fromkeys(whole, each.sum())
    return {name: Estimate.of(value, resampled[name], known.get(name)) for name, value in whole.items()}


def as_card(estimates: Mapping[str, Estimate]) -> dict[str, float | int | str]:
    """Figures and their intervals as a card holds them."""
    card: dict[str, float | int | str] = {}
    for name, figure in estimates.items():
        low, value, high = (np.nan if number is None else number for number in (figure.low, figure.value, figure.high))
        card[name] = round(value, 4)
        card[f"{name}_95"] = f"{low:.4f} to {high:.4f}"
    return card
