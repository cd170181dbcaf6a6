"""Trains the bundle that ships as `default`: StampNet, distilled from braai d6_m7 on public ZTF alerts.

    broker-filter models import braai d6_m7.weights.h5 --normalisation row --name d6_m7 --out d6_m7
    python -m training.train_default ztf_alerts.tar --teacher d6_m7 --out default

The card says what was measured on objects that were not trained on, and how.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from broker_filter.config import Runtime
from broker_filter.scoring.bundle import Architecture, Description, ImageInput, Outputs, Training
from broker_filter.scoring.export import write_bundle
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import Model, open_model
from training.datasets import Alerts, held_out, load_alerts
from training.distil import Recipe, distil
from training.evaluate import agreement, interval_by_object, roc_auc

VERSION = "1.0"
ARCHITECTURE = Architecture(name="stampnet")
TEST_FRACTION = 0.25
"""Of the objects. Real alerts that the survey calls bogus are few: fewer objects would tell too little."""
SPLIT_SEED = 2026

log = logging.getLogger(__name__)


def main() -> None:
    """Trains, evaluates, writes the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--teacher", required=True, help="bundle of braai d6_m7")
    parser.add_argument("--out", required=True, type=Path, help="the new bundle's directory")
    parser.add_argument("--checkpoint", type=Path, help="file to save progress in and to continue from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    teacher = open_model(arguments.teacher, Runtime(engine="onnxruntime", inference_threads=arguments.threads))
    alerts = load_alerts(arguments.inputs, teacher.bundle.card.inputs.images.size)
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    train, test = alerts[~unseen], alerts[unseen & np.isfinite(alerts.drb)]
    log.info("%d alerts to train on, %d to test with", len(train), len(test))

    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    network = distil(build_network(ARCHITECTURE), teacher, train, recipe, arguments.checkpoint)
    evaluation = evaluate(network, teacher.bundle.card.inputs.images, test)
    log.info("on objects not trained on: %s", evaluation)
    write_bundle(arguments.out, describe(teacher, train, recipe, evaluation), network)


def evaluate(network: nn.Module, images: ImageInput, test: Alerts) -> dict[str, float | int | str]:
    """The card's figures: the network against the survey's own score of alerts of unseen objects."""
    with torch.inference_mode():
        logits, _ = network(torch.from_numpy(prepare_images(test.cutouts, test.cutout_box, images)))
    score = logits[:, 0].sigmoid().double().numpy()
    real = test.drb > 0.5
    evaluation: dict[str, float | int | str] = {
        "truth": "the drb in the packet > 0.5; alerts of objects that were not trained on",
        "alerts": len(test),
        "objects": len(np.unique(test.object_id)),
        "bogus": int((~real).sum()),
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}",
        "caveat": "architecture and recipe were chosen on another random split of the same alerts: slightly optimistic",
    }
    for name, figure in (("roc_auc", roc_auc), ("agreement", agreement)):
        low, high = interval_by_object(figure, real, score, test.object_id, SPLIT_SEED)
        evaluation[name] = round(figure(real, score), 4)
        evaluation[f"{name}_95"] = f"{low:.4f} to {high:.4f} (bootstrap by object)"
    return evaluation


def describe(teacher: Model, train: Alerts, recipe: Recipe, evaluation: dict[str, float | int | str]) -> Description:
    """What the card says of the bundle, besides its files."""
    card = teacher.bundle.card
    return Description(
        name="default",
        version=VERSION,
        task="real/bogus classification",
        surveys=("ztf",),
        inputs=card.inputs,
        outputs=Outputs(labels=("real",), activation="sigmoid", thresholds={"real": 0.5}),
        architecture=ARCHITECTURE,
        licence="BSD-3-Clause",
        source="training/train_default.py of broker-filter",
        citation=f"of the teacher: {card.citation}",
        training=Training(
            method=f"Distilled: {recipe.steps} steps of {recipe.batch} images, each made on the fly from one or two "
            "real alerts (symmetries, shifts, noise, a difference moved to another template) and labelled by the "
            f"teacher, {card.name} of {card.source}. AdamW, peak learning rate {recipe.learning_rate:g}, averaged "
            f"weights, seed {recipe.seed}.",
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects. No person labelled "
            "them: the labels are the teacher's scores, and the network inherits the teacher's mistakes.",
            evaluation=evaluation,
        ),
    )


if __name__ == "__main__":
    main()
