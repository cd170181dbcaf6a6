"""Evaluation of policies on objects' histories: purity and completeness of the objects that a policy saves.

As in BTSbot (Rehemtulla et al. 2024, arXiv:2401.15167; `btsbot/val.py` of https://github.com/nabeelre/BTSbot), an
object counts once, with the class of its first alert. Excluded are objects with a single alert, true objects that never
become as bright as the policies require, and alerts without a magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from broker_filter.tables.bts_policies import BRIGHT, POLICIES
from training.evaluation.metrics import Values, Weights, ratio
from training.evaluation.predictions import Predictions

LEAST_ALERTS = 2


@dataclass(frozen=True, slots=True)
class Histories:
    """O objects on which policies are evaluated."""

    first: NDArray[np.int64]  # [O] row of the object's first alert, whose weight is the object's weight
    truth: NDArray[np.int64]  # [O] class of that alert; 1 if policies should save the object
    saved: Mapping[str, NDArray[np.bool_]]  # [O] by policy

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Return the histories in the predictions; there are none with several classes or without magnitudes."""
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
        """Return `<policy>.purity` and `<policy>.completeness` for weights [..., N] of alerts.

        The weights are equal within an object. Purity is the fraction of saved objects that are true; completeness is
        the fraction of true objects that are saved. The result is empty unless both true and other objects are there,
        because purity would be meaningless.
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
        """Return the number of objects behind each figure of `measure`."""
        saved = {f"{name}.purity": int(saved.sum()) for name, saved in self.saved.items()}
        return saved | {f"{name}.completeness": int((self.truth == 1).sum()) for name in self.saved}


def _faint(predictions: Predictions, rows: NDArray[np.int64]) -> bool:
    return bool(predictions.truth[rows[0]] == 1 and predictions.magpsf[rows].min() > BRIGHT)
