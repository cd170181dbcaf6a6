"""The photometry encoder: the encoder of Informer, without distilling.

Zhou et al. 2021, "Informer: Beyond efficient transformer for long sequence time-series forecasting", AAAI 35, 11106
(arXiv:2012.07436); in AstroM3's variant (Rizhko & Bloom 2024, arXiv:2411.08842). Parameter names are those of the
published checkpoints. The attention includes the padding, as in the published code; only the output masks it.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from broker_filter.config import Section

MAX_LENGTH = 5000
"""Number of positions in the published checkpoints."""
EMBEDDING_DROPOUT = 0.1
"""Dropout rate of the embedded observations: Informer's default, which the published configurations keep."""


class InformerArguments(Section):
    """The arguments of an Informer, with the published names and defaults."""

    classification: bool = False
    num_classes: int = Field(default=10, gt=0, le=1000)
    seq_len: int = Field(default=200, gt=0, le=MAX_LENGTH, description="Number of observations, including padding.")
    enc_in: int = Field(default=9, gt=0, le=64, description="Values per observation.")
    d_model: int = Field(default=128, gt=0, le=2048)
    n_heads: int = Field(default=4, gt=0, le=64)
    d_ff: int = Field(default=512, gt=0, le=8192)
    e_layers: int = Field(default=8, gt=0, le=64)
    factor: int = Field(default=1, gt=0, le=100, description="Number of attending queries in units of ln(seq_len).")
    activation: Literal["gelu"] = "gelu"
    output_attention: Literal[False] = False
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd or not a multiple of {self.n_heads} heads")
        return self

    @property
    def features(self) -> int:
        """Number of features of an encoded light curve."""
        return self.seq_len * self.d_model

    @property
    def active(self) -> int:
        """Number of attending queries, and of sampled keys per query: factor * ceil(ln(seq_len)), at most seq_len."""
        return min(self.factor * math.ceil(math.log(self.seq_len)), self.seq_len)


