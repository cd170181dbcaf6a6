"""Archives into a reference set: which of their alerts stand for the ordinary, and how strange others of them look.

Holds at most a few times the alerts that are kept, however many there are; which ones those are depends on their ids
alone, not on the order in which they come. Knows no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.anomaly import NEIGHBOURS, Cloud, from_neighbours, strangeness
from broker_filter.scoring.neighbours import Neighbours, normalise
from broker_filter.scoring.reference import (
    UNLABELLED,
    Measure,
    Ordinary,
    Reference,
    ReferenceSetError,
    make_reference,
)
from broker_filter.scoring.scorer import Model
from broker_filter.streaming.expressions import Expression
from broker_filter.streaming.filtering import ScoredBatch

if TYPE_CHECKING:
    from broker_filter.scoring.labels import Labels

HELD_OUT = 0.2
"""Share of the objects that the reference is calibrated on: their alerts are as ordinary, and it does not know them."""
MAX_COMPARED = 10_000
"""Of those, to find out how unlike its neighbours an ordinary alert is: more would only take room."""
MIN_HELD_OUT = 20
"""Alerts: with fewer there is no tail to find a threshold in."""


@dataclass
class Sample:
    """Up to `limit` of the alerts that are put in, drawn by their ids; each id once."""

    limit: int
    _parts: list[tuple[NDArray[np.uint64], Ordinary]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._drawn()[0]) if self._parts else 0

    def put(self, alerts: Ordinary) -> None:
        """Adds alerts, and forgets those that the draw leaves out."""
        self._parts.append((np.array([_draw(str(alert)) for alert in alerts.alert_id.tolist()], np.uint64), alerts))
        if sum(len(part) for _, part in self._parts) > 2 * self.limit:
            self._parts = [self._drawn()]

    def take(self) -> Ordinary:
        """The alerts, in the order of the draw. Raises ReferenceSetError where there are none."""
        if not self._parts:
            raise ReferenceSetError("no ordinary alert among the inputs")
        return self._drawn()[1]

    def _drawn(self) -> tuple[NDArray[np.uint64], Ordinary]:
        draws = np.concatenate([draw for draw, _ in self._parts])
        alerts = _concatenate([part for _, part in self._parts])
        draws, first = np.unique(draws, return_index=True)
        return draws[: self.limit], alerts[first[: self.limit]]


def ordinary_alerts(scored: ScoredBatch, model: Model, where: Expression | None) -> Ordinary:
    """The batch's alerts that may stand for the ordinary: those that pass `where`, all if None.

    Raises ReferenceSetError for a model without an embedding.
    """
    scores = next(one for one in scored.scores.models if one.model == model.name)
    if scores.embedding is None:
        raise ReferenceSetError(f"the bundle {model.name} gives no embedding: build with one that does")
    alerts = scored.alerts
    rows = np.flatnonzero(scores.taken & (where.evaluate(scored) if where else True))
    names = np.array(alerts.object_id, np.str_)
    return Ordinary(normalise(scores.embedding[rows]), alerts.alert_id[rows], names[rows], alerts.survey[rows])


def build_reference(
    batches: Iterable[ScoredBatch],
    model: Model,
    where: Expression | None,
    limit: int,
    measure: Measure = "mahalanobis",
    labels: Labels | None = None,
) -> Reference:
    """A reference of up to `limit` of the batches' alerts, calibrated on those of other objects.

    `labels`: of some of them, for the measure `centroids`. Raises ReferenceSetError where there are too few.
    """
    sample = Sample(limit)
    for scored in batches:
        sample.put(ordinary_alerts(scored, model, where))
    alerts = sample.take()
    objects, index = np.unique(alerts.object_id, return_inverse=True)
    held_out = np.array([_draw(name) < HELD_OUT * 2**64 for name in objects.tolist()])[index]
    kept, others = alerts[~held_out], alerts[held_out]
    if len(others) < MIN_HELD_OUT or len(kept) < NEIGHBOURS:
        raise ReferenceSetError(
            f"{len(alerts)} ordinary alerts of {len(objects)} objects are too few to say what is strange: at least "
            f"{MIN_HELD_OUT} of other objects than the rest are needed; give more inputs, or a wider filter"
        )
    card = model.bundle.card
    label = labels.of(kept.alert_id, kept.object_id) if labels else np.full(len(kept), UNLABELLED)
    distances = Cloud(kept.embedding, len(card.outputs.modalities), measure, label).distances(others.embedding)
    few = others.embedding[:MAX_COMPARED]
    theirs = kept.embedding[Neighbours(kept.embedding).nearest(few, NEIGHBOURS)[1]]
    usual = _mean_and_deviation(distances)
    apart = _mean_and_deviation(from_neighbours(few, theirs, len(card.outputs.modalities)))
    if not ((usual[:, 1] > 0).all() and (apart[:, 1] > 0).all()):
        raise ReferenceSetError("in some modality all alerts are equally strange: the embedding says nothing there")
    scores = np.sort(strangeness(distances, usual))
    passed, classes = where.text if where else None, labels.classes if labels else ()
    return make_reference(card, passed, kept, scores, usual, apart, measure, label, classes)


def _mean_and_deviation(distances: NDArray[np.float64]) -> NDArray[np.float32]:
    """Of the columns of [N, P], leaving out NaN, [P, 2]."""
    return np.stack([np.nanmean(distances, axis=0), np.nanstd(distances, axis=0)], axis=1).astype(np.float32)


def _draw(name: str) -> int:
    """A number below 2**64 that a name alone decides."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _concatenate(parts: Sequence[Ordinary]) -> Ordinary:
    return Ordinary(
        np.concatenate([part.embedding for part in parts]),
        np.concatenate([part.alert_id for part in parts]),
        np.concatenate([part.object_id for part in parts]),
        np.concatenate([part.survey for part in parts]),
    )
