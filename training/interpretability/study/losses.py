"""The loss of a network with replaced activations at a site: how much of what the network does a reconstruction keeps.

The loss is the one that the network was trained with: for an embedder the contrastive loss between the modalities at a
fixed inverse temperature, otherwise the binary cross-entropy of the first label. Losses of different replacements are
comparable, because they are of the same alerts in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from training.embedding.contrast import FEWEST, Contrast
from training.interpretability.sites.open_site import Attention, Site
from training.interpretability.study.measures import Rows

BATCH = 192
"""Largest number of alerts that the contrastive loss tells apart, as in the embedder's training."""
SEED = 2026
"""Seed of the batches."""
AT_ONCE = 128
"""Number of alerts that pass through the network at a time."""

Loss = Callable[[Sequence[Tensor]], float]
"""Function from the network's outputs for N alerts to a loss."""


@dataclass(frozen=True, slots=True)
class Attended:
    """The attention of N alerts at a site, with what is needed to run the rest of the network again."""

    site: Site
    attention: Attention

    @classmethod
    def join(cls, site: Site, parts: Sequence[Attention]) -> Attended:
        """Return the attention of consecutive parts of the alerts as one."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        rest = {name: torch.cat([part.rest[name] for part in parts]) for name in parts[0].rest}
        names = ("z", "pattern", "values", "queries", "sources")
        return cls(site, Attention(**{name: joined(name) for name in names}, rest=rest))

    @property
    def rows(self) -> Rows:
        """The rows of z that exist, float32[T, d], alert by alert."""
        return self.attention.z[self.attention.queries].numpy()

    @property
    def alert(self) -> NDArray[np.int64]:
        """The alert of each of the rows, int64[T]."""
        return self.attention.queries.nonzero()[:, 0].numpy()

    def outputs(self, rows: Rows) -> list[Tensor]:
        """Return the network's outputs for N alerts with `rows` float32[T, d] in place of the rows of z."""
        z = self.attention.z.clone()
        z[self.attention.queries] = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
        return resumed(self.site, self.attention.rest, z)


def resumed(site: Site, rest: Mapping[str, Tensor], z: Tensor) -> list[Tensor]:
    """Return the network's outputs [N, ...] with `z` [N, Q, d], in parts of AT_ONCE alerts."""
    with torch.inference_mode():
        parts = [
            site.resume({name: tensor[start : start + AT_ONCE] for name, tensor in rest.items()}, z[start:][:AT_ONCE])
            for start in range(0, len(z), AT_ONCE)
        ]
    return [torch.cat(output) for output in zip(*parts, strict=True)]


def contrastive_loss(survey: NDArray[np.uint8]) -> Loss:
    """Return the mean contrastive loss of batches of at most BATCH alerts of one `survey` uint8[N]."""
    rng = np.random.default_rng(SEED)
    batches: list[NDArray[np.int64]] = []
    for code in np.unique(survey).tolist():
        rows = rng.permutation(np.flatnonzero(survey == code))
        batches += [part for part in np.array_split(rows, -(-len(rows) // BATCH)) if len(part) >= FEWEST]

    def loss(outputs: Sequence[Tensor]) -> float:
        modalities = outputs[2]
        contrast = Contrast(modalities.shape[1])  # the inverse temperature keeps its initial value
        with torch.inference_mode():
            return float(np.mean([contrast(modalities[torch.from_numpy(batch)]).item() for batch in batches]))

    return loss


def cross_entropy(real: NDArray[np.float64]) -> Loss:
    """Return the binary cross-entropy of the first logit for `real` [N]: 1, 0, or NaN for alerts that do not count."""
    known = torch.from_numpy(np.flatnonzero(~np.isnan(real)))
    truth = torch.from_numpy(real[~np.isnan(real)]).float()

    def loss(outputs: Sequence[Tensor]) -> float:
        return float(binary_cross_entropy_with_logits(outputs[0][known, 0], truth))

    return loss
