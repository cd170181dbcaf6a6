"""`pretrain`: trains an encoder on the morphology of galaxies, or on simulated alerts, to initialise `fit` with.

This is Zoobot's method: one network answers all Galaxy Zoo questions, each as the fraction of volunteers who gave an
answer; questions that volunteers were not asked have no loss (Walmsley et al. 2022, MNRAS 509, 3966; 2024,
arXiv:2404.02973). The defaults are those of Zoobot's ConvNeXt-pico; images are normalised as alerts are. The card
states whether galaxies were simulated. Simulated alerts are a third source of questions, labelled by truth.
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
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from broker_filter.config import Section
from broker_filter.importers.encoders import load_encoder_weights
from broker_filter.scoring.bundle import Architecture, ImageInput, Inputs
from broker_filter.scoring.networks import build_network, fusion
from broker_filter.scoring.preprocess import prepare_images
from training.atomic_write import write_whole
from training.data.datasets import no_plane
from training.errors import DatasetError, TrainingError
from training.evaluation.metrics import rank
from training.learner import Learner, check_takes, learn, loader
from training.recipe import (
    ENCODER_CARD,
    ENCODER_WEIGHTS,
    PUBLISHED_IMAGES,
    Encoder,
    Hardware,
    Optimisation,
    begin,
    read_configuration,
)
from training.vision.galaxies import AnsweredImages, read_galaxies, read_galaxy_zoo_1, simulate_galaxies
from training.vision.simulated_alerts import simulate_alerts

LEAST_GALAXIES = 2
CHUNK = 256
"""Images per run of a network over many images."""
Rows = NDArray[np.int64]
"""Indices of images."""
LEAST_WEIGHT = 1e-6
"""Divisor of the loss of a batch without any answer; weights of answered images are larger."""


class GalaxyZoo(Section):
    """A folder of images, and the table that lists them."""

    kind: Literal["galaxy_zoo"]
    images: Path
    table: Path
    questions: tuple[str, ...] = Field(default=(), description="Columns of vote fractions; absent: every `*_fraction`.")


class Simulated(Section):
    """AnsweredImages simulated with GalSim, labelled with the parameters of the simulation."""

    kind: Literal["simulated"]
    galaxies: int = Field(gt=0)
    seed: int = 0


class GalaxyZoo1(Section):
    """An archive of the images of Galaxy Zoo 1, and the table of their classes."""

    kind: Literal["galaxy_zoo_1"]
    archive: Path
    table: Path


class SimulatedAlerts(Section):
    """Simulated alerts of a survey, labelled by truth."""

    kind: Literal["simulated_alerts"]
    alerts: int = Field(gt=0)
    survey: Literal["ztf", "lsst"]
    seed: int = 0


Source = Annotated[GalaxyZoo | GalaxyZoo1 | Simulated | SimulatedAlerts, Field(discriminator="kind")]


class Pretraining(Section):
    """The keys of a pre-training's YAML file."""

    out: Path
    architecture: Architecture = Field(description="A network with an `encoder`; only the encoder is trained.")
    encoder: Encoder | None = Field(default=None, description="Pre-trained encoder to begin with; absent: random.")
    galaxies: tuple[Source, ...] = Field(
        min_length=1, description="Images with answers: galaxies, and simulated alerts; one network learns all."
    )
    images: ImageInput = PUBLISHED_IMAGES
    validation: float = Field(default=0.1, gt=0, lt=0.5, description="Fraction of the images held out for validation.")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="Dropout rate of the features.")
    recipe: Optimisation = Optimisation(epochs=50, batch=256, learning_rate=1e-4, weight_decay=0.05, patience=10)
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)


