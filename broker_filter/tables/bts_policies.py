"""The Bright Transient Survey's policies: rules that decide when to act on an object.

A policy decides from the scores of the object's alerts. BTSbot is evaluated with these policies (Rehemtulla et al.
2024, arXiv:2401.15167; `btsbot/val.py` of https://github.com/nabeelre/BTSbot, MIT). A policy uses an alert's past and
never its future, so the decisions on an archive are those that it would have made night by night. An object that has
passed stays passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FAINTEST = 19.0
"""Magnitude limit: an alert counts if its magpsf is below this value (brighter)."""
BRIGHT = 18.5
"""Peak magnitude (magpsf) down to which the survey classifies every transient (Fremling et al. 2020, ApJ 895, 32)."""


@dataclass(frozen=True, slots=True)
class Past:
    """The state of a policy for one object."""

    counting: int = 0
    """Number of alerts that counted so far."""
    brightest: float = np.inf
    """Brightest magnitude so far."""


NO_PAST = Past()


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that an object passes with `alerts` alerts that score above `above` and are brighter than FAINTEST.

    If `peak` is given, any alert of the object, counted or not, must also have reached that magnitude.
    """

    above: float
    alerts: int
    peak: float = np.inf

    def so_far(
        self, score: NDArray[np.floating], magpsf: NDArray[np.floating], past: Past = NO_PAST
    ) -> tuple[NDArray[np.bool_], Past]:
        """Return whether the object had passed at each of its next n alerts, bool[n], and the state after them.

        `score`, `magpsf`: of one object's alerts in time order, [n] each; `past`: the state before them.
        """
        counting = past.counting + np.cumsum((score > self.above) & (magpsf < FAINTEST))
        brightest = np.fmin(np.fmin.accumulate(magpsf), past.brightest)
        passed = (counting >= self.alerts) & (brightest <= self.peak)
        return passed, Past(int(counting[-1]), float(brightest[-1]))

    def __call__(self, score: NDArray[np.floating], magpsf: NDArray[np.floating]) -> bool:
        """Return whether one object, with these alerts [n] in time order, has passed."""
        return bool(self.so_far(score, magpsf)[0][-1])


POLICIES: Mapping[str, Policy] = {
    "bts_p1": Policy(above=0.5, alerts=2),
    "bts_p2": Policy(above=0.5, alerts=2, peak=BRIGHT),
    "prod_p1": Policy(above=0.85, alerts=1),
    "prod_p2": Policy(above=0.85, alerts=1, peak=BRIGHT),
}
"""Policies by their names in btsbot: `bts_*` save the object to the survey's list, `prod_*` trigger a spectrum at once.
"""


@dataclass(frozen=True, slots=True)
class PolicyFilter:
    """Applies a policy to a stream: alerts arrive in batches in time order, and each is judged with its object's past.

    The memory grows by some hundred bytes for each object, and is never released.
    """

    policy: Policy
    _past: dict[str, Past] = field(default_factory=dict)

    def passed(
        self, object_id: Sequence[str], score: NDArray[np.floating], magpsf: NDArray[np.floating]
    ) -> NDArray[np.bool_]:
        """Return, for each of the next N alerts, whether the alert's object had passed by then: bool[N]."""
        names, objects = np.unique(np.asarray(object_id, np.str_), return_inverse=True)
        order = np.argsort(objects, kind="stable")
        result = np.zeros(len(order), np.bool_)
        for name, rows in zip(names.tolist(), np.split(order, np.cumsum(np.bincount(objects))[:-1]), strict=False):
            past = self._past.get(name, NO_PAST)
            result[rows], self._past[name] = self.policy.so_far(score[rows], magpsf[rows], past)
        return result
