"""Which scored alerts are anomalies: how strange each is, and which are the strangest share of them.

Holds the threshold, which moves with every alert that is judged: batches must be judged once each, in their order. A
start begins from the reference's own threshold, so that a message read again may be flagged otherwise than the first
time, as far as the threshold has moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_filter import config
from broker_filter.scoring.anomaly import AnomalyScorer, Reason
from broker_filter.scoring.reference import Reference, ReferenceSetError, check_made_with, read_reference
from broker_filter.scoring.scorer import Scorer
from broker_filter.scoring.threshold import RateTracker
from broker_filter.streaming.expressions import FIELDS, Expression, compile_filter

if TYPE_CHECKING:
    from broker_filter.streaming.filtering import ScoredBatch


@dataclass(frozen=True, slots=True)
class Anomalies:
    """What was found of N alerts; those that are not judged have NaN for a score and are not flagged."""

    model: str
    score: NDArray[np.float32]  # [N]
    threshold: NDArray[np.float32]  # [N] what the score met
    flag: NDArray[np.bool_]  # [N]
    reasons: dict[int, Reason] = field(default_factory=dict)  # of the rows that are flagged

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Which have a score, [N]."""
        return ~np.isnan(self.score)


class AnomalyJudge:
    """Judges scored batches by a reference."""

    def __init__(self, reference: Reference, rate: float, where: Expression | None) -> None:
        """`rate`: the share of the judged alerts to flag; `where`: which are judged, all if None. Of those, the ones
        that have an embedding, of surveys that the reference has alerts of."""
        self._model = reference.card.bundle
        self._surveys = np.unique(reference.alerts.survey)
        self._scorer = AnomalyScorer(reference)
        self._tracker = RateTracker(reference.scores, rate)
        self._where = where

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that it reads, which must be decoded."""
        return tuple(self._where.columns) if self._where else ()

    def judge(self, scored: ScoredBatch) -> Anomalies:
        """Scores, flags and reasons. Alerts seen before are flagged as others are, but move nothing."""
        model = next(one for one in scored.scores.models if one.model == self._model)
        if model.embedding is None:
            raise ReferenceSetError(f"the model {self._model} gives no embedding")
        judged = model.taken & np.isin(scored.alerts.survey, self._surveys)
        if self._where:
            judged &= self._where.evaluate(scored)
        score = np.full(len(judged), np.nan, np.float32)
        if judged.any():
            score[judged] = self._scorer.score(model.embedding[judged])
        threshold, flag = self._tracker.flag(score, ~scored.duplicate)
        reasons = {}
        if flag.any():
            explained = self._scorer.explain(model.embedding[flag])
            reasons = dict(zip(np.flatnonzero(flag).tolist(), explained, strict=True))
        return Anomalies(self._model, score, threshold, flag, reasons)


def open_judge(asked: config.Anomalies, scorer: Scorer) -> AnomalyJudge:
    """What a configuration asks for.

    Raises ReferenceSetError where the reference cannot be used with the models, ExpressionError for a filter that does
    not compile.
    """
    reference = read_reference(asked.reference)
    check_made_with(asked.reference, reference.card, [model.bundle.card for model in scorer.models])
    where = asked.where if asked.where is not None else reference.card.where
    outputs = [f"{model.name}.{label}" for model in scorer.models for label in model.labels]
    return AnomalyJudge(reference, asked.rate, compile_filter(where, FIELDS, outputs) if where else None)
