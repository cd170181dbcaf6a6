"""Trains the shipped bundle `default`: StampNet, distilled from braai d6_m7 on public ZTF alerts.

    broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out d6_m7
    python -m training train-default ztf_alerts.tar --teacher d6_m7 --out default

The card states the figures measured on held-out objects, and how they were measured.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import (
    WEIGHTS,
    Architecture,
    Description,
    ImageInput,
    Outputs,
    Part,
    Training,
    open_bundle,
)
from broker_filter.scoring.networks import build_network, load_network
from training.arguments import positive, seed, share
from training.bundles.distil import Hint, Recipe, distil, run_over
from training.checkpoint import beside
from training.data.datasets import Alerts, held_out, load_alerts, sha256_of
from training.data.record_distribution import record_archives
from training.errors import DatasetError, TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.calibration import logit_of, slope_and_intercept
from training.evaluation.evaluate import calibration_for_card
from training.evaluation.metrics import Values, Weights, rank, ratio
from training.evaluation.predictions import Predictions

NAME, VERSION = "default", "2.0"
SOURCE = "training/bundles/train_default.py"
ARCHITECTURE = Architecture(name="stampnet", arguments={"dropout": 0.0})
"""The student's architecture, without dropout: no image is repeated, so overfitting to single images is impossible."""
TEACHER = "vgg6"
HINTS = (
    Hint(student="features.10", teacher="features.10"),
    Hint(student="features.17", teacher="features.14"),
)
"""The layers of student and teacher that are compared: StampNet's map of 8 x 8 px, whose inner 6 x 6 px cover the same
sky as VGG6's map; and the embeddings."""
TEST_FRACTION = 0.25
"""Fraction of the objects held out for the test. Bogus alerts are rare; fewer objects would give wide intervals."""
SPLIT_SEED = 2026
UNSURE = (0.4, 0.6)
"""Range of the teacher's scores in which the decision at 0.5 is uncertain."""
FIGURES = (
    "score_slope, score_intercept: of a logistic regression of the score itself (drb, or the teacher's), taken as a "
    "probability, on the logits of real; calibration_slope, calibration_intercept: the same for the truth; both are 1 "
    "and 0 if real is as sure as these. ece_if_calibrated: the expected ECE of a perfectly calibrated model for as "
    "many alerts. reliability_: mean predicted probability and observed frequency of the truth, by bins."
)
"""The description of the figures of calibration in the card."""
THRESHOLDS = (0.3, 0.5, 0.8)
"""Score thresholds that are evaluated: for high completeness, for decisions as the survey's, and for high purity."""
NO_DRB = 0.0
"""Value of drb, with an empty drbversion, in packets from the weeks before ZTF ran the network. Null also means that a
packet has no drb."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-default`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--teacher", required=True, help="bundle of braai d6_m7, the teacher")
    parser.add_argument(
        "--begin-with", metavar="BUNDLE", help="StampNet bundle whose weights to start from (default: random weights)"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")
    parser.add_argument(
        "--checkpoint", type=Path, help="file to save progress in and to resume from (default: OUT.ckpt, beside OUT)"
    )
    parser.add_argument(
        "--share",
        type=share,
        default=1.0,
        help="fraction of the training objects to use, to measure the effect of more data (default: 1)",
    )
    parser.add_argument("--steps", type=positive, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1, help="seed of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of torch (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and write the bundle.

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
    network = build_network(ARCHITECTURE)
    begun = open_bundle(arguments.begin_with).part("ztf") if arguments.begin_with else None
    if begun:
        network = load_network(ARCHITECTURE, load_file(begun.directory / WEIGHTS))
    images = bundle.card.inputs.images
    alerts = load_alerts(arguments.inputs, images.size, ("drb",))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    train, test = alerts[~unseen], alerts[unseen]
    check_rated(test)
    if arguments.share < 1:
        train = train[held_out(train.object_id, arguments.share, SPLIT_SEED)]
    log.info("%d training alerts, %d test alerts", len(train), len(test))

    recipe = Recipe(steps=arguments.steps, seed=arguments.seed, hints=HINTS)
    checkpoint = arguments.checkpoint or beside(arguments.out)
    network = distil(network, teacher, images, train, recipe, checkpoint)
    evaluation = evaluate(network, teacher, images, train, test) | {"dataset_sha256": data_sha256(train)}
    log.info("on held-out objects: %s", evaluation)
    method = _method(bundle, begun, recipe)
    description = describe(NAME, VERSION, ARCHITECTURE, bundle, train, method, SOURCE, evaluation)
    write_bundle(arguments.out, description, network)
    record_archives(arguments.out, arguments.inputs)
    checkpoint.unlink(missing_ok=True)


def data_sha256(train: Alerts) -> str:
    """Return the sha256 of the training data: the alerts' ids, pixels and metadata."""
    return sha256_of(train.alert_id, train.cutouts, train.cutout_box, train.metadata)


