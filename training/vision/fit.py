"""`fit`: trains the network that a file describes, writes its bundle, and scores the test split with the bundle.

It may be killed at any time: the same command resumes after the last complete epoch. The test split is not used before
the bundle is written.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from broker_filter.config import Runtime
from broker_filter.importers.encoders import load_encoder_weights
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import Architecture, Description, Inputs, MetadataColumn, Outputs, Training
from broker_filter.scoring.networks import NETWORKS, arguments_of, build_network
from broker_filter.scoring.scorer import open_model
from training.atomic_write import write_whole
from training.data.datasets import Dataset, View
from training.data.record_distribution import record_data_set
from training.errors import DatasetError, TrainingError
from training.evaluation.evaluate import PREDICTIONS, predict
from training.evaluation.plots import reliability_diagram
from training.evaluation.scaling import Calibration
from training.learner import check_takes, learn
from training.recipe import ENCODER_CARD, Encoder, Fit, begin, read_configuration
from training.vision.calibrate import calibrate, last_layer
from training.vision.classifier import Classifier, alerts_loader, chosen_to_train, class_weights, corrupt
from training.vision.frozen_fusion import is_frozen_fusion, train_branches

BUNDLE = "bundle"
RELIABILITY = "reliability.svg"
"""The reliability curves of the validation split, before and after the calibration."""
THRESHOLD = 0.5
"""Recommended threshold of a binary classifier that was trained without class weights: above it, the label is more
probable than not."""
FITTED = ("btsbot_cnn", "stampnet", "timm", "vgg6")
"""Networks that can be fitted to any labels: they take images, and some also metadata or PSF images. Other networks
have fixed labels or other inputs."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit`."""
    parser.add_argument(
        "configuration", type=Path, metavar="CONFIG.yaml", help="YAML file with the keys of `training.recipe.Fit`"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, or resume training, and print the path of the bundle."""
    config = read_configuration(Fit, arguments.configuration)
    fit(config)
    rank_zero_only(print)(
        f"{config.out / BUNDLE}: bundle {config.name} written and verified; {config.out / PREDICTIONS}"
    )


def fit(config: Fit) -> None:
    """Train a network, write its bundle, and score the test split with the bundle; finished steps are not repeated.

    Raises TrainingError if the directory was started with another configuration, if the network does not accept the
    data set's alerts, if a checkpoint is damaged or if training diverges; DatasetError if the data set cannot be used
    or lacks a column; WeightsError if the encoder's weights cannot be loaded.
    """
    begin(config.out, config)
    dataset = Dataset.open(config.dataset)
    if dataset.card.cutout_size < config.images.size:
        raise DatasetError(
            f"{config.dataset}: its cutouts have {dataset.card.cutout_size} px, but the network takes "
            f"{config.images.size} px: build it with --cutout-size {config.images.size}"
        )
    dataset.check_pixels(config.images)
    if planes := dataset.missing_planes(Inputs(images=config.images, psf=config.psf)):
        raise DatasetError(
            f"{config.dataset}: it lacks planes that the network needs: build it with --planes {' '.join(planes)}"
        )
    if not (config.out / BUNDLE).exists():
        _train_and_write(config, dataset)
    _score_test(config, dataset)


@rank_zero_only  # with several devices, every process runs this code
def _score_test(config: Fit, dataset: Dataset) -> None:
    if not (config.out / PREDICTIONS).exists():
        model = open_model(str(config.out / BUNDLE), Runtime(engine="onnxruntime", device="cpu"))
        write_whole(config.out / PREDICTIONS, predict(model, dataset, "test").write)


def _train_and_write(config: Fit, dataset: Dataset) -> None:
    classes = dataset.card.classes
    labels = classes[1:] if len(classes) == 2 else classes
    train, validation = dataset["train"], dataset["validation"]
    if config.recipe.corrupt == "dropped":
        train, validation = train[~corrupt(train)], validation[~corrupt(validation)]
        for c, name in enumerate(classes):
            if c not in train.label or c not in validation.label:
                raise TrainingError(
                    f"{config.dataset}: all training or all validation alerts of class {name} are corrupt"
                )
    train = chosen_to_train(train, len(classes), config.recipe)
    _check_arguments(config)
    inputs = Inputs(images=config.images, metadata=_columns(train, config.metadata), psf=config.psf)
    shapes = inputs.shapes()
    extra = {"labels": len(labels)} | {name: shapes[name][0] for name in ("metadata", "psf") if name in shapes}
    architecture = Architecture(name=config.architecture.name, arguments={**config.architecture.arguments, **extra})
    torch.manual_seed(config.recipe.seed)
    network = build_network(architecture)
    check_takes(network, inputs)
    last_layer(network)  # raises before training, not after it
    if config.encoder:
        load_encoder_weights(network, config.encoder.source)
    weights = class_weights(train.label, len(classes), balance=config.recipe.balance)

    def train_network(part: nn.Module, directory: Path, frozen: Sequence[nn.Module] = ()) -> dict[str, Any]:
        return learn(
            Classifier(part, config.recipe, weights, frozen, config.recipe.frozen_branches),
            alerts_loader(train, inputs, config.recipe, config.hardware, training=True),
            alerts_loader(validation, inputs, config.recipe, config.hardware, training=False),
            directory,
            config.hardware,
            config.logs,
        )

    frozen: Sequence[nn.Module] = ()
    if is_frozen_fusion(architecture):
        frozen = train_branches(network, architecture, len(labels), train_network, config.out)
    evaluation = train_network(network, config.out, frozen)
    shown = alerts_loader(validation, inputs, config.recipe, config.hardware, training=False)
    calibration, figures, curves = calibrate(network, shown, validation, classes, weights)
    rank_zero_only(write_whole)(config.out / RELIABILITY, reliability_diagram(curves).encode())
    thresholds = {}
    if len(labels) == 1:
        thresholds[labels[0]] = _cut(calibration) if config.recipe.balance else THRESHOLD
    description = Description(
        name=config.name,
        version=config.version,
        task=f"classification: {', '.join(classes)}",
        surveys=dataset.card.surveys,
        inputs=inputs,
        outputs=Outputs(
            labels=labels,
            activation="sigmoid" if len(labels) == 1 else "softmax",
            thresholds=thresholds,
        ),
        architecture=architecture,
        licence=config.licence,
        source="python -m training fit, of broker-filter",
        citation=config.citation,
        training=_describe(config, dataset, train, evaluation | figures),
    )
    rank_zero_only(write_bundle)(config.out / BUNDLE, description, network)
    rank_zero_only(record_data_set)(config.out / BUNDLE, train)


def _cut(calibration: Calibration) -> float:
    """Return the calibrated probability that a binary classifier gives where it gave 0.5 before the calibration.

    With this threshold, decisions are those of the network trained with class weights: they depend on the rates at
    which the classes are confused, not on how common the classes are.
    """
    [logit] = calibration(np.zeros((1, 1)))[0].tolist()
    return 1 / (1 + math.exp(-logit))


def _check_arguments(config: Fit) -> None:
    """Raise TrainingError if the network does not take the labels, metadata and PSF images of the data set."""
    name = config.architecture.name
    if name not in NETWORKS:
        return  # `build_network` raises the error
    if name not in FITTED:
        raise TrainingError(f"network {name!r} cannot be fitted to labels: choose one of {', '.join(FITTED)}")
    for argument, wanted in (("metadata", config.metadata), ("psf", config.psf)):
        if wanted and argument not in arguments_of(name):
            others = ", ".join(other for other in FITTED if argument in arguments_of(other))
            raise TrainingError(f"network {name!r} takes no {argument}: omit `{argument}`, or choose one of {others}")


def _columns(train: View, columns: Sequence[str]) -> tuple[MetadataColumn, ...]:
    """Return the columns with NO_VALUE for a missing value, as in BTSbot: no measured value equals it."""
    metadata = train.metadata(columns)
    missing = np.isnan(metadata).mean(axis=0)
    if empty := [name for name, share in zip(columns, missing, strict=True) if share == 1]:
        raise TrainingError(f"{train.dataset.directory}: no training alert has a value of {', '.join(empty)}")
    if whole := [name for name, share in zip(columns, missing, strict=True) if share == 0]:
        log.warning(
            "every training alert has a value of %s: the network is untested on alerts that lack a value",
            ", ".join(whole),
        )
    return tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in columns)


def _describe(config: Fit, dataset: Dataset, train: View, evaluation: dict[str, float | int | str]) -> Training:
    """Return the card's description of the training."""
    recipe, card = config.recipe, dataset.card
    return Training(
        method=f"Trained from {_origin(config.encoder)}: AdamW, peak learning rate {recipe.learning_rate:g}, batches "
        f"of {recipe.batch}, up to {recipe.epochs} epochs, weights of the epoch with the lowest validation loss; "
        f"{f'an epoch must improve it by {recipe.least_improvement:.2%}, ' if recipe.least_improvement else ''}"
        f"{'images rotated and flipped at random, ' if recipe.augment else ''}"
        f"{'alerts with corrupt cutouts dropped, ' if recipe.corrupt == 'dropped' else ''}"
        f"{'classes weighted, ' if recipe.balance else ''}seed {recipe.seed}. Calibrated on the validation split"
        f"{', with the class weights undone' if recipe.balance else ''}: see `calibration`.",
        data=f"{len(train)} alerts of {len(np.unique(train.object_id))} objects ({recipe.fraction:.0%} of the training "
        f"sources) of data set {card.sha256}: {card.labels}.",
        evaluation={
            "regimen": config.encoder.regimen if config.encoder else "random",
            "fraction": recipe.fraction,
            "seed": recipe.seed,
            "dataset_sha256": card.sha256,
            **evaluation,
        },
    )


def _origin(encoder: Encoder | None) -> str:
    """Return a description of the initial weights; for an encoder of `pretrain`, with the galaxies on its card."""
    if encoder is None:
        return "random weights"
    card = Path(encoder.source).with_name(ENCODER_CARD)
    saw = yaml.safe_load(card.read_bytes())["galaxies"] if card.is_file() else Path(encoder.source).name
    return f"an encoder ({encoder.regimen}: {saw})"
