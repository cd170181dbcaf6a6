"""The alert embedder: an alert's cutouts, light curve and metadata as vectors in a common space.

The embedding is the concatenation of these vectors. The architecture is this project's own (BSD-3-Clause), and is
modelled on AstroM3 (Rizhko & Bloom 2024, arXiv:2411.08842), which aligns light curves, spectra and metadata of stars by
contrastive learning. The trunk is an image network that is also served on its own, so one pass gives both that
network's probabilities and the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import LIGHT_CURVE_FEATURES
from broker_filter.scoring.networks.stampnet import StampNet
from broker_filter.scoring.networks.timm_network import timm_network

MODALITIES = ("image", "light_curve", "metadata")
"""The modalities of an alert, in the order of the embedder's outputs."""
MAX_DEVIATION = 5.0
"""Standardised values are clipped to this many standard deviations."""
LEAST_DEVIATION = 1e-3
"""Smallest standard deviation that a column is divided by."""
TAPPED = 8
"""Number of StampNet layers up to its map of 32 channels and 15 x 15 px. This map still holds what is needed to tell
classes apart; the features before the real/bogus logit no longer do."""
CENTRE = slice(6, 9)
"""Rows and columns 6 to 8 of the 15 x 15 px map: its centre, where the alert is."""


class JoinedModalities(nn.Module):
    """Encoders of an alert's modalities, joined in a common space. The trunk encodes the images.

    Each modality vector has length 1, or is 0 if the alert lacks the modality. The embedding is their concatenation,
    scaled to length 1, so the cosine similarity of two alerts that have all modalities is the mean of the similarities
    of their modalities. Metadata are raw, with NO_VALUE where missing.
    """

    metadata: FittedEncoder

    def __init__(
        self,
        trunk: nn.Module,
        features: int,
        metadata: FittedEncoder,
        encoded: int,
        size: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
    ) -> None:
        """Build the encoders around the `trunk`, which gives `features` numbers per alert.

        `metadata`: the encoder of raw metadata [N, F] into [N, encoded]. `size`: the number of
        dimensions of each modality's vector. `width`, `layers`, `heads`: the size of the light-curve transformer.
        `hidden`: the width of the layer before each projection.
        """
        super().__init__()
        self.trunk = trunk
        self.features = Standardise(features)
        self.metadata = metadata
        self.light_curve = LightCurveEncoder(width, layers, heads)
        self.projections = nn.ModuleDict(
            {name: projection(w, hidden, size) for name, w in zip(MODALITIES, (features, width, encoded), strict=True)}
        )

    def see(self, features: Tensor, metadata: Tensor, light_curve: Tensor, light_curve_mask: Tensor) -> Tensor:
        """Return the modalities [N, M, size], given the trunk's features [N, T] in place of the images."""
        return self.join(features, metadata, self.light_curve(light_curve, light_curve_mask), light_curve_mask)

    def join(self, features: Tensor, metadata: Tensor, light_curves: Tensor, light_curve_mask: Tensor) -> Tensor:
        """Return the modalities [N, M, size], given the encoded light curves [N, width] in place of their points."""
        seen = (self.features(features), light_curves, self.metadata(metadata))
        there = (
            torch.ones_like(features[:, 0]),
            light_curve_mask.amax(1),
            (metadata != NO_VALUE).to(metadata.dtype).amax(1),
        )
        vectors = [
            normalize(self.projections[name](encoded), dim=1) * present.unsqueeze(1)
            for name, encoded, present in zip(MODALITIES, seen, there, strict=True)
        ]
        return torch.stack(vectors, 1)


class AlertEmbedder(JoinedModalities):
    """Images, metadata, light curves and mask -> logits, embedding and modalities.

    Images are [N, 3, S, S], metadata [N, F], light curves [N, L, LIGHT_CURVE_FEATURES] and the mask [N, L]. The logits
    [N, labels] are those of the trunk; the embedding is [N, M * size], and modalities are [N, M, size].
    """

    trunk: StampNetTrunk | TimmTrunk

    def __init__(
        self,
        trunk: str,
        metadata: int,
        size: int = 32,
        width: int = 48,
        layers: int = 2,
        heads: int = 4,
        hidden: int = 128,
        labels: int = 1,
    ) -> None:
        """Build the network with initial parameters.

        `trunk`: `stampnet`, or the name of a timm backbone. `metadata`: F, the number of columns. `size`: the number
        of dimensions of each modality's vector. `width`, `layers`, `heads`: the size of the light-curve transformer.
        `hidden`: the width of the layer before each projection. `labels`: the number of labels of the trunk.
        """
        images = StampNetTrunk(labels) if trunk == "stampnet" else TimmTrunk(trunk, labels)
        encoder = MetadataEncoder(metadata)
        super().__init__(images, images.features, encoder, 2 * metadata, size, width, layers, heads, hidden)

    def forward(
        self, images: Tensor, metadata: Tensor, light_curve: Tensor, light_curve_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [N, labels], the embedding [N, M * size] and the modalities [N, M, size] of N alerts."""
        logits, features = self.trunk(images)
        modalities = self.see(features, metadata, light_curve, light_curve_mask)
        return logits, normalize(modalities.flatten(1), dim=1), modalities


def projection(width: int, hidden: int, size: int) -> nn.Sequential:
    """Return a projection of encoder features [N, width] into the common space [N, size]."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, size))


class StampNetTrunk(nn.Module):
    """StampNet, unchanged.

    Features [N, 128]: its embedding (64), and an earlier map of 32 channels averaged over the whole image (32) and
    over its centre (32).
    """

    features = 128

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.network = StampNet(labels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, labels] and the features [N, 128] of images [N, 3, 63, 63]."""
        layers = self.network.features
        tapped = layers[:TAPPED](images)
        embedding = layers[TAPPED:](tapped)
        centre = tapped[:, :, CENTRE, CENTRE]
        features = torch.cat([embedding, tapped.mean((2, 3)), centre.mean((2, 3))], dim=1)
        return self.network.head(embedding), features


class TimmTrunk(nn.Module):
    """A timm backbone with BTSbot's head (`timm_network`), unchanged. Features: the pooled output of the backbone."""

    def __init__(self, backbone: str, labels: int) -> None:
        super().__init__()
        self.network = timm_network(backbone, labels=labels)
        self.features = self.network.encoder.features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, labels] and the features [N, T] of images [N, 3, S, S]."""
        logits, features = self.network(images)
        return logits, features


class Standardise(nn.Module):
    """Subtract a constant mean from columns [N, F], divide by a constant standard deviation, clip to MAX_DEVIATION."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("deviation", torch.ones(columns))

    def forward(self, columns: Tensor) -> Tensor:
        """Return the standardised, clipped columns [N, F]."""
        return ((columns - self.mean) / self.deviation).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    @torch.no_grad()
    def fit(self, columns: Tensor) -> None:
        """Set the constants to mean and standard deviation of `columns` [N, F]; NaN is ignored."""
        mean = columns.nanmean(0)
        self.mean.copy_(mean.nan_to_num(0.0))
        deviation = (columns - mean).square().nanmean(0).sqrt()
        self.deviation.copy_(deviation.nan_to_num(1.0).clamp(min=LEAST_DEVIATION))


