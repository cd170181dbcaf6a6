"""A batch of packets after decoding and scoring: its scored alerts, its rejects, its anomalies and its filters.

This module holds data only and imports no model runtime, so that filters can be compiled without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject
from broker_filter.scoring.scores import ModelScores, Scores

if TYPE_CHECKING:
    from broker_filter.anomalies.score import Reason


class LeftOut(StrEnum):
    """Why a record of the shadow topic was left out. The alert's other records are published all the same."""

    SCHEMA_REFUSED = "schema_refused"
    """The schema registry refused the schema for the shadow topic."""
    REGISTRY_UNAVAILABLE = "registry_unavailable"
    """The schema registry gave no id for the shadow topic, although it gave ids for the other topics."""
    TOO_LARGE = "too_large"
    """The record is larger than the shadow topic accepts."""


@dataclass(frozen=True, slots=True)
class Anomalies:
    """The anomaly scores of N alerts. An alert that was not judged has the score NaN and is not flagged."""

    model: str
    """Name of the model whose embedding was judged."""
    score: NDArray[np.float32]  # [N]
    threshold: NDArray[np.float32]  # [N]; the threshold of the survey when the alert was judged
    flag: NDArray[np.bool_]  # [N]
    reasons: dict[int, Reason] = field(default_factory=dict)  # by flagged row
    unjudged: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows that passed the cut but were not judged, because the reference has too few alerts of their survey."""

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Whether each alert was judged, bool[N]."""
        return ~np.isnan(self.score)


@dataclass(frozen=True, slots=True)
class FilterOutcome:
    """Which of N alerts passed a filter."""

    name: str
    revision: str
    """Revision of the filter's expression."""
    passed: NDArray[np.bool_]  # [N]
    paused: bool = False
    """Whether the filter's topic is paused: it then gets none of the alerts that passed."""


@dataclass(frozen=True, slots=True)
class Match:
    """The target of a list that is nearest to an alert, within the radius of a filter."""

    list: str
    """The list, as the filter names it."""
    name: str
    separation: float
    """Angle between the target and the alert in arcseconds."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The outcome of a batch of packets: each alert in them is either a scored row of `alerts` or one of `rejects`.

    A row of `alerts` that no model takes is one of the rejects (`no_model_for_survey`) and not in `scored`.
    """

    packets: Sequence[Packet]
    alerts: AlertBatch
    scores: Scores
    duplicate: NDArray[np.bool_]  # [N]; whether the alert id was seen before within the window
    rejects: Sequence[Reject]
    anomalies: Anomalies | None = None  # None without anomaly detection
    filters: tuple[FilterOutcome, ...] = ()  # one for each configured filter, in the configured order
    matches: Mapping[int, tuple[Match, ...]] = field(default_factory=dict)
    """By row of `alerts`: the targets of the filters' lists that are near the alert. Other rows are near none."""
    shadows: tuple[ModelScores, ...] = ()
    """The outputs of the shadow models, without those of a model that failed on the batch."""

    @property
    def scored(self) -> NDArray[np.int64]:
        """Indices of the rows of `alerts` that at least one model scored, int64[number of scored alerts]."""
        return np.flatnonzero(self.scores.taken)

    @property
    def on_trial(self) -> NDArray[np.int64]:
        """Indices of the scored rows that at least one shadow model scored too, int64[number of such alerts]."""
        shadowed = [scores.taken for scores in self.shadows]
        return np.flatnonzero(self.scores.taken & np.logical_or.reduce(shadowed, initial=False))

    def less(self, refused: Mapping[int, Reject]) -> ScoredBatch:
        """Return the batch with some scored rows turned into rejects. `refused`: rejects by row."""
        if not refused:
            return self
        taken = self.scores.taken.copy()
        taken[list(refused)] = False
        scores = replace(self.scores, taken=taken)
        return replace(self, scores=scores, rejects=[*self.rejects, *refused.values()])
