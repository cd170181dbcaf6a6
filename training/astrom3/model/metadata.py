"""The metadata encoder: a perceptron on catalogue values (Rizhko & Bloom 2024, arXiv:2411.08842).

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from broker_filter.config import Section
from training.astrom3.model.preprocess import METADATA_COLUMNS


class MetadataArguments(Section):
    """The arguments of a metadata encoder, with the published names and defaults."""

    classification: bool = False
    num_classes: int = Field(default=10, gt=0, le=1000)
    input_dim: int = Field(default=len(METADATA_COLUMNS), gt=0, le=1000)
    hidden_dim: int = Field(default=512, gt=0, le=8192)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class MetadataEncoder(nn.Module):
    """The metadata encoder. It maps standardised metadata [N, input_dim] to features [N, hidden_dim]."""

    def __init__(self, arguments: MetadataArguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.model = nn.Sequential(
            nn.Linear(arguments.input_dim, arguments.hidden_dim),
            nn.ReLU(),
            nn.Dropout(arguments.dropout),
            nn.Linear(arguments.hidden_dim, arguments.hidden_dim),
            nn.ReLU(),
            nn.Dropout(arguments.dropout),
        )

    def forward(self, metadata: Tensor) -> Tensor:
        """Return the features float32[N, hidden_dim] of standardised metadata float32[N, input_dim]."""
        features: Tensor = self.model(metadata)
        return features


class MetadataClassifier(MetadataEncoder):
    """The metadata encoder with a linear layer, which gives logits [N, num_classes]."""

    def __init__(self, arguments: MetadataArguments) -> None:
        super().__init__(arguments)
        self.fc = nn.Linear(arguments.hidden_dim, arguments.num_classes)

    def forward(self, metadata: Tensor) -> Tensor:
        """Return the logits float32[N, num_classes] of standardised metadata float32[N, input_dim]."""
        logits: Tensor = self.fc(super().forward(metadata))
        return logits
