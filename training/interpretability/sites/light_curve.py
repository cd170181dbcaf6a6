"""The light-curve transformers of the embedders as sites."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import normalize

from broker_filter.scoring.networks.alert_embedder import AlertEmbedder, JoinedModalities, Layer
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder, flagged
from training.interpretability.sites.attention import TOKEN, Attention

LIGHT_CURVE = "light_curve"
"""The first part of the names of these sites: `light_curve.0` is the first layer of the transformer."""


def light_curve_sites(network: JoinedModalities) -> list[str]:
    """Return the names of the layers of the embedder's light-curve transformer, from the first on."""
    return [f"{LIGHT_CURVE}.{number}" for number in range(len(network.light_curve.layers))]


def attention_pattern(query: Tensor, key: Tensor, there: Tensor) -> Tensor:
    """Return the attention weights [N, H, Q, P] that scaled_dot_product_attention uses and does not return.

    `query`: [N, H, Q, D]; `key`: [N, H, P, D]; `there`: bool [N, P], the source tokens that exist.
    """
    logits: Tensor = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    return logits.masked_fill(~there[:, None, None, :], -float("inf")).softmax(3)


class LightCurveSite:
    """A layer of an embedder's light-curve transformer.

    Source tokens are the learnt token and the L points after it. The queries are the same, but in the last layer the
    learnt token alone.
    """

    def __init__(self, network: AlertEmbedder | SnrEmbedder, name: str) -> None:
        """Open the site `name`, one of `light_curve_sites`."""
        number = light_curve_sites(network).index(name)
        self.name = name
        self.network = network
        self.encoder = network.light_curve
        self.number = number
        layer = self.encoder.layers[number]
        assert isinstance(layer, Layer)
        self.layer = layer
        self.heads = layer.heads
        self.output = layer.output
        self.d_head = layer.output.in_features // layer.heads

    def attend(self, inputs: Mapping[str, Tensor]) -> Attention:
        """Return the attention; see Site."""
        there = self.encoder.existing(inputs["light_curve_mask"])
        x = self.enter(inputs)
        residual = self.encoder.queries(self.number, x)
        query, key, values = self.layer.split(x, residual.shape[1])
        pattern = attention_pattern(query, key, there)
        z = (pattern @ values).transpose(1, 2).flatten(2)
        seen, features = self._trunk(inputs)
        rest = {
            "residual": residual,
            "logits": seen,
            "features": features,
            "metadata": inputs["metadata"],
            "light_curve_mask": inputs["light_curve_mask"],
        }
        return Attention(z, pattern, values, there[:, : residual.shape[1]], there, rest)

    def enter(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the tokens [N, P, width] that the layer takes: its residual stream."""
        x = self.encoder.tokens(inputs["light_curve"])
        there = self.encoder.existing(inputs["light_curve_mask"])
        for layer in self.encoder.layers[: self.number]:
            x = layer(x, x, there)
        return x

    def resume(self, rest: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return logits, embedding and modalities with `z`; see Site."""
        there = self.encoder.existing(rest["light_curve_mask"])
        x = self.layer.add(rest["residual"], z)
        encoded = self.encoder.read(x, there, self.number + 1)
        modalities = self.network.join(rest["features"], rest["metadata"], encoded, rest["light_curve_mask"])
        return rest["logits"], normalize(modalities.flatten(1), dim=1), modalities

    def splice(self, inputs: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return logits, embedding and modalities with `z` in place of the layer's own; see Site."""
        return self.resume(self.attend(inputs).rest, z)

    def where(self, sources: int, stamp: int) -> list[int]:  # noqa: ARG002 - a light curve has no pixels
        """Return the index of each source token's point, and TOKEN for the learnt token."""
        return list(range(TOKEN, sources - 1))

    def _trunk(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the trunk's logits [N, labels] and features [N, T]."""
        if isinstance(self.network, SnrEmbedder):
            seen: tuple[Tensor, Tensor] = self.network.trunk(
                inputs["images"], flagged(inputs["metadata"]), inputs["psf"]
            )
        else:
            seen = self.network.trunk(inputs["images"])
        return seen
