"""Sites: the attention layers of a network, opened.

At a site, one row is one query token of one alert. Its activation z is the heads' outputs, side by side, before the
output projection. `Site.attend` returns z with the attention pattern and the values that it is made of; `Site.resume`
returns the network's outputs for another z. A site changes neither the network nor what the network returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.functional import normalize

from broker_filter.scoring.networks.alert_embedder import AlertEmbedder, JoinedModalities, Layer
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder, flagged
from training.errors import LensError

LIGHT_CURVE = "light_curve"
"""The first part of the names of an embedder's sites: `light_curve.0` is the first layer of its transformer."""
TOKEN = -1
"""What `Site.where` returns for the learnt token, which is no point of the light curve."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one site for N alerts, with H heads, Q query tokens and P source tokens.

    `z` [N, Q, H * d_head]: the heads' outputs side by side. `pattern` [N, H, Q, P]: attention weights; each row sums to
    1 over the source tokens that exist. `values` [N, H, P, d_head]. z of head h is `pattern[:, h] @ values[:, h]`, to
    the rounding of float32. `queries` bool [N, Q] and `sources` bool [N, P]: the tokens that exist; padding does not,
    and its rows of z mean nothing. `rest`: the other tensors [N, ...] that `Site.resume` needs.
    """

    z: Tensor
    pattern: Tensor
    values: Tensor
    queries: Tensor
    sources: Tensor
    rest: Mapping[str, Tensor]


class Box(NamedTuple):
    """The part of a stamp that a cell stands for, in pixels from the top left corner of the stamp."""

    top: float
    left: float
    bottom: float
    right: float


class Site(Protocol):
    """One attention layer of a network. The dtype and the device are those of the network and of its inputs."""

    name: str
    heads: int
    d_head: int
    output: nn.Linear
    """The output projection W_O, whose input is z."""

    def attend(self, inputs: Mapping[str, Tensor]) -> Attention:
        """Return the attention for the network's inputs [N, ...], by the names of `Inputs.shapes`."""

    def resume(self, rest: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the network's outputs (logits, embedding, and modalities if there are any) with `z` [N, Q, d].

        `rest` is that of `attend`. Rows may be repeated in both, for example once for each feature that is ablated.
        """

    def splice(self, inputs: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the network's outputs for its inputs [N, ...] with `z` [N, Q, d] in place of its own."""

    def where(self, sources: int, stamp: int) -> list[int] | list[Box]:
        """Return what each of the source tokens is.

        `sources`: P. `stamp`: the side of the network's images in pixels. For light curves, returns the index of the
        point, and TOKEN for the learnt token; for images, the Box of each cell.
        """


def site_names(network: nn.Module) -> list[str]:
    """Return the names of the network's sites, from the input on; none for a network without attention."""
    if isinstance(network, JoinedModalities):
        return [f"{LIGHT_CURVE}.{number}" for number in range(len(network.light_curve.layers))]
    return []


def open_site(network: nn.Module, name: str) -> Site:
    """Return a site of the network.

    Raises LensError if the network has no attention, or no site of that name.
    """
    names = site_names(network)
    if not names:
        raise LensError(
            f"{type(network).__name__} has no attention layer that can be opened: choose a bundle with a light-curve "
            "transformer or with an attention image network"
        )
    if name not in names:
        raise LensError(f"{type(network).__name__} has no site {name!r}; its sites are {', '.join(names)}")
    assert isinstance(network, AlertEmbedder | SnrEmbedder)
    return LightCurveSite(network, int(name.rpartition(".")[2]))


class LightCurveSite:
    """A layer of an embedder's light-curve transformer.

    Source tokens are the learnt token and the L points after it. The queries are the same, but in the last layer the
    learnt token alone.
    """

    def __init__(self, network: AlertEmbedder | SnrEmbedder, number: int) -> None:
        self.name = f"{LIGHT_CURVE}.{number}"
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
        logits = query @ key.transpose(2, 3) * self.d_head**-0.5
        pattern = logits.masked_fill(~there[:, None, None, :], -float("inf")).softmax(3)
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
