"""Confidence intervals by resampling objects, not alerts: alerts of one object are not independent.

This is the percentile bootstrap (Efron & Tibshirani 1993, chapter 13), with an object and all its alerts as the unit. A
resample is represented by the number of times that each object was drawn, so that thousands of resamples are one array
of weights.

If every object agrees on a fraction, such as a purity of 1, all resamples are equal and the bootstrap would give an
interval of zero width. The interval is then that of Clopper & Pearson (1934, Biometrika 26, 404), with one trial for
each object behind the fraction. For a ROC AUC a trial is whether, of a positive and a negative object, the positive one
ranks higher. Disjoint pairs are independent, and their number is that of the objects of the rarer class.
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
"""Percentiles of the resampled figures: a 95 % interval."""
SEED = 2026
"""Seed of the resamples. It is the same for every model, so that the same objects are drawn and differences between
models are paired."""
ALIKE = 1e-9
"""Largest difference of figures that counts as rounding."""
ELEMENTS_AT_ONCE = 2**21
"""Number of weights held in memory at a time: 16 MB, and a dozen arrays of that size."""

INTERVALS = "95 %, bootstrap over objects; Clopper-Pearson with one trial per object if all resamples are equal"
"""The description of the intervals in a card."""

Measure = Callable[[Weights], dict[str, Values]]
"""Function from weights [..., N] to figures [...] by name."""
Trials = Callable[[Weights], dict[str, Values]]
"""Function from weights [N] that sum to 1 over each object to the number of objects behind each figure that is a
fraction, by name."""


class Estimate(BaseModel):
    """A figure and its interval; a value is None if it is undefined."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float | Values, resampled: Values, trials: float | Values | None = None) -> Self:
        """Return the estimate from the figure and its resamples [R]; undefined (NaN) resamples are ignored.

        `trials`: for a fraction, the number of objects behind it. If all resamples are equal, the interval is the exact
        one for this number of trials.
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
    """Return each figure in RESAMPLES resamples of the objects, [R].

    The resamples depend on the set of objects only, not on the measure or the order of the alerts.
    """
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
    """Return the 95 % interval of Clopper & Pearson for a fraction of `trials`, which need not be integer."""
    tail, successes = PERCENTILES[0] / 100, share * trials
    failures = trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures > 0 else 1.0
    return float(low), float(high)


def weights_by_object(object_id: NDArray[np.str_]) -> Weights:
    """Return weights float64[N] of alerts that sum to 1 over each object."""
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    weights: Weights = 1 / alerts_of[index]
    return weights


def estimate(measure: Measure, object_id: NDArray[np.str_], trials: Trials | None = None) -> dict[str, Estimate]:
    """Return each figure with its interval.

    `trials`: numbers of objects behind the figures that are fractions; if absent, every figure is taken as a fraction
    of all objects.
    """
    resampled, whole = resample(measure, object_id), measure(np.ones(len(object_id)))
    each = weights_by_object(object_id)
    known = trials(each) if trials else dict.fromkeys(whole, each.sum())
    return {name: Estimate.of(value, resampled[name], known.get(name)) for name, value in whole.items()}


def as_card(estimates: Mapping[str, Estimate]) -> dict[str, float | int | str]:
    """Return figures and their intervals in the format of a card."""
    card: dict[str, float | int | str] = {}
    for name, figure in estimates.items():
        low, value, high = (np.nan if number is None else number for number in (figure.low, figure.value, figure.high))
        card[name] = round(value, 4)
        card[f"{name}_95"] = f"{low:.4f} to {high:.4f}"
    return card
