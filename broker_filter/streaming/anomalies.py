"""Which scored alerts are anomalies: how strange each is, and which are the strangest share of them.

Holds a threshold for each survey, which moves with every alert of it that is judged: batches must be judged once each,
in their order. A start begins from the reference's own thresholds, so that a message read again may be flagged
otherwise than the first time, as far as the threshold has moved.
"""

from __future__ import annotations

import logging

import numpy as np

from broker_filter import config
from broker_filter.scoring.anomaly import AnomalyScorer, Reason
from broker_filter.scoring.reference import Reference, ReferenceSetError, check_made_with, read_reference
from broker_filter.scoring.scorer import Scorer
from broker_filter.scoring.threshold import RateTracker
from broker_filter.streaming.expressions import FIELDS, Expression, compile_filter
from broker_filter.streaming.scored import Anomalies, ScoredBatch

log = logging.getLogger(__name__)


class AnomalyJudge:
    """Judges scored batches by a reference, the alerts of each survey by the reference's alerts of that survey."""

    def __init__(self, reference: Reference, rate: float, where: Expression | None) -> None:
        """`rate`: the share of each survey's judged alerts to flag; `where`: which are judged, all if None. Of those,
        the ones that have an embedding, of surveys that the reference has alerts of."""
        self._model = reference.card.bundle
        self._surveys = {
            survey: (AnomalyScorer(reference.card, part), RateTracker(part.scores, rate))
            for survey, part in reference.surveys.items()
        }
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
        judged = model.taken & self._where.evaluate(scored) if self._where else model.taken
        n = len(judged)
        score, threshold = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
        flag = np.zeros(n, np.bool_)
        reasons: dict[int, Reason] = {}
        for survey, (scorer, tracker) in self._surveys.items():
            rows = np.flatnonzero(judged & (scored.alerts.survey == survey))
            if not len(rows):
                continue
            score[rows] = scorer.score(model.embedding[rows])
            threshold[rows], flag[rows] = tracker.flag(score[rows], ~scored.duplicate[rows])
            if len(flagged := rows[flag[rows]]):
                reasons |= dict(zip(flagged.tolist(), scorer.explain(model.embedding[flagged]), strict=True))
        unjudged = np.flatnonzero(judged & ~np.isin(scored.alerts.survey, list(self._surveys)))
        return Anomalies(self._model, score, threshold, flag, reasons, unjudged)


def open_judge(asked: config.Anomalies, scorer: Scorer) -> AnomalyJudge:
    """What a configuration asks for. Logs which surveys' alerts the model takes and the reference cannot judge.

    Raises ReferenceSetError where the reference cannot be used with the models, ExpressionError for a filter that does
    not compile.
    """
    reference = read_reference(asked.reference)
    check_made_with(asked.reference, reference.card, [model.bundle.card for model in scorer.models])
    model = next(model for model in scorer.models if model.name == reference.card.bundle)
    for survey in model.surveys:
        if counts := None if survey in reference.surveys else reference.card.surveys.get(str(survey)):
            log.warning(
                "%s: alerts of %s are not judged: of %d that the reference was built from %d passed its filter, which "
                "are too few",
                *(asked.reference, survey, counts.read, counts.passed),
            )
        elif survey not in reference.surveys:
            log.info("%s: alerts of %s are not judged: the reference was built from none", asked.reference, survey)
    where = asked.where if asked.where is not None else reference.card.where
    return AnomalyJudge(reference, asked.rate, compile_filter(where, FIELDS, scorer.outputs) if where else None)
