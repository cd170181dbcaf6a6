"""The contrastive loss: each modality of an alert must identify the other modalities of the same alert within a batch.

It is the CLIP loss for each pair of modalities, as in AstroM3 (`contrastive_losses`), for any number of modalities. An
alert that lacks a modality is excluded from the pairs with that modality.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from training.astrom3.model.network import MAX_LOGIT_SCALE, contrastive_losses

FEWEST = 2
"""Smallest number of alerts with both modalities of a pair; with a single alert there is nothing to distinguish."""
FIRST_LOGIT_SCALE = 10.0
"""Initial value of the learnable inverse temperatures. AstroM3's value of 100 suits larger batches; with these batches
it overfits."""


class Contrast(nn.Module):
    """The loss for M modalities, with a learnable inverse temperature per pair."""

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.pairs = list(combinations(range(modalities), 2))
        self.log_scale = nn.Parameter(torch.full((len(self.pairs),), FIRST_LOGIT_SCALE).log())

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the sum of the losses over the available pairs of modalities.

        `vectors` [N, M, D]: vectors of length 1, or 0 where a modality is missing.
        """
        there = (vectors != 0).any(dim=2)
        logits = []
        for (i, j), scale in zip(self.pairs, self.log_scale.exp().clamp(1, MAX_LOGIT_SCALE), strict=True):
            both = there[:, i] & there[:, j]
            if both.sum() >= FEWEST:
                logits.append(scale * vectors[both, i] @ vectors[both, j].T)
        return contrastive_losses(logits).sum()