class FittedEncoder(nn.Module):
    """An encoder of raw metadata with constants that are fitted to the training alerts."""

    def fit(self, metadata: Tensor) -> None:
        """Set the constants from raw `metadata` [N, F]."""
        raise NotImplementedError


class MetadataEncoder(FittedEncoder):
    """Raw metadata [N, F] -> [N, 2 F]: standardised values and flags.

    A value is the standardised asinh of the raw one, 0 where it is missing. A flag is 1 where the value is missing.
    asinh is logarithmic for large values, and also defined for zero and negative ones.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.standardise = Standardise(columns)

    def forward(self, metadata: Tensor) -> Tensor:
        """Return the encoded metadata [N, 2 F]: standardised values, then flags of missing values."""
        missing = metadata == NO_VALUE
        values = self.standardise(metadata.asinh()).masked_fill(missing, 0.0)
        return torch.cat([values, missing.to(values.dtype)], dim=1)

    def fit(self, metadata: Tensor) -> None:
        """Set the standardisation constants from raw `metadata` [N, F]."""
        self.standardise.fit(torch.where(metadata == NO_VALUE, torch.nan, metadata).asinh())


class LightCurveEncoder(nn.Module):
    """A transformer over light-curve points [N, L, LIGHT_CURVE_FEATURES] with mask [N, L] -> [N, width].

    The order of the points does not matter, because their times are features. The output is read from a learnt token
    that is prepended to the points, so that a light curve without points is allowed.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(LIGHT_CURVE_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        """Return the encoded light curves [N, width] of points [N, L, LIGHT_CURVE_FEATURES] with a mask [N, L]."""
        return self.read(self.tokens(points), self.existing(mask))

    def tokens(self, points: Tensor) -> Tensor:
        """Return the learnt token and the embedded points [N, 1 + L, width], which the first layer takes."""
        return torch.cat([self.token.expand(points.shape[0], -1, -1), self.embed(points)], dim=1)

    def existing(self, mask: Tensor) -> Tensor:
        """Return which tokens exist, bool [N, 1 + L]: the learnt token, and the points that are no padding."""
        return torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1) > 0

    def queries(self, layer: int, x: Tensor) -> Tensor:
        """Return the tokens that are read from `layer`, given all tokens `x` [N, 1 + L, width].

        The first token alone is read from the last layer.
        """
        return x[:, :1] if layer == len(self.layers) - 1 else x

    def read(self, x: Tensor, there: Tensor, first: int = 0) -> Tensor:
        """Return the encoded light curves [N, width] of the tokens `x` that the layer `first` takes.

        `x`: [N, 1 + L, width], or the first token alone [N, 1, width] after the last layer. `there`: bool [N, 1 + L].
        """
        for number in range(first, len(self.layers)):
            x = self.layers[number](self.queries(number, x), x, there)
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A transformer layer with layer normalisation before attention and perceptron.

    Source: Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, points: Tensor, there: Tensor) -> Tensor:
        """Return `x` [N, Q, width] after attention to the `points` [N, P, width] where `there` [N, P] is true."""
        query, key, value = self.split(points, x.shape[1])  # x are the first Q points
        found = scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None, :])
        return self.add(x, found.transpose(1, 2).flatten(2))

    def split(self, points: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [N, heads, queries, D], key and value [N, heads, P, D] of the points [N, P, width]."""
        seen = self.norm(points)
        query = self._split(self.query(seen[:, :queries]))
        key, value = map(self._split, self.key_value(seen).chunk(2, dim=2))
        return query, key, value

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """Return `x` [N, Q, width] with the heads' outputs `found` [N, Q, width] and the perceptron's output added."""
        x = x + self.output(found)
        return x + self.perceptron(x)  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """Return `x` [N, P, width] as [N, heads, P, width / heads]."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)
