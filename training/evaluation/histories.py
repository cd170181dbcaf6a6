"""Policies over objects' histories: which objects they save, and how pure and complete that is.

As BTSbot is judged (Rehemtulla et al. 2024, arXiv 2401.15167; `btsbot/val.py` of https://github.com/nabeelre/BTSbot):
an object counts once, as what its first alert is. Not judged are objects with a single alert, and true ones that never
are as bright as what the policies are for. Never looks at an alert without a magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.bts_policies import BRIGHT, POLICIES
from training.evaluation.metrics import Values, Weights, ratio
from training.evaluation.predictions import Predictions

LEAST_ALERTS = 2


@dataclass(frozen=True, slots=True)
class Histories:
    """O objects that are judged."""

    first: NDArray[np.int64]  # [O] the row of an object's first alert, whose weight is the object's
    truth: NDArray[np.int64]  # [O] the class of that alert: 1 where the policies ought to save the object
    saved: Mapping[str, NDArray[np.bool_]]  # [O] by policy

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """The histories that the predictions hold: none where they are of several classes, or without magnitudes."""
        rows = np.flatnonzero(np.isfinite(predictions.magpsf) & predictions.binary)
        rows = rows[np.lexsort((predictions.alert_id[rows], predictions.object_id[rows]))]  # alert ids rise with time
        ends = np.flatnonzero(predictions.object_id[rows][1:] != predictions.object_id[rows][:-1]) + 1
        judged = [own for own in np.split(rows, ends) if len(own) >= LEAST_ALERTS and not _faint(predictions, own)]
        first = np.array([own[0] for own in judged], np.int64)
        score = predictions.probabilities[:, 0]
        saved = {
            name: np.array([policy(score[own], predictions.magpsf[own]) for own in judged], np.bool_)
            for name, policy in POLICIES.items()
        }
        return cls(first, predictions.truth[first], saved)

    def measure(self, weight: Weights) -> dict[str, Values]:
        """`<policy>.purity`, the share of the saved objects that are true, and `<policy>.completeness`, the share of
        the true ones that are saved, for weights [..., N] of the predictions' alerts that are alike for an object's.

        No figures where not both true and other objects are judged: purity would mean nothing.
        """
        true, weight = self.truth == 1, weight[..., self.first]
        if true.all() or not true.any():
            return {}
        figures = {}
        for name, saved in self.saved.items():
            found = weight @ (saved & true)
            figures[f"{name}.purity"] = ratio(found, weight @ saved)
            figures[f"{name}.completeness"] = ratio(found, weight @ true)
        return figures

    def trials(self) -> dict[str, int]:
        """How many objects each figure of `measure` is of."""
        saved = {f"{name}.purity": int(saved.sum()) for name, saved in self.saved.items()}
        return saved | {f"{name}.completeness": int((self.truth == 1).sum()) for name in self.saved}


def _faint(predictions: Predictions, rows: NDArray[np.int64]) -> bool:
    return bool(predictions.truth[rows[0]] == 1 and predictions.magpsf[rows].min() > BRIGHT)