class MorphologyLearner(Learner):
    """A learner that answers Q questions about images; the loss is the squared error over answered questions."""

    def loss_of(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of images [N, 3, S, S] with answers [N, Q], NaN where unknown, and weights [N]."""
        images, answers, weight = batch
        counted = ~answers.isnan() * weight[:, None]
        error = (self.network(images).sigmoid() - answers.nan_to_num()).square() * counted
        loss: Tensor = error.sum() / counted.sum().clamp(min=LEAST_WEIGHT)
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
    rank_zero_only(print)(f"{config.out / ENCODER_WEIGHTS}: {losses}")


def pretrain(config: Pretraining) -> dict[str, object]:
    """Train an encoder, write its weights and its card, and return the card.

    Raises TrainingError if the network has no encoder or the directory was started with another configuration, and
    DatasetError if galaxies cannot be read or are too few, and WeightsError if the weights of the encoder to begin with
    cannot be loaded.
    """
    begin(config.out, config)
    torch.manual_seed(config.recipe.seed)
    whole = build_network(config.architecture)
    encoder = getattr(whole, "encoder", None)
    if not isinstance(encoder, fusion.Encoder):
        raise TrainingError(f"network {config.architecture.name!r} has no encoder to pre-train")
    if config.encoder:
        load_encoder_weights(whole, config.encoder.source)
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
    known, unseen = order[held_out:], order[:held_out]
    weights = getattr(encoder, "backbone", encoder).state_dict()  # a timm backbone keeps timm's parameter names
    tensors = save({name: tensor.contiguous() for name, tensor in weights.items()})
    write = rank_zero_only(write_whole)  # with several devices, every process runs this code
    write(config.out / ENCODER_WEIGHTS, tensors)
    card: dict[str, object] = {
        "architecture": config.architecture.model_dump(mode="json"),
        "images": config.images.model_dump(mode="json"),
        "galaxies": galaxies.source,
        "began_with": config.encoder.regimen if config.encoder else "random weights",
        "questions": list(galaxies.questions),
        "recipe": config.recipe.model_dump(mode="json"),
        **figures,
        "baseline_loss": round(_loss_of_the_mean(galaxies, known, unseen), 5),
        "validation_roc_auc": _roc_auc(network, galaxies, unseen, config.images),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    write(config.out / ENCODER_CARD, yaml.safe_dump(card, sort_keys=False).encode())
    return card


def _loss_of_the_mean(galaxies: AnsweredImages, known: Rows, unseen: Rows) -> float:
    """Return the loss of predicting the mean answers of the images `known`, on the images `unseen`."""
    counted = ~np.isnan(galaxies.answers) * galaxies.weight[:, None]
    answers = np.nan_to_num(galaxies.answers)
    mean = (answers * counted)[known].sum(axis=0) / counted[known].sum(axis=0).clip(LEAST_WEIGHT)
    error = ((answers - mean) ** 2 * counted)[unseen]
    return float(error.sum() / max(counted[unseen].sum(), LEAST_WEIGHT))


def _roc_auc(network: nn.Module, galaxies: AnsweredImages, unseen: Rows, images: ImageInput) -> dict[str, float]:
    """Return, for each question with answers of only 0 and 1, the ROC AUC on the images `unseen`."""
    prepared = _prepare(galaxies, unseen, images)
    with torch.inference_mode():
        said = torch.cat([network(some) for some in torch.split(prepared, CHUNK)]).double().numpy()
    answers = galaxies.answers[unseen]
    figures = {}
    for question, answer, logit in zip(galaxies.questions, answers.T, said.T, strict=True):
        asked = ~np.isnan(answer)
        positive = answer[asked] == 1
        if np.isin(answer[asked], (0, 1)).all() and 0 < positive.sum() < len(positive):
            figures[question] = round(float(rank(positive, logit[asked], np.ones(len(positive))).roc_auc), 4)
    return figures


def combine(parts: Sequence[AnsweredImages]) -> AnsweredImages:
    """Concatenate images. The result has all questions of the parts; NaN stands where a part lacks a question."""
    questions = tuple(dict.fromkeys(question for part in parts for question in part.questions))
    answers = np.full((sum(map(len, parts)), len(questions)), np.nan, np.float32)
    start = 0
    for part in parts:
        answers[start : start + len(part), [questions.index(name) for name in part.questions]] = part.answers
        start += len(part)
    return AnsweredImages(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.box for part in parts]),
        answers,
        questions,
        "; ".join(part.source for part in parts),
        np.concatenate([part.weight for part in parts]),
    )


def _load(source: GalaxyZoo | GalaxyZoo1 | Simulated | SimulatedAlerts, size: int) -> AnsweredImages:
    match source:
        case GalaxyZoo():
            return read_galaxies(source.images, source.table, source.questions, size)
        case GalaxyZoo1():
            return read_galaxy_zoo_1(source.archive, source.table, size)
        case Simulated():
            return simulate_galaxies(source.galaxies, source.seed, size)
        case SimulatedAlerts():
            return simulate_alerts(source.alerts, source.seed, source.survey, size)


def _loader(
    galaxies: AnsweredImages, rows: Rows, config: Pretraining, *, training: bool
) -> DataLoader[tuple[Tensor, ...]]:
    images = _prepare(galaxies, rows, config.images)
    answers, weight = torch.from_numpy(galaxies.answers[rows]), torch.from_numpy(galaxies.weight[rows])
    return loader(TensorDataset(images, answers, weight), config.recipe, config.hardware, training=training)


def _prepare(galaxies: AnsweredImages, rows: Rows, images: ImageInput) -> Tensor:
    """Return the network's images [N, 3, S, S].

    Their noise is estimated from the pixels, if the normalisation needs it.
    """
    variance = no_plane(len(rows), galaxies.images.shape[-1])
    return torch.from_numpy(prepare_images(galaxies.images[rows], galaxies.box[rows], images, variance))
