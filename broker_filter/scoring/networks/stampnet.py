"""StampNet: a small residual network for alert cutouts, an architecture of this project (BSD-3-Clause).

It pools early, so that most of the computation is on few pixels, and flattens its last map instead of averaging it, so
that features keep their position: the alert is at the centre.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels_out)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), nn.ReLU(), _convolution(channels, channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.body(x))  # type: ignore[no-any-return]


class StampNet(nn.Module):
    """Images [N, 3, 63, 63] -> logits [N, labels] and the embedding [N, 64], the input of the last layer."""

    def __init__(self, labels: int = 1, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 30 px
            _convolution(16, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 15 px
            _Residual(32),
            _convolution(32, 64, stride=2),  # 8 px
            nn.ReLU(),
            _Residual(64),
            nn.Conv2d(64, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16 * 8 * 8, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, labels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, labels] and the embedding [N, 64] of images [N, 3, 63, 63]."""
        embedding = self.features(images)
        return self.head(embedding), embedding


def log_odds(scores: Tensor) -> Tensor:
    """Convert scores [N, C] with softmax probabilities p into logits [N, C] with sigmoid(logits) = p."""
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rest = scores.unsqueeze(1).masked_fill(own, -torch.inf).logsumexp(dim=2)
    return scores - rest
