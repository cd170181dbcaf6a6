"""SnrNet: a small network for alerts of Rubin, an architecture of this project (BSD-3-Clause).

It sees pixels in units of their noise (the normalisation `snr`), the PSF, and, for the classes, metadata of the
detection. Several equal image networks, each trained from another seed, are averaged: with a few hundred labelled
alerts, the average is better and steadier than any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from broker_filter.scoring.networks.stampnet import log_odds
from broker_filter.scoring.networks.stampnet_classes import MAX_LOGIT

SIZE = 31
"""Pixels per side of the images and of the PSF. Stamps of Rubin have at least 30."""
FEATURES = 48
"""Length of the embedding of one image network."""
LEAST = 1e-3
"""Smallest divisor in a ratio of metadata columns; their units are nJy, arcsec and arcsec^2."""
LARGEST = 1e12
"""Metadata are clipped to this absolute value, whose square is finite in float32."""
LIMIT = 4.0
"""Metadata features are clipped to this many standard deviations from their mean."""

METADATA = (
    "snr",
    "psfFlux",
    "psfFluxErr",
    "apFlux",
    "apFluxErr",
    "scienceFlux",
    "scienceFluxErr",
    "templateFlux",
    "templateFluxErr",
    "psfChi2",
    "psfNdata",
    "ixx",
    "iyy",
    "ixy",
    "ixxPSF",
    "iyyPSF",
    "ixyPSF",
    "extendedness",
    "trailLength",
    "trailFlux",
    "dipoleLength",
    "dipoleMeanFlux",
    "isDipole",
    "isNegative",
    "glint_trail",
    "pixelFlags",
    "pixelFlags_edge",
    "pixelFlags_bad",
    "pixelFlags_cr",
    "pixelFlags_saturated",
    "pixelFlags_streak",
)
"""The metadata columns that the network takes, in order. None reveals `reliability`, the history of the object, or
where and when it was observed."""
FLAGGED = ("scienceFlux", "templateFlux", "ixx", "extendedness", "trailLength", "dipoleLength")
"""Columns with a flag for missing values, in the order of METADATA; other columns are missing together with these, or
never."""
_FLAGS = slice(METADATA.index("isDipole"), len(METADATA) + len(FLAGGED))


def derive(metadata: Tensor) -> Tensor:
    """Return features [N, K] of the metadata [N, len(METADATA) + len(FLAGGED)], missing values 0.

    They are signal-to-noise ratios, ratios of fluxes and sizes, and fluxes on a logarithmic scale.
    """
    metadata = metadata.clamp(-LARGEST, LARGEST)
    column = dict(zip(METADATA, metadata.unbind(1), strict=False))

    def ratio(above: str, below: str) -> Tensor:
        return column[above] / column[below].abs().clamp(min=LEAST)

    size, psf = column["ixx"] + column["iyy"], column["ixxPSF"] + column["iyyPSF"]
    elongation, of_psf = (
        ((column[f"ixx{of}"] - column[f"iyy{of}"]).square() + 4 * column[f"ixy{of}"].square()).sqrt()
        / width.abs().clamp(min=LEAST)
        for of, width in (("", size), ("PSF", psf))
    )
    logarithmic = [
        column["snr"],
        ratio("psfFlux", "psfFluxErr"),
        ratio("apFlux", "apFluxErr"),
        ratio("scienceFlux", "scienceFluxErr"),
        ratio("templateFlux", "templateFluxErr"),
        ratio("psfChi2", "psfNdata"),
        ratio("apFlux", "psfFlux"),
        ratio("psfFlux", "scienceFlux"),
        ratio("psfFlux", "templateFlux"),
        ratio("trailFlux", "psfFlux"),
        ratio("dipoleMeanFlux", "psfFluxErr"),
        column["psfFlux"],
        column["psfFluxErr"],
        column["apFluxErr"],
        column["scienceFlux"],
        column["templateFlux"],
        column["templateFluxErr"],
        column["trailLength"] / psf.abs().clamp(min=LEAST).sqrt(),
        column["trailLength"],
        column["dipoleLength"],
        10 * size / psf.abs().clamp(min=LEAST),
        10 * psf,
        10 * elongation,
        10 * of_psf,
        column["extendedness"],
    ]
    return torch.cat([torch.stack(logarithmic, dim=1).asinh(), metadata[:, _FLAGS]], dim=1)


N_DERIVED = 25 + _FLAGS.stop - _FLAGS.start
"""K, the number of features that `derive` returns."""


def _convolution(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2 if stride == 1 else 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


class ImageNet(nn.Sequential):
    """Images and PSF [N, 4, 31, 31] -> features [N, FEATURES]. Features keep their position: nothing is averaged."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(
            *_convolution(4, 16, 5, 2),  # 15 px
            *_convolution(16, 32),
            nn.MaxPool2d(2),  # 7 px
            *_convolution(32, 48),
            *_convolution(48, 12, 1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(12 * 7 * 7, FEATURES),
            nn.ReLU(),
        )


