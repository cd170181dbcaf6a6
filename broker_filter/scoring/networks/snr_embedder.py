"""SnrEmbedder: the alert embedder for Rubin, whose trunk is SnrNet; an architecture of this project (BSD-3-Clause).

It sees pixels in units of their noise and the PSF, as SnrNet does, and gives SnrNet's probabilities in the same pass.
Everything else is as in `alert_embedder`: three modalities in a common space, concatenated to one embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.networks.alert_embedder import FittedEncoder, JoinedModalities, Standardise
from broker_filter.scoring.networks.snrnet import (
    FEATURES,
    FLAGGED,
    METADATA,
    N_DERIVED,
    ImageNet,
    SnrNet,
    derive,
    orient,
)

TAPPED = 10
"""Number of layers of an image network up to its map of MAP_CHANNELS channels and 7 x 7 px."""
MAP_CHANNELS = 48
CENTRE = slice(2, 5)
"""Rows and columns 2 to 4 of the 7 x 7 px map: its centre, where the alert is."""
_FLAGGED = [METADATA.index(name) for name in FLAGGED]


class SnrEmbedder(JoinedModalities):
    """Images, metadata, light curves, mask and PSF -> logits, embedding and modalities.

    Images are [N, 3, 31, 31], metadata [N, F], light curves [N, L, LIGHT_CURVE_FEATURES], the mask [N, L] and the PSF
    [N, 1, 31, 31]. The logits [N, 1 + classes] are those of the trunk; the embedding is [N, M * size], and modalities
    are [N, M, size]. The metadata are in the order of SnrNet's METADATA, with NO_VALUE where missing; SnrNet itself
    gets 0 there, and its flags.
    """

    trunk: SnrTrunk
    metadata: DerivedMetadata

    def __init__(
        self,
        members: int,
        classes: int,
        orientations: int = 8,
        size: int = 32,
        width: int = 48,
        layers: int = 2,
        heads: int = 4,
        hidden: int = 128,
        lost: float = 0.15,
    ) -> None:
        """Build the network with initial parameters.

        `members`, `classes` and `orientations` are those of SnrNet; `size`, `width`, `layers`, `heads` and `hidden`
        are those of AlertEmbedder. `lost`: the fraction of the metadata features that are masked in training.
        """
        trunk, metadata = SnrTrunk(members, classes, orientations), DerivedMetadata(lost)
        super().__init__(
            trunk, members * (FEATURES + 2 * MAP_CHANNELS), metadata, N_DERIVED, size, width, layers, heads, hidden
        )

    def forward(
        self, images: Tensor, metadata: Tensor, light_curve: Tensor, light_curve_mask: Tensor, psf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [N, 1 + classes], embedding [N, M * size] and modalities [N, M, size] of N alerts."""
        logits, features = self.trunk(images, flagged(metadata), psf)
        modalities = self.see(features, metadata, light_curve, light_curve_mask)
        return logits, normalize(modalities.flatten(1), dim=1), modalities


class SnrTrunk(SnrNet):
    """SnrNet, unchanged, with more features.

    They are, for each image network, its own features, and an earlier map averaged over the whole image and over its
    centre. The map still holds what tells classes apart.
    """

    def forward(self, images: Tensor, metadata: Tensor, psf: Tensor) -> tuple[Tensor, Tensor]:
        """Return SnrNet's logits [N, 1 + classes], and features [N, members * (FEATURES + 2 * MAP_CHANNELS)]."""
        seen = torch.cat(orient(torch.cat([images, psf], dim=1), self.orientations))
        features, maps = [], []
        for net in self.image_nets:
            assert isinstance(net, ImageNet)
            x = seen
            for place, layer in enumerate(net):
                x = layer(x)
                if place == TAPPED - 1:
                    means = (x.mean((2, 3)), x[:, :, CENTRE, CENTRE].mean((2, 3)))
                    maps += [self.averaged(mean) for mean in means]
            features.append(self.averaged(x))
        logits, _ = self.logits_of(features, metadata)
        return logits, torch.cat([*features, *maps], dim=1)


class DerivedMetadata(FittedEncoder):
    """Raw metadata [N, F] with NO_VALUE where missing -> the standardised features of `snrnet.derive` [N, N_DERIVED].

    In training, a random fraction `lost` of the features is set to its mean.
    """

    def __init__(self, lost: float) -> None:
        super().__init__()
        self.lost = lost
        self.standardise = Standardise(N_DERIVED)

    def forward(self, metadata: Tensor) -> Tensor:
        """Return the encoded metadata [N, N_DERIVED]."""
        features: Tensor = self.standardise(derive(flagged(metadata)))
        if self.training:
            features = features * (torch.rand_like(features) >= self.lost)
        return features

    def fit(self, metadata: Tensor) -> None:
        """Set the standardisation constants from raw `metadata` [N, F]."""
        self.standardise.fit(derive(flagged(metadata)))


def flagged(metadata: Tensor) -> Tensor:
    """Return SnrNet's metadata [N, F + flags] of raw `metadata` [N, F]: 0 instead of NO_VALUE, then the flags."""
    missing = metadata == NO_VALUE
    return torch.cat([metadata.masked_fill(missing, 0.0), missing[:, _FLAGGED].to(metadata.dtype)], dim=1)
