"""Trains the bundle that ships as `default`: StampNet, distilled from braai d6_m7 on public ZTF alerts.

    broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out d6_m7
    python -m training train-default ztf_alerts.tar --teacher d6_m7 --out default

The card says what was measured on objects that were not trained on, and how.
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
    Bundle,
    Description,
    ImageInput,
    Outputs,
    Training,
    load_bundle,
)
from broker_filter.scoring.networks import build_network, load_network
from training.arguments import positive, seed, share
from training.bundles.distil import Hint, Recipe, distil, run_over
from training.checkpoint import beside
from training.data.datasets import Alerts, held_out, load_alerts, sha256_of
from training.errors import DatasetError, TrainingError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.metrics import Values, Weights, rank, ratio

VERSION = "2.0"
ARCHITECTURE = Architecture(name="stampnet", arguments={"dropout": 0.0})
"""No image comes twice, so there is nothing that dropout would keep from being learnt by heart."""
TEACHER = "vgg6"
HINTS = (Hint(student=11, teacher=11), Hint(student=18, teacher=15))
"""StampNet's map of 8 px, whose interior stands where VGG6's of 6 px does; the embeddings."""
TEST_FRACTION = 0.25
"""Of the objects. Real alerts that the survey calls bogus are few: fewer objects would tell too little."""
SPLIT_SEED = 2026
UNSURE = (0.4, 0.6)
"""Scores of the teacher about which side of 0.5 they are on says little."""
THRESHOLDS = (0.3, 0.5, 0.8)
"""Of the score: to lose few real alerts, to decide as the survey does, to have few bogus ones."""
NO_DRB = 0.0
"""Stands, besides null, in packets of the weeks before ZTF had the network: exactly 0, and an empty drbversion."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--teacher", required=True, help="bundle of braai d6_m7")
    parser.add_argument(
        "--begin-with", metavar="BUNDLE", help="of StampNet: whose weights to begin with, not random ones"
    )
    parser.add_argument("--out", required=True, type=Path, help="the new bundle's directory")
    parser.add_argument(
        "--checkpoint", type=Path, help="file to save progress in and to continue from (default: OUT.ckpt, beside OUT)"
    )
    parser.add_argument(
        "--share", type=share, default=1.0, help="of the objects to train on: 0.25, for what more are worth"
    )
    parser.add_argument("--steps", type=positive, default=5000)
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--threads", type=positive, default=1)


def run(arguments: argparse.Namespace) -> None:
    """Trains, evaluates, writes the bundle. Raises TrainingError or DatasetError, before training, where that cannot
    be."""
    refuse_existing(arguments.out)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    bundle = load_bundle(arguments.teacher)
    if bundle.card.architecture.name != TEACHER:
        raise TrainingError(f"{arguments.teacher}: is no {TEACHER}: import braai's weights with `models import braai`")
    teacher = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    network = build_network(ARCHITECTURE)
    begun = load_bundle(arguments.begin_with) if arguments.begin_with else None
    if begun:
        network = load_network(ARCHITECTURE, load_file(begun.directory / WEIGHTS))
    images = bundle.card.inputs.images
    alerts = load_alerts(arguments.inputs, images.size, ("drb",))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    train, test = alerts[~unseen], alerts[unseen]
    check_rated(test)
    if arguments.share < 1:
        train = train[held_out(train.object_id, arguments.share, SPLIT_SEED)]
    log.info("%d alerts to train on, %d to test with", len(train), len(test))

    recipe = Recipe(steps=arguments.steps, seed=arguments.seed, hints=HINTS)
    checkpoint = arguments.checkpoint or beside(arguments.out)
    network = distil(network, teacher, images, train, recipe, checkpoint)
    evaluation = evaluate(network, teacher, images, train, test) | {"dataset_sha256": data_sha256(train)}
    log.info("on objects not trained on: %s", evaluation)
    write_bundle(arguments.out, describe(bundle, begun, train, recipe, evaluation), network)
    checkpoint.unlink(missing_ok=True)


def data_sha256(train: Alerts) -> str:
    """Of what was trained on: the alerts' ids, pixels and metadata."""
    return sha256_of(train.alert_id, train.cutouts, train.cutout_box, train.metadata)


def published_score(alerts: Alerts) -> NDArray[np.float64]:
    """The survey's own real/bogus score [N], NaN where the packet carries none."""
    drb = alerts.metadata[:, alerts.columns.index("drb")]
    return np.where(drb == NO_DRB, np.nan, drb)


def check_rated(test: Alerts) -> None:
    """Raises DatasetError where no alert has the score that the network is judged by."""
    if not np.isfinite(published_score(test)).any():
        raise DatasetError(f"no alert of the objects to test with has a drb, of {len(test)}: add alerts since 2019")


