"""The score above which an alert is among the strangest share of them, whatever the stream does.

The quantile tracker of Angelopoulos, Candes & Tibshirani 2023 (arXiv:2307.16895, eq. 4): the threshold falls a little
with each alert that is not flagged and rises with each that is, so that the two balance at the rate that was asked for.
Its realised rate is off by at most (R / step + 1) / n after n alerts, R being how far the threshold went: whatever the
alerts are, in whatever order (their Proposition 1). The threshold is all its state; it begins where the reference's
ordinary alerts put it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

TAIL = 50
"""Ordinary alerts, the strangest, that the first threshold is extrapolated from: enough for their mean excess to be
known to a seventh."""
TAIL_SHARE = 10
"""And one in so many of them at most, or it would be no tail."""
STEP = 0.1
"""Of the tail's scale: the threshold then settles within 20 % of the rate, and halves its error in 7 / rate alerts."""


class RateTracker:
    """Flags a share of a stream of scores. The same scores in the same order are flagged the same way, however they are
    batched."""

    def __init__(self, ordinary: NDArray[np.float32], rate: float) -> None:
        """`ordinary`: scores of ordinary alerts, ascending, at least two that differ; `rate`: the share to flag."""
        tail = max(min(TAIL, len(ordinary) // TAIL_SHARE), math.ceil(rate * len(ordinary)), 1)
        edge = float(ordinary[-1 - tail])
        scale = float(ordinary[-tail:].astype(np.float64).mean()) - edge
        self._rate = rate
        has_scale = scale > np.spacing(abs(ordinary[-1]))  # or the tail is all one score
        self.step = STEP * (scale if has_scale else float(ordinary.std()))
        # Excesses over a high edge are about exponential (Pickands 1975): also beyond the strangest one known.
        self.threshold = edge + scale * math.log(tail / (rate * len(ordinary)))

    def flag(
        self, scores: NDArray[np.float32], counts: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The threshold that each of N scores met and whether it is above it, in their order.

        `counts` [N]: the others are flagged too, but do not move the threshold. A NaN is neither flagged nor counted.
        """
        thresholds, flags = np.empty(len(scores), np.float32), np.zeros(len(scores), np.bool_)
        for i, (score, moves) in enumerate(zip(scores.tolist(), counts.tolist(), strict=True)):
            thresholds[i] = self.threshold
            flags[i] = flagged = score > self.threshold
            if moves and not math.isnan(score):
                self.threshold += self.step * (flagged - self._rate)
        return thresholds, flags
