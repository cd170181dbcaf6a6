"""How well scores tell real from bogus, with the uncertainty that few objects leave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled figures: a 95 % interval."""

Figure = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]


def roc_auc(real: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The chance that a real alert scores higher than a bogus one, ties counting half (Mann-Whitney U / n1 n0).

    `real` and `score` [N]; NaN where one of the classes is empty.
    """
    _, position, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[position]
    n_real, n_bogus = int(real.sum()), int((~real).sum())
    if not n_real * n_bogus:
        return float("nan")
    return float((rank[real].sum() - n_real * (n_real + 1) / 2) / (n_real * n_bogus))


def agreement(real: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The share of alerts on whose side of 0.5 both are."""
    return float(((score > 0.5) == real).mean())


def interval_by_object(
    figure: Figure, real: NDArray[np.bool_], score: NDArray[np.float64], object_id: NDArray[np.str_], seed: int
) -> tuple[float, float]:
    """The bootstrap interval of a figure, drawing objects, not alerts: an object's alerts are no independent trials."""
    _, index = np.unique(object_id, return_inverse=True)
    alerts_of = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([alerts_of[i] for i in rng.integers(len(alerts_of), size=len(alerts_of))])
        figures.append(figure(real[rows], score[rows]))
    low, high = np.nanpercentile(figures, INTERVAL)
    return float(low), float(high)
