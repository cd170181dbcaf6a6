"""The anomaly threshold: an adaptive threshold that keeps the share of flagged alerts at the requested rate.

This is the quantile tracker of Angelopoulos, Candes & Tibshirani 2023 (arXiv:2307.16895, eq. 4): the threshold falls by
step x rate with each alert that is not flagged, and rises by step x (1 - rate) with each one that is. After n alerts
the realised rate differs from the requested one by at most (R / step + 1) / n, where R is the range of the threshold,
for any sequence of scores (their Proposition 1). The threshold is the only state; its start value is extrapolated from
the reference's held-out ordinary alerts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

TAIL = 50
"""Number of the highest reference scores from which the first threshold is extrapolated: the relative error of their
mean excess is about 1/7 (1/sqrt(50))."""
TAIL_SHARE = 10
"""The tail is at most one in this many of the reference scores; a larger share would not be a tail."""
STEP = 0.1
"""Step in units of the tail's scale. The threshold then settles within 20 % of the rate, and halves its error every 7 /
rate alerts."""


class RateTracker:
    """Flags a given share of a stream of scores.

    The result depends on the scores and their order only, not on how they are batched.
    """

    def __init__(self, ordinary: NDArray[np.float32], rate: float) -> None:
        """Start with the threshold that flags the share `rate` of `ordinary`.

        `ordinary`: ascending scores of ordinary alerts, at least two different ones. `rate`: the share of alerts to
        flag, 0 to 1.
        """
        tail = max(min(TAIL, len(ordinary) // TAIL_SHARE), math.ceil(rate * len(ordinary)), 1)
        edge = float(ordinary[-1 - tail])
        scale = float(ordinary[-tail:].astype(np.float64).mean()) - edge
        self._rate = rate
        has_scale = scale > np.spacing(abs(ordinary[-1]))  # False if all scores of the tail are equal
        self.step = STEP * (scale if has_scale else float(ordinary.std()))
        # Excesses over a high value are about exponential (Pickands 1975), also beyond the highest score that is known.
        self.threshold = edge + scale * math.log(tail / (rate * len(ordinary)))

    def flag(
        self, scores: NDArray[np.float32], counts: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the threshold in force at each of N scores, float32[N], and whether the score is above it, bool[N].

        The scores are taken in their order. `counts` [N]: alerts that move the threshold; the others are flagged too,
        but do not move it. A NaN is neither flagged nor counted.
        """
        thresholds, flags = np.empty(len(scores), np.float32), np.zeros(len(scores), np.bool_)
        for i, (score, moves) in enumerate(zip(scores.tolist(), counts.tolist(), strict=True)):
            thresholds[i] = self.threshold
            flags[i] = flagged = score > self.threshold
            if moves and not math.isnan(score):
                self.threshold += self.step * (flagged - self._rate)
        return thresholds, flags
