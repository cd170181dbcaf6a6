"""AstroM3: the three encoders with a common embedding space, the classifier, and the contrastive loss.

Rizhko & Bloom 2024 (arXiv:2411.08842). Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from broker_filter.config import Section
from training.astrom3.model.galspecnet import GalSpecNet, GalSpecNetArguments
from training.astrom3.model.informer import Informer, InformerArguments
from training.astrom3.model.metadata import MetadataArguments, MetadataEncoder

CLASSES = ("DSCT", "EA", "EB", "EW", "HADS", "M", "ROT", "RRAB", "RRC", "SR")
"""ASAS-SN's variable types of the published classifiers, in the order of their logits."""
MAX_LOGIT_SCALE = 100.0
"""Initial value and upper limit of the learnable inverse temperatures, as published."""


class AstroM3Arguments(Section):
    """The arguments of an AstroM3, with the published names and defaults.

    The arguments of an encoder have a prefix: the first letter of its modality.
    """

    classification: bool = False
    num_classes: int = Field(default=10, gt=0, le=1000)
    hidden_dim: int = Field(default=512, gt=0, le=8192, description="Dimensions of the common space.")
    fusion: Literal["avg", "concat"] = Field(
        default="avg", description="How a classifier joins the embeddings: mean or concatenation."
    )
    seq_len: int = 200
    p_enc_in: int = 9
    p_d_model: int = 128
    p_n_heads: int = 4
    p_d_ff: int = 512
    p_e_layers: int = 8
    p_factor: int = 1
    p_activation: Literal["gelu"] = "gelu"
    p_output_attention: Literal[False] = False
    p_dropout: float = 0.2
    s_conv_channels: tuple[int, ...] = (3, 64, 64, 32, 32)
    s_kernel_size: int = 3
    s_mp_kernel_size: int = 4
    s_dropout: float = 0.3
    m_input_dim: int = 34
    m_hidden_dim: int = 512
    m_dropout: float = 0.1

    @property
    def photometry(self) -> InformerArguments:
        """The arguments of the photometry encoder."""
        return InformerArguments(**self._behind("p_"), seq_len=self.seq_len, num_classes=self.num_classes)

    @property
    def spectra(self) -> GalSpecNetArguments:
        """The arguments of the spectra encoder."""
        arguments = self._behind("s_")
        dropout = arguments.pop("dropout")  # the only argument with another name there
        return GalSpecNetArguments(**arguments, dropout_rate=dropout, num_classes=self.num_classes)

    @property
    def metadata(self) -> MetadataArguments:
        """The arguments of the metadata encoder."""
        return MetadataArguments(**self._behind("m_"), num_classes=self.num_classes)

    @model_validator(mode="after")
    def _encoders_can_be_made(self) -> Self:
        _ = self.photometry, self.spectra, self.metadata
        return self

    def _behind(self, letter: str) -> dict[str, Any]:
        return {name.removeprefix(letter): value for name, value in self if name.startswith(letter)}


class Stars(NamedTuple):
    """N stars as `preprocess` returns them, float32."""

    photometry: Tensor  # [N, L, 9]
    mask: Tensor  # [N, L] 1 where observed, 0 where padded
    spectra: Tensor  # [N, 3, 2575]
    metadata: Tensor  # [N, 34]


class Embeddings(NamedTuple):
    """Embeddings of N stars in the common space, float32, each of length 1."""

    photometry: Tensor  # [N, D]
    spectra: Tensor  # [N, D]
    metadata: Tensor  # [N, D]


class AstroM3(nn.Module):
    """The three encoders, each with a projection into the common space."""

    def __init__(self, arguments: AstroM3Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.photometry_encoder = Informer(arguments.photometry)
        self.spectra_encoder = GalSpecNet(arguments.spectra)
        self.metadata_encoder = MetadataEncoder(arguments.metadata)
        self.photometry_proj = nn.Linear(arguments.photometry.features, arguments.hidden_dim)
        self.spectra_proj = nn.Linear(arguments.spectra.features, arguments.hidden_dim)
        self.metadata_proj = nn.Linear(arguments.metadata.hidden_dim, arguments.hidden_dim)
        self.logit_scale_ps = nn.Parameter(torch.tensor(MAX_LOGIT_SCALE).log())
        self.logit_scale_sm = nn.Parameter(torch.tensor(MAX_LOGIT_SCALE).log())
        self.logit_scale_mp = nn.Parameter(torch.tensor(MAX_LOGIT_SCALE).log())

    def embed(self, stars: Stars, keys: Tensor | None = None) -> Embeddings:
        """Return the embeddings of N stars, each float32[N, hidden_dim]. `keys`: see `Informer`."""
        projected = (
            self.photometry_proj(self.photometry_encoder(stars.photometry, stars.mask, keys)),
            self.spectra_proj(self.spectra_encoder(stars.spectra)),
            self.metadata_proj(self.metadata_encoder(stars.metadata)),
        )
        return Embeddings(*(nn.functional.normalize(vectors, dim=-1) for vectors in projected))

    def pair_logits(self, embeddings: Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled cosine similarities [N, N]: photometry-spectra, spectra-metadata, metadata-photometry."""
        p, s, m = embeddings
        pairs = ((self.logit_scale_ps, p, s), (self.logit_scale_sm, s, m), (self.logit_scale_mp, m, p))
        ps, sm, mp = (scale.exp().clamp(1, MAX_LOGIT_SCALE) * rows @ columns.T for scale, rows, columns in pairs)
        return ps, sm, mp


class AstroM3Classifier(AstroM3):
    """AstroM3 with a linear layer on the mean or the concatenation of the three embeddings: logits [N, num_classes]."""

    def __init__(self, arguments: AstroM3Arguments) -> None:
        super().__init__(arguments)
        joined = len(Embeddings._fields) if arguments.fusion == "concat" else 1
        self.fc = nn.Linear(joined * arguments.hidden_dim, arguments.num_classes)

    def forward(self, stars: Stars, keys: Tensor | None = None) -> Tensor:
        """Return the logits float32[N, num_classes] of N stars. `keys`: see `Informer`."""
        return self.classify(*self.embed(stars, keys))

    def classify(self, photometry: Tensor, spectra: Tensor, metadata: Tensor) -> Tensor:
        """Return the logits float32[N, num_classes] of the three embeddings, each [N, hidden_dim]."""
        embeddings = torch.stack([photometry, spectra, metadata], 1)
        logits: Tensor = self.fc(embeddings.flatten(1) if self.arguments.fusion == "concat" else embeddings.mean(1))
        return logits


def contrastive_losses(logits: Sequence[Tensor]) -> Tensor:
    """Return the loss of each of P pairs of modalities, [P], given its scaled cosine similarities [N, N].

    The loss is the cross-entropy of identifying a star's other modality among the N stars, over rows plus over columns.
    As published, it is not halved. The sum over the pairs is minimised.
    """
    cross_entropy = nn.functional.cross_entropy
    losses = []
    for pair in logits:
        stars = torch.arange(len(pair), device=pair.device)
        losses.append(cross_entropy(pair, stars) + cross_entropy(pair.T, stars))
    return torch.stack(losses)
