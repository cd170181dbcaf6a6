"""Intervals by resampling objects, never alerts: an object's alerts are no independent trials.

The percentile bootstrap (Efron & Tibshirani 1993, chapter 13), with an object and all its alerts as the unit. A
resample is how often each object was drawn, so that thousands of them are one array of weights and no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from training.evaluation.metrics import Values, Weights

RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)
"""Of the resampled figures: a 95 % interval."""
SEED = 2026
"""The same for every model: the same objects are drawn for all, so that differences between models are paired."""
ELEMENTS_AT_ONCE = 2**21
"""Weights that are held at a time: 16 MB, and a dozen arrays of that size beside them."""

Measure = Callable[[Weights], dict[str, Values]]
"""Figures by name, [...], for weights [..., N]."""


class Estimate(BaseModel):
    """A figure and its interval; None where it is not defined."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float | Values, resampled: Values) -> Self:
        """From the figure and its resamples [R]: those in which it is not defined are left out."""
        known = resampled[~np.isnan(resampled)]
        low, high = np.percentile(known, PERCENTILES) if len(known) else (np.nan, np.nan)
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


def estimate(measure: Measure, object_id: NDArray[np.str_]) -> dict[str, Estimate]:
    """Each figure with its interval."""
    resampled = resample(measure, object_id)
    return {name: Estimate.of(value, resampled[name]) for name, value in measure(np.ones(len(object_id))).items()}


def as_card(estimates: Mapping[str, Estimate]) -> dict[str, float | int | str]:
    """Figures and their intervals as a card holds them."""
    card: dict[str, float | int | str] = {}
    for name, figure in estimates.items():
        low, value, high = (np.nan if number is None else number for number in (figure.low, figure.value, figure.high))
        card[name] = round(value, 4)
        card[f"{name}_95"] = f"{low:.4f} to {high:.4f}"
    return card
