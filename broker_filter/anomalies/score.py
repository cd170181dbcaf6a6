"""Anomaly scores: how far an alert's embedding lies from a reference of ordinary alerts, and the reason.

Distances are measured in the embedding as a whole and in each modality (each modality is a slice of the embedding).
Each distance is standardised with the mean and standard deviation of the distances of held-out ordinary alerts; the
anomaly score is the mean of the standardised distances. `training/embedding/ANOMALIES.md` compares the three distance
measures.

This module sees embeddings only. `threshold` decides which scores are flagged. An alert's score does not depend on the
other alerts that are scored with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Embeddings, Neighbours, normalise
from broker_filter.anomalies.reference import (
    Measure,
    ReferenceCard,
    ReferenceSetError,
    SurveyReference,
)
from broker_filter.scoring.explanation import Explanation
from broker_filter.scoring.labels import UNLABELLED

NEIGHBOURS = 5
"""Number of nearest neighbours: named in a reason, and averaged over by the measure `neighbours`."""
SHRINKAGE = 0.003
"""Weight with which a covariance matrix is shrunk towards a multiple of the identity with the same trace. It keeps the
matrix invertible if the embeddings hardly vary in some directions or the ordinary alerts are few."""
LEAST_VARIANCE = 1e-12
"""Total variance of unit vectors below which the vectors differ by float32 rounding only."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An ordinary alert, and the cosine distance of its embedding from the embedding of the judged alert."""

    alert_id: int
    object_id: str
    distance: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an alert was given its anomaly score.

    `neighbours`: the most similar ordinary alerts, the nearest first. `modalities`: for each modality that the alert
    has, its distance from that modality of the neighbours, standardised (in standard deviations of what ordinary alerts
    show). `most_unlike`: the modality with the largest of these values, or None if the alert has no modality.
    `explanations`: what each configured lens says about the alert.
    """

    neighbours: tuple[Neighbour, ...]
    modalities: dict[str, float]
    most_unlike: str | None
    explanations: tuple[Explanation, ...] = ()


class Mahalanobis:
    """The Mahalanobis distance from the mean: Lee et al. 2018 (arXiv:1807.03888), eq. 2, with a single class.

    Differences are weighted by the inverse covariance of the ordinary embeddings: a deviation counts by how rare it is
    among ordinary alerts, also along directions that vary little and in combinations of features that do not occur
    together.
    """

    def __init__(self, ordinary: Embeddings) -> None:
        """`ordinary`: unit vectors float32[K, D], K >= 2. Raises ReferenceSetError if all are the same."""
        wide = ordinary.astype(np.float64)
        self._mean = wide.mean(axis=0)
        covariance = np.cov(wide, rowvar=False)
        if not np.trace(covariance) > LEAST_VARIANCE:
            raise ReferenceSetError(
                "all ordinary alerts have the same embedding, so distances have no scale: give more inputs"
            )
        sphere = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
        self._whitening = np.linalg.cholesky(np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere))

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """Return the distances float64[N] of embeddings float32[N, D]."""
        return np.asarray(np.linalg.norm((embedding - self._mean) @ self._whitening, axis=1))


class NeighbourDistance:
    """The mean cosine distance from the NEIGHBOURS nearest ordinary alerts.

    Ramaswamy et al. 2000 (SIGMOD) use the distance from the k-th neighbour; here it is the mean over all k. Sun et al.
    2022 (arXiv:2204.06507) apply the method to learnt embeddings.
    """

    def __init__(self, ordinary: Embeddings) -> None:
        """`ordinary`: unit vectors float32[K, D], K >= NEIGHBOURS."""
        self._neighbours = Neighbours(ordinary)

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """Return the distances float64[N] of embeddings float32[N, D]."""
        return np.asarray(self._neighbours.nearest(embedding, NEIGHBOURS)[0].mean(axis=1, dtype=np.float64))


class CentroidDistance:
    """The cosine distance from the nearest class centroid: Rizhko & Bloom 2024 (arXiv:2411.08842)."""

    def __init__(self, ordinary: Embeddings, label: NDArray[np.int64]) -> None:
        """`ordinary`: unit vectors float32[K, D]; `label`: class indices int64[K], UNLABELLED for alerts without one.

        Raises ReferenceSetError if no alert has a label.
        """
        labelled = label != UNLABELLED
        if not labelled.any():
            raise ReferenceSetError(
                "no ordinary alert has a label, and the measure `centroids` needs classes: give labels"
            )
        _, label = np.unique(label[labelled], return_inverse=True)  # a class without alerts has no centroid
        self._centroids = centroids(ordinary[labelled], label).astype(np.float64)

    def __call__(self, embedding: Embeddings) -> NDArray[np.float64]:
        """Return the distances float64[N] of embeddings float32[N, D]."""
        return np.asarray(1 - (embedding.astype(np.float64) @ self._centroids.T).max(axis=1))


def centroids(embedding: Embeddings, label: NDArray[np.int64]) -> Embeddings:
    """Return the mean embedding of each class, with length 1: float32[C, D]; zeros for a class without alerts."""
    sums = np.zeros((int(label.max()) + 1, embedding.shape[1]))
    np.add.at(sums, label, embedding)
    return normalise(sums)


def parts(embedding: NDArray[np.float32], modalities: int) -> list[Embeddings]:
    """Return the parts of embeddings [N, D]: the whole [N, D] and each of the M modalities [N, D / M].

    Every part is normalised to length 1; it is all zeros for an alert that lacks the modality.
    """
    whole = normalise(embedding)
    if not modalities:
        return [whole]
    apart = normalise(embedding.reshape(len(embedding), modalities, -1))
    return [whole] + [apart[:, m] for m in range(modalities)]


class Cloud:
    """Distances from ordinary embeddings, for the whole embedding and for each modality."""

    def __init__(self, embedding: Embeddings, modalities: int, measure: Measure, label: NDArray[np.int64]) -> None:
        """Prepare the measure over K ordinary alerts.

        `embedding`: float32[K, D], of M `modalities`. `label`: class indices int64[K], used by the measure `centroids`.

        Raises ReferenceSetError if fewer than NEIGHBOURS alerts have one of the modalities, or if the measure cannot be
        computed.
        """
        self._modalities = modalities
        self._distances = []
        for part in parts(embedding, modalities):
            known = part.any(axis=1)
            if known.sum() < NEIGHBOURS:
                raise ReferenceSetError(
                    f"fewer than {NEIGHBOURS} ordinary alerts have one of the modalities of the embedding: give more "
                    "inputs"
                )
            self._distances.append(_measured(measure, part[known], label[known]))

    def distances(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the distances of embeddings [N, D] from the ordinary embeddings: float64[N, 1 + M].

        The first column is for the whole embedding, the others are for the modalities; NaN where an alert lacks the
        modality.
        """
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
    """Return the mean cosine distance of each modality from the same modality of the neighbours, float64[N, M].

    `embedding`: float32[N, D], of M `modalities`. `neighbours`: the embeddings of the k neighbours, float32[N, k, D].
    The mean is over the neighbours that have the modality. The result is NaN where the alert, or every neighbour, lacks
    the modality.
    """
    if not modalities:
        return np.empty((len(embedding), 0))
    own = normalise(embedding.reshape(len(embedding), 1, modalities, -1))
    theirs = normalise(neighbours.reshape(*neighbours.shape[:2], modalities, -1))
    distance = 1 - (own * theirs).sum(axis=3, dtype=np.float64)
    there = own.any(axis=3) & theirs.any(axis=3)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, distance, 0).sum(axis=1) / there.sum(axis=1))


