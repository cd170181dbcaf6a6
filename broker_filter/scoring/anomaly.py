"""How strange an alert is beside a reference of ordinary ones, and what makes it strange.

Ordinary embeddings are a cloud, and so is each modality that they have side by side. An alert has a distance from the
middle of each cloud by the cloud's own shape; those distances, in deviations of what is usual, make the score. So what
varies little among ordinary alerts counts as much as what varies a lot, and so does what never goes together
(`training anomalies` compares this with other measures). Works on embeddings alone, and decides nothing: which scores
are flagged is `threshold`'s affair. An alert's score does not depend on what else is scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.neighbours import Embeddings, Neighbours, normalise
from broker_filter.scoring.reference import Reference, ReferenceSetError

NEIGHBOURS = 5
"""Named in a reason."""
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
    """What makes an alert strange: the ordinary alerts most like it, the nearest first; how strange each modality is
    that it has, in deviations of what is usual; and the strangest of them."""

    neighbours: tuple[Neighbour, ...]
    modalities: dict[str, float]
    most_unlike: str | None


class Mahalanobis:
    """The Mahalanobis distance from the mean: Lee et al. 2018 (arXiv:1807.03888), eq. 2, all being of one class."""

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

    def __init__(self, embedding: Embeddings, modalities: int) -> None:
        """`embedding` [K, D], of M `modalities`. Raises ReferenceSetError where one is had by fewer than two alerts."""
        self._modalities = modalities
        known = [part[part.any(axis=1)] for part in parts(embedding, modalities)]
        if min(map(len, known)) < 2:
            raise ReferenceSetError("hardly an ordinary alert has all that the embedding is of: give more inputs")
        self._distances = [Mahalanobis(part) for part in known]

    def distances(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """How far each of [N, D] is from the middle, as a whole and in each modality, [N, 1 + M]; NaN for what it
        lacks."""
        columns = [
            np.where(part.any(axis=1), distance(part), np.nan)
            for part, distance in zip(parts(embedding, self._modalities), self._distances, strict=True)
        ]
        return np.stack(columns, axis=1)


def strangeness(distances: NDArray[np.float64], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores [N] of distances [N, P]: the mean of those there are, each in deviations of `usual` [P, 2]; NaN where
    there is none."""
    unusual = (distances - usual[:, 0]) / usual[:, 1]
    known = np.isfinite(unusual)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, unusual, 0).sum(axis=1) / known.sum(axis=1), np.float32)


class AnomalyScorer:
    """Scores and reasons by one reference. May be called from several threads."""

    def __init__(self, reference: Reference) -> None:
        """Makes the search ready: some seconds for a million alerts."""
        alerts = reference.alerts
        self._names = reference.card.modalities
        self._usual = reference.usual
        self._alert_id, self._object_id = alerts.alert_id, alerts.object_id
        self._cloud = Cloud(alerts.embedding, len(self._names))
        self._neighbours = Neighbours(alerts.embedding)

    def score(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """How strange each of [N, D] is, [N]; NaN for one that is all zeros."""
        return strangeness(self._cloud.distances(embedding), self._usual)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[tuple[Neighbour, ...]]:
        """The k ordinary alerts most like each of [N, D], the nearest first."""
        distances, rows = self._neighbours.nearest(normalise(embedding), k)
        return [
            tuple(
                Neighbour(int(self._alert_id[row]), str(self._object_id[row]), float(distance))
                for distance, row in zip(distances[i], rows[i], strict=True)
                if row >= 0
            )
            for i in range(len(embedding))
        ]

    def explain(self, embedding: NDArray[np.float32]) -> list[Reason]:
        """Why each of [N, D] is as strange as it is."""
        unusual = ((self._cloud.distances(embedding) - self._usual[:, 0]) / self._usual[:, 1])[:, 1:]
        reasons = []
        for neighbours, far in zip(self.nearest(embedding, NEIGHBOURS), unusual, strict=True):
            modalities = {name: float(d) for name, d in zip(self._names, far, strict=True) if np.isfinite(d)}
            reasons.append(Reason(neighbours, modalities, max(modalities, key=modalities.__getitem__, default=None)))
        return reasons
