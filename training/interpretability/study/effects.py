"""What features do: where in an alert each one reads, and what changes in the network's outputs without it.

Where a feature reads is its direct feature attribution (DFA): attention weight times value, projected on the feature's
encoder direction. What it does is measured by ablation with the error term kept: its part is subtracted from z, so that
what the dictionary does not explain stays. The same is done with directions that no feature has, of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.functional import normalize

from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.interpretability.ablation import changes, contribution, in_random_direction
from training.interpretability.attribution import direct_attribution
from training.interpretability.study.losses import Attended, resumed

ALERTS_OF_A_FEATURE = 24
"""Number of alerts, drawn from those in which a feature is active, that its figures are averaged over."""
DRAWN = 4
"""Number of random directions for each of these alerts."""
SEED = 2026


Figures = Callable[[NDArray[np.float32], NDArray[np.int64]], dict[str, NDArray[np.float64]]]
"""Returns what is computed from the embeddings float32[n, D] of the alerts int64[n], by name, float64[n] each."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a feature reads, for n alerts at the row in which it is most active: DFA [n, H, P] by head and source."""

    alert: NDArray[np.int64]  # [n]
    query: NDArray[np.int64]  # [n]
    attribution: NDArray[np.float64]  # [n, H, P]


@dataclass(frozen=True, slots=True)
class Effect:
    """Mean changes of the outputs and of what is computed from them, by name, over alerts in which a feature is active.

    `ablated`: without the feature. `random`: without a random direction of equal size. `alike`: without a difference of
    two rows of other alerts, scaled to equal size; such directions are ones in which z does vary.
    """

    ablated: dict[str, float]
    random: dict[str, float]
    alike: dict[str, float]


def active_alerts(attended: Attended, dictionary: SparseDictionary) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return activations float32[N, Q, F], 0 in padding, and their maxima over the rows of an alert, float32[N, F]."""
    attention = attended.attention
    activations = np.zeros((*attention.z.shape[:2], len(dictionary.w_dec)), np.float32)
    activations[attention.queries.numpy()] = dictionary.encode(attended.rows)
    return activations, activations.max(axis=1)


def draw_alerts(greatest: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """Return ALERTS_OF_A_FEATURE alerts in which each feature is active, or all if they are fewer; from [N, F]."""
    rng = np.random.default_rng(SEED)
    active = [np.flatnonzero(column > 0) for column in greatest.T]
    return [rng.choice(rows, min(ALERTS_OF_A_FEATURE, len(rows)), replace=False) for rows in active]


def read(
    attended: Attended,
    dictionary: SparseDictionary,
    activations: NDArray[np.float32],
    feature: int,
    alert: NDArray[np.int64],
) -> Reading:
    """Return where a feature reads in the alerts int64[n], given all activations [N, Q, F]."""
    query = activations[alert, :, feature].argmax(axis=1)
    features = torch.full((len(alert),), feature)
    triples = (torch.from_numpy(alert), torch.from_numpy(query), features)
    by_source, _ = direct_attribution(attended.attention, dictionary, *triples)
    return Reading(alert, query, by_source.numpy())


def ablate(
    attended: Attended,
    dictionary: SparseDictionary,
    feature: int,
    alert: NDArray[np.int64],
    figures: Figures | None = None,
) -> Effect:
    """Return the effect of a feature on the outputs and the figures, for alerts int64[n] in which it is active."""
    draws = Generator().manual_seed(SEED + feature)
    own = torch.from_numpy(alert)
    drawn = own.repeat(DRAWN)
    z = attended.attention.z
    before = _outputs(attended, own, z[own])
    removed = contribution(z[own], attended.attention.queries[own], dictionary, torch.full((len(alert),), feature))
    repeated, expected = (
        removed.repeat(DRAWN, 1, 1),
        [output.repeat(DRAWN, *[1] * (output.ndim - 1)) for output in before],
    )
    nulls = (in_random_direction(repeated, draws), _alike(attended, repeated, draws))
    moved = [_moved(before, _outputs(attended, own, z[own] - removed), alert, figures)]
    moved += [_moved(expected, _outputs(attended, drawn, z[drawn] - null), drawn.numpy(), figures) for null in nulls]
    return Effect(*moved)


def _moved(
    before: Sequence[Tensor], after: Sequence[Tensor], alert: NDArray[np.int64], figures: Figures | None
) -> dict[str, float]:
    """Return the mean changes of the outputs [n, ...] of the alerts int64[n], and of the figures, by name.

    Alerts without a figure do not count; without any, its change is 0.
    """
    changed = {name: float(values.mean()) for name, values in changes(tuple(before), tuple(after)).items()}
    if figures is not None:
        old, new = (figures(outputs[1].numpy(), alert) for outputs in (before, after))
        for name in old:
            moves = np.abs(new[name] - old[name])
            known = moves[np.isfinite(moves)]
            changed[name] = float(known.mean()) if len(known) else 0.0
    return changed


def _alike(attended: Attended, vectors: Tensor, draws: Generator) -> Tensor:
    """Return vectors of the lengths of `vectors` [n, Q, d], each along the difference of two random rows of z."""
    rows = torch.from_numpy(attended.rows)
    first, second = torch.randint(len(rows), (2, len(vectors)), generator=draws)
    directions = normalize(rows[first] - rows[second], dim=1)[:, None]
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    return lengths * directions


def _outputs(attended: Attended, alert: Tensor, z: Tensor) -> list[Tensor]:
    """Return the network's outputs [n, ...] for the alerts int64[n] with `z` [n, Q, d]."""
    rest = {name: tensor[alert] for name, tensor in attended.attention.rest.items()}
    return resumed(attended.site, rest, z)
