"""`astrom3-embed`: the embeddings of variable stars, as a set in which stars can be retrieved, mapped and judged.

The file has the format of a reference set (`broker_filter.anomalies.reference`). `broker-filter similar` and `map`, and
`python -m training suspects` read it: retrieval, manifold, misclassified and odd stars, as in Rizhko & Bloom 2024
(arXiv:2411.08842). An embedding is the concatenation of those of photometry, spectrum and metadata, each of length 1,
so the cosine similarity of two stars is the mean of the three. Light curves longer than the network takes are cut about
their middle, and attention uses all keys: a star has the same embedding in each run.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import NO_SURVEY, Reference, ReferenceAlerts, make_star_reference
from broker_filter.console import progress
from broker_filter.streaming.build_reference import calibrate
from training import arguments as kinds
from training.astrom3.model.checkpoint import WEIGHTS, load_network
from training.astrom3.model.network import CLASSES, AstroM3, Embeddings, Stars
from training.astrom3.stars import DIVISORS, ShownStars, Split, StarSet, Subset, read_stars
from training.errors import TrainingError

NETWORK = "astrom3"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
STARS_AT_ONCE = 128
"""Stars that are embedded together; the attention of a published network takes some MB for each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `astrom3-embed`."""
    parser.add_argument("stars", type=Path, metavar="STARS", help="directory of stars, as `astrom3` takes it")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint of AstroM3: published, or of the mode clip or all of `astrom3`",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write (.safetensors)")
    parser.add_argument("--subset", choices=DIVISORS, default="full", help="subset of the stars (default: %(default)s)")
    parser.add_argument("--seed", type=kinds.seed, default=42, help="seed of the splits (default: %(default)s)")
    parser.add_argument(
        "--split", choices=SPLITS, nargs="+", default=list(SPLITS), help="splits to embed (default: all three)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Embed the stars, write the file and print what it holds."""
    splits = [split for split in SPLITS if split in arguments.split]
    reference = embed_stars(arguments.stars, arguments.checkpoint, arguments.subset, arguments.seed, splits)
    reference.write(arguments.out)
    assert reference.stars
    print(
        f"{arguments.out}: {len(reference.stars.alerts):,} stars with ids 0 to {len(reference.stars.alerts) - 1}, "
        f"{reference.stars.alerts.embedding.shape[1]} dimensions; scores calibrated on {len(reference.stars.scores):,} "
        "of them"
    )


def embed_stars(
    stars: Path, checkpoint: Path, subset: Subset = "full", seed: int = 42, splits: Sequence[Split] = SPLITS
) -> Reference:
    """Return the embeddings of the stars of some splits, with labels and calibrated anomaly scores.

    Stars are numbered from 0 in the order of the splits and their rows; a star is named `SPLIT:ROW`. The anomaly score
    is made of the distances from the nearest centroid of a class. It is calibrated on a fifth of the stars with
    centroids of the others; then all stars are kept.

    Raises DatasetError if the stars cannot be read, BundleError if the checkpoint cannot, TrainingError if it holds
    another network than AstroM3, and ReferenceSetError if there are too few stars.
    """
    network = load_network(checkpoint)
    if not isinstance(network, AstroM3):
        raise TrainingError(
            f"{checkpoint}: holds a {type(network).__name__}, which has no common space of the modalities: name a "
            "checkpoint of the mode clip or all"
        )
    embeddings, labels, names = [], [], []
    for split in splits:
        part = read_stars(stars, subset, seed, split)
        embeddings.append(_embed(network, part))
        labels.append(part.label)
        names += [f"{split}:{row}" for row in range(len(part))]
    embedding, label = np.concatenate(embeddings), np.concatenate(labels)
    n = len(label)
    everything = ReferenceAlerts(embedding, np.arange(n), np.array(names, np.str_), np.full(n, NO_SURVEY, np.uint8))
    modalities = Embeddings._fields
    calibrated = calibrate(everything, label, len(modalities), "centroids")
    with (checkpoint / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    part_of_all = replace(calibrated, alerts=everything, label=label)
    version = f"{subset}_{seed}: {', '.join(splits)}"
    return make_star_reference(NETWORK, version, sha256, modalities, CLASSES, "centroids", part_of_all)


@torch.inference_mode()
def _embed(network: AstroM3, stars: StarSet) -> NDArray[np.float32]:
    """Return the concatenated embeddings of N stars, float32[N, 3 D], each of length 1."""
    shown = ShownStars(stars, network.arguments.seq_len)
    parts = []
    with progress("Embedding", len(stars), "stars") as advance:
        for start in range(0, len(stars), STARS_AT_ONCE):
            *inputs, _ = shown.__getitems__(range(start, min(start + STARS_AT_ONCE, len(stars))))
            parts.append(torch.cat(network.embed(Stars(*inputs)), dim=1).numpy())
            advance(len(inputs[0]))
    return normalise(np.concatenate(parts))