def anomaly_scores(distances: NDArray[np.float64], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the anomaly scores float32[N] of distances [N, P].

    Each distance is standardised with the mean and standard deviation in `usual` [P, 2]; the score is the mean of the
    standardised distances that are finite, or NaN if none is.
    """
    unusual = (distances - usual[:, 0]) / usual[:, 1]
    known = np.isfinite(unusual)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, unusual, 0).sum(axis=1) / known.sum(axis=1), np.float32)


class AnomalyScorer:
    """Computes anomaly scores and reasons for alerts of one survey, from its part of a reference. Thread-safe."""

    def __init__(self, card: ReferenceCard, reference: SurveyReference) -> None:
        """Build the search index; this takes some seconds for a million alerts."""
        alerts = reference.alerts
        self._names = card.modalities
        self._usual = reference.usual
        self._apart = reference.apart
        self._alerts = alerts
        self._cloud = Cloud(alerts.embedding, len(self._names), card.measure, reference.label)
        self._neighbours = Neighbours(alerts.embedding)

    def score(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the anomaly scores float32[N] of embeddings [N, D]; NaN for an embedding that is all zeros."""
        return anomaly_scores(self._cloud.distances(embedding), self._usual)

    def score_variants(
        self, embedding: NDArray[np.float32], modality: str, vectors: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the anomaly scores float32[K] of an alert with K vectors [K, D / M] in the place of one modality.

        `embedding`: the alert's, float32[D]. Raises ValueError if the embedding has no such modality.
        """
        whole = normalise(embedding.reshape(len(self._names), -1))
        variants = np.repeat(whole[None], len(vectors), axis=0)
        variants[:, self._names.index(modality)] = vectors
        return self.score(variants.reshape(len(vectors), -1))

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[tuple[Neighbour, ...]]:
        """Return the k most similar ordinary alerts for each embedding of [N, D], the nearest first."""
        return self._named(*self._neighbours.nearest(normalise(embedding), k))

    def explain(self, embedding: NDArray[np.float32]) -> list[Reason]:
        """Return the reason for the score of each embedding of [N, D]."""
        distances, rows = self._neighbours.nearest(normalise(embedding), NEIGHBOURS)
        theirs = np.where(rows[..., None] < 0, np.float32(0), self._alerts.embedding[rows])
        unlike = (from_neighbours(embedding, theirs, len(self._names)) - self._apart[:, 0]) / self._apart[:, 1]
        reasons = []
        for neighbours, far in zip(self._named(distances, rows), unlike, strict=True):
            modalities = {name: float(d) for name, d in zip(self._names, far, strict=True) if np.isfinite(d)}
            reasons.append(Reason(neighbours, modalities, max(modalities, key=modalities.__getitem__, default=None)))
        return reasons

    def _named(self, distances: NDArray[np.float32], rows: NDArray[np.int64]) -> list[tuple[Neighbour, ...]]:
        """Return the ordinary alerts in `rows` [N, k] with their distances [N, k].

        A row of -1 stands for no neighbour and is left out.
        """
        alert_id, object_id = self._alerts.alert_id, self._alerts.object_id
        return [
            tuple(
                Neighbour(int(alert_id[row]), str(object_id[row]), float(distance))
                for distance, row in zip(distances[i], rows[i], strict=True)
                if row >= 0
            )
            for i in range(len(rows))
        ]
