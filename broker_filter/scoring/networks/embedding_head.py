"""EmbeddingHead: labels from the embedding of another network by one linear layer; of this project (BSD-3-Clause).

A linear classifier on a frozen embedding learns from some hundred labels, where a network of its own would not.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from torch import Tensor, nn

from broker_filter.scoring.networks.alert_embedder import AlertEmbedder, JoinedModalities
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder

OUTPUTS = "outputs"
"""The argument of an architecture with a head that gives its number of labels. Embedders have arguments `labels` and
`classes` of their own."""


class EmbeddingHead(nn.Module):
    """The inputs of an embedder -> logits [N, outputs], and the embedder's embedding [N, D] of length 1."""

    def __init__(self, embedder: JoinedModalities, size: int, outputs: int) -> None:
        """Put a linear layer with initial parameters on `embedder`. `size`: D, the size of the embedding."""
        super().__init__()
        self.embedder = embedder
        self.head = nn.Linear(size, outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, outputs] and the embedding [N, D] of N alerts. `inputs`: those of the embedder."""
        _, embedding, *_ = self.embedder(*inputs)
        return self.head(embedding), embedding


def with_head(embedder: Callable[..., JoinedModalities]) -> Callable[..., EmbeddingHead]:
    """Return an architecture: `embedder` with a head. Its arguments are those of the embedder, and OUTPUTS."""

    def build(*, outputs: int, **arguments: Any) -> EmbeddingHead:
        network = embedder(**arguments)
        taken = signature(embedder).bind(**arguments)
        taken.apply_defaults()
        return EmbeddingHead(network, len(network.projections) * taken.arguments["size"], outputs)

    own = Parameter(OUTPUTS, Parameter.KEYWORD_ONLY)
    build.__signature__ = Signature([*signature(embedder).parameters.values(), own])  # type: ignore[attr-defined]
    return build


HEADS: dict[str, Callable[..., EmbeddingHead]] = {
    "alert_embedder_head": with_head(AlertEmbedder),
    "snr_embedder_head": with_head(SnrEmbedder),
}
"""The architectures with a head, by the name used in cards: that of the embedder, and `_head`."""
