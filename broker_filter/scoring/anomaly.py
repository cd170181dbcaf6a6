"""How strange an alert is beside a reference of ordinary ones, and what makes it strange.

In each modality an alert has a distance from the ordinary ones that are most like it there; those distances, in
deviations of what is usual, make the score. So a modality in which alerts are all much alike says as much as one in
which they are not (`training anomalies` compares this with other measures). Works on embeddings alone, and decides
nothing: which scores are flagged is `threshold`'s affair. An alert's score does not depend on what else is scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.neighbours import Embeddings, Neighbours, normalise
from broker_filter.scoring.reference import Reference

NEIGHBOURS = 5
"""Whose mean distance counts, and which are named in the reason."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An ordinary alert, and the cosine distance of its embedding."""

    alert_id: int
    object_id: str
    distance: float


@dataclass(frozen=True, slots=True)
class Reason:
    """What makes an alert strange: the ordinary alerts most like it as a whole, the nearest first; its distance from
    those most like it in each modality that it has; and the modality that adds most to its score."""

    neighbours: tuple[Neighbour, ...]
    modalities: dict[str, float]
    most_unlike: str | None


def apart(embedding: NDArray[np.float32], modalities: int) -> list[Embeddings]:
    """What an embedding [N, D] has side by side: [N, D / M] for each of M modalities, of length 1, zeros where an alert
    lacks it. Without modalities (0) it is all one."""
    parts = normalise(embedding.reshape(len(embedding), modalities or 1, -1))
    return [np.ascontiguousarray(parts[:, m]) for m in range(parts.shape[1])]


class Surroundings:
    """Ordinary alerts in each of their modalities."""

    def __init__(self, embedding: Embeddings, modalities: int) -> None:
        """`embedding` [K, D] of M `modalities`, 0 for one that is all one."""
        self._modalities = modalities
        self._neighbours = [Neighbours(part) for part in apart(embedding, modalities)]

    def distances(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """The mean cosine distance of each of [N, D] from the NEIGHBOURS nearest in each modality, [N, M or 1]; NaN
        where it lacks one. Ramaswamy et al. 2000 (SIGMOD), the mean in place of the last; of learnt embeddings, Sun et
        al. 2022 (arXiv:2204.06507)."""
        columns = []
        for part, neighbours in zip(apart(embedding, self._modalities), self._neighbours, strict=True):
            distance = neighbours.nearest(part, NEIGHBOURS)[0].astype(np.float64).mean(axis=1)
            columns.append(np.where(part.any(axis=1), distance, np.nan))
        return np.stack(columns, axis=1)


def strangeness(distances: NDArray[np.float64], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores [N] of distances [N, M]: the mean of those there are, each in deviations of `usual` [M, 2]; NaN where
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
        self._surroundings = Surroundings(alerts.embedding, len(self._names))
        self._whole = Neighbours(alerts.embedding)

    def score(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """How strange each of [N, D] is, [N]; NaN for one that is all zeros."""
        return strangeness(self._surroundings.distances(embedding), self._usual)

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[tuple[Neighbour, ...]]:
        """The k ordinary alerts most like each of [N, D], the nearest first."""
        distances, rows = self._whole.nearest(normalise(embedding), k)
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
        named = self.nearest(embedding, NEIGHBOURS)
        if not self._names:
            return [Reason(neighbours, {}, None) for neighbours in named]
        distances = self._surroundings.distances(embedding)
        unusual = (distances - self._usual[:, 0]) / self._usual[:, 1]
        return [
            Reason(
                neighbours,
                {name: float(d) for name, d in zip(self._names, distance, strict=True) if np.isfinite(d)},
                self._names[int(np.nanargmax(far))],
            )
            for neighbours, distance, far in zip(named, distances, unusual, strict=True)
        ]
