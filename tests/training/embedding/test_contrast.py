"""The contrastive loss: the sum over all pairs of modalities, without alerts that lack one of the two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from training.embedding.contrast import FIRST_LOGIT_SCALE, Contrast

ALERTS, SIZE = 12, 6


def vectors(modalities: int) -> Tensor:
    generator = torch.Generator().manual_seed(modalities)
    return normalize(torch.randn(ALERTS, modalities, SIZE, generator=generator), dim=2)


def clip(one: Tensor, other: Tensor) -> Tensor:
    """Return the loss of one pair as in CLIP, summed over both directions."""
    logits, truth = FIRST_LOGIT_SCALE * one @ other.T, torch.arange(len(one))
    return cross_entropy(logits, truth) + cross_entropy(logits.T, truth)


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_loss_is_the_sum_over_all_pairs(modalities: int) -> None:
    v = vectors(modalities)
    expected = sum(clip(v[:, i], v[:, j]) for i in range(modalities) for j in range(i))
    torch.testing.assert_close(Contrast(modalities)(v), expected)


def test_an_alert_is_excluded_only_from_pairs_with_a_missing_modality() -> None:
    v = vectors(3)
    v[:4, 2] = 0
    expected = clip(v[:, 0], v[:, 1]) + clip(v[4:, 0], v[4:, 2]) + clip(v[4:, 1], v[4:, 2])
    torch.testing.assert_close(Contrast(3)(v), expected)


def test_a_modality_that_no_alert_has_does_not_contribute() -> None:
    v = torch.cat([vectors(2), torch.zeros(ALERTS, 1, SIZE)], dim=1)
    torch.testing.assert_close(Contrast(3)(v), Contrast(2)(v[:, :2]))


def test_aligned_modalities_have_a_smaller_loss() -> None:
    v = vectors(1).expand(-1, 3, -1)
    shuffled = torch.stack([v[:, 0], v[:, 1].roll(1, 0), v[:, 2].roll(2, 0)], dim=1)
    assert Contrast(3)(v) < Contrast(3)(shuffled) / 2
