"""Explains scored alerts with lenses: joins a lens, the model whose network it explains, and the anomaly scores.

It runs on the few alerts that somebody asks about, and never changes a score or a flag.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.anomalies.reference import ReferenceCard
from broker_filter.anomalies.score import AnomalyScorer, Reason
from broker_filter.packets.batch import Survey
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import Bundle, Part
from broker_filter.scoring.explanation import Explanation, Verdict
from broker_filter.scoring.lens import Lens, Outcome, find_network
from broker_filter.scoring.lens_files import ANOMALY_SCORE, LENS_CARD, LensCard, LensError, LensFiles, open_files
from broker_filter.scoring.scorer import Model, Scorer
from broker_filter.streaming.scored import ScoredBatch

USUAL = 2.0
"""A modality whose standardised distance is below this is not what makes an alert strange: about 95 % of ordinary
alerts are below it."""


@dataclass(frozen=True, slots=True)
class ModelLens:
    """A lens with the model whose network it explains."""

    lens: Lens
    model: Model

    def explain(
        self, scored: ScoredBatch, rows: NDArray[np.int64], survey: Survey, judge: AnomalyScorer | None
    ) -> list[Explanation]:
        """Return the explanations of the alerts in `rows`, which are of one survey that the lens takes.

        `judge`: measures effects on the anomaly score; None if the alerts are not compared with a reference.
        """
        chosen = np.zeros(len(scored.alerts), np.bool_)
        chosen[rows] = True
        alerts = raw_alerts(scored.alerts)[chosen]  # in the order of the batch
        outcome = self._outcome(scored, np.flatnonzero(chosen), judge)
        found = self.lens.explain(alerts, survey, outcome)
        by_row = dict(zip(np.flatnonzero(chosen).tolist(), found, strict=True))
        return [by_row[row] for row in rows.tolist()]

    def _outcome(self, scored: ScoredBatch, rows: NDArray[np.int64], judge: AnomalyScorer | None) -> Outcome | None:
        """Return what effects are measured on; None if that needs a reference and there is none."""
        card = self.lens.card
        if card.effect_on != ANOMALY_SCORE:
            label = self.model.bundle.card.outputs.labels.index(card.effect_on)
            return lambda _, probabilities: probabilities[:, label].astype(np.float64)
        if judge is None:
            return None
        scores = next(one for one in scored.scores.models if one.model == self.model.name)
        embedding = scores.embedding
        assert embedding is not None  # `find_explained`: the bundle gives the embedding that is judged
        return lambda i, vectors: judge.score_variants(embedding[rows[i]], card.modality, vectors).astype(np.float64)

    def of_reasons(
        self, scored: ScoredBatch, reasons: dict[int, Reason], survey: Survey, judge: AnomalyScorer
    ) -> dict[int, Explanation]:
        """Return what the lens says about flagged alerts of one survey, by row; nothing for a survey that it lacks.

        Where the lens's modality is usual, it says only that, because its features are then no reason. An alert
        without this modality is left to the lens, which says so.
        """
        if survey not in self.lens.surveys:
            return {}
        card = self.lens.card
        says = dict.fromkeys(reasons, Explanation(card.name, card.version, card.site, card.effect_on, Verdict.USUAL))
        strange = [row for row, reason in reasons.items() if reason.modalities.get(card.modality, np.inf) >= USUAL]
        if strange:
            says |= dict(zip(strange, self.explain(scored, np.array(strange), survey, judge), strict=True))
        return says


def find_explained(files: LensFiles, bundles: Sequence[Bundle], reference: ReferenceCard | None) -> tuple[Bundle, Part]:
    """Return the network that a lens explains, and its bundle.

    `reference`: the card of the reference set that anomalies are found with; None without one. Raises LensError if the
    lens is on none of the bundles, or if its effects cannot be measured.
    """
    (bundle, part), card = find_network(files, bundles), files.card
    where = files.directory / LENS_CARD
    if card.effect_on != ANOMALY_SCORE:
        if card.effect_on not in bundle.card.outputs.labels:
            raise LensError(
                f"{where}: effects on {card.effect_on}, which {bundle.card.name} does not give; export again"
            )
    elif card.modality not in bundle.modalities:
        raise LensError(f"{where}: on the modality {card.modality}, which {bundle.card.name} lacks; export again")
    elif reference is not None and reference.bundle != bundle.card.name:
        raise LensError(
            f"{where}: a lens on {bundle.card.name}, but the reference set was made with {reference.bundle}: its "
            "effects on the anomaly score cannot be measured; choose a lens on that bundle"
        )
    return bundle, part


def open_lenses(names: Sequence[str], scorer: Scorer, reference: ReferenceCard | None) -> list[ModelLens]:
    """Open lenses on the models of a scorer: names of shipped lenses, or directories. Raises LensError."""
    bundles = [model.bundle for model in scorer.models]
    lenses = []
    for name in names:
        files = open_files(name)
        bundle, part = find_explained(files, bundles, reference)
        model = next(model for model in scorer.models if model.bundle is bundle)
        lenses.append(ModelLens(Lens(files, part), model))
    return lenses


def explain_rows(
    scored: ScoredBatch, lens: ModelLens, judges: Mapping[Survey, AnomalyScorer], wanted: Collection[int] | None = None
) -> list[tuple[int, dict[str, Any]]]:
    """Return the row and the JSON form of each alert of a batch that the lens can explain, without duplicates.

    `judges`: by survey, for effects on the anomaly score; a survey may be absent. `wanted`: ids of alerts; None: all.
    """
    alerts = scored.alerts
    scores = next(one for one in scored.scores.models if one.model == lens.model.name)
    chosen = scores.taken & ~scored.duplicate & np.isin(alerts.survey, lens.lens.surveys)
    if wanted is not None:
        chosen &= np.isin(alerts.alert_id, list(wanted))
    entries = {}
    for survey in lens.lens.surveys:
        rows = np.flatnonzero(chosen & (alerts.survey == survey))
        if not len(rows):
            continue
        judge, embedding = judges.get(survey), scores.embedding
        anomaly: list[float | None] = [None] * len(rows)
        reasons: list[Reason | None] = [None] * len(rows)
        if judge is not None and embedding is not None:
            anomaly, reasons = judge.score(embedding[rows]).tolist(), list(judge.explain(embedding[rows]))
        found = lens.explain(scored, rows, survey, judge)
        for row, score, reason, explanation in zip(rows.tolist(), anomaly, reasons, found, strict=True):
            identity = alerts.identity(row)
            entries[row] = {
                "alert_id": identity.alert_id,
                "object_id": identity.object_id,
                "survey": str(survey),
                "mjd": identity.mjd,
                "anomaly_score": score,
                "modalities": reason.modalities if reason else {},
                **explanation.as_json(),
            }
    return sorted(entries.items())


def as_document(card: LensCard, alerts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON form of explained alerts, with the lens and its worth."""
    return {"lenses": [card.model_dump(mode="json", exclude={"files", "cells"})], "alerts": list(alerts)}
