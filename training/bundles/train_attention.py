"""Trains the bundle `attention`: a standard network with attention, pre-trained, then distilled from braai d6_m7.

    broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out d6_m7
    python -m training pretrain training/bundles/attention_encoder.yaml
    python -m training train-attention ztf_alerts.tar --teacher d6_m7 --encoder study/encoders/attention --out attention

The network is the architecture on the encoder's card. It is distilled as `default` is, on the same alerts and the same
split, so that the cards of both can be compared; hints are left out, because no layer of a transformer has a
counterpart in the teacher. A fine-tuning with a low learning rate follows. Only ZTF's alerts have a teacher.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from broker_filter.importers.encoders import load_encoder_weights
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import WEIGHTS, Architecture, Part, open_bundle
from broker_filter.scoring.networks import build_network, load_network
from training.arguments import positive, seed
from training.bundles.distil import Recipe, distil
from training.bundles.train_default import (
    SPLIT_SEED,
    TEACHER,
    TEST_FRACTION,
    check_rated,
    data_sha256,
    describe,
    evaluate,
)
from training.checkpoint import beside
from training.data.datasets import held_out, load_alerts
from training.errors import TrainingError, refuse_existing
from training.recipe import ENCODER_CARD, ENCODER_WEIGHTS

NAME, VERSION = "attention", "1.0"
SOURCE = "training/bundles/train_attention.py"
LEARNING_RATE = 5e-4
"""Peak learning rate of the distillation. Transformers need a lower one than `default`'s network."""
WEIGHT_DECAY = 0.05
"""The value of pre-training."""
TUNING_SHARE = 0.2
"""Steps of the fine-tuning, as a fraction of those of the distillation."""
TUNING_RATE = 1e-4
TUNING_SEED = 1
"""Added to the seed, so that fine-tuning sees other images than the first steps of the distillation."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-attention`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--teacher", required=True, help="bundle of braai d6_m7, the teacher")
    parser.add_argument("--encoder", required=True, type=Path, help="directory that `pretrain` wrote")
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument("--steps", type=positive, default=8000, help="steps of distillation (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1, help="seed of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train, or resume training, evaluate and write the bundle.

    Raises TrainingError or DatasetError before training if the input cannot be used.
    """
    refuse_existing(arguments.out)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    bundle = open_bundle(arguments.teacher).part("ztf")
    if bundle.card.architecture.name != TEACHER:
        raise TrainingError(
            f"{arguments.teacher}: its network is not {TEACHER}: import braai's weights with `models import braai`"
        )
    teacher = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    architecture, origin = _read_card(arguments.encoder / ENCODER_CARD)
    network = build_network(architecture)
    load_encoder_weights(network, str(arguments.encoder / ENCODER_WEIGHTS))

    images = bundle.card.inputs.images
    alerts = load_alerts(arguments.inputs, images.size, ("drb",))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    train, test = alerts[~unseen], alerts[unseen]
    check_rated(test)
    log.info("%d training alerts, %d test alerts", len(train), len(test))

    long = Recipe(arguments.steps, arguments.seed, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    short = replace(
        long,
        steps=max(1, round(TUNING_SHARE * long.steps)),
        seed=long.seed + TUNING_SEED,
        learning_rate=TUNING_RATE,
    )
    checkpoints = [beside(arguments.out.with_name(f"{arguments.out.name}.{stage}")) for stage in ("distil", "tune")]
    for recipe, checkpoint in zip((long, short), checkpoints, strict=True):
        network = distil(network, teacher, images, train, recipe, checkpoint)
    evaluation = evaluate(network, teacher, images, train, test) | {"dataset_sha256": data_sha256(train)}
    log.info("on held-out objects: %s", evaluation)
    method = _method(bundle, origin, long, short)
    description = describe(NAME, VERSION, architecture, bundle, train, method, SOURCE, evaluation)
    write_bundle(arguments.out, description, network)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


def _read_card(card: Path) -> tuple[Architecture, str]:
    """Return the architecture of an encoder and the images that it learnt from.

    Raises TrainingError if the encoder has no readable card.
    """
    try:
        said = yaml.safe_load(card.read_bytes())
        return Architecture.model_validate(said["architecture"]), str(said["galaxies"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise TrainingError(f"{card}: not the card of an encoder that `pretrain` wrote: {error}") from error


def _method(teacher: Part, origin: str, long: Recipe, short: Recipe) -> str:
    """Return how the network was trained, for the card."""
    return (
        f"The encoder was pre-trained on {origin}. Then knowledge distillation: {long.steps} steps of {long.batch} "
        f"images at a peak learning rate of {long.learning_rate:g}, and {short.steps} at {short.learning_rate:g}; each "
        "image made on the fly from one or two real alerts and labelled by the teacher, "
        f"{teacher.card.name} of {teacher.card.source}. AdamW, averaged weights, seed {long.seed}."
    )