def published_score(alerts: Alerts) -> NDArray[np.float64]:
    """Return the survey's real/bogus score, float64[N], NaN where the packet has none."""
    drb = alerts.metadata[:, alerts.columns.index("drb")]
    return np.where(drb == NO_DRB, np.nan, drb)


def check_rated(test: Alerts) -> None:
    """Raise DatasetError if no test alert has the survey's score, with which the network is evaluated."""
    if not np.isfinite(published_score(test)).any():
        raise DatasetError(f"none of the {len(test)} test alerts has a drb: add alerts from 2019 or later")


def evaluate(
    network: nn.Module, teacher: nn.Module, images: ImageInput, seen: Alerts, unseen: Alerts
) -> dict[str, float | int | str]:
    """Return the card's figures on alerts of held-out objects, by name.

    The network is compared with the survey's drb, and with the teacher on all packets, also those without drb.
    `teachers_agreement` is the teacher's agreement with drb, the upper limit for the student. `seen_agreement` is the
    student's agreement with the teacher on the training alerts.
    """
    logit, of_teacher = (_logits(each, images, unseen) for each in (network, teacher))
    drb = published_score(unseen)
    rated = np.isfinite(drb)
    sides: dict[str, tuple[str, Alerts, NDArray[np.floating], NDArray[np.float32]]] = {
        "": ("the drb in the packet > 0.5", unseen[rated], drb[rated], logit[rated]),
        "all_": ("the teacher's score > 0.5, including packets without drb", unseen, _sigmoid(of_teacher), logit),
    }
    card: dict[str, float | int | str] = {
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}, held out from training",
        "intervals": INTERVALS,
        "figures": FIGURES,
    }
    for prefix, (truth, alerts, score, said) in sides.items():
        found = estimate(partial(figures, score, said), alerts.object_id, partial(trials, score, said))
        about: dict[str, float | int | str] = {
            "truth": truth,
            "alerts": len(alerts),
            "objects": len(np.unique(alerts.object_id)),
            "bogus": int((score <= 0.5).sum()),
        }
        calibration = calibration_for_card(_predictions(alerts, score > 0.5, said))
        card |= {f"{prefix}{name}": value for name, value in {**about, **as_card(found), **calibration}.items()}
    same_side = {
        "teachers_agreement": (of_teacher[rated] > 0) == (drb[rated] > 0.5),
        "seen_agreement": (_logits(network, images, seen) > 0) == (_logits(teacher, images, seen) > 0),
    }
    return card | {name: round(float(same.mean()), 4) for name, same in same_side.items()}


def _logits(network: nn.Module, images: ImageInput, alerts: Alerts) -> NDArray[np.float32]:
    return run_over(network, images, alerts)[0][:, 0].numpy()


def _predictions(alerts: Alerts, real: NDArray[np.bool_], logit: NDArray[np.floating]) -> Predictions:
    return Predictions(
        ("bogus", "real"),
        alerts.alert_id,
        alerts.object_id,
        np.full(len(alerts), np.nan),
        real.astype(np.int64),
        _sigmoid(logit)[:, None].astype(np.float32),
        threshold=0.5,
    )


