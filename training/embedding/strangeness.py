"""Ways to say how strange an alert is beside ordinary ones, to be compared: of its embedding, its features, its pixels.

Of embeddings, what is served (`scoring.anomaly`) is set beside these. Each takes ordinary alerts and the ones that are
asked about, and gives the latter's scores, [N], higher for stranger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest

from broker_filter.scoring.anomaly import NEIGHBOURS, parts
from broker_filter.scoring.neighbours import Embeddings, Neighbours
from training.embedding.suspects import centroids

Scores = NDArray[np.float64]

TREES = 200
COMPONENTS = 32
"""Of the pixels: more of them are noise."""
SEED = 2026


def by_neighbours(ordinary: Embeddings, asked: Embeddings, modalities: int) -> NDArray[np.float64]:
    """The mean cosine distance from the NEIGHBOURS nearest, as a whole and in each modality, [N, 1 + M]: Ramaswamy et
    al. 2000 (SIGMOD), the mean in place of the last; of learnt embeddings, Sun et al. 2022 (arXiv:2204.06507)."""
    columns = [
        Neighbours(known).nearest(part, NEIGHBOURS)[0].mean(axis=1)
        for known, part in zip(parts(ordinary, modalities), parts(asked, modalities), strict=True)
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def by_centroids(ordinary: Embeddings, label: NDArray[np.int64], asked: Embeddings) -> Scores:
    """The cosine distance from the nearest class's centroid: Rizhko & Bloom 2025 (arXiv:2411.08842)."""
    _, label = np.unique(label, return_inverse=True)
    return np.asarray(1 - (asked.astype(np.float64) @ centroids(ordinary, label).T).max(axis=1), np.float64)


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
