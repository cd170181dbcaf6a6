"""What a site is: an attention layer of a network, opened.

At a site, one row is one query token of one alert. Its activation z is the heads' outputs, side by side, before the
output projection. `Site.attend` returns z with the attention pattern and the values that it is made of; `Site.resume`
returns the network's outputs for another z. A site changes neither the network nor what the network returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

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
