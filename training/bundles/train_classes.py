"""Trains the bundle that ships as `classes`: what an alert is, in the same pass that tells real from bogus.

    python -m training train-classes ztf_alerts.tar --labels labels.parquet --real default --out classes

Multinomial logistic regression on weak labels, from the logit of the bundle `default`, whose network stays as it is,
and a few columns of metadata. Must never read a column that a label was made from. The card says which those are, and
what was measured on objects that neither saw.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import (
    WEIGHTS,
    Architecture,
    Bundle,
    Description,
    Inputs,
    MetadataColumn,
    Outputs,
    Training,
    load_bundle,
)
from broker_filter.scoring.labels import Labels, parse_rule, read_labels
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.networks.stampnet import StampNetClasses, evidence, log_odds
from broker_filter.scoring.preprocess import prepare_metadata
from training.bundles.distil import run_over
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION, data_sha256
from training.data.datasets import Alerts, held_out, load_alerts
from training.errors import DatasetError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.metrics import Values, Weights, harmonic_mean, rank

VERSION = "2.0"
COLUMN = "weak_class"
CLASSES = ("VS=VS", "asteroid=asteroid", "bogus=bogus,likely_bogus", "SN=SN,SN_cand", "AGN=AGN")
"""The five of ALeRCE's stamp classifier (Carrasco-Davis et al. 2021, arXiv:2008.03309); the labels have no other with
enough objects. Each a rule of `scoring.labels`."""
METADATA = ("magpsf", "sigmapsf", "isdiffpos", "ndethist", "distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""How bright, how often, next to what. Left out: what labels were made from (ssdistnr, drb, positions), and what tells
when or by whom a packet was taken rather than what it shows (dates, fields, columns that older schemas lack)."""
LOST_TOGETHER = (
    ("magpsf", "sigmapsf"),
    ("isdiffpos",),
    ("ndethist",),
    ("distnr", "magnr"),
    ("distpsnr1", "sgscore1"),
    ("nmtchps",),
)
"""Columns that a packet lacks together. Few packets do: a network learns what is left to go by from copies of alerts
that lack some."""
LOSS = 0.3
"""Share of the copies that lack a group of columns."""
COPIES = 4
"""Of each alert, beside as many that lack nothing."""
HOST = ("distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""What is known of the sources near an alert: nothing, of a supernova in a galaxy too faint for the catalogues."""
NO_SOURCE = ("distpsnr1", "nmtchps")
"""Where Pan-STARRS has no source near an alert, packets lack the first and most have 0 of the second."""
L2 = 1e-3
"""Weight of the squared coefficients, over columns of unit variance; chosen by cross-validation, and hardly matters."""
ITERATIONS = 300
"""Of L-BFGS at most; it takes some dozens."""
FOLDS = 5
"""Few supernovae and active galaxies are in the test split; over all objects they say more."""
UNLABELLED = -1

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the column {COLUMN}, by candid")
    parser.add_argument("--real", default="default", help="bundle of StampNet (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="the new bundle's directory")


def run(arguments: argparse.Namespace) -> None:
    """Fits, evaluates, writes the bundle. Raises TrainingError, before fitting, where that cannot be."""
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    real = load_bundle(arguments.real)
    images = real.card.inputs.images
    labels = read_labels(arguments.labels, COLUMN, [parse_rule(rule) for rule in CLASSES])
    alerts = load_alerts(arguments.inputs, images.size, METADATA)
    unseen, label = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED), classes_of(alerts, labels)
    known = label != UNLABELLED
    alerts, unseen, label = alerts[known], unseen[known], label[known]
    check_sides(labels, label, unseen)

    inputs = Inputs(images=images, metadata=_columns(alerts[~unseen]))
    network = StampNetClasses(inputs.shapes()["metadata"][0], len(CLASSES)).eval()
    stampnet = load_network(Architecture(name="stampnet"), load_file(real.directory / WEIGHTS))
    network.stampnet.load_state_dict(stampnet.state_dict())
    logit, _ = run_over(network.stampnet, images, alerts)

    def told_by(metadata: NDArray[np.float64]) -> Tensor:
        return evidence(logit, torch.from_numpy(prepare_metadata(metadata, METADATA, inputs.metadata)))

    told = told_by(alerts.metadata)
    copies = torch.stack([told] * COPIES + [told_by(lacking) for lacking in lose_columns(alerts.metadata)])
    fit_copies(network.classes, copies[:, torch.from_numpy(~unseen)], alerts.object_id[~unseen], label[~unseen])
    hostless = alerts.metadata.copy()
    hostless[:, [METADATA.index(name) for name in HOST]] = np.nan
    with torch.inference_mode():
        scores, without_host = (log_odds(network.classes(seen)).double().numpy() for seen in (told, told_by(hostless)))
    evaluation = {
        "truth": f"{COLUMN}: weak labels",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}: none of their alerts were trained on",
        "intervals": INTERVALS,
        **evaluate(scores[unseen], labels.classes, alerts.object_id[unseen], label[unseen]),
        "without_host": f"the same alerts, {', '.join(HOST)} taken from them",
        **{
            f"without_host_{name}": figure
            for name, figure in evaluate(
                without_host[unseen], labels.classes, alerts.object_id[unseen], label[unseen]
            ).items()
        },
        "cross_validation": f"{FOLDS} folds of all objects; what tells real from bogus was trained on most of them",
        **{
            f"cross_validation_{name}": figure
            for name, figure in evaluate(
                cross_validate(copies, alerts.object_id, label), labels.classes, alerts.object_id, label
            ).items()
        },
        "dataset_sha256": data_sha256(alerts[~unseen]),
    }
    log.info("on objects not trained on: %s", evaluation)
    write_bundle(arguments.out, describe(real, labels, inputs, alerts[~unseen], evaluation), network)


