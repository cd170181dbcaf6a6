"""The common parts of BTSbot's networks: an image encoder, an optional metadata branch, and a head that joins both.

Rehemtulla et al. 2024, "The Zwicky Transient Facility Bright Transient Survey. III. BTSbot", ApJ 972, 7
(arXiv:2401.15167); Rehemtulla et al. 2025, "Pre-training vision models for the classification of alerts from wide-field
time-domain surveys" (arXiv:2512.11957); code https://github.com/nabeelre/BTSbot (MIT).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

CUTOUTS = 3
"""Image channels of an encoder without PSF images."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Encoder(nn.Module):
    """Images [N, 3 + `psf`, S, S] -> features [N, `features`]. The last `psf` channels are images of the PSF."""

    features: int
    psf: int = 0


class FusionNetwork(nn.Module):
    """Images [N, 3, S, S] and, if `metadata` > 0, raw metadata [N, F] -> logits [N, labels] and the embedding [N, D].

    The embedding is the input of the head: the encoder's features, followed by those of the metadata branch. An encoder
    with PSF channels sees the PSF images [N, P, S, S] as further channels of the images.

    `metadata`: F, the number of columns. `hidden`, `metadata_hidden`: widths of the dense layers of the head and of the
    metadata branch. `fusion`: `joint` if branches and head are trained together; `frozen` if the branches were trained
    separately and lost their heads, so that the metadata branch ends with a linear layer (see `metadata_classifier`).
    """

    def __init__(
        self,
        encoder: Encoder,
        labels: int = 1,
        metadata: int = 0,
        activation: Literal["gelu", "relu"] = "gelu",
        hidden: tuple[int, int] = (256, 8),
        dropout: float = 0.7,
        fusion: Literal["joint", "frozen"] = "joint",
        metadata_hidden: tuple[int, int] = (128, 128),
        metadata_dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS or fusion not in {"joint", "frozen"}:
            raise ValueError(
                f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}, and fusion {fusion!r} joint or "
                "frozen"
            )
        active = ACTIVATIONS[activation]
        features = encoder.features
        self.encoder = encoder
        self.metadata_branch = None
        if metadata:
            self.metadata_branch = metadata_branch(metadata, metadata_hidden, metadata_dropout, active)
            if fusion == "joint":
                self.metadata_branch.append(active())
            features += metadata_hidden[1]
        self.head = nn.Sequential(
            nn.Linear(features, hidden[0]),
            active(),
            nn.Linear(hidden[0], hidden[1]),
            active(),
            nn.Dropout(dropout),
            nn.Linear(hidden[1], labels),
        )

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, labels] and the embedding [N, D] of images [N, 3, S, S].

        `others`: raw metadata [N, F] and PSF images [N, P, S, S], as far as the network takes them. In training, the
        images already have the PSF images as further channels, so that both are rotated together.
        """
        return self.join(self.encoder(self.channels(images, *others)), *others)

    def channels(self, images: Tensor, *others: Tensor) -> Tensor:
        """Return the images [N, 3 + P, S, S] that the encoder takes: with the PSF images as further channels."""
        if self.encoder.psf and images.shape[1] == CUTOUTS:
            images = torch.cat([images, others[-1]], dim=1)
        return images

    def join(self, embedding: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the embedding, given the encoder's features [N, features] in place of the images."""
        if self.metadata_branch is not None:
            embedding = torch.cat([embedding, self.metadata_branch(others[0])], dim=1)
        return self.head(embedding), embedding


def metadata_branch(columns: int, hidden: tuple[int, int], dropout: float, active: type[nn.Module]) -> nn.Sequential:
    """Return a branch: raw metadata [N, columns] -> features [N, hidden[1]].

    Batch normalisation scales columns of any unit.
    """
    return nn.Sequential(
        nn.BatchNorm1d(columns),
        nn.Linear(columns, hidden[0]),
        active(),
        nn.Dropout(dropout),
        nn.Linear(hidden[0], hidden[1]),
    )
