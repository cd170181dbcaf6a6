"""Measures of a sparse autoencoder and of what it is compared with: sparsity, reconstruction, stability, enrichment.

All functions work on numpy arrays: rows of activations z [T, d] (one row for each query token of each alert), features
[T, F], and decoders [F, d] whose rows are the features' directions. Nothing here knows a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from training.evaluation.bootstrap import Estimate, estimate
from training.evaluation.metrics import Values, Weights

Rows = NDArray[np.float32]
"""Values of T rows, [T, ...]."""

DENSE = 0.1
"""A feature that is active in more than this fraction of the rows is dense."""
SAME_COSINE = 0.9
"""Two features of different seeds are the same if the cosine of their directions exceeds this."""


class Sparsity(NamedTuple):
    """How sparse features are: the mean number of active features in a row, and fractions of all features.

    `alive` and `dead`: the fractions of features that are active in some row, and in none. `dense`: the fraction that
    is active in more than DENSE of the rows.
    """

    l0: float
    alive: float
    dead: float
    dense: float


def sparsity(features: Rows) -> Sparsity:
    """Return the sparsity of features [T, F], of which a value above 0 is active."""
    frequency = (features > 0).mean(axis=0)
    alive = float((frequency > 0).mean())
    return Sparsity(float(frequency.sum()), alive, 1 - alive, float((frequency > DENSE).mean()))


def explained_variance(z: Rows, reconstruction: Rows) -> float:
    """Return 1 - |z - reconstruction|^2 / |z - mean|^2, both summed over all rows [T, d]."""
    exact = z.astype(np.float64)
    unexplained = np.square(exact - reconstruction).sum()
    return float(1 - unexplained / np.square(exact - exact.mean(axis=0)).sum())


def loss_recovered(clean: float, ablated: float, replaced: float) -> float:
    """Return the share of the loss that a replacement of z keeps: 1 for the network's own z, 0 for the ablation.

    `clean`, `ablated`, `replaced`: the network's loss with its own z, with the ablated z, and with the replacement.
    NaN if the ablation does not change the loss.
    """
    return (ablated - replaced) / (ablated - clean) if ablated != clean else float("nan")


def unit(directions: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return directions [F, d] scaled to length 1; a direction of length 0 stays 0."""
    length = np.linalg.norm(directions.astype(np.float64), axis=1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(directions, length, out=np.zeros(directions.shape), where=length > 0)
    return scaled


def greatest_cosines(decoder: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each feature's greatest cosine with another feature of the decoder [F, d], float64[F]."""
    directions = unit(decoder)
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -1)
    greatest: NDArray[np.float64] = cosines.max(axis=1)
    return greatest


@dataclass(frozen=True, slots=True)
class Pca:
    """The principal components of rows, by decreasing variance."""

    mean: NDArray[np.float64]  # [d]
    components: NDArray[np.float64]  # [d, d] orthonormal rows

    @classmethod
    def fit(cls, z: Rows) -> Self:
        """Return the components of rows [T, d]."""
        mean = z.mean(axis=0, dtype=np.float64)
        values, vectors = np.linalg.eigh(np.cov((z - mean).T))
        return cls(mean, vectors[:, np.argsort(-values)].T)

    def project(self, z: Rows) -> NDArray[np.float64]:
        """Return the coordinates [T, d] of rows [T, d]."""
        coordinates: NDArray[np.float64] = (z - self.mean) @ self.components.T
        return coordinates

    def reconstruct(self, z: Rows, components: int) -> Rows:
        """Return rows [T, d] from their first `components` coordinates."""
        first = self.components[:components]
        return ((z - self.mean) @ first.T @ first + self.mean).astype(np.float32)


def sparse(values: NDArray[np.floating], active: float, train: NDArray[np.bool_]) -> Rows:
    """Return values [T, D] above one threshold for all columns, and 0 elsewhere.

    Of a training row, `active` values remain on average; `train` bool[T] says which rows are. The threshold is not
    below 0, as for features. The columns need comparable units.
    """
    threshold = max(0.0, float(np.quantile(values[train], 1 - min(1.0, active / values.shape[1]))))
    return np.where(values > threshold, values, 0).astype(np.float32)


def random_features(z: Rows, n: int, active: float, seed: int, train: NDArray[np.bool_]) -> Rows:
    """Return features [T, n] along random directions, of which `active` are above 0 in a row on average (`sparse`).

    A direction is drawn uniformly and applied to z minus the mean of the training rows.
    """
    directions = unit(np.random.default_rng(seed).standard_normal((n, z.shape[1])))
    return sparse((z - z[train].mean(axis=0)) @ directions.T.astype(np.float32), active, train)


def standardised(values: NDArray[np.floating], train: NDArray[np.bool_]) -> Rows:
    """Return columns [T, D] with mean 0 and deviation 1 in the rows `train` bool[T]; a constant column becomes 0."""
    deviation = values[train].std(axis=0)
    centred = values - values[train].mean(axis=0)
    unit_deviation = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return np.asarray(unit_deviation, np.float32)


def greatest_of_alerts(values: Rows, alert: NDArray[np.int64], n: int) -> Rows:
    """Return the greatest value over the rows of each of n alerts, [n, F], of values [T, F]; 0 without rows.

    `alert` int64[T]: the alert of each row.
    """
    greatest = np.full((n, values.shape[1]), -np.inf, np.float32)
    order = np.argsort(alert, kind="stable")
    owners, starts = np.unique(alert[order], return_index=True)
    if len(owners):
        greatest[owners] = np.maximum.reduceat(values[order], starts, axis=0)
    return np.where(np.isfinite(greatest), greatest, 0).astype(np.float32)


def signed(values: Rows) -> Rows:
    """Return values [T, D] and their negatives side by side, [T, 2 D], so that both ends of a direction count."""
    return np.concatenate([values, -values], axis=1)


def stable_in(decoders: Sequence[NDArray[np.floating]], alive: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Return in how many of the dictionaries each feature of the first one is found, int64[F]; a dead one in 0.

    `decoders`: [F, d] of each seed; `alive`: bool[F] of each. Living features of two dictionaries are matched one to
    one, so that the sum of their cosines is greatest (Hungarian method). A match counts if its cosine exceeds
    SAME_COSINE. The first dictionary counts itself.
    """
    own = np.flatnonzero(alive[0])
    found = np.zeros(len(decoders[0]), np.int64)
    found[own] = 1
    directions = unit(decoders[0][own])
    for decoder, living in zip(decoders[1:], alive[1:], strict=True):
        cosines = directions @ unit(decoder[living]).T
        rows, columns = linear_sum_assignment(-cosines)
        same = cosines[rows, columns] > SAME_COSINE
        found[own[rows[same]]] += 1
    return found


class Enrichment(NamedTuple):
    """The class that is most enriched among the alerts in which a feature is active.

    `lift`: the fraction of the class among these alerts over its fraction among all; its interval is by objects.
    """

    name: str
    lift: Estimate


def enrichment(
    active: NDArray[np.bool_], label: NDArray[np.int64], names: Sequence[str], object_id: NDArray[np.str_]
) -> Enrichment | None:
    """Return the class with the greatest lower end of the interval of its lift, or None if no labelled alert is active.

    `active` bool[N]: whether the feature is active in an alert; `label` int64[N]: index into `names`.
    """
    if not active.any():
        return None

    def lifts(weight: Weights) -> dict[str, Values]:
        lift = {}
        for c, name in enumerate(names):
            among_active = weight @ (active & (label == c)) / np.maximum(weight @ active, 1e-12)
            overall = weight @ (label == c) / weight.sum(axis=-1)
            lift[name] = np.divide(among_active, overall, out=np.zeros_like(overall), where=overall > 0)
        return lift

    found = estimate(lifts, object_id, lambda _: {})
    best = max(found, key=lambda name: found[name].low or 0.0)
    return Enrichment(best, found[best])
