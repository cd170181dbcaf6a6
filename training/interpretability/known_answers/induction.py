"""`sae induction`: whether a sparse autoencoder finds the induction features of a transformer that must have them.

A ToyTransformer predicts the next token by copying the one after the previous occurrence. An autoencoder is trained on
the second layer's z without being told so. Then it is measured, on new sequences,

- how many tokens have a feature that is active where that token is copied, and not elsewhere;
- whether DFA of those features points at the token that is copied;
- whether ablating the feature removes the copying, beside a random direction of equal size.

This must hold before attributions and ablations in networks of unknown mechanism are believed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.arguments import positive
from training.atomic_write import write_whole
from training.interpretability.ablation import ablate
from training.interpretability.attribution import direct_attribution
from training.interpretability.known_answers.toy_transformer import (
    VOCABULARY,
    Sequences,
    ToySite,
    ToyTransformer,
    draw_sequences,
    train_transformer,
)
from training.interpretability.sites.attention import Attention
from training.interpretability.train_autoencoder import Recipe, train

COPYING = 1
"""The layer whose heads copy: the second."""
SPECIFIC = 0.9
"""Precision and recall from which on a feature counts as the induction feature of a token."""
ROWS_PER_STEP = 1024
"""Rows in a training step of the autoencoder: about forty of each token that is copied."""
PAIRS = 2000
"""Largest number of pairs of sequence and feature that are ablated."""


@dataclass(frozen=True, slots=True)
class Induction:
    """The figures of one transformer and one dictionary, on new sequences."""

    accuracy: float
    """Share of the predictable tokens that the transformer predicts."""
    recall: float
    """Mean over the tokens: share of the positions where the token is copied that its best feature is active at."""
    precision: float
    """Mean over the tokens: share of the positions where its best feature is active that the token is copied at."""
    tokens_found: float
    """Share of the tokens of the vocabulary that have an induction feature: recall and precision above SPECIFIC."""
    tokens_found_at_random: float
    """The same for as many random directions, which are active as often as the features on average."""
    pointed: float
    """Share of the activations of induction features whose largest DFA is at a token after a previous occurrence."""
    pointed_by_chance: float
    """The mean share of the tokens that are after a previous occurrence, among those that can be attended to."""
    probability: float
    """Mean probability of the copied token, where its induction feature is active."""
    probability_ablated: float
    """The same after the ablation of the feature."""
    probability_at_random: float
    """The same after a random direction of equal size was subtracted."""


def copying_rows(network: ToyTransformer, sequences: Sequences) -> Attention:
    """Return the attention of the layer that copies, for N sequences."""
    with torch.no_grad():
        return ToySite(network, COPYING).attend({"tokens": sequences.tokens})


@dataclass(frozen=True, slots=True)
class Copiers:
    """For each token of the vocabulary, the feature that tells best where this token is copied."""

    feature: NDArray[np.int64]  # [VOCABULARY]
    recall: NDArray[np.float64]  # [VOCABULARY]: share of the positions where the token is copied that the feature is on
    precision: NDArray[np.float64]  # [VOCABULARY]: share of the positions where the feature is on that are of this kind

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which tokens have an induction feature: recall and precision are above SPECIFIC."""
        return np.minimum(self.recall, self.precision) > SPECIFIC


def copiers(active: NDArray[np.bool_], sequences: Sequences) -> Copiers:
    """Return the best feature of each token, by the smaller of recall and precision.

    `active`: bool [N, L, F], where each feature is active.
    """
    flat = active.reshape(-1, active.shape[2])
    copied = np.where(sequences.predictable.numpy(), sequences.next.numpy(), -1).ravel()
    is_copied = copied[:, None] == np.arange(VOCABULARY)
    both = flat.T.astype(np.float64) @ is_copied  # [F, VOCABULARY]
    recall = both / np.maximum(is_copied.sum(0), 1)
    precision = both / np.maximum(flat.sum(0), 1)[:, None]
    best = np.minimum(recall, precision).argmax(0)
    tokens = np.arange(VOCABULARY)
    return Copiers(best, recall[best, tokens], precision[best, tokens])


