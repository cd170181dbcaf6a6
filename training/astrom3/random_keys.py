"""How far the random keys of published ProbSparse attention move what AstroM3 says of a star, beside all keys.

The published model samples keys anew at each call (`training.astrom3.model.informer`), so that its embedding of
a star is another each time; all keys, as served, give one.
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
    """Means over stars, each batch with keys of its own, drawn from torch's generator.

    Distances are 1 - cosine, between photometry embeddings of a star with all keys and with random ones, with random
    ones twice, and of two stars with all keys; shares are of the stars whose most probable class is another.
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
    """1 - cosine of unit vectors [N, D], row by row, [N]."""
    return 1 - (one * other).sum(1)
