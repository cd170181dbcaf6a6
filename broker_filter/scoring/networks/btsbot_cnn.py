"""BTSbot's convolutional network: the image branch alone, or with the metadata branch.

Rehemtulla et al. 2024 (arXiv:2401.15167); `um_cnn` and `mm_cnn` of https://github.com/nabeelre/BTSbot (MIT). Images of
63 px.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from broker_filter.scoring.networks.fusion import Encoder, FusionNetwork
from broker_filter.scoring.networks.initialisation import initialise_as_keras

POOLED_SIZE = 63 // 2 // 4
"""Pixels per side after the two poolings of a 63 px image."""


class BTSbotEncoder(Encoder):
    """Images [N, 3, 63, 63] -> features [N, channels[1] * 7 * 7]."""

    def __init__(self, channels: tuple[int, int] = (32, 64), kernel: int = 5) -> None:
        super().__init__()
        first, second = channels
        self.layers = nn.Sequential(
            nn.Conv2d(3, first, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2d(first, first, kernel, padding="same"),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.50),
            nn.Conv2d(first, second, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2d(second, second, kernel, padding="same"),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Dropout2d(0.55),
            nn.Flatten(),
        )
        self.features = second * POOLED_SIZE**2

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [N, channels[1] * 7 * 7] of images [N, 3, 63, 63]."""
        return self.layers(images)  # type: ignore[no-any-return]


def btsbot_cnn(channels: tuple[int, int] = (32, 64), kernel: int = 5, **heads: Any) -> FusionNetwork:
    """Return a FusionNetwork with a BTSbotEncoder, with ReLU throughout, as published.

    `channels`, `kernel`: arguments of BTSbotEncoder; `heads`: arguments of FusionNetwork.
    """
    network = FusionNetwork(BTSbotEncoder(channels, kernel), **{"activation": "relu", **heads})
    initialise_as_keras(network)
    return network
