"""Calibration slope and intercept: a logistic regression of the outcomes on the logits of the predicted probabilities.

The method is that of Cox 1958 (Biometrika 45, 562). A calibrated model has slope 1 and intercept 0. A slope below 1
means that the model is overconfident; an intercept above 0 means that events are more common than predicted. The
estimate is Firth's (1993, Biometrika 80, 27), which is finite even if the scores separate the classes (Heinze &
Schemper 2002, Statistics in Medicine 21, 2409).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST = 1e-7
"""Smallest distance of a probability from 0 and 1; it limits logits to 16. A float32 probability that is closer to 1
cannot be distinguished from 1."""
ITERATIONS = 60
"""Maximum number of iterations of Newton's method: about ten are needed from zero, a few from the estimate for all
alerts."""
LARGEST_STEP = 2.0
"""Largest step of a coefficient, for logits of unit variance: longer steps can leave the region of convergence."""
CONVERGED = 1e-6
GROUPS = 128
"""Number of groups into which alerts with the same outcome and similar logits are merged, so that the cost of a
resample does not grow with the number of alerts. The estimate changes in its fifth digit."""


def logit_of(probability: NDArray[np.floating]) -> Floats:
    """Return the logits of probabilities, float64 in the shape of `probability`.

    Probabilities are limited to the range from LEAST to 1 - LEAST first.
    """
    bounded = probability.astype(np.float64).clip(LEAST, 1 - LEAST)
    logit: Floats = np.log(bounded / (1 - bounded))
    return logit


def slope_and_intercept(logit: Floats, happened: NDArray[np.bool_], weight: Floats) -> tuple[Floats, Floats]:
    """Return calibration slope and intercept, each float64[...], for N logits and outcomes, and weights [..., N].

    They are NaN if all outcomes or all logits are equal.
    """
    logit, happened, weight = _grouped(logit, happened, weight)
    mean, deviation = float(logit.mean()), float(logit.std())
    undefined = np.full(weight.shape[:-1], np.nan)
    if deviation <= LEAST:
        return undefined, undefined
    unit = (logit - mean) / deviation
    start = _firth(unit, happened, np.ones((1, len(logit))), np.zeros((1, 2)))
    coefficients = _firth(unit, happened, weight.reshape(-1, len(logit)), start)
    slope = coefficients[:, 1].reshape(undefined.shape) / deviation
    return slope, coefficients[:, 0].reshape(undefined.shape) - slope * mean


def _grouped(logit: Floats, happened: NDArray[np.bool_], weight: Floats) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Merge alerts into at most GROUPS groups per outcome: mean logits [G], outcomes [G] and weights [..., G]."""
    order = np.lexsort((logit, happened))
    logit, happened = logit[order], happened[order]
    parts = np.array_split(np.flatnonzero(~happened), GROUPS) + np.array_split(np.flatnonzero(happened), GROUPS)
    starts = np.array([part[0] for part in parts if len(part)])
    size = np.diff(np.append(starts, len(logit)))
    return (
        np.add.reduceat(logit, starts) / size,
        happened[starts],
        np.add.reduceat(weight[..., order], starts, axis=-1),
    )


def _firth(unit: Floats, happened: NDArray[np.bool_], weight: Floats, start: Floats) -> Floats:
    """Return intercept and slope of Firth's logistic regression, float64[R, 2], for weights [R, N].

    Newton's method starts from `start` [1, 2]. The result is NaN if all outcomes with a weight are equal, or if the
    method does not converge.
    """
    found = np.full((len(weight), 2), np.nan)
    rows = np.flatnonzero((weight @ happened > 0) & (weight @ ~happened > 0))
    if np.isnan(start).any():
        return found
    beta = np.repeat(start, len(rows), axis=0)
    powers = np.stack([np.ones_like(unit), unit, unit**2], axis=1)
    for _ in range(ITERATIONS):
        if not len(rows):
            break
        chosen = weight[rows] if len(rows) < len(weight) else weight
        p = 1 / (1 + np.exp(-(beta[:, :1] + beta[:, 1:] * unit)))
        variance = p * (1 - p)
        s0, s1, s2 = ((chosen * variance) @ powers).T[:, :, None]
        determinant = s0 * s2 - s1**2
        with np.errstate(divide="ignore", invalid="ignore"):
            leverage = variance * (s2 - 2 * s1 * unit + s0 * unit**2) / determinant
            residual = chosen * (happened - p + leverage * (0.5 - p))
            u0, u1 = (residual @ powers[:, :2]).T[:, :, None]
            step = np.concatenate([s2 * u0 - s1 * u1, s0 * u1 - s1 * u0], axis=1) / determinant
        beta = beta + step.clip(-LARGEST_STEP, LARGEST_STEP)
        moving = ~(np.abs(step).max(axis=1) < CONVERGED)  # NaN counts as moving, and is dropped below
        found[rows[~moving]] = beta[~moving]
        moving &= np.isfinite(beta).all(axis=1)
        rows, beta = rows[moving], beta[moving]
    return found