def measure(network: ToyTransformer, dictionary: SparseDictionary, sequences: Sequences, seed: int) -> Induction:
    """Return the figures on new sequences. `seed`: of the random directions."""
    draws = Generator().manual_seed(seed)
    attention = copying_rows(network, sequences)
    z = attention.z.numpy()
    activations = dictionary.encode(z.reshape(-1, z.shape[2])).reshape(*z.shape[:2], -1)
    best = copiers(activations > 0, sequences)
    projected = (z - dictionary.b_dec) @ torch.randn(dictionary.w_enc.shape, generator=draws).numpy()
    as_often = np.quantile(projected, 1 - (activations > 0).mean(), axis=(0, 1))
    at_random = copiers(projected > as_often, sequences)
    with torch.no_grad():
        predicted = network(sequences.tokens).argmax(2) == sequences.next
    feature_of = torch.from_numpy(np.where(best.found, best.feature, -1))
    wanted = feature_of[sequences.next]  # [N, L]: the feature that should be active
    active = torch.from_numpy(activations).gather(2, wanted.clamp(min=0)[:, :, None])[:, :, 0] > 0
    rows, queries = (active & (wanted >= 0) & sequences.predictable).nonzero()[:PAIRS].T
    features = wanted[rows, queries]
    by_source, _ = direct_attribution(attention, dictionary, rows, queries, features)
    after_previous = sequences.after_previous()[rows, queries]  # [n, P]
    ablated = ablate(ToySite(network, COPYING), attention, dictionary, rows, features, draws)
    copied = sequences.next[rows, queries]

    def probability(logits: Tensor) -> float:
        at_query = logits[torch.arange(len(rows)), queries].softmax(1)
        return float(at_query[torch.arange(len(rows)), copied].mean())

    return Induction(
        accuracy=float(predicted[sequences.predictable].float().mean()),
        recall=float(best.recall.mean()),
        precision=float(best.precision.mean()),
        tokens_found=float(best.found.mean()),
        tokens_found_at_random=float(at_random.found.mean()),
        pointed=float(after_previous.gather(1, by_source.sum(1).argmax(1)[:, None]).float().mean()),
        pointed_by_chance=float((after_previous.sum(1) / (queries + 1)).mean()),
        probability=probability(ablated.before[0]),
        probability_ablated=probability(ablated.after[0]),
        probability_at_random=probability(ablated.random[0]),
    )


def study(steps: int, recipe: Recipe, sequences: int, seed: int) -> Induction:
    """Train a transformer and an autoencoder on its rows, and measure them on as many new sequences."""
    network = train_transformer(steps, seed)
    draws = Generator().manual_seed(seed + 1)
    rows = copying_rows(network, draw_sequences(sequences, draws)).z.flatten(0, 1).numpy()
    return measure(network, train(rows, recipe, seed), draw_sequences(sequences, draws), seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sae induction`."""
    parser.add_argument(
        "--steps", type=positive, default=600, help="training steps of the transformer (default: %(default)s)"
    )
    parser.add_argument(
        "--sequences", type=positive, default=4000, help="sequences for the autoencoder (default: %(default)s)"
    )
    parser.add_argument("--features", type=positive, default=64, help="features (default: %(default)s)")
    parser.add_argument(
        "--active", type=positive, default=1, help="mean number of active features per row (default: %(default)s)"
    )
    parser.add_argument(
        "--autoencoder-steps", type=positive, default=3000, help="steps of the autoencoder (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="number of trainings (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Train transformers and autoencoders, and print a table of the figures in Markdown."""
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(
        features=arguments.features, active=arguments.active, steps=arguments.autoencoder_steps, batch=ROWS_PER_STEP
    )
    figures = [asdict(study(arguments.steps, recipe, arguments.sequences, seed)) for seed in range(arguments.seeds)]
    print("| figure | mean | least | greatest |\n|---|---|---|---|")
    for name in figures[0]:
        values = [each[name] for each in figures]
        print(f"| {name.replace('_', ' ')} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    if arguments.out:
        write_whole(arguments.out, json.dumps(figures, indent=2).encode())
