"""The Bright Transient Survey's policies: when the scores of an object's alerts are enough to act on.

As BTSbot is judged by them (Rehemtulla et al. 2024, arXiv:2401.15167; `btsbot/val.py` of
https://github.com/nabeelre/BTSbot, MIT). A policy sees an alert's past and never its future, so that what it says of an
archive is what it would have said each night; once it has passed, an object has passed for good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FAINTEST = 19.0
"""Magnitude: an alert counts if it is brighter."""
BRIGHT = 18.5
"""Peak magnitude down to which the survey classifies every transient (Fremling et al. 2020, ApJ 895, 32)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Passed with `alerts` alerts that score above `above` and are brighter than `FAINTEST`, and any one of `peak`."""

    above: float
    alerts: int
    peak: float = np.inf

    def so_far(self, score: NDArray[np.floating], magpsf: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether one object's n alerts, in order of time, had passed at each of them, [n]."""
        counting = np.cumsum((score > self.above) & (magpsf < FAINTEST))
        return (counting >= self.alerts) & (np.fmin.accumulate(magpsf) <= self.peak)

    def __call__(self, score: NDArray[np.floating], magpsf: NDArray[np.floating]) -> bool:
        """Whether one object's alerts, in order of time, have passed."""
        return bool(self.so_far(score, magpsf)[-1])


POLICIES: Mapping[str, Policy] = {
    "bts_p1": Policy(above=0.5, alerts=2),
    "bts_p2": Policy(above=0.5, alerts=2, peak=BRIGHT),
    "prod_p1": Policy(above=0.85, alerts=1),
    "prod_p2": Policy(above=0.85, alerts=1, peak=BRIGHT),
}
"""By the names that btsbot has for them: `bts` to save a source, `prod` to ask for a spectrum at once."""


def passed(
    policy: Policy,
    object_id: Sequence[str],
    mjd: NDArray[np.float64],
    score: NDArray[np.floating],
    magpsf: NDArray[np.floating],
) -> NDArray[np.bool_]:
    """Whether its object had passed at each of N alerts in any order, [N]: a filter over a scored archive."""
    _, objects = np.unique(np.asarray(object_id), return_inverse=True)
    order = np.lexsort((mjd, objects))
    result = np.zeros(len(order), np.bool_)
    for rows in np.split(order, np.flatnonzero(np.diff(objects[order])) + 1):
        result[rows] = policy.so_far(score[rows], magpsf[rows])
    return result
