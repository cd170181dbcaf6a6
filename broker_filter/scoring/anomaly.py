"""How strange an alert is beside a reference of ordinary ones, and what makes it strange.

Works on embeddings alone; decides nothing: which scores are flagged is `threshold`'s affair. An alert's score does not
depend on what else is scored with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.neighbours import Embeddings, Neighbours, normalise
from broker_filter.scoring.reference import Reference

NEIGHBOURS = 5
"""Whose mean distance is the score, and which are named in the reason."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An ordinary alert, and the cosine distance from it."""

    alert_id: int
    object_id: str
    distance: float


@dataclass(frozen=True, slots=True)
class Reason:
    """What makes an alert strange: `modalities` has those that it has, with their mean cosine distance from the
    neighbours' own; `most_unlike` is the one that is further off than usual by most deviations of ordinary alerts."""

    neighbours: tuple[Neighbour, ...]
    modalities: dict[str, float]
    most_unlike: str | None


def neighbour_distance(neighbours: Neighbours, embedding: Embeddings) -> NDArray[np.float32]:
    """The mean cosine distance from the NEIGHBOURS nearest, [N]: Ramaswamy et al. 2000 (SIGMOD), the mean in place of
    the last; on learnt embeddings, Sun et al. 2022 (arXiv:2204.06507)."""
    return np.asarray(neighbours.nearest(embedding, NEIGHBOURS)[0].mean(axis=1))


class AnomalyScorer:
    """Scores and reasons by one reference. May be called from several threads."""

    def __init__(self, reference: Reference) -> None:
        """Makes the search ready: some seconds for a million alerts."""
        alerts = reference.alerts
        self._names = reference.card.modalities
        self._usual = reference.usual
        self._modalities, self._alert_id, self._object_id = alerts.modalities, alerts.alert_id, alerts.object_id
        self._neighbours = Neighbours(alerts.embedding)

    def score(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """How strange each is, [N]; `embedding` [N, D] of any length but 0."""
        return neighbour_distance(self._neighbours, normalise(embedding))

    def nearest(self, embedding: NDArray[np.float32], k: int) -> list[tuple[Neighbour, ...]]:
        """The k ordinary alerts nearest to each of [N, D], the nearest first."""
        distances, rows = self._neighbours.nearest(normalise(embedding), k)
        return [
            tuple(
                Neighbour(int(self._alert_id[row]), str(self._object_id[row]), float(distance))
                for distance, row in zip(distances[i], rows[i], strict=True)
                if row >= 0
            )
            for i in range(len(embedding))
        ]

    def explain(self, embedding: NDArray[np.float32], modalities: NDArray[np.float32] | None) -> list[Reason]:
        """Why each of [N, D], with its modalities [N, M, S] where the model has any, is where it is."""
        named = self.nearest(embedding, NEIGHBOURS)
        if modalities is None:
            return [Reason(neighbours, {}, None) for neighbours in named]
        _, rows = self._neighbours.nearest(normalise(embedding), NEIGHBOURS)
        distances = modality_distances(modalities, self._modalities[rows])
        return [
            Reason(neighbours, *self._unlike(distance)) for neighbours, distance in zip(named, distances, strict=True)
        ]

    def _unlike(self, distance: NDArray[np.float64]) -> tuple[dict[str, float], str | None]:
        known = np.flatnonzero(np.isfinite(distance))
        mean, deviation = self._usual.T
        excess = (distance - mean) / deviation
        most = self._names[known[np.argmax(excess[known])]] if len(known) else None
        return {self._names[m]: float(distance[m]) for m in known.tolist()}, most


def modality_distances(modalities: NDArray[np.float32], neighbours: NDArray[np.float16]) -> NDArray[np.float64]:
    """The mean cosine distance of each modality [N, M, S] from those of the neighbours [N, k, M, S] that have it.

    [N, M]; NaN where the alert or all its neighbours lack it.
    """
    others = neighbours.astype(np.float64)
    has = (modalities != 0).any(axis=-1)
    they_have = (others != 0).any(axis=-1)
    cosine = np.einsum("nms,nkms->nkm", modalities, others)
    n = np.where(has, they_have.sum(axis=1), 0)
    mean = (cosine * they_have).sum(axis=1) / np.maximum(n, 1)
    return np.where(n > 0, 1 - mean, np.nan)
