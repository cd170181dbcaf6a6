"""A two-layer transformer without perceptrons, trained on repeated random sequences: its mechanism is known.

A sequence is a start token, and then a random segment of different tokens that is repeated until the sequence is full,
with a random period. The next token can be predicted from the second segment on: it is the token after the previous
occurrence of the current one. Before that, heads can rest on the start token. Two layers of attention learn this as an
induction head (Olsson et al. 2022, arXiv:2209.11895): a head of the first layer looks at the previous token, and a head
of the second layer at the token after the previous occurrence, which it copies. Positions enter the attention only as a
learnt bias by distance, so that no head can count positions instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from training.interpretability.sites.attention import Attention

VOCABULARY = 24
START = VOCABULARY
"""The start token, which is never predicted."""
LENGTH = 33
"""Tokens in a sequence, with the start token."""
PERIODS = (8, 15)
"""Shortest and longest period: each sequence holds its segment at least twice."""
WIDTH, HEADS, D_HEAD, LAYERS = 48, 2, 16, 2
LEARNING_RATE = 1e-2
BATCH = 64


@dataclass(frozen=True, slots=True)
class Sequences:
    """N sequences. `tokens`: int64 [N, LENGTH]; `period`: int64 [N]."""

    tokens: Tensor
    period: Tensor

    @property
    def predictable(self) -> Tensor:
        """Where the current token has occurred before, so that the next one is known: bool [N, LENGTH]."""
        return torch.arange(LENGTH) > self.period[:, None]

    @property
    def next(self) -> Tensor:
        """The token that comes next, int64 [N, LENGTH]; after the last one, the segment would go on."""
        return self.tokens.gather(1, 1 + torch.arange(LENGTH) % self.period[:, None])

    def after_previous(self) -> Tensor:
        """Return which source tokens come after a previous occurrence of each query token, bool [N, LENGTH, LENGTH]."""
        position = torch.arange(LENGTH)
        behind = position[:, None] + 1 - position  # from the source to the token after the query
        repeated: Tensor = (behind > 0) & (position > 1) & (behind % self.period[:, None, None] == 0)
        return repeated


def draw_sequences(n: int, draws: Generator) -> Sequences:
    """Return `n` random sequences. Tokens differ within a segment, so that each has one successor."""
    segments = torch.rand(n, VOCABULARY, generator=draws).argsort(1)
    period = torch.randint(PERIODS[0], PERIODS[1] + 1, (n,), generator=draws)
    repeated = segments.gather(1, torch.arange(LENGTH - 1) % period[:, None])
    return Sequences(torch.cat([torch.full((n, 1), START), repeated], 1), period)


class ToyTransformer(nn.Module):
    """Tokens int64 [N, L] -> logits of the next token [N, L, VOCABULARY], from this and the earlier tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.layers = nn.ModuleList([ToyLayer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, L, VOCABULARY]."""
        return self.read(self.through(self.embed(tokens), 0, LAYERS))

    def through(self, x: Tensor, first: int, last: int) -> Tensor:
        """Return the residual stream [N, L, WIDTH] that layer `last` takes, given what layer `first` takes."""
        for layer in self.layers[first:last]:
            assert isinstance(layer, ToyLayer)
            x = x + layer.output(heads_joined(*layer.attend(x)))
        return x

    def read(self, x: Tensor) -> Tensor:
        """Return the logits [N, L, VOCABULARY] of the residual stream after the last layer [N, L, WIDTH]."""
        logits: Tensor = self.unembed(self.norm(x))
        return logits


class ToyLayer(nn.Module):
    """Causal attention with a learnt bias by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * HEADS * D_HEAD)
        self.output = nn.Linear(HEADS * D_HEAD, WIDTH)
        self.distance = nn.Parameter(torch.zeros(HEADS, LENGTH))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pattern [N, H, L, L] and values [N, H, L, D_HEAD] of the residual stream [N, L, WIDTH]."""
        length = x.shape[1]
        split = self.query_key_value(self.norm(x)).reshape(len(x), length, 3, HEADS, D_HEAD)
        query, key, values = split.permute(2, 0, 3, 1, 4)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        logits = query @ key.transpose(2, 3) * D_HEAD**-0.5 + self.distance[:, distance.clamp(min=0)]
        return logits.masked_fill(distance < 0, -float("inf")).softmax(3), values


def heads_joined(pattern: Tensor, values: Tensor) -> Tensor:
    """Return z [N, L, HEADS * D_HEAD] of pattern [N, H, L, L] and values [N, H, L, D_HEAD]."""
    return (pattern @ values).transpose(1, 2).flatten(2)


def train_transformer(steps: int, seed: int) -> ToyTransformer:
    """Return a transformer after `steps` training steps on new sequences."""
    torch.manual_seed(seed)
    draws = Generator().manual_seed(seed)
    network = ToyTransformer()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        sequences = draw_sequences(BATCH, draws)
        loss = cross_entropy(network(sequences.tokens).flatten(0, 1), sequences.next.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


class ToySite:
    """A layer of a ToyTransformer as a site; its inputs are `tokens`, and its outputs the logits alone; see Site."""

    def __init__(self, network: ToyTransformer, number: int) -> None:
        self.name = f"layers.{number}"
        self.network = network
        self.number = number
        layer = network.layers[number]
        assert isinstance(layer, ToyLayer)
        self.layer = layer
        self.heads, self.d_head = HEADS, D_HEAD
        self.output = layer.output

    def attend(self, inputs: Mapping[str, Tensor]) -> Attention:
        """Return the attention; see Site."""
        x = self.network.through(self.network.embed(inputs["tokens"]), 0, self.number)
        pattern, values = self.layer.attend(x)
        existing = torch.ones_like(inputs["tokens"], dtype=torch.bool)
        return Attention(heads_joined(pattern, values), pattern, values, existing, existing, {"residual": x})

    def resume(self, rest: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the logits with `z`; see Site."""
        x = self.network.through(rest["residual"] + self.output(z), self.number + 1, LAYERS)
        return (self.network.read(x),)

    def splice(self, inputs: Mapping[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """Return the logits with `z` in place of the layer's own; see Site."""
        return self.resume(self.attend(inputs).rest, z)

    def where(self, sources: int, stamp: int) -> list[int]:  # noqa: ARG002 - a sequence has no pixels
        """Return the position of each source token."""
        return list(range(sources))