class Informer(nn.Module):
    """The photometry encoder. It maps photometry [N, L, enc_in] and mask [N, L] to features [N, L * d_model].

    The mask is 1 where observed; features are 0 where padded. `keys`: int64[e_layers, L, active], the sampled keys of
    each layer and query (see `draw_keys`); absent: all keys.
    """

    def __init__(self, arguments: InformerArguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.enc_embedding = _Embedding(arguments.enc_in, arguments.d_model)
        self.encoder = _Encoder(arguments)
        self.dropout = nn.Dropout(arguments.dropout)

    def forward(self, photometry: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the features of light curves, float32[N, L * d_model].

        `photometry`: [N, L, enc_in]; `mask`: [N, L], 0 at padded points.
        """
        encoded: Tensor = self.dropout(self.encoder(self.enc_embedding(photometry), keys))
        return (encoded * mask.unsqueeze(-1)).flatten(1)

    def draw_keys(self) -> Tensor:
        """Return random keys int64[e_layers, L, active] for one pass, from torch's global generator.

        The published code draws new keys in every call.
        """
        layers, length, active = self.arguments.e_layers, self.arguments.seq_len, self.arguments.active
        return torch.randint(length, (layers, length, active))


class PhotometryClassifier(Informer):
    """The photometry encoder with a linear layer, which gives logits [N, num_classes]."""

    def __init__(self, arguments: InformerArguments) -> None:
        super().__init__(arguments)
        self.fc = nn.Linear(arguments.features, arguments.num_classes)

    def forward(self, photometry: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the logits float32[N, num_classes] of photometry [N, L, enc_in] with the mask [N, L]."""
        logits: Tensor = self.fc(super().forward(photometry, mask, keys))
        return logits


class ProbSparseAttention(nn.Module):
    """ProbSparse self-attention over a sequence [N, L, width] (Zhou et al. 2021, section 3.1, equation 4).

    Only the queries whose largest score exceeds their mean score most attend; the others get the mean of the values.
    The scores are computed against all keys or, as published, against a random sample of keys (`keys`, int64[L,
    active]). All keys cost more time, and are deterministic. `training/astrom3/RESULTS.md` gives the difference.
    """

    def __init__(self, arguments: InformerArguments) -> None:
        super().__init__()
        self.heads = arguments.n_heads
        self.active = arguments.active
        self.query_projection = nn.Linear(arguments.d_model, arguments.d_model)
        self.key_projection = nn.Linear(arguments.d_model, arguments.d_model)
        self.value_projection = nn.Linear(arguments.d_model, arguments.d_model)
        self.out_projection = nn.Linear(arguments.d_model, arguments.d_model)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the attention of `x` [N, L, width], float32[N, L, width].

        `keys`: int64[L, active], the keys of each query; None stands for all keys.
        """
        q, k, v = self.split(x)
        chosen, weights = self.attend(q, k, keys)
        found = weights @ v
        context = v.mean(2, keepdim=True).expand_as(v).scatter(2, chosen.expand_as(found), found)
        return self.project(context)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [N, heads, L, width / heads], of `x` [N, L, width]."""
        n, length, width = x.shape

        def by_head(projected: Tensor) -> Tensor:
            return projected.view(n, length, self.heads, width // self.heads).transpose(1, 2)

        return by_head(self.query_projection(x)), by_head(self.key_projection(x)), by_head(self.value_projection(x))

    def attend(self, q: Tensor, k: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the attending queries int64[N, heads, active, 1] and their weights [N, heads, active, L]."""
        length, depth = q.shape[2:]
        with torch.no_grad():  # the selection of queries has no gradient
            scores = q @ k.mT
            if keys is not None:
                scores = scores.gather(-1, keys.expand(len(q), self.heads, -1, -1))
            # As in the published code, the sum over the sample is divided by the number of all keys.
            sparsity = scores.amax(-1) - scores.sum(-1) / length
            chosen = sparsity.topk(self.active, sorted=False).indices
        chosen = chosen.unsqueeze(-1)
        weights = torch.softmax(q.gather(2, chosen.expand(-1, -1, -1, depth)) @ k.mT / math.sqrt(depth), dim=-1)
        return chosen, weights

    def project(self, context: Tensor) -> Tensor:
        """Return the output [N, L, width] of the heads' outputs [N, heads, L, width / heads]."""
        n, heads, length, depth = context.shape
        # The published weights were trained without moving the head axis back before this reshape.
        output: Tensor = self.out_projection(context.reshape(n, length, heads * depth))
        return output


class _Embedding(nn.Module):
    """Observations embedded by a circular convolution of width 3, plus a position embedding: [N, L, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.value_embedding = _TokenEmbedding(channels, width)
        self.position_embedding = _PositionEmbedding(width)
        self.dropout = nn.Dropout(EMBEDDING_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.value_embedding(x) + self.position_embedding.pe[:, : x.shape[1]])
        return embedded


class _TokenEmbedding(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.tokenConv = nn.Conv1d(channels, width, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.tokenConv(x.mT).mT
        return convolved


class _PositionEmbedding(nn.Module):
    """Sines and cosines of the position (Vaswani et al. 2017, section 3.5), in a buffer that checkpoints contain."""

    pe: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        position = torch.arange(MAX_LENGTH, dtype=torch.float32).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10_000.0) / width))
        waves = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)
        self.register_buffer("pe", waves.reshape(1, MAX_LENGTH, width))


class _Encoder(nn.Module):
    def __init__(self, arguments: InformerArguments) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(arguments) for _ in range(arguments.e_layers))
        self.norm = nn.LayerNorm(arguments.d_model)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        for i, layer in enumerate(self.attn_layers):
            x = layer(x, None if keys is None else keys[i])
        normalised: Tensor = self.norm(x)
        return normalised


class EncoderLayer(nn.Module):
    """Attention and a perceptron, each added to its input and then normalised."""

    def __init__(self, arguments: InformerArguments) -> None:
        super().__init__()
        self.attention = ProbSparseAttention(arguments)
        self.conv1 = nn.Conv1d(arguments.d_model, arguments.d_ff, 1)
        self.conv2 = nn.Conv1d(arguments.d_ff, arguments.d_model, 1)
        self.norm1 = nn.LayerNorm(arguments.d_model)
        self.norm2 = nn.LayerNorm(arguments.d_model)
        self.dropout = nn.Dropout(arguments.dropout)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Return `x` [N, L, width] after the layer. `keys`: see ProbSparseAttention."""
        return self.add(x, self.attention(x, keys))

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return `x` [N, L, width] after the layer, given the output of its attention [N, L, width]."""
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(nn.functional.gelu(self.conv1(x.mT)))
        output: Tensor = self.norm2(x + self.dropout(self.conv2(hidden)).mT)
        return output
