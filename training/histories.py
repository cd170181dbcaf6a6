"""Policies over objects' histories: which objects they save, and how pure and complete that is.

As BTSbot is judged (Rehemtulla et al. 2024, arXiv 2401.15167; `btsbot/val.py` of https://github.com/nabeelre/BTSbot):
an object counts once, as what its first alert is. Not judged are objects with a single alert, and true ones that never
are as bright as what the policies are for. Never looks at an alert without a magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from training.metrics import Values, Weights, ratio
from training.predictions import Predictions

LEAST_ALERTS = 2
BRIGHT = 18.5
"""Peak magnitude down to which the Bright Transient Survey classifies every transient (Fremling et al. 2020)."""

Policy = Callable[[NDArray[np.float32], NDArray[np.float64]], bool]
"""Whether an object's scores and magnitudes so far, [n] each in order of time, make it worth saving; what is saved once
stays saved."""


@dataclass(frozen=True, slots=True)
class Histories:
    """O objects that are judged."""

    first: NDArray[np.int64]  # [O] the row of an object's first alert, whose weight is the object's
    positive: NDArray[np.bool_]  # [O] what that alert is
    saved: Mapping[str, NDArray[np.bool_]]  # [O] by policy

    @classmethod
    def of(cls, predictions: Predictions, policies: Mapping[str, Policy]) -> Self:
        """The histories that the predictions of a yes or no hold."""
        rows = np.flatnonzero(np.isfinite(predictions.magpsf))
        rows = rows[np.lexsort((predictions.alert_id[rows], predictions.object_id[rows]))]  # alert ids rise with time
        ends = np.flatnonzero(predictions.object_id[rows][1:] != predictions.object_id[rows][:-1]) + 1
        judged = [own for own in np.split(rows, ends) if len(own) >= LEAST_ALERTS and not _faint(predictions, own)]
        first = np.array([own[0] for own in judged], np.int64)
        score = predictions.probabilities[:, 0]
        saved = {
            name: np.array([policy(score[own], predictions.magpsf[own]) for own in judged], np.bool_)
            for name, policy in policies.items()
        }
        return cls(first, predictions.truth[first] == 1, saved)

    def measure(self, weight: Weights) -> dict[str, Values]:
        """`<policy>.purity`, the share of the saved objects that are true, and `<policy>.completeness`, the share of
        the true ones that are saved, for weights [..., N] of the predictions' alerts that are alike for an object's.

        No figures where not both true and other objects are judged: purity would mean nothing.
        """
        if self.positive.all() or not self.positive.any():
            return {}
        weight = weight[..., self.first]
        figures = {}
        for name, saved in self.saved.items():
            found = weight @ (saved & self.positive)
            figures[f"{name}.purity"] = ratio(found, weight @ saved)
            figures[f"{name}.completeness"] = ratio(found, weight @ self.positive)
        return figures


def _faint(predictions: Predictions, rows: NDArray[np.int64]) -> bool:
    return bool(predictions.truth[rows[0]] == 1 and predictions.magpsf[rows].min() > BRIGHT)
