"""How strange an alert is beside a reference of ordinary ones, and what makes it strange.

Ordinary embeddings are a cloud, and so is each modality that they have side by side. An alert has a distance from each
cloud by one of three measures; those distances, in deviations of what is usual, make the score. `training anomalies`
says what each measure is worth. Works on embeddings alone, and decides nothing: which scores are flagged is
`threshold`'s affair. An alert's score does not depend on what else is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.neighbours import Embeddings, Neighbours, normalise
from broker_filter.scoring.reference import (
    UNLABELLED,
    Measure,
    ReferenceCard,
    ReferenceSetError,
    SurveyReference,
)

NEIGHBOURS = 5
"""Named in a reason, and measured from."""
SHRINKAGE = 0.003
"""Of a covariance towards a sphere of the same mean variance: enough to invert it where a network's embeddings hardly
vary in some directions, or the ordinary alerts are few."""
LEAST_VARIANCE = 1e-12
"""Of embeddings of length 1: below it they differ by no more than float32 rounds."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An ordinary alert, and the cosine distance of its embedding."""

    alert_id: int
    object_id: str
    distance: float


@dataclass(frozen=True, slots=True)
class Reason:
    """What makes an alert strange: the ordinary alerts most like it, the nearest first; how unlike theirs each modality
    is that it has, in deviations of what is usual; and the one that is most unlike."""

    neighbours: tuple[Neighbour, ...]
    modalities: dict[str, float]
    most_unlike: str | None


class Mahalanobis:
    """The Mahalanobis distance from the mean: Lee et al. 2018 (arXiv:1807.03888), eq. 2, all being of one class.

    By the cloud's own shape: what varies little among ordinary alerts counts as much as what varies a lot, and so does
    what never goes together.
    """

    def __init__(self, ordinary: Embeddings) -> None:
        """`ordinary`: [K, D], K of at least 2. Raises ReferenceSetError where all are the same."""
        wide = ordinary.astype(np.float64)
        self._mean = wide.mean(axis=0)
        covariance = np.cov(wide, rowvar=False)
        if not np.trace(covariance) > LEAST_VARIANCE:
            raise ReferenceSetError("the ordinary alerts all look the same: give more inputs")
        sphere = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
        self._whitening = np.linalg.cholesky(np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere))

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """The distances [N] of embeddings [N, D]."""
        return np.asarray(np.linalg.norm((embedding - self._mean) @ self._whitening, axis=1))


class NeighbourDistance:
    """The mean cosine distance from the NEIGHBOURS nearest: Ramaswamy et al. 2000 (SIGMOD), the mean in place of the
    last; of learnt embeddings, Sun et al. 2022 (arXiv:2204.06507)."""

    def __init__(self, ordinary: Embeddings) -> None:
        """`ordinary`: [K, D], K of at least NEIGHBOURS."""
        self._neighbours = Neighbours(ordinary)

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """The distances [N] of embeddings [N, D]."""
        return np.asarray(self._neighbours.nearest(embedding, NEIGHBOURS)[0].mean(axis=1, dtype=np.float64))


class CentroidDistance:
    """The cosine distance from the nearest class's centroid: Rizhko & Bloom 2025 (arXiv:2411.08842)."""

    def __init__(self, ordinary: Embeddings, label: NDArray[np.int64]) -> None:
        """`ordinary`: [K, D], of the classes `label` [K]. Raises ReferenceSetError where none has a label."""
        labelled = label != UNLABELLED
        if not labelled.any():
            raise ReferenceSetError("no ordinary alert has a label, and centroids are of classes")
        _, label = np.unique(label[labelled], return_inverse=True)  # a class without alerts has no centroid
        self._centroids = centroids(ordinary[labelled], label).astype(np.float64)

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """The distances [N] of embeddings [N, D]."""
        return np.asarray(1 - (embedding.astype(np.float64) @ self._centroids.T).max(axis=1))


def centroids(embedding: Embeddings, label: NDArray[np.int64]) -> Embeddings:
    """The mean embedding of each class, of length 1, [C, D]; zeros for a class without alerts."""
    sums = np.zeros((int(label.max()) + 1, embedding.shape[1]))
    np.add.at(sums, label, embedding)
    return normalise(sums)


def parts(embedding: NDArray[np.float32], modalities: int) -> list[Embeddings]:
    """An embedding [N, D] as a whole, and each of the M modalities that it has side by side, [N, D / M]; each of length
    1, zeros where an alert lacks it."""
    whole = normalise(embedding)
    if not modalities:
        return [whole]
    apart = normalise(embedding.reshape(len(embedding), modalities, -1))
    return [whole] + [apart[:, m] for m in range(modalities)]


