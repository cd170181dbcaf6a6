"""StampNetClasses: classes of alerts beside StampNet's real/bogus score.

The architecture is this project's own (BSD-3-Clause). The classes are computed from the maps of the real/bogus network,
which stays unchanged, and from metadata columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from broker_filter.scoring.networks.alert_embedder import StampNetTrunk, Standardise
from broker_filter.scoring.networks.stampnet import log_odds

MAX_LOGIT = 8.0
"""The real/bogus logit is clipped to this absolute value before it enters the classes: beyond it, it adds no
evidence."""


class StampNetClasses(nn.Module):
    """Images [N, 3, 63, 63] and metadata [N, F] -> logits [N, 1 + classes] and StampNet's embedding [N, 64].

    The first logit is StampNet's real/bogus logit. The sigmoids of the other logits are the softmax over the classes,
    so they sum to 1. The classes are a perceptron with one hidden layer on the standardised `evidence`.
    """

    def __init__(self, metadata: int, classes: int, hidden: int, distances: Sequence[int], star: int) -> None:
        """Build the network with initial parameters.

        `metadata`: F, the number of metadata inputs. `hidden`: the width of the hidden layer. `distances`: the
        positions of the metadata inputs that are distances from the alert to a catalogued source, in arcsec. `star`:
        the position of the probability that this source is a star.
        """
        super().__init__()
        self.distances, self.star = list(distances), star
        self.trunk = StampNetTrunk(labels=1)
        width = 1 + self.trunk.features + metadata + 2 * len(self.distances)
        self.standardise = Standardise(width)
        self.classes = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, images: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, 1 + classes] and the embedding [N, 64] of images [N, 3, 63, 63] and metadata [N, F]."""
        real, features = self.trunk(images)
        scores = self.classes(self.standardise(self.evidence(real, features, metadata)))
        return torch.cat([real, log_odds(scores)], dim=1), features[:, : self.trunk.network.head.in_features]

    def evidence(self, real: Tensor, features: Tensor, metadata: Tensor) -> Tensor:
        """Return the inputs of the class layers, float32[N, 1 + 128 + F + 2 D] for D distances.

        They are the clipped real/bogus logit `real` [N, 1], the trunk's `features` [N, 128], asinh of the metadata
        [N, F], and the proximity 1 / (1 + distance^2) of each source, alone and times the probability that the source
        is a star. asinh is logarithmic for large values, and also defined for zero and negative ones.
        """
        proximity = 1 / (1 + metadata[:, self.distances].square())
        star = metadata[:, self.star : self.star + 1]
        limited = real.clamp(-MAX_LOGIT, MAX_LOGIT)
        return torch.cat([limited, features, metadata.asinh(), proximity, proximity * star], dim=1)
