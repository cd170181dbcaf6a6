"""`pretrain`: trains an encoder on galaxy morphology, to initialise `fit` with.

This is Zoobot's method: one network answers all Galaxy Zoo questions, each as the fraction of volunteers who gave an
answer; questions that volunteers were not asked have no loss (Walmsley et al. 2022, MNRAS 509, 3966; 2024,
arXiv:2404.02973). The defaults are those of Zoobot's ConvNeXt-pico; images are normalised as alerts are. The card
states whether galaxies were simulated.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from broker_filter.config import Section
from broker_filter.scoring.bundle import Architecture, ImageInput, Inputs
from broker_filter.scoring.networks import build_network, fusion
from broker_filter.scoring.preprocess import prepare_images
from training.atomic_write import write_whole
from training.errors import DatasetError, TrainingError
from training.learner import Learner, check_takes, learn, loader
from training.recipe import ENCODER_CARD, PUBLISHED_IMAGES, Hardware, Optimisation, begin, read_configuration
from training.vision.galaxies import Galaxies, read_galaxies, simulate_galaxies

WEIGHTS = "encoder.safetensors"
LEAST_GALAXIES = 2


class GalaxyZoo(Section):
    """A folder of images, and the table that lists them."""

    kind: Literal["galaxy_zoo"]
    images: Path
    table: Path
    questions: tuple[str, ...] = Field(default=(), description="Columns of vote fractions; absent: every `*_fraction`.")


class Simulated(Section):
    """Galaxies simulated with GalSim, labelled with the parameters of the simulation."""

    kind: Literal["simulated"]
    galaxies: int = Field(gt=0)
    seed: int = 0


class Pretraining(Section):
    """The keys of a pre-training's YAML file."""

    out: Path
    architecture: Architecture = Field(description="A network with an `encoder`; only the encoder is trained.")
    galaxies: tuple[Annotated[GalaxyZoo | Simulated, Field(discriminator="kind")], ...] = Field(min_length=1)
    images: ImageInput = PUBLISHED_IMAGES
    validation: float = Field(
        default=0.1, gt=0, lt=0.5, description="Fraction of the galaxies held out for validation."
    )
    dropout: float = Field(default=0.5, ge=0, lt=1, description="Dropout rate of the features.")
    recipe: Optimisation = Optimisation(epochs=50, batch=256, learning_rate=1e-4, weight_decay=0.05, patience=10)
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)


class MorphologyLearner(Learner):
    """A learner that answers Q questions about images; the loss is the squared error over answered questions."""

    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of images [N, 3, S, S] with answers [N, Q], NaN where unknown."""
        images, answers = batch
        asked = ~answers.isnan()
        error = (self.network(images).sigmoid() - answers.nan_to_num()).square() * asked
        loss: Tensor = error.sum() / asked.sum().clamp(min=1)
        return loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pretrain`."""
    parser.add_argument(
        "configuration",
        type=Path,
        metavar="PRETRAIN.yaml",
        help="YAML file with the keys of `training.vision.pretrain.Pretraining`",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, or resume training, and print the path of the encoder and its loss."""
    config = read_configuration(Pretraining, arguments.configuration)
    card = pretrain(config)
    losses = f"validation loss {card['validation_loss']} (predicting the mean answers: {card['baseline_loss']})"
    rank_zero_only(print)(f"{config.out / WEIGHTS}: {losses}")


def pretrain(config: Pretraining) -> dict[str, object]:
    """Train an encoder, write its weights and its card, and return the card.

    Raises TrainingError if the network has no encoder or the directory was started with another configuration, and
    DatasetError if galaxies cannot be read or are too few.
    """
    begin(config.out, config)
    torch.manual_seed(config.recipe.seed)
    encoder = getattr(build_network(config.architecture), "encoder", None)
    if not isinstance(encoder, fusion.Encoder):
        raise TrainingError(f"network {config.architecture.name!r} has no encoder to pre-train")
    galaxies = combine([_load(source, config.images.size) for source in config.galaxies])
    if len(galaxies) < LEAST_GALAXIES:
        raise DatasetError(f"{len(galaxies)} galaxy: training and validation need at least one each")
    network = nn.Sequential(encoder, nn.Dropout(config.dropout), nn.Linear(encoder.features, len(galaxies.questions)))
    check_takes(network, Inputs(images=config.images))
    order = np.random.default_rng(config.recipe.seed).permutation(len(galaxies))
    held_out = max(1, round(config.validation * len(galaxies)))
    figures = learn(
        MorphologyLearner(network, config.recipe),
        _loader(galaxies, order[held_out:], config, training=True),
        _loader(galaxies, order[:held_out], config, training=False),
        config.out,
        config.hardware,
        config.logs,
    )
    known, unseen = galaxies.answers[order[held_out:]], galaxies.answers[order[:held_out]]
    weights = getattr(encoder, "backbone", encoder).state_dict()  # a timm backbone keeps timm's parameter names
    tensors = save({name: tensor.contiguous() for name, tensor in weights.items()})
    write = rank_zero_only(write_whole)  # with several devices, every process runs this code
    write(config.out / WEIGHTS, tensors)
    card: dict[str, object] = {
        "architecture": config.architecture.model_dump(mode="json"),
        "images": config.images.model_dump(mode="json"),
        "galaxies": galaxies.source,
        "questions": list(galaxies.questions),
        "recipe": config.recipe.model_dump(mode="json"),
        **figures,
        "baseline_loss": round(float(np.nanmean((unseen - np.nanmean(known, axis=0)) ** 2)), 5),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    write(config.out / ENCODER_CARD, yaml.safe_dump(card, sort_keys=False).encode())
    return card


def combine(parts: Sequence[Galaxies]) -> Galaxies:
    """Concatenate galaxies. The result has all questions of the parts; NaN stands where a part lacks a question."""
    questions = tuple(dict.fromkeys(question for part in parts for question in part.questions))
    answers = np.full((sum(map(len, parts)), len(questions)), np.nan, np.float32)
    start = 0
    for part in parts:
        answers[start : start + len(part), [questions.index(name) for name in part.questions]] = part.answers
        start += len(part)
    images = np.concatenate([part.images for part in parts])
    return Galaxies(images, answers, questions, "; ".join(part.source for part in parts))


def _load(source: GalaxyZoo | Simulated, size: int) -> Galaxies:
    if isinstance(source, Simulated):
        return simulate_galaxies(source.galaxies, source.seed, size)
    return read_galaxies(source.images, source.table, source.questions, size)


def _loader(
    galaxies: Galaxies, rows: np.ndarray[tuple[int], np.dtype[np.int64]], config: Pretraining, *, training: bool
) -> DataLoader[tuple[Tensor, ...]]:
    size = galaxies.images.shape[-1]
    whole = np.broadcast_to(np.array([0, 0, size, size], np.int16), (len(rows), 3, 4))
    images = torch.from_numpy(prepare_images(galaxies.images[rows], whole, config.images))
    answers = torch.from_numpy(galaxies.answers[rows])
    return loader(TensorDataset(images, answers), config.recipe, config.hardware, training=training)
