"""What joins modalities: each finds every other of the same alert, among those of a batch.

CLIP between each pair, as AstroM3 has it (`contrastive_losses`), for any number of modalities; an alert that lacks one
is left out of its pairs.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from training.astrom3.model.network import MAX_LOGIT_SCALE, contrastive_losses

FEWEST = 2
"""Alerts that have both of a pair: among one there is nothing to find."""
FIRST_LOGIT_SCALE = 10.0
"""Where the learnable inverse temperatures begin: AstroM3's 100 is for larger batches, and learns these by heart."""


class Contrast(nn.Module):
    """The loss of M modalities, with an inverse temperature a pair."""

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.pairs = list(combinations(range(modalities), 2))
        self.log_scale = nn.Parameter(torch.full((len(self.pairs),), FIRST_LOGIT_SCALE).log())

    def forward(self, vectors: Tensor) -> Tensor:
        """The sum of the losses of the pairs that there are, of vectors [N, M, D]: of length 1, or 0 where missing."""
        there = (vectors != 0).any(dim=2)
        logits = []
        for (i, j), scale in zip(self.pairs, self.log_scale.exp().clamp(1, MAX_LOGIT_SCALE), strict=True):
            both = there[:, i] & there[:, j]
            if both.sum() >= FEWEST:
                logits.append(scale * vectors[both, i] @ vectors[both, j].T)
        return contrastive_losses(logits).sum()
