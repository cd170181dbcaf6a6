"""The Bright Transient Survey's policies: when the scores of an object's alerts are enough to act on.

As BTSbot is judged by them (Rehemtulla et al. 2024, arXiv:2401.15167; `btsbot/val.py` of
https://github.com/nabeelre/BTSbot, MIT). A policy sees an alert's past and never its future, so that what it says of an
archive is what it would have said each night; once it has passed, an object has passed for good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FAINTEST = 19.0
"""Magnitude: an alert counts if it is brighter."""
BRIGHT = 18.5
"""Peak magnitude down to which the survey classifies every transient (Fremling et al. 2020, ApJ 895, 32)."""


@dataclass(frozen=True, slots=True)
class Past:
    """What a policy remembers of an object."""

    counting: int = 0
    """Alerts that counted."""
    brightest: float = np.inf
    """Magnitude."""


NO_PAST = Past()


@dataclass(frozen=True, slots=True)
class Policy:
    """Passed with `alerts` alerts that score above `above` and are brighter than `FAINTEST`, and any one of `peak`."""

    above: float
    alerts: int
    peak: float = np.inf

    def so_far(
        self, score: NDArray[np.floating], magpsf: NDArray[np.floating], past: Past = NO_PAST
    ) -> tuple[NDArray[np.bool_], Past]:
        """Whether one object's next n alerts, in order of time, had passed at each of them, [n], and what is past
        then."""
        counting = past.counting + np.cumsum((score > self.above) & (magpsf < FAINTEST))
        brightest = np.fmin(np.fmin.accumulate(magpsf), past.brightest)
        passed = (counting >= self.alerts) & (brightest <= self.peak)
        return passed, Past(int(counting[-1]), float(brightest[-1]))

    def __call__(self, score: NDArray[np.floating], magpsf: NDArray[np.floating]) -> bool:
        """Whether one object's alerts, in order of time, have passed."""
        return bool(self.so_far(score, magpsf)[0][-1])


POLICIES: Mapping[str, Policy] = {
    "bts_p1": Policy(above=0.5, alerts=2),
    "bts_p2": Policy(above=0.5, alerts=2, peak=BRIGHT),
    "prod_p1": Policy(above=0.85, alerts=1),
    "prod_p2": Policy(above=0.85, alerts=1, peak=BRIGHT),
}
"""By the names that btsbot has for them: `bts` to save a source, `prod` to ask for a spectrum at once."""


@dataclass(frozen=True, slots=True)
class PolicyFilter:
    """A policy over a stream: alerts come batch by batch in order of time, and each is judged with its object's past.

    Remembers some hundred bytes an object, for as long as it lives.
    """

    policy: Policy
    _past: dict[str, Past] = field(default_factory=dict)

    def passed(
        self, object_id: Sequence[str], score: NDArray[np.floating], magpsf: NDArray[np.floating]
    ) -> NDArray[np.bool_]:
        """Whether its object had passed at each of the next N alerts, [N]."""
        names, objects = np.unique(np.asarray(object_id, np.str_), return_inverse=True)
        order = np.argsort(objects, kind="stable")
        result = np.zeros(len(order), np.bool_)
        for name, rows in zip(names.tolist(), np.split(order, np.cumsum(np.bincount(objects))[:-1]), strict=False):
            past = self._past.get(name, NO_PAST)
            result[rows], self._past[name] = self.policy.so_far(score[rows], magpsf[rows], past)
        return result