class SnrNet(nn.Module):
    """Images [N, 3, 31, 31], metadata [N, F] and PSF [N, 1, 31, 31] -> logits [N, 1 + classes] and features [N, D].

    The first logit is real/bogus; it depends on images and PSF alone. The sigmoids of the other logits are the softmax
    over the classes. D is members x FEATURES. Every image network sees each image in several orientations, and its
    outputs are averaged.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, members: int, classes: int, orientations: int = 8) -> None:
        """`orientations`: how many of the eight symmetries of the square are averaged."""
        super().__init__()
        self.orientations = orientations
        self.image_nets = nn.ModuleList(ImageNet() for _ in range(members))
        self.image_heads = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(members))
        self.calibration = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(N_DERIVED))
        self.register_buffer("deviation", torch.ones(N_DERIVED))
        self.classes = nn.Linear(members * FEATURES + 1 + N_DERIVED, classes)

    def image_features(self, images: Tensor, psf: Tensor) -> list[Tensor]:
        """Return the features [N, FEATURES] of each image network, averaged over the orientations."""
        seen = torch.cat(orient(torch.cat([images, psf], dim=1), self.orientations))
        return [self.averaged(net(seen)) for net in self.image_nets]

    def averaged(self, features: Tensor) -> Tensor:
        """Return the mean [N, D] over the orientations of features [orientations * N, D]."""
        return features.reshape(self.orientations, -1, features.shape[1]).mean(dim=0)

    def evidence(self, images: Tensor, metadata: Tensor, psf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of the last layers.

        They are the mean logit [N, 1] of the image networks, the image features [N, D], and the inputs of the class
        layer [N, D + 1 + K].
        """
        return self.evidence_of(self.image_features(images, psf), metadata)

    def evidence_of(self, features: list[Tensor], metadata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `evidence`, given the features [N, FEATURES] of each image network."""
        logit = torch.stack([head(each) for head, each in zip(self.image_heads, features, strict=True)]).mean(dim=0)
        embedding = torch.cat(features, dim=1)
        real = logit.clamp(-MAX_LOGIT, MAX_LOGIT)
        return logit, embedding, torch.cat([embedding, real, self.standardised(derive(metadata))], dim=1)

    def standardised(self, derived: Tensor) -> Tensor:
        """Return the features of `derive` in units of their standard deviations from the mean, clipped to LIMIT."""
        return ((derived - self.mean) / self.deviation).clamp(-LIMIT, LIMIT)

    def forward(self, images: Tensor, metadata: Tensor, psf: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32[N, 1 + classes] and features float32[N, D]."""
        return self.logits_of(self.image_features(images, psf), metadata)

    def logits_of(self, features: list[Tensor], metadata: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `forward`, given the features [N, FEATURES] of each image network."""
        logit, embedding, of_class = self.evidence_of(features, metadata)
        return torch.cat([self.calibration(logit), log_odds(self.classes(of_class))], dim=1), embedding


def orient(images: Tensor, n: int) -> list[Tensor]:
    """Return the first `n` of the eight symmetric views of `images` [N, C, S, S]."""
    views: list[Tensor] = []
    for flipped in (images, images.flip(-1)):
        for view in (flipped, flipped.flip((-2, -1))):
            views += [view, view.transpose(-2, -1)]
    return views[:n]