class Cloud:
    """Ordinary embeddings, as a whole and in each of their modalities."""

    def __init__(self, embedding: Embeddings, modalities: int, measure: Measure, label: NDArray[np.int64]) -> None:
        """`embedding` [K, D], of M `modalities`; `label` [K], which `centroids` are of.

        Raises ReferenceSetError where one is had by fewer than NEIGHBOURS alerts, or the measure cannot be made of
        them.
        """
        self._modalities = modalities
        self._distances = []
        for part in parts(embedding, modalities):
            known = part.any(axis=1)
            if known.sum() < NEIGHBOURS:
                raise ReferenceSetError("hardly an ordinary alert has all that the embedding is of: give more inputs")
            self._distances.append(_measured(measure, part[known], label[known]))

    def distances(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """How far each of [N, D] is from the ordinary ones, as a whole and in each modality, [N, 1 + M]; NaN for what
        it lacks."""
        columns = [
            np.where(part.any(axis=1), distance(part), np.nan)
            for part, distance in zip(parts(embedding, self._modalities), self._distances, strict=True)
        ]
        return np.stack(columns, axis=1)


def _measured(
    measure: Measure, ordinary: Embeddings, label: NDArray[np.int64]
) -> Callable[[Embeddings], NDArray[np.float64]]:
    match measure:
        case "mahalanobis":
            return Mahalanobis(ordinary)
        case "neighbours":
            return NeighbourDistance(ordinary)
        case "centroids":
            return CentroidDistance(ordinary, label)


def from_neighbours(
    embedding: NDArray[np.float32], neighbours: NDArray[np.float32], modalities: int
) -> NDArray[np.float64]:
    """How far the modalities of each of [N, D] are from those of its neighbours [N, k, D], [N, M]: the mean cosine
    distance from the neighbours that have it; NaN where it or all of them lack it."""
    if not modalities:
        return np.empty((len(embedding), 0))
    own = normalise(embedding.reshape(len(embedding), 1, modalities, -1))
    theirs = normalise(neighbours.reshape(*neighbours.shape[:2], modalities, -1))
    distance = 1 - (own * theirs).sum(axis=3, dtype=np.float64)
    there = own.any(axis=3) & theirs.any(axis=3)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, distance, 0).sum(axis=1) / there.sum(axis=1))


def strangeness(distances: NDArray[np.float64], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores [N] of distances [N, P]: the mean of those there are, each in deviations of `usual` [P, 2]; NaN where
    there is none."""
    unusual = (distances - usual[:, 0]) / usual[:, 1]
    known = np.isfinite(unusual)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, unusual, 0).sum(axis=1) / known.sum(axis=1), np.float32)


class AnomalyScorer:
    """Scores and reasons for alerts of one survey, by a reference's alerts of it. Several threads may call it."""

    def __init__(self, card: ReferenceCard, reference: SurveyReference) -> None:
        """Makes the search ready: some seconds for a million alerts."""
        alerts = reference.alerts
        self._names = card.modalities
        self._usual = reference.usual
        self._apart = reference.apart
        self._alerts = alerts
        self._cloud = Cloud(alerts.embedding, len(self._names), card.measure, reference.label)
        self._neighbours = Neighbours(alerts.embedding)

    def score(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """How strange each of [N, D] is, [N]; NaN for one that is all zeros."""
        return strangeness(self._cloud.distances(embedding), self._usual)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[tuple[Neighbour, ...]]:
        """The k ordinary alerts most like each of [N, D], the nearest first."""
        return self._named(*self._neighbours.nearest(normalise(embedding), k))

    def explain(self, embedding: NDArray[np.float32]) -> list[Reason]:
        """Why each of [N, D] is as strange as it is."""
        distances, rows = self._neighbours.nearest(normalise(embedding), NEIGHBOURS)
        theirs = np.where(rows[..., None] < 0, np.float32(0), self._alerts.embedding[rows])
        unlike = (from_neighbours(embedding, theirs, len(self._names)) - self._apart[:, 0]) / self._apart[:, 1]
        reasons = []
        for neighbours, far in zip(self._named(distances, rows), unlike, strict=True):
            modalities = {name: float(d) for name, d in zip(self._names, far, strict=True) if np.isfinite(d)}
            reasons.append(Reason(neighbours, modalities, max(modalities, key=modalities.__getitem__, default=None)))
        return reasons

    def _named(self, distances: NDArray[np.float32], rows: NDArray[np.int64]) -> list[tuple[Neighbour, ...]]:
        """The alerts in rows [N, k], those that there are, and their distances [N, k]."""
        alert_id, object_id = self._alerts.alert_id, self._alerts.object_id
        return [
            tuple(
                Neighbour(int(alert_id[row]), str(object_id[row]), float(distance))
                for distance, row in zip(distances[i], rows[i], strict=True)
                if row >= 0
            )
            for i in range(len(rows))
        ]
