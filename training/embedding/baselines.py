"""Baseline anomaly scores from features or pixels, by methods of the literature, for comparison with `anomalies.score`.

Each function takes ordinary alerts and alerts to judge. It returns the scores float64[N] of the alerts to judge, higher
for stronger anomalies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest

Scores = NDArray[np.float64]

TREES = 200
COMPONENTS = 32
"""Number of principal components of the pixels that are used; further components are noise."""
SEED = 2026


def by_isolation_forest(ordinary: NDArray[np.float64], asked: NDArray[np.float64]) -> Scores:
    """Return scores of an isolation forest (Liu et al. 2008, ICDM) on features [N, F].

    A missing value is replaced by the median of the ordinary alerts.
    """
    known = np.isfinite(ordinary).any(axis=0)
    median = np.nanmedian(ordinary[:, known], axis=0)
    filled = (np.where(np.isfinite(some[:, known]), some[:, known], median) for some in (ordinary, asked))
    ordinary, asked = filled
    forest = IsolationForest(n_estimators=TREES, random_state=SEED).fit(ordinary)
    scores: Scores = -forest.score_samples(asked)
    return scores


def by_pixels(ordinary: NDArray[np.float32], asked: NDArray[np.float32]) -> Scores:
    """Return scores of an isolation forest on the principal components of normalised images [N, ...]."""
    flat = [images.reshape(len(images), -1) for images in (ordinary, asked)]
    components = PCA(min(COMPONENTS, *flat[0].shape), random_state=SEED).fit(flat[0])
    return by_isolation_forest(*(components.transform(some).astype(np.float64) for some in flat))
