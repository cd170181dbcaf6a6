"""Compares AstroM3 with randomly sampled attention keys (as published) and with all keys (as used here).

The published ProbSparse attention samples keys at random in each call (`training.astrom3.model.informer`), so its
embedding of a star changes from call to call. With all keys the embedding is deterministic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.astrom3.model.informer import PhotometryClassifier
from training.astrom3.model.network import AstroM3, Stars
from training.astrom3.stars import Shown


@torch.inference_mode()
def compare_keys(pretrained: AstroM3, classifier: PhotometryClassifier, loader: DataLoader[Shown]) -> dict[str, float]:
    """Return means over stars by name; random keys are drawn from torch's generator for each batch.

    Distances are 1 - cosine similarity of photometry embeddings: of a star with all keys and with random keys, of a
    star with two draws of random keys, and of two stars with all keys. Fractions count stars whose most probable class
    changes.
    """
    figures: dict[str, list[float]] = {}
    for photometry, mask, *rest, _ in loader:
        stars = Stars(photometry, mask, *rest)
        with_all = pretrained.embed(stars).photometry
        once, again = (pretrained.embed(stars, pretrained.photometry_encoder.draw_keys()).photometry for _ in range(2))
        said = classifier(photometry, mask).argmax(1)
        said_once, said_again = (classifier(photometry, mask, classifier.draw_keys()).argmax(1) for _ in range(2))
        batch = {
            "all keys to random keys": _distance(with_all, once),
            "random keys to other random keys": _distance(once, again),
            "a star to another": _distance(with_all, with_all.roll(1, 0)),
            "class changed, all keys to random keys": said != said_once,
            "class changed, random keys to other random keys": said_once != said_again,
        }
        for name, values in batch.items():
            figures.setdefault(name, []).extend(values.tolist())
    return {name: float(np.mean(values)) for name, values in figures.items()}


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 - cosine similarity of unit vectors [N, D], row by row: [N]."""
    return 1 - (one * other).sum(1)
