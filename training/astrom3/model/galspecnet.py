"""The spectra encoder: GalSpecNet, a convolutional network over wavelength.

Wu et al. 2024, MNRAS 527, 1163; in AstroM3's variant (Rizhko & Bloom 2024, arXiv:2411.08842). Parameter names are those
of the published checkpoints.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from broker_filter.config import Section
from training.astrom3.model.preprocess import WAVELENGTHS


class GalSpecNetArguments(Section):
    """The arguments of a GalSpecNet, with the published names and defaults."""

    classification: bool = False
    num_classes: int = Field(default=10, gt=0, le=1000)
    conv_channels: tuple[int, ...] = Field(default=(3, 64, 64, 32, 32), min_length=2, max_length=10)
    kernel_size: int = Field(default=3, gt=0, le=100)
    mp_kernel_size: int = Field(default=4, gt=0, le=100)
    dropout_rate: float = Field(default=0.3, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.features <= 0:
            raise ValueError(
                f"too many convolutions and poolings: no features are left of {len(WAVELENGTHS)} wavelengths"
            )
        return self

    @property
    def features(self) -> int:
        """Number of features of an encoded spectrum."""
        length = len(WAVELENGTHS) - self.kernel_size + 1
        for _ in self.conv_channels[2:]:
            length = length // self.mp_kernel_size - self.kernel_size + 1
        return length * self.conv_channels[-1]


class GalSpecNet(nn.Module):
    """The spectra encoder. It maps spectra [N, 3, 2575] to features [N, features].

    Each layer is a convolution with ReLU, followed by pooling except after the last one.
    """

    def __init__(self, arguments: GalSpecNetArguments) -> None:
        super().__init__()
        self.arguments = arguments
        channels = arguments.conv_channels
        layers: list[nn.Module] = []
        for inward, outward in pairwise(channels):
            layers += [nn.Conv1d(inward, outward, arguments.kernel_size), nn.ReLU()]
            layers += [nn.MaxPool1d(arguments.mp_kernel_size)]
        self.layers = nn.Sequential(*layers[:-1])
        self.dropout = nn.Dropout(arguments.dropout_rate)

    def forward(self, spectra: Tensor) -> Tensor:
        """Return the features float32[N, features] of spectra float32[N, 3, 2575]."""
        features: Tensor = self.dropout(self.layers(spectra).flatten(1))
        return features


class SpectraClassifier(GalSpecNet):
    """The spectra encoder with a linear layer, which gives logits [N, num_classes]."""

    def __init__(self, arguments: GalSpecNetArguments) -> None:
        super().__init__(arguments)
        self.fc = nn.Linear(arguments.features, arguments.num_classes)

    def forward(self, spectra: Tensor) -> Tensor:
        """Return the logits float32[N, num_classes] of spectra float32[N, 3, 2575]."""
        logits: Tensor = self.fc(super().forward(spectra))
        return logits