def classes_of(alerts: Alerts, labels: Labels) -> NDArray[np.int64]:
    """The class of each alert [N], UNLABELLED where it has none. Raises DatasetError where none has one."""
    keys = zip(alerts.alert_id.tolist(), alerts.object_id.tolist(), strict=True)
    label = np.array([labels.label_of.get(labels.key_of(*key), UNLABELLED) for key in keys])
    if (label == UNLABELLED).all():
        raise DatasetError(
            f"{labels.table}: none of its {len(labels.label_of)} labels is of an alert of the inputs, by {labels.key}"
        )
    return label


def check_sides(labels: Labels, label: NDArray[np.int64], unseen: NDArray[np.bool_]) -> None:
    """Raises DatasetError where a class has no alerts on a side of the split, as one with a single source has not."""
    for side, rows in (("to train on", ~unseen), ("to test with", unseen)):
        if absent := [name for c, name in enumerate(labels.classes) if c not in label[rows]]:
            raise DatasetError(
                f"{labels.table}: no object {side} is of class {', '.join(absent)}: add alerts of more objects"
            )


def lose_columns(metadata: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """COPIES of the METADATA [N, F] of alerts, each without some groups of its columns, which are NaN."""
    rng = np.random.default_rng(SPLIT_SEED)
    distance, sources = (METADATA.index(name) for name in NO_SOURCE)
    copies = []
    for _ in range(COPIES):
        copy = metadata.copy()
        for group in LOST_TOGETHER:
            lost = rng.random(len(metadata)) < LOSS
            for name in group:
                copy[lost, METADATA.index(name)] = np.nan
        copy[np.isnan(copy[:, distance]) & ~np.isnan(copy[:, sources]), sources] = 0
        copies.append(copy)
    return copies


def fit_copies(layer: nn.Linear, copies: Tensor, object_id: NDArray[np.str_], label: NDArray[np.int64]) -> None:
    """`fit_classes` to several copies of N alerts, [copies, N, D]."""
    n = len(copies)
    fit_classes(layer, copies.flatten(0, 1), np.tile(object_id, n), np.tile(label, n))


def fit_classes(layer: nn.Linear, told: Tensor, object_id: NDArray[np.str_], label: NDArray[np.int64]) -> None:
    """Sets `layer` so that the softmax of what it makes of `told` [N, D] is the class `label` [N].

    Every class counts the same, and so does every object of a class, however many alerts it has.
    """
    told, truth = told.double(), torch.from_numpy(label)
    mean, deviation = told.mean(0), told.std(0)
    unit = (told - mean) / deviation
    _, index, alerts_of = np.unique(object_id, return_inverse=True, return_counts=True)
    share = 1 / alerts_of[index]
    weight = torch.from_numpy(share / np.bincount(label, share)[label] / len(np.unique(label)))
    fitted = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        distance = (weight * cross_entropy(fitted(unit), truth, reduction="none")).sum()
        distance = distance + L2 * fitted.weight.square().sum()
        distance.backward()  # type: ignore[no-untyped-call]
        return distance

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(fitted.weight / deviation)
        layer.bias.copy_(fitted.bias - fitted.weight @ (mean / deviation))


def cross_validate(copies: Tensor, object_id: NDArray[np.str_], label: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-odds of the classes [N, C], each alert's by a layer that was fitted without its object and others.

    `copies` [copies, N, D]: all are fitted to; the first, which lacks nothing, is judged.
    """
    objects, index = np.unique(object_id, return_inverse=True)
    fold = (np.random.default_rng(SPLIT_SEED).permutation(len(objects)) % FOLDS)[index]
    scores = np.empty((len(label), len(CLASSES)))
    for left_out in range(FOLDS):
        rows = torch.from_numpy(fold == left_out)
        layer = nn.Linear(copies.shape[2], len(CLASSES))
        fit_copies(layer, copies[:, ~rows], object_id[fold != left_out], label[fold != left_out])
        with torch.inference_mode():
            scores[fold == left_out] = log_odds(layer(copies[0, rows])).numpy()
    return scores


def evaluate(
    scores: NDArray[np.float64], classes: Sequence[str], object_id: NDArray[np.str_], label: NDArray[np.int64]
) -> dict[str, float | int | str]:
    """How well `scores` [N, C] tell each class from the rest, with intervals by object."""

    def figures(weight: Weights) -> dict[str, Values]:
        auc = {name: rank(label == c, scores[:, c], weight).roc_auc for c, name in enumerate(classes)}
        return {"macro_roc_auc": np.mean(list(auc.values()), axis=0), **{f"roc_auc_{c}": a for c, a in auc.items()}}

    def trials(weight: Weights) -> dict[str, Values]:
        positive = [weight @ (label == c) for c in range(len(classes))]
        pairs = [np.minimum(some, weight.sum() - some) for some in positive]
        return {"macro_roc_auc": harmonic_mean(pairs)} | {
            f"roc_auc_{name}": some for name, some in zip(classes, pairs, strict=True)
        }

    return {
        "alerts": len(label),
        "objects": len(np.unique(object_id)),
        **{f"objects_{name}": len(np.unique(object_id[label == c])) for c, name in enumerate(classes)},
        **as_card(estimate(figures, object_id, trials)),
    }


def describe(
    real: Bundle, labels: Labels, inputs: Inputs, train: Alerts, evaluation: dict[str, float | int | str]
) -> Description:
    """What the card says of the bundle, besides its files."""
    card = real.card
    return Description(
        name="classes",
        version=VERSION,
        task="real/bogus and classification: variable star, asteroid, bogus, supernova, active galactic nucleus",
        surveys=("ztf",),
        inputs=inputs,
        outputs=Outputs(labels=("real", *labels.classes), activation="sigmoid", thresholds=card.outputs.thresholds),
        architecture=Architecture(
            name="stampnet_classes",
            arguments={"metadata": inputs.shapes()["metadata"][0], "classes": len(labels.classes)},
        ),
        licence="BSD-3-Clause",
        source="training/bundles/train_classes.py of broker-filter",
        citation=card.citation,
        training=Training(
            method=f"`real` is the bundle {card.name} {card.version} unchanged. The classes: multinomial logistic "
            "regression, balanced by class and object, on its logit, the metadata, and which of them are missing. It "
            "is fitted to the alerts and to as many copies that lack groups of columns, each with a chance of "
            f"{LOSS:.0%}. No column is read that a label was made from (ssdistnr, drb, coordinates), nor one that "
            "tells when a packet was taken. Two labels are near what is read: bogus is the teacher's score, and known "
            "asteroids have few detections.",
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects with weak labels: VS by "
            "a match in position with VSX, GCVS or SIMBAD, asteroid by a known one's predicted position, bogus by "
            "drb < 0.5, SN by TNS or Fink's candidates, AGN by SIMBAD. Probabilities are as if every class were "
            "equally common. Few supernovae and active galaxies were there to learn from.",
            evaluation=evaluation,
        ),
    )


def _columns(train: Alerts) -> tuple[MetadataColumn, ...]:
    """The columns, each with a flag that says where it is missing; there it has the median, which tells nothing."""
    medians = np.nanmedian(train.metadata, axis=0)
    return tuple(
        MetadataColumn(name=name, fill=float(fill), flag=True) for name, fill in zip(METADATA, medians, strict=True)
    )
