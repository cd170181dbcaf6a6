"""How strange alerts are beside ordinary ones by their features or their pixels, as others do it.

What is served (`scoring.anomaly`) is set beside these. Each takes ordinary alerts and the ones that are asked about,
and gives the latter's scores, [N], higher for stranger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest

Scores = NDArray[np.float64]

TREES = 200
COMPONENTS = 32
"""Of the pixels: more of them are noise."""
SEED = 2026


def by_isolation_forest(ordinary: NDArray[np.float64], asked: NDArray[np.float64]) -> Scores:
    """An isolation forest (Liu et al. 2008, ICDM) on features [N, F], a missing one being the ordinary median."""
    known = np.isfinite(ordinary).any(axis=0)
    median = np.nanmedian(ordinary[:, known], axis=0)
    filled = (np.where(np.isfinite(some[:, known]), some[:, known], median) for some in (ordinary, asked))
    ordinary, asked = filled
    forest = IsolationForest(n_estimators=TREES, random_state=SEED).fit(ordinary)
    scores: Scores = -forest.score_samples(asked)
    return scores


def by_pixels(ordinary: NDArray[np.float32], asked: NDArray[np.float32]) -> Scores:
    """An isolation forest on the principal components of images [N, ...], each as a network sees it."""
    flat = [images.reshape(len(images), -1) for images in (ordinary, asked)]
    components = PCA(min(COMPONENTS, *flat[0].shape), random_state=SEED).fit(flat[0])
    return by_isolation_forest(*(components.transform(some).astype(np.float64) for some in flat))
