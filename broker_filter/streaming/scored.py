"""A batch of packets after decoding and scoring: the rows that were scored, the rejects, and the anomalies among them.

Holds data only, and imports no model runtime: a filter is compiled without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject
from broker_filter.scoring.scores import Scores

if TYPE_CHECKING:
    from broker_filter.scoring.anomaly import Reason


@dataclass(frozen=True, slots=True)
class Anomalies:
    """What was found of N alerts; those that are not judged have NaN for a score and are not flagged."""

    model: str
    score: NDArray[np.float32]  # [N]
    threshold: NDArray[np.float32]  # [N] of its survey, what the score met
    flag: NDArray[np.bool_]  # [N]
    reasons: dict[int, Reason] = field(default_factory=dict)  # of the rows that are flagged
    unjudged: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows that passed the cut, of surveys that the reference has too few alerts of."""

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Which have a score, [N]."""
        return ~np.isnan(self.score)


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """What became of a batch of packets: every alert in them is a scored row of `alerts` or one of `rejects`.

    Rows of `alerts` that no model takes are among the rejects (`no_model_for_survey`) and not in `scored`.
    """

    packets: Sequence[Packet]
    alerts: AlertBatch
    scores: Scores
    duplicate: NDArray[np.bool_]  # [N] the alert id was seen before within the window
    rejects: Sequence[Reject]
    anomalies: Anomalies | None = None  # where they are looked for

    @property
    def scored(self) -> NDArray[np.int64]:
        """Indices of the alerts that at least one model scored."""
        return np.flatnonzero(self.scores.taken)

    def less(self, refused: Mapping[int, Reject]) -> ScoredBatch:
        """The batch with some of its scored rows as rejects instead."""
        if not refused:
            return self
        taken = self.scores.taken.copy()
        taken[list(refused)] = False
        scores = replace(self.scores, taken=taken)
        return replace(self, scores=scores, rejects=[*self.rejects, *refused.values()])