def evaluate(
    network: nn.Module, teacher: nn.Module, images: ImageInput, seen: Alerts, unseen: Alerts
) -> dict[str, float | int | str]:
    """The card's figures, of alerts of unseen objects: against the survey's own score, and against the teacher's where
    packets carry none too.

    `teachers_agreement`, with the drb, is what could be reached; `seen_agreement`, with the teacher on the alerts that
    were trained on, is what would be if these were all the sky.
    """
    logit, of_teacher = (_logits(each, images, unseen) for each in (network, teacher))
    drb = published_score(unseen)
    rated = np.isfinite(drb)
    sides: dict[str, tuple[str, Alerts, NDArray[np.floating], NDArray[np.float32]]] = {
        "": ("the drb in the packet > 0.5", unseen[rated], drb[rated], logit[rated]),
        "all_": ("the teacher's score > 0.5, of packets without drb too", unseen, _sigmoid(of_teacher), logit),
    }
    card: dict[str, float | int | str] = {
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}: none of their alerts were trained on",
        "intervals": INTERVALS,
    }
    for prefix, (truth, alerts, score, said) in sides.items():
        found = estimate(partial(figures, score, said), alerts.object_id, partial(trials, score, said))
        about: dict[str, float | int | str] = {
            "truth": truth,
            "alerts": len(alerts),
            "objects": len(np.unique(alerts.object_id)),
            "bogus": int((score <= 0.5).sum()),
        }
        card |= {f"{prefix}{name}": value for name, value in {**about, **as_card(found)}.items()}
    same_side = {
        "teachers_agreement": (of_teacher[rated] > 0) == (drb[rated] > 0.5),
        "seen_agreement": (_logits(network, images, seen) > 0) == (_logits(teacher, images, seen) > 0),
    }
    return card | {name: round(float(same.mean()), 4) for name, same in same_side.items()}


def _logits(network: nn.Module, images: ImageInput, alerts: Alerts) -> NDArray[np.float32]:
    return run_over(network, images, alerts)[0][:, 0].numpy()


def figures(score: NDArray[np.floating], logit: NDArray[np.float32], weight: Weights) -> dict[str, Values]:
    """How far logits go with `score` [N], the truth where it is above 0.5.

    `agreement` is the share of alerts on whose side of 0.5 both are. `purity_above_0.8`: of the alerts that the network
    gives more than 0.8 so many are real; `completeness_above_0.8`: so many of the real ones are among them.
    """
    real = score > 0.5
    shares = _shares(score, logit)
    return {"roc_auc": rank(real, logit, weight).roc_auc} | {
        name: ratio(weight @ part, weight @ whole) for name, (part, whole) in shares.items()
    }


def trials(score: NDArray[np.floating], logit: NDArray[np.float32], weight: Weights) -> dict[str, Values]:
    """How many objects each of the `figures` is of, for weights [N] that sum to 1 over each object."""
    real = score > 0.5
    return {"roc_auc": np.minimum(weight @ real, weight @ ~real)} | {
        name: weight @ whole for name, (_, whole) in _shares(score, logit).items()
    }


def _shares(
    score: NDArray[np.floating], logit: NDArray[np.float32]
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """The figures that are shares: of which alerts [N], and of them which [N] count."""
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


def _sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def describe(
    teacher: Bundle, begun: Bundle | None, train: Alerts, recipe: Recipe, evaluation: dict[str, float | int | str]
) -> Description:
    """What the card says of the bundle, besides its files."""
    card = teacher.card
    beginning = f"Begun with the weights of {begun.card.name} {begun.card.version}. " if begun else ""
    return Description(
        name="default",
        version=VERSION,
        task="real/bogus classification",
        surveys=("ztf",),
        inputs=card.inputs,
        outputs=Outputs(labels=("real",), activation="sigmoid", thresholds={"real": 0.5}),
        architecture=ARCHITECTURE,
        licence="BSD-3-Clause",
        source="training/bundles/train_default.py of broker-filter",
        citation=f"of the teacher: {card.citation}",
        training=Training(
            method=f"Distilled: {recipe.steps} steps of {recipe.batch} images, each made on the fly from one or two "
            "real alerts (symmetries, shifts, noise, a difference moved to another template) and labelled by the "
            f"teacher, {card.name} of {card.source}, of which a map and the embedding are learnt besides the score. "
            f"{beginning}AdamW, peak learning rate {recipe.learning_rate:g}, averaged weights, seed {recipe.seed}. "
            "Hints chosen by validation on training objects alone; the architecture and the rest earlier, on another "
            "random split of the same alerts, so that the figures are slightly optimistic. A threshold of 0.5 decides "
            "as drb > 0.5 does; 0.3 loses fewer real alerts, above 0.8 fewer are bogus: see purity and completeness.",
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects. No person labelled "
            "them: the labels are the teacher's scores, and the network inherits the teacher's mistakes.",
            evaluation=evaluation,
        ),
    )
