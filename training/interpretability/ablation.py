"""Causal effects of features: the network's outputs after a feature was ablated.

The ablated activation is z' = z - f_i w_dec_i: what the dictionary does not reconstruct (the error term) stays in
place, so that an effect is that of the feature alone. The null is the same with random directions of equal size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.interpretability.sites.attention import Attention, Site

BATCH = 256
"""Pairs of alert and feature in one run of the rest of the network: its intermediate results stay in the CPU caches."""

Outputs = tuple[Tensor, ...]
"""A network's outputs [n, ...]: logits, embedding, and modalities if there are any."""


@dataclass(frozen=True, slots=True)
class Ablated:
    """The network's outputs for n pairs of alert and feature.

    `before`: with z as it is. `after`: with the feature ablated at all query tokens of the alert. `random`: with a
    vector of equal size in a random direction subtracted instead.
    """

    before: Outputs
    after: Outputs
    random: Outputs


@torch.no_grad()
def ablate(
    site: Site,
    attention: Attention,
    dictionary: SparseDictionary,
    alerts: Tensor,
    features: Tensor,
    draws: Generator,
    batch: int = BATCH,
) -> Ablated:
    """Return the outputs of the network before and after the ablation of n (alert, feature) pairs.

    `alerts`, `features`: int64 [n], indices into `attention` and `dictionary`. `draws`: for the random directions.
    """
    runs: list[tuple[Outputs, Outputs, Outputs]] = []
    for first in range(0, max(1, len(alerts)), batch):  # once without pairs, so that the outputs have their shapes
        some, of = alerts[first : first + batch], features[first : first + batch]
        z = attention.z[some]
        rest = {name: tensor[some] for name, tensor in attention.rest.items()}
        feature = contribution(z, attention.queries[some], dictionary, of)
        runs.append(
            (
                site.resume(rest, z),
                site.resume(rest, z - feature),
                site.resume(rest, z - in_random_direction(feature, draws)),
            )
        )
    before, after, random = (_joined(each) for each in zip(*runs, strict=True))
    return Ablated(before, after, random)


def contribution(z: Tensor, queries: Tensor, dictionary: SparseDictionary, features: Tensor) -> Tensor:
    """Return f_i w_dec_i [n, Q, d], the part of z [n, Q, d] of one feature each; 0 at queries that do not exist.

    `queries`: bool [n, Q], those that exist. `features`: int64 [n].
    """
    arrays = (dictionary.w_enc.T, dictionary.b_enc, dictionary.w_dec, dictionary.threshold)
    w_enc, b_enc, w_dec, threshold = (torch.from_numpy(array)[features].to(z) for array in arrays)
    pre = torch.einsum("nqd,nd->nq", z - torch.from_numpy(dictionary.b_dec).to(z), w_enc) + b_enc[:, None]
    active = pre * ((pre > threshold[:, None]) & queries)
    removed: Tensor = active[:, :, None] * w_dec[:, None, :]
    return removed


def in_random_direction(vectors: Tensor, draws: Generator) -> Tensor:
    """Return vectors of the same lengths as `vectors` [n, Q, d], in one random direction for each of the n."""
    directions = normalize(torch.randn(len(vectors), 1, vectors.shape[2], generator=draws), dim=2).to(vectors)
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    return lengths * directions


def changes(before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """Return how far each output moved, float64, by name.

    `logits` [n, labels]: the absolute change. `embedding` [n]: 1 - cosine similarity. `modalities` [n, M], if there are
    any: 1 - cosine similarity of each modality's vector, and 0 for a modality that the alert lacks.
    """
    moved = {"logits": (after[0].double() - before[0].double()).abs()}
    for name, old, new in zip(("embedding", "modalities"), before[1:], after[1:], strict=False):
        # For vectors of length 1 this is 1 - cosine similarity, without the cancellation that small changes suffer from
        moved[name] = (normalize(new.double(), dim=-1) - normalize(old.double(), dim=-1)).square().sum(-1) / 2
    return moved


def _joined(runs: Iterable[Outputs]) -> Outputs:
    return tuple(torch.cat(parts) for parts in zip(*runs, strict=True))
