"""Frozen fusion: joins separately trained branches of a network, frozen and without their heads, by a new joint head.

`frozen_fusion`, `um_nn` and their training in https://github.com/nabeelre/BTSbot; Rehemtulla et al. 2025
(arXiv:2512.11957).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from broker_filter.scoring.bundle import Architecture
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.fusion import ACTIVATIONS, FusionNetwork
from training.errors import TrainingError

OF_THE_FUSION = ("metadata", "fusion", "metadata_hidden", "metadata_dropout")
"""Arguments of the architecture that a network of images alone does not have."""
IMAGE_BRANCH, METADATA_BRANCH = "image_branch", "metadata_branch"
"""Directories of the branches' checkpoints."""


def is_frozen_fusion(architecture: Architecture) -> bool:
    """Return whether the architecture is trained by frozen fusion."""
    return architecture.arguments.get("fusion") == "frozen"


class MetadataClassifier(nn.Module):
    """A metadata branch with its own head, for training the branch alone."""

    def __init__(self, branch: nn.Sequential, activation: nn.Module, labels: int) -> None:
        super().__init__()
        *_, last = branch
        assert isinstance(last, nn.Linear)  # a frozen branch ends with a linear layer
        self.branch = branch
        self.head = nn.Sequential(activation, nn.Linear(last.out_features, labels))

    def forward(self, _: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32[N, labels] and features float32[N, D] of `metadata` [N, F]; images are ignored."""
        features = self.branch(metadata)
        return self.head(features), features


def train_branches(
    network: nn.Module,
    architecture: Architecture,
    labels: int,
    train: Callable[[nn.Module, Path], object],
    directory: Path,
) -> tuple[nn.Module, nn.Module]:
    """Train the encoder and the metadata branch of `network` separately, in place, and return both.

    The caller freezes them. `train`: a function that trains a network, with a directory for its checkpoints. Raises
    TrainingError if the network does not have two branches.
    """
    if not isinstance(network, FusionNetwork) or network.metadata_branch is None:
        raise TrainingError("frozen fusion needs a network with two branches: add metadata columns, or train jointly")
    arguments = {name: value for name, value in architecture.arguments.items() if name not in OF_THE_FUSION}
    images = build_network(Architecture(name=architecture.name, arguments=arguments))
    images.encoder = network.encoder
    active = ACTIVATIONS[str(arguments.get("activation", "gelu"))]()
    metadata = MetadataClassifier(network.metadata_branch, active, labels)
    # Both networks are built before training, so that their random weights are the same if a killed run is resumed.
    train(images, directory / IMAGE_BRANCH)
    train(metadata, directory / METADATA_BRANCH)
    return network.encoder, network.metadata_branch
