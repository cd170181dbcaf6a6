"""The photometry encoder of AstroM3, an Informer, as sites.

In each head, only the few queries with the most uneven scores attend; the pattern of all others is uniform. The rows of
a site are the observations that attend in at least one head, and one observation that attends in none, since all of
these say the same. Queries are chosen against all keys, which is deterministic.

The published network takes padding as source tokens, so padding is a source here too, but never a row. It also
reshapes the heads' outputs without moving the head axis back, so a row of the output projection's input is no row of z.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.astrom3.model.informer import EncoderLayer, Informer, PhotometryClassifier
from training.astrom3.model.network import AstroM3Classifier
from training.interpretability.sites.attention import Attention

LAYERS = "attn_layers"
"""The first part of the names of these sites: `attn_layers.0` is the first layer of the encoder."""


def informer_sites(network: PhotometryClassifier | AstroM3Classifier) -> list[str]:
    """Return the names of the layers of the photometry encoder, from the first on."""
    return [f"{LAYERS}.{number}" for number in range(len(_informer(network).encoder.attn_layers))]


class InformerSite:
    """A layer of AstroM3's photometry encoder. Inputs are `photometry` and `mask`, and those of `Stars` besides.

    Its output, for `resume`, is the logits alone.
    """

    def __init__(self, network: PhotometryClassifier | AstroM3Classifier, name: str) -> None:
        """Open the site `name`, one of `informer_sites`."""
        self.name = name
        self.network = network
        self.informer = _informer(network)
        self.number = informer_sites(network).index(name)
        layer = self.informer.encoder.attn_layers[self.number]
        assert isinstance(layer, EncoderLayer)
        self.layer = layer
        self.heads = layer.attention.heads
        self.output: nn.Linear = layer.attention.out_projection
        self.d_head = self.output.in_features // self.heads

    def attend(self, inputs: Mapping[str, Tensor]) -> Attention:
        """Return the attention; see Site."""
        x = self.informer.enc_embedding(inputs["photometry"])
        for layer in self.informer.encoder.attn_layers[: self.number]:
            x = layer(x, None)
        query, key, values = self.layer.attention.split(x)
        chosen, weights = self.layer.attention.attend(query, key)
        length = x.shape[1]
        uniform = torch.full_like(weights[:, :, :1], 1 / length).expand(-1, -1, length, -1)
        pattern = uniform.scatter(2, chosen.expand_as(weights), weights)
        attending = torch.zeros_like(query[..., 0], dtype=torch.bool).scatter(2, chosen[..., 0], True).any(1)
        observed = inputs["mask"] > 0
        silent = observed & ~attending
        first = silent & (silent.cumsum(1) == 1)
        return Attention(
            z=(pattern @ values).transpose(1, 2).flatten(2),
            pattern=pattern,
            values=values,
            queries=(observed & attending) | first,
            sources=torch.ones_like(observed),
            rest={"residual": x, "mask": inputs["mask"], **self._others(inputs)},
        )

    def resume(self, rest: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the logits with `z`; see Site."""
        context = z.reshape(*z.shape[:2], self.heads, self.d_head).transpose(1, 2)
        x = self.layer.add(rest["residual"], self.layer.attention.project(context))
        for layer in self.informer.encoder.attn_layers[self.number + 1 :]:
            x = layer(x, None)
        features = (self.informer.encoder.norm(x) * rest["mask"].unsqueeze(-1)).flatten(1)
        if isinstance(self.network, PhotometryClassifier):
            return (self.network.fc(features),)
        photometry = normalize(self.network.photometry_proj(features), dim=-1)
        return (self.network.classify(photometry, rest["spectra"], rest["metadata"]),)

    def splice(self, inputs: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the logits with `z` in place of the layer's own; see Site."""
        return self.resume(self.attend(inputs).rest, z)

    def where(self, sources: int, stamp: int) -> list[int]:  # noqa: ARG002 - a light curve has no pixels
        """Return the index of each source token's observation."""
        return list(range(sources))

    def _others(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the embeddings [N, D] of the modalities that the site does not change."""
        if isinstance(self.network, PhotometryClassifier):
            return {}
        spectra = self.network.spectra_proj(self.network.spectra_encoder(inputs["spectra"]))
        metadata = self.network.metadata_proj(self.network.metadata_encoder(inputs["metadata"]))
        return {"spectra": normalize(spectra, dim=-1), "metadata": normalize(metadata, dim=-1)}


def _informer(network: PhotometryClassifier | AstroM3Classifier) -> Informer:
    return network if isinstance(network, PhotometryClassifier) else network.photometry_encoder
