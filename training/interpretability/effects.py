"""What features do: where in an alert each one reads, and what changes in the network's outputs without it.

Where a feature reads is its direct feature attribution (DFA): attention weight times value, projected on the feature's
encoder direction. What it does is measured by ablation with the error term kept: its part is subtracted from z, so that
what the dictionary does not explain stays. The same is done with directions that no feature has, of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.interpretability.losses import Attended, resumed
from training.interpretability.measures import unit

ALERTS_OF_A_FEATURE = 24
"""Number of alerts, drawn from those in which a feature is active, that its figures are averaged over."""
DRAWN = 4
"""Number of random directions for each of these alerts."""
SEED = 2026


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a feature reads, for n alerts at the row in which it is most active: DFA [n, H, P] by head and source."""

    alert: NDArray[np.int64]  # [n]
    query: NDArray[np.int64]  # [n]
    attribution: NDArray[np.float64]  # [n, H, P]


@dataclass(frozen=True, slots=True)
class Effect:
    """Mean changes of the outputs, by name, over the alerts in which a feature is active.

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
    attention, heads = attended.attention, attended.site.heads
    query = activations[alert, :, feature].argmax(axis=1)
    encoder = torch.from_numpy(dictionary.w_enc[:, feature].reshape(heads, -1)).double()
    written = torch.einsum("nhpd,hd->nhp", attention.values[alert].double(), encoder)
    pattern = attention.pattern[alert, :, query].double() * attention.sources[alert][:, None]
    return Reading(alert, query, (pattern * written).numpy())


def ablate(
    attended: Attended,
    dictionary: SparseDictionary,
    activations: NDArray[np.float32],
    feature: int,
    alert: NDArray[np.int64],
) -> Effect:
    """Return the effect of a feature on the outputs for the alerts int64[n] in which it is active."""
    rng = np.random.default_rng(SEED + feature)
    size = activations[alert, :, feature] * np.linalg.norm(dictionary.w_dec[feature])
    rows = attended.rows
    pairs = rng.integers(len(rows), size=(2, DRAWN * len(alert)))
    nulls = (
        rng.standard_normal((DRAWN * len(alert), rows.shape[1])),
        rows[pairs[0]].astype(np.float64) - rows[pairs[1]],
    )
    own = np.broadcast_to(unit(dictionary.w_dec[feature][None]), (len(alert), rows.shape[1]))
    directions = np.concatenate([own, *map(unit, nulls)])
    repeated = np.concatenate([np.arange(len(alert)), *[np.tile(np.arange(len(alert)), DRAWN)] * 2])
    moved = torch.from_numpy((size[repeated][:, :, None] * directions[:, None, :]).astype(np.float32))
    which = alert[repeated]
    rest = {name: tensor[which] for name, tensor in attended.attention.rest.items()}
    z = attended.attention.z[which]
    after = resumed(attended.site, rest, z - moved)
    before = [output[torch.from_numpy(repeated)] for output in _before(attended, alert)]
    changed = changes(before, after)
    n = len(alert)
    sides = (slice(n), slice(n, n + DRAWN * n), slice(n + DRAWN * n, None))
    return Effect(*({name: float(values[side].mean()) for name, values in changed.items()} for side in sides))


def changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, NDArray[np.float64]]:
    """Return by how much outputs changed for n alerts, float64[n] by name."""
    found = {"logits": (after[0] - before[0]).abs().amax(1)}
    if len(before) > 1:
        found["embedding"] = 1 - cosine_similarity(before[1].double(), after[1].double(), dim=1)
    return {name: values.double().numpy() for name, values in found.items()}


def _before(attended: Attended, alert: NDArray[np.int64]) -> list[Tensor]:
    rest = {name: tensor[alert] for name, tensor in attended.attention.rest.items()}
    return resumed(attended.site, rest, attended.attention.z[alert])
