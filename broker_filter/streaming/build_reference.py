"""Builds a reference set from scored alerts: a sample of ordinary alerts, calibrated on held-out ordinary alerts.

Each survey has its own sample and calibration. The memory is bounded by a few times the number of alerts that are kept.
The sample depends only on the ids of the alerts, not on their order. This module reads and writes no files.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Neighbours, normalise
from broker_filter.anomalies.reference import (
    Measure,
    Reference,
    ReferenceAlerts,
    ReferenceSetError,
    SurveyCounts,
    SurveyReference,
    make_reference,
)
from broker_filter.anomalies.score import NEIGHBOURS, Cloud, anomaly_scores, from_neighbours
from broker_filter.packets.batch import Survey
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.scoring.scorer import Model
from broker_filter.streaming.expressions import Expression
from broker_filter.streaming.scored import ScoredBatch

if TYPE_CHECKING:
    from broker_filter.scoring.labels import Labels

HELD_OUT = 0.2
"""Fraction of the objects that are held out of the reference, for its calibration."""
MAX_COMPARED = 10_000
"""Largest number of held-out alerts that are compared with their neighbours, which bounds the memory."""
MIN_ALERTS = 20
"""Smallest number of alerts of a survey, both in the reference and held out. A threshold needs a tail of scores."""
FEW_PASS = 0.1
"""If a smaller fraction of a survey's alerts passes the filter, the filter is probably wrong for the survey."""

log = logging.getLogger(__name__)


@dataclass
class Sample:
    """A random sample of at most `limit` alerts. The ids alone decide which alerts are drawn; each id occurs once."""

    limit: int
    _parts: list[tuple[NDArray[np.uint64], ReferenceAlerts]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._drawn()[0]) if self._parts else 0

    def put(self, alerts: ReferenceAlerts) -> None:
        """Add alerts to the sample, and drop alerts that are not drawn."""
        self._parts.append((np.array([_draw(str(alert)) for alert in alerts.alert_id.tolist()], np.uint64), alerts))
        if sum(len(part) for _, part in self._parts) > 2 * self.limit:
            self._parts = [self._drawn()]

    def take(self) -> ReferenceAlerts:
        """Return the sample, in the order of the draw. Raises ReferenceSetError if it is empty."""
        if not self._parts:
            raise ReferenceSetError("no ordinary alert among the inputs")
        return self._drawn()[1]

    def _drawn(self) -> tuple[NDArray[np.uint64], ReferenceAlerts]:
        draws = np.concatenate([draw for draw, _ in self._parts])
        alerts = concatenate([part for _, part in self._parts])
        draws, first = np.unique(draws, return_index=True)
        return draws[: self.limit], alerts[first[: self.limit]]


def ordinary_alerts(scored: ScoredBatch, model: Model, where: Expression | None) -> ReferenceAlerts:
    """Return the ordinary alerts of a batch: those that pass `where` (all alerts if None), without duplicates.

    Raises ReferenceSetError if the model gives no embedding.
    """
    scores = next(one for one in scored.scores.models if one.model == model.name)
    if scores.embedding is None:
        raise ReferenceSetError(f"the bundle {model.name} gives no embedding: build with one that does")
    alerts = scored.alerts
    rows = np.flatnonzero(scores.taken & ~scored.duplicate & (where.evaluate(scored) if where else True))
    names = np.array(alerts.object_id, np.str_)
    return ReferenceAlerts(normalise(scores.embedding[rows]), alerts.alert_id[rows], names[rows], alerts.survey[rows])


