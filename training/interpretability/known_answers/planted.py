"""`sae recover`: rows made from a known sparse dictionary, to measure whether autoencoders find its directions.

This is the first thing that must hold before the features of a network are believed. It needs no network and no alerts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.arguments import positive
from training.atomic_write import write_whole
from training.interpretability.train_autoencoder import Recipe, train

STRENGTHS = (0.5, 1.5)
"""Range of the activations of a planted feature."""
OFFSET = 0.3
"""Standard deviation of the constant that is added to every dimension; it stands for a bias in the network."""
NOISE = 0.05
"""Norm of the noise that is added to a row, where the mean activation is 1."""
FOUND = 0.9
"""Cosine from which on a planted feature counts as found."""


@dataclass(frozen=True, slots=True)
class Planted:
    """Rows whose dictionary is known."""

    rows: NDArray[np.float32]  # [T, d]
    directions: NDArray[np.float32]  # [F, d] of unit norm


def plant(t: int, d: int, features: int, active: float, seed: int) -> Planted:
    """Return `t` rows in `d` dimensions, in each of which every feature is active with probability active / features.

    The directions are random. A row is the sum of its active directions times STRENGTHS, plus OFFSET and NOISE.
    """
    draws = np.random.default_rng(seed)
    directions = draws.normal(size=(features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    activations = (draws.random((t, features)) < active / features) * draws.uniform(*STRENGTHS, (t, features))
    noise = NOISE / np.sqrt(d) * draws.normal(size=(t, d))
    rows = activations @ directions + OFFSET * draws.normal(size=d) + noise
    return Planted(rows.astype(np.float32), directions.astype(np.float32))


def recovered(planted: Planted, dictionary: SparseDictionary) -> NDArray[np.float32]:
    """Return, for each planted feature, the largest cosine with a row of the decoder, float32[F]."""
    cosines: NDArray[np.float32] = (planted.directions @ dictionary.w_dec.T).max(1)  # all rows have unit norm
    return cosines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae recover`."""
    parser.add_argument("--rows", type=positive, default=100_000, help="number of rows (default: %(default)s)")
    parser.add_argument("--dimensions", type=positive, default=48, help="dimensions of a row (default: %(default)s)")
    parser.add_argument(
        "--planted", type=positive, default=96, help="number of planted features (default: %(default)s)"
    )
    parser.add_argument(
        "--active", type=positive, default=3, help="mean number of active features per row (default: %(default)s)"
    )
    parser.add_argument(
        "--features", type=positive, default=192, help="features of the autoencoders (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=6000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--sparsity", type=float, default=2.0, help="L1 coefficient of the published autoencoder (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, help="number of dictionaries and trainings (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Train both autoencoders on planted dictionaries, and print a table of the figures in Markdown."""
    torch.set_num_threads(arguments.threads)
    figures: dict[str, list[dict[str, float]]] = {}
    common = {"features": arguments.features, "steps": arguments.steps}
    recipes = [
        Recipe(kind="batch_top_k", active=arguments.active, **common),
        Recipe(kind="published", sparsity=arguments.sparsity, **common),
    ]
    for seed in range(arguments.seeds):
        planted = plant(arguments.rows, arguments.dimensions, arguments.planted, arguments.active, seed)
        for recipe in recipes:
            figures.setdefault(recipe.kind, []).append(measure(planted, train(planted.rows, recipe, seed)))
    print(table(figures))
    if arguments.out:
        write_whole(arguments.out, json.dumps(figures, indent=2).encode())


def measure(planted: Planted, dictionary: SparseDictionary) -> dict[str, float]:
    """Return how well a dictionary recovers the planted one, and its sparsity on the rows."""
    cosines = recovered(planted, dictionary)
    activations = dictionary.encode(planted.rows)
    residual = np.square(planted.rows - dictionary.decode(activations)).sum()
    total = np.square(planted.rows - planted.rows.mean(0)).sum()
    return {
        "mean max cosine": float(cosines.mean()),
        f"share above {FOUND}": float((cosines > FOUND).mean()),
        "L0": float((activations > 0).sum(1).mean()),
        "explained variance": float(1 - residual / total),
        "dead features": float((activations <= 0).all(0).mean()),
    }


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Return the figures as a table in Markdown: mean over the seeds, and the least and greatest in brackets."""
    names = list(next(iter(figures.values()))[0])
    lines = [" | ".join(["autoencoder", *names]), "|".join(["---"] * (1 + len(names)))]
    for kind, several in figures.items():
        values = {name: [each[name] for each in several] for name in names}
        cells = [f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in values.values()]
        lines.append(" | ".join([kind, *cells]))
    return "\n".join(f"| {line} |" for line in lines)
