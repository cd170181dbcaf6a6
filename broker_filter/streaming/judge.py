"""Flags anomalies in scored batches: the requested fraction of alerts with the highest anomaly scores.

Each survey has a threshold, which moves with every judged alert of the survey. So each batch must be judged once, and
in order. At a start, the thresholds are those of the reference. So a message that is read again after a restart may be
flagged differently, because the threshold has moved.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from broker_filter.anomalies.reference import Reference, ReferenceSetError, check_made_with, read_reference
from broker_filter.anomalies.score import AnomalyScorer, Reason
from broker_filter.anomalies.threshold import RateTracker
from broker_filter.scoring.scorer import Scorer
from broker_filter.streaming.explain import ModelLens, open_lenses
from broker_filter.streaming.expressions import FIELDS, Expression, compile_filter
from broker_filter.streaming.scored import Anomalies, ScoredBatch

log = logging.getLogger(__name__)


class AnomalyJudge:
    """Compares the alerts of scored batches with the reference's alerts of the same survey."""

    def __init__(
        self, reference: Reference, rate: float, where: Expression | None, lenses: Sequence[ModelLens] = ()
    ) -> None:
        """`rate`: fraction of each survey's judged alerts to flag.

        `where`: selects the alerts to judge; None selects all. `lenses`: explain the flagged alerts.

        An alert is judged only if the model gives it an embedding and the reference has alerts of its survey.
        """
        self._model = reference.card.bundle
        self._basis = reference.card, rate
        self._surveys = {
            survey: (AnomalyScorer(reference.card, part), RateTracker(part.scores, rate))
            for survey, part in reference.surveys.items()
        }
        self._where = where
        self._lenses = tuple(lenses)

    def continue_from(self, before: AnomalyJudge) -> None:
        """Share the thresholds of another judge, if both have the same reference and rate.

        The two judges then move the same thresholds, so one thread must use both.
        """
        if self._basis == before._basis:  # the card contains the sha256 of the reference's arrays
            trackers = {survey: tracker for survey, (_, tracker) in before._surveys.items()}
            self._surveys = {survey: (scorer, trackers[survey]) for survey, (scorer, _) in self._surveys.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that `where` reads, and that must be decoded."""
        return tuple(self._where.columns) if self._where else ()

    def judge(self, scored: ScoredBatch) -> Anomalies:
        """Return score, threshold, flag and reason of each alert.

        A duplicate is judged but does not move the threshold.

        Raises ReferenceSetError if the model gives no embedding.
        """
        model = next(one for one in scored.scores.models if one.model == self._model)
        if model.embedding is None:
            raise ReferenceSetError(f"the model {self._model} gives no embedding; choose a bundle that gives one")
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
                own = dict(zip(flagged.tolist(), scorer.explain(model.embedding[flagged]), strict=True))
                said = [lens.of_reasons(scored, own, survey, scorer) for lens in self._lenses]
                for row, reason in own.items():
                    explanations = tuple(of_lens[row] for of_lens in said if of_lens)
                    reasons[row] = replace(reason, explanations=explanations) if explanations else reason
        unjudged = np.flatnonzero(judged & ~np.isin(scored.alerts.survey, list(self._surveys)))
        return Anomalies(self._model, score, threshold, flag, reasons, unjudged)


def open_judge(
    scorer: Scorer, file: Path, rate: float, where: Expression | None = None, lenses: Sequence[str] = ()
) -> AnomalyJudge:
    """Open the judge of the scorer's alerts. Logs for which surveys the reference cannot judge alerts.

    `file`: a reference that was made with one of the models. `rate`, `where`: as for AnomalyJudge, but if `where` is
    None, the expression of the reference selects the alerts. `lenses`: names or directories of lenses on the models.

    Raises ReferenceSetError if the reference cannot be used with the models, LensError if a lens cannot, and
    ExpressionError if the expression of the reference does not compile.
    """
    reference = read_reference(file)
    check_made_with(file, reference.card, [model.bundle for model in scorer.models])
    model = next(model for model in scorer.models if model.name == reference.card.bundle)
    for survey in model.surveys:
        if counts := None if survey in reference.surveys else reference.card.surveys.get(str(survey)):
            log.warning(
                "%s: alerts of %s are not judged: the reference was built from too few alerts of this survey (%d "
                "passed its filter, of %d)",
                *(file, survey, counts.passed, counts.read),
            )
        elif survey not in reference.surveys:
            log.info("%s: alerts of %s are not judged: the reference has none", file, survey)
    if where is None and reference.card.where:
        where = compile_filter(reference.card.where, FIELDS, scorer.outputs)
    opened = open_lenses(lenses, scorer, reference.card)
    for lens in opened:
        log.info("lens %s on %s: %s", lens.lens.card.title, lens.lens.card.site, lens.lens.card.worth)
    return AnomalyJudge(reference, rate, where, opened)