def figures(score: NDArray[np.floating], logit: NDArray[np.float32], weight: Weights) -> dict[str, Values]:
    """Return how well logits [N] reproduce `score` [N], where score > 0.5 is the truth.

    `agreement`: fraction of alerts that are on the same side of 0.5. `purity_above_0.8`: fraction of real alerts among
    those that the network scores above 0.8; `completeness_above_0.8`: fraction of the real alerts that score above 0.8.
    `score_slope`, `score_intercept`: slope and intercept of the logistic regression of `score` itself, taken as a
    probability, on the logits: 1 and 0 if the network is as sure as `score` is.
    """
    real = score > 0.5
    shares = _shares(score, logit)
    slope, intercept = slope_and_intercept(
        np.tile(logit_of(_sigmoid(logit)), 2),
        np.repeat([True, False], len(logit)),
        np.concatenate([weight * score, weight * (1 - score)], axis=-1),
    )
    return {
        "roc_auc": rank(real, logit, weight).roc_auc,
        **{name: ratio(weight @ part, weight @ whole) for name, (part, whole) in shares.items()},
        "score_slope": slope,
        "score_intercept": intercept,
    }


def trials(score: NDArray[np.floating], logit: NDArray[np.float32], weight: Weights) -> dict[str, Values]:
    """Return the number of objects behind each of the `figures`, for weights [N] that sum to 1 over each object."""
    real = score > 0.5
    return {"roc_auc": np.minimum(weight @ real, weight @ ~real)} | {
        name: weight @ whole for name, (_, whole) in _shares(score, logit).items()
    }


def _shares(
    score: NDArray[np.floating], logit: NDArray[np.float32]
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Return the figures that are fractions, each as two masks bool[N]: of the numerator and of the denominator."""
    real = score > 0.5
    agree, sure = (logit > 0) == real, (score < UNSURE[0]) | (score > UNSURE[1])
    shares = {
        "agreement": (agree, np.ones_like(agree)),
        "agreement_where_truth_is_sure": (agree & sure, sure),
    }
    for threshold in THRESHOLDS:
        above = _sigmoid(logit) > threshold
        shares[f"purity_above_{threshold}"] = (above & real, above)
        shares[f"completeness_above_{threshold}"] = (above & real, real)
    return shares


def _sigmoid(logit: NDArray[np.floating]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def describe(
    name: str,
    version: str,
    architecture: Architecture,
    teacher: Part,
    train: Alerts,
    method: str,
    source: str,
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the description, for the card, of a network that is distilled from `teacher` on ZTF alerts.

    `method`: how the network was trained; `source`: path of the program that trained it.
    """
    card = teacher.card
    return Description(
        name=name,
        version=version,
        task="real/bogus classification",
        surveys=("ztf",),
        inputs=card.inputs,
        outputs=Outputs(labels=("real",), activation="sigmoid", thresholds={"real": 0.5}),
        architecture=architecture,
        licence="BSD-3-Clause",
        source=f"{source} of broker-filter",
        citation=f"Teacher: {card.citation}",
        training=Training(
            method=method,
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects. No person labelled "
            "them: the labels are the teacher's scores, so the network inherits the teacher's errors.",
            evaluation=evaluation,
        ),
    )


def _method(teacher: Part, begun: Part | None, recipe: Recipe) -> str:
    """Return how the network was trained, for the card."""
    beginning = f"Initialised with the weights of {begun.card.title}. " if begun else ""
    return (
        f"Knowledge distillation: {recipe.steps} steps of {recipe.batch} images, each made on the fly from one or two "
        "real alerts (symmetries, shifts, noise, a difference moved to another template) and labelled by the teacher, "
        f"{teacher.card.name} of {teacher.card.source}. Besides the score, a map and the embedding of the teacher are "
        f"learnt. {beginning}AdamW, peak learning rate {recipe.learning_rate:g}, averaged weights, seed {recipe.seed}. "
        "The hints were chosen by validation on training objects alone; the architecture and other settings were "
        "chosen earlier on another random split of the same alerts, so the figures are slightly optimistic. A "
        "threshold of 0.5 corresponds to drb > 0.5; 0.3 loses fewer real alerts, 0.8 passes fewer bogus ones: see "
        "purity and completeness."
    )
