"""The alert embedder: an alert's cutouts, light curve and metadata as vectors of one space, and side by side as one.

This project's own (BSD-3-Clause), after AstroM3 (Rizhko & Bloom 2025, arXiv:2411.08842), which joins stars' light
curves, spectra and metadata by contrastive learning. Its trunk is a network of images as it is served alone, so that
one pass gives that network's probabilities and the embedding.
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
"""What an alert is seen in, in the order of the embedder's outputs."""
MAX_DEVIATION = 5.0
"""Standard deviations of a metadata column beyond which a value is only large."""
LEAST_DEVIATION = 1e-3
"""Lest a column that hardly varies be divided by nothing."""
TAPPED = 8
"""Layers of StampNet up to its map of 32 channels and 15 px: what classes need is still there, and in what its answer
is read from no longer is."""
CENTRE = slice(6, 9)
"""Of these 15 px: where the alert is."""


class AlertEmbedder(nn.Module):
    """Images [N, 3, S, S], metadata [N, F], light curves [N, L, LIGHT_CURVE_FEATURES] and their mask [N, L] -> the
    trunk's logits [N, labels], the embedding [N, M * size] and the modalities that it is made of, [N, M, size].

    A modality's vector has length 1, or is 0 where the alert lacks it; the embedding has them side by side, and length
    1: the cosine of two alerts is the mean of their modalities'. Metadata are raw, NO_VALUE where missing.
    """

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
        """`trunk`: `stampnet`, or a backbone that timm knows; `metadata`: F, the number of columns; `width`, `layers`,
        `heads`: of the light curves' transformer; `hidden`: width of the layer before each projection."""
        super().__init__()
        self.trunk: StampNetTrunk | TimmTrunk
        self.trunk = StampNetTrunk(labels) if trunk == "stampnet" else TimmTrunk(trunk, labels)
        self.features = Standardise(self.trunk.features)
        self.metadata = MetadataEncoder(metadata)
        self.light_curve = LightCurveEncoder(width, layers, heads)
        widths = (self.trunk.features, width, 2 * metadata)
        self.projections = nn.ModuleDict(
            {name: projection(w, hidden, size) for name, w in zip(MODALITIES, widths, strict=True)}
        )

    def forward(
        self, images: Tensor, metadata: Tensor, light_curve: Tensor, light_curve_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        logits, features = self.trunk(images)
        modalities = self.see(features, metadata, light_curve, light_curve_mask)
        return logits, normalize(modalities.flatten(1), dim=1), modalities

    def see(self, features: Tensor, metadata: Tensor, light_curve: Tensor, light_curve_mask: Tensor) -> Tensor:
        """The modalities [N, M, size], of the trunk's features [N, T] instead of the images."""
        seen = (
            self.features(features),
            self.light_curve(light_curve, light_curve_mask),
            self.metadata(metadata),
        )
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


def projection(width: int, hidden: int, size: int) -> nn.Sequential:
    """Of an encoder's features [N, width] into the common space [N, size]."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, size))


class StampNetTrunk(nn.Module):
    """StampNet as it is; its features: what it is asked about is read from, [64], and the mean of an earlier map, over
    the whole image and over its centre, [32] each."""

    features = 128

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.network = StampNet(labels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, 63, 63] -> logits [N, labels], features [N, 128]."""
        layers = self.network.features
        tapped = layers[:TAPPED](images)
        embedding = layers[TAPPED:](tapped)
        centre = tapped[:, :, CENTRE, CENTRE]
        features = torch.cat([embedding, tapped.mean((2, 3)), centre.mean((2, 3))], dim=1)
        return self.network.head(embedding), features


class TimmTrunk(nn.Module):
    """A backbone of timm under BTSbot's head (`timm_network`), as it is; its features are what the backbone pools."""

    def __init__(self, backbone: str, labels: int) -> None:
        super().__init__()
        self.network = timm_network(backbone, labels=labels)
        self.features = self.network.encoder.features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, S, S] -> logits [N, labels], features [N, T]."""
        logits, features = self.network(images)
        return logits, features


class Standardise(nn.Module):
    """Columns [N, F] less their mean, in units of their deviation, both constants; clipped beyond MAX_DEVIATION."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("deviation", torch.ones(columns))

    def forward(self, columns: Tensor) -> Tensor:
        """See the class."""
        return ((columns - self.mean) / self.deviation).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    @torch.no_grad()
    def fit(self, columns: Tensor) -> None:
        """Sets the constants: those of `columns` [N, F], where NaN is no value."""
        mean = columns.nanmean(0)
        self.mean.copy_(mean.nan_to_num(0.0))
        deviation = (columns - mean).square().nanmean(0).sqrt()
        self.deviation.copy_(deviation.nan_to_num(1.0).clamp(min=LEAST_DEVIATION))


class MetadataEncoder(nn.Module):
    """Raw metadata [N, F] -> [N, 2 F]: the values' inverse hyperbolic sines, logarithms that zero and negative values
    have too, standardised, and 0 where missing; and 1 where missing."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.standardise = Standardise(columns)

    def forward(self, metadata: Tensor) -> Tensor:
        """See the class."""
        missing = metadata == NO_VALUE
        values = self.standardise(metadata.asinh()).masked_fill(missing, 0.0)
        return torch.cat([values, missing.to(values.dtype)], dim=1)

    def fit(self, metadata: Tensor) -> None:
        """Sets the constants: those of raw `metadata` [N, F]."""
        self.standardise.fit(torch.where(metadata == NO_VALUE, torch.nan, metadata).asinh())


class LightCurveEncoder(nn.Module):
    """A transformer over points [N, L, LIGHT_CURVE_FEATURES], those that the mask [N, L] has, in any order: their times
    are among the features -> [N, width], what a token of its own, which is always there, has gathered from them."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(LIGHT_CURVE_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        x = torch.cat([self.token.expand(points.shape[0], -1, -1), self.embed(points)], dim=1)
        there = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1) > 0
        *all_but_last, last = self.layers
        for layer in all_but_last:
            x = layer(x, x, there)
        x = last(x[:, :1], x, there)  # nothing else is read from the last layer
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Pre-normed attention and a perceptron (Xiong et al. 2020, arXiv:2002.04745)."""

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
        """`x` [N, Q, width] looks at those of `points` [N, P, width] that are `there` [N, P]."""
        seen = self.norm(points)
        query = self._split(self.query(seen[:, : x.shape[1]]))  # x are the first of the points
        key, value = map(self._split, self.key_value(seen).chunk(2, dim=2))
        found = scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None, :])
        x = x + self.output(found.transpose(1, 2).flatten(2))
        return x + self.perceptron(x)  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """[N, P, width] -> [N, heads, P, width / heads]."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)
