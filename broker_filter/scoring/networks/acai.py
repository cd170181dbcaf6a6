"""ACAI's network: separable convolutions for images, dense layers for features, and a dense head that joins them.

Duev & van der Walt 2021, "Phenomenological classification of the Zwicky Transient Facility astronomical event alerts"
(arXiv:2111.12142); `build_model` of November 2020 in https://github.com/dmitryduev/acai (MIT). Images of 63 px.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SeparableConvolution(nn.Sequential):
    """Keras's SeparableConv2D with ReLU.

    It applies a 3 x 3 filter to each channel, then a 1 x 1 convolution over the channels.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, groups=channels_in, bias=False),
            nn.Conv2d(channels_in, channels_out, 1),
            nn.ReLU(),
        )


class ACAI(nn.Module):
    """Images [N, 3, 63, 63] and metadata [N, F] -> logits [N, 1] and embedding [N, 16].

    The embedding is the input of the last layer.
    """

    def __init__(self, metadata: int) -> None:
        super().__init__()
        self.images = nn.Sequential(
            SeparableConvolution(3, 16),
            SeparableConvolution(16, 16),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            SeparableConvolution(16, 32),
            SeparableConvolution(32, 32),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.metadata = nn.Sequential(
            nn.Linear(metadata, 64), nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, 32), nn.ReLU()
        )
        self.joint = nn.Sequential(nn.Linear(32 + 32, 16), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, images: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, 1] and the embedding [N, 16] of images [N, 3, 63, 63] and metadata [N, F]."""
        embedding = self.joint(torch.cat([self.metadata(metadata), self.images(images)], dim=1))
        return self.head(embedding), embedding