def build_reference(
    batches: Iterable[ScoredBatch],
    model: Model,
    where: Expression | None,
    limit: int,
    measure: Measure = "mahalanobis",
    labels: Labels | None = None,
) -> Reference:
    """Build a reference from up to `limit` alerts of each survey, calibrated on alerts of other objects.

    `where`: selects the ordinary alerts; None selects all. `labels`: classes of some alerts, for the measure
    `centroids`. A survey with too few alerts is left out with a warning. A survey of which few alerts pass `where` is
    logged too. Raises ReferenceSetError if no survey has enough alerts.
    """
    samples = {survey: Sample(limit) for survey in Survey}
    read: Counter[int] = Counter()
    passed: Counter[int] = Counter()
    for scored in batches:
        read.update(scored.alerts.survey[~scored.duplicate].tolist())
        ordinary = ordinary_alerts(scored, model, where)
        passed.update(ordinary.survey.tolist())
        for survey, sample in samples.items():
            if (own := ordinary.survey == survey).any():
                sample.put(ordinary[own])
    parts: dict[Survey, SurveyReference] = {}
    counts: dict[Survey, SurveyCounts] = {}
    problems: dict[Survey, ReferenceSetError] = {}
    for survey in (survey for survey in Survey if read[survey]):
        try:
            alerts = samples[survey].take()
            label = labels.of(alerts.alert_id, alerts.object_id) if labels else np.full(len(alerts), UNLABELLED)
            parts[survey] = part = calibrate(alerts, label, len(model.bundle.modalities), measure)
            kept, held_out = len(part.alerts), len(part.scores)
        except ReferenceSetError as error:
            problems[survey], kept, held_out = error, 0, 0
        counts[survey] = SurveyCounts(read=read[survey], passed=passed[survey], kept=kept, held_out=held_out)
        if passed[survey] < FEW_PASS * read[survey]:
            log.warning(
                "%s: only %d of %d alerts are scored by %s and pass `%s`; choose a filter that suits the survey",
                *(survey, passed[survey], read[survey], model.name, where.text if where else ""),
            )
    if not parts:
        said = "; ".join(f"{survey}: {problem}" for survey, problem in problems.items())
        raise ReferenceSetError(said or "no ordinary alert among the inputs")
    for survey, problem in problems.items():
        log.warning("%s: %s. The reference is built without this survey: its alerts are not judged", survey, problem)
    passing, classes = where.text if where else None, labels.classes if labels else ()
    return make_reference(model.bundle, passing, parts, counts, measure, classes)


def calibrate(alerts: ReferenceAlerts, label: NDArray[np.int64], modalities: int, measure: Measure) -> SurveyReference:
    """Return the reference of a survey, made from a part of its alerts and calibrated on the held-out alerts.

    `label`: class indices int64[N] of the alerts, or UNLABELLED. `modalities`: their number in an embedding.

    Raises ReferenceSetError if there are too few alerts, or if all distances of a modality are equal.
    """
    held_out = _held_out(alerts.object_id)
    kept, others = alerts[~held_out], alerts[held_out]
    if len(kept) < MIN_ALERTS or len(others) < MIN_ALERTS:
        raise ReferenceSetError(
            f"{len(alerts)} ordinary alerts of {len(np.unique(alerts.object_id))} objects are too few for a reference: "
            f"it needs at least {MIN_ALERTS}, and {MIN_ALERTS} more of other objects; add inputs, or use a wider filter"
        )
    label = label[~held_out]
    distances = Cloud(kept.embedding, modalities, measure, label).distances(others.embedding)
    few = others.embedding[:MAX_COMPARED]
    theirs = kept.embedding[Neighbours(kept.embedding).nearest(few, NEIGHBOURS)[1]]
    usual = _mean_and_deviation(distances)
    apart = _mean_and_deviation(from_neighbours(few, theirs, modalities))
    if not ((usual[:, 1] > 0).all() and (apart[:, 1] > 0).all()):
        raise ReferenceSetError(
            "in at least one modality, calibration distances have zero variance: the embedding is the same for all "
            "alerts there; add more alerts or use another bundle"
        )
    return SurveyReference(kept, np.sort(anomaly_scores(distances, usual)), usual, apart, label)


def _held_out(object_id: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Return which alerts are held out for the calibration, bool[N].

    These are the alerts of a fraction HELD_OUT of the objects, or of more objects if there are too few alerts.
    """
    objects, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    draw = np.array([_draw(name) for name in objects.tolist()], np.uint64)
    order = np.argsort(draw)
    enough = int(np.searchsorted(alerts_of[order].cumsum(), MIN_ALERTS)) + 1
    chosen = np.zeros(len(objects), np.bool_)
    chosen[order[: max(enough, int((draw < HELD_OUT * 2**64).sum()))]] = True
    return chosen[index]


def _mean_and_deviation(distances: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return mean and standard deviation of each column of [N, P] without NaN, float32[P, 2]."""
    return np.stack([np.nanmean(distances, axis=0), np.nanstd(distances, axis=0)], axis=1).astype(np.float32)


def _draw(name: str) -> int:
    """Return a pseudo-random number below 2**64 that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def concatenate(parts: Sequence[ReferenceAlerts]) -> ReferenceAlerts:
    """Return the alerts of all parts, in order."""
    return ReferenceAlerts(
        np.concatenate([part.embedding for part in parts]),
        np.concatenate([part.alert_id for part in parts]),
        np.concatenate([part.object_id for part in parts]),
        np.concatenate([part.survey for part in parts]),
    )
