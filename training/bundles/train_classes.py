"""Trains the shipped bundle `classes`: classes of alerts, computed in the same pass as the real/bogus score.

    python -m training train-classes ztf_alerts.tar --labels labels.parquet --real default --out classes

The classifier is a multinomial logistic regression on weak labels. Its inputs are the logit of the bundle `default`,
whose network stays unchanged, and a few metadata columns. It never uses a column from which a label was derived. The
card lists these columns, and the figures measured on held-out objects.
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
    Description,
    Inputs,
    MetadataColumn,
    Outputs,
    Part,
    Training,
    open_bundle,
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
"""Class rules (`scoring.labels`). The five classes are those of ALeRCE's stamp classifier (Carrasco-Davis et al. 2021,
arXiv:2008.03309); no other class has enough labelled objects."""
METADATA = ("magpsf", "sigmapsf", "isdiffpos", "ndethist", "distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""Columns on brightness, number of detections and neighbouring sources. Excluded are columns from which labels were
derived (ssdistnr, drb, positions), and columns that reveal when or by whom a packet was collected rather than what it
shows (dates, fields, columns that older schemas lack)."""
LOST_TOGETHER = (
    ("magpsf", "sigmapsf"),
    ("isdiffpos",),
    ("ndethist",),
    ("distnr", "magnr"),
    ("distpsnr1", "sgscore1"),
    ("nmtchps",),
)
"""Groups of columns that are missing together in a packet. Few packets lack any, so the network is also trained on
copies of alerts from which groups are removed."""
LOSS = 0.3
"""Probability that a copy lacks a group of columns."""
COPIES = 4
"""Number of copies with missing columns for each alert, and as many copies without missing columns."""
HOST = ("distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""Columns on sources near an alert; they are missing for a supernova whose galaxy is too faint for the catalogues."""
NO_SOURCE = ("distpsnr1", "nmtchps")
"""Columns by which a packet says that Pan-STARRS has no source nearby: the first one is missing, and the second one is
mostly 0."""
L2 = 1e-3
"""Weight of the squared coefficients, for columns of unit variance; chosen by cross-validation, with little effect."""
ITERATIONS = 300
"""Maximum number of L-BFGS iterations; some dozens are enough."""
FOLDS = 5
"""Number of folds of the cross-validation over all objects, which is used because the test split holds few supernovae
and active galaxies."""
UNLABELLED = -1

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-classes`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the columns candid and {COLUMN}")
    parser.add_argument(
        "--real", default="default", help="real/bogus bundle with the network StampNet (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")


def run(arguments: argparse.Namespace) -> None:
    """Fit, evaluate and write the bundle. Raises TrainingError or DatasetError before fitting if the input cannot be
    used."""
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    real = open_bundle(arguments.real).part("ztf")
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

    def features_of(metadata: NDArray[np.float64]) -> Tensor:
        return evidence(logit, torch.from_numpy(prepare_metadata(metadata, METADATA, inputs.metadata)))

    features = features_of(alerts.metadata)
    copies = torch.stack([features] * COPIES + [features_of(lacking) for lacking in lose_columns(alerts.metadata)])
    fit_copies(network.classes, copies[:, torch.from_numpy(~unseen)], alerts.object_id[~unseen], label[~unseen])
    hostless = alerts.metadata.copy()
    hostless[:, [METADATA.index(name) for name in HOST]] = np.nan
    with torch.inference_mode():
        scores, without_host = (
            log_odds(network.classes(seen)).double().numpy() for seen in (features, features_of(hostless))
        )
    evaluation = {
        "truth": f"{COLUMN}: weak labels",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}, held out from training",
        "intervals": INTERVALS,
        **evaluate(scores[unseen], labels.classes, alerts.object_id[unseen], label[unseen]),
        "without_host": f"the same alerts with the columns {', '.join(HOST)} removed",
        **{
            f"without_host_{name}": figure
            for name, figure in evaluate(
                without_host[unseen], labels.classes, alerts.object_id[unseen], label[unseen]
            ).items()
        },
        "cross_validation": f"{FOLDS} folds of all objects; the real/bogus network was trained on most of them",
        **{
            f"cross_validation_{name}": figure
            for name, figure in evaluate(
                cross_validate(copies, alerts.object_id, label), labels.classes, alerts.object_id, label
            ).items()
        },
        "dataset_sha256": data_sha256(alerts[~unseen]),
    }
    log.info("on held-out objects: %s", evaluation)
    write_bundle(arguments.out, describe(real, labels, inputs, alerts[~unseen], evaluation), network)


def classes_of(alerts: Alerts, labels: Labels) -> NDArray[np.int64]:
    """Return the class index of each alert, int64[N], UNLABELLED without a label. Raises DatasetError if no alert has
    one."""
    keys = zip(alerts.alert_id.tolist(), alerts.object_id.tolist(), strict=True)
    label = np.array([labels.label_of.get(labels.key_of(*key), UNLABELLED) for key in keys])
    if (label == UNLABELLED).all():
        raise DatasetError(
            f"{labels.table}: none of its {len(labels.label_of)} labels matches an alert of the inputs by {labels.key}"
        )
    return label


def check_sides(labels: Labels, label: NDArray[np.int64], unseen: NDArray[np.bool_]) -> None:
    """Raise DatasetError if a class has no training alerts or no test alerts, as happens with a single object."""
    for side, rows in (("training", ~unseen), ("test", unseen)):
        if absent := [name for c, name in enumerate(labels.classes) if c not in label[rows]]:
            raise DatasetError(
                f"{labels.table}: no {side} object is of class {', '.join(absent)}: add alerts of more objects"
            )


def lose_columns(metadata: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return COPIES copies of the METADATA [N, F], each with some groups of columns set to NaN."""
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
    """Apply `fit_classes` to several copies of N alerts, [copies, N, D]."""
    n = len(copies)
    fit_classes(layer, copies.flatten(0, 1), np.tile(object_id, n), np.tile(label, n))


def fit_classes(layer: nn.Linear, features: Tensor, object_id: NDArray[np.str_], label: NDArray[np.int64]) -> None:
    """Fit `layer` so that the softmax of its output for `features` [N, D] predicts the class indices `label` [N].

    All classes have the same total weight, and so have all objects of a class, however many alerts they have.
    """
    features, truth = features.double(), torch.from_numpy(label)
    mean, deviation = features.mean(0), features.std(0)
    unit = (features - mean) / deviation
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
    """Return log-odds of the classes, float64[N, C]; each alert is scored by a layer fitted without the alert's fold of
    objects.

    `copies` [copies, N, D]: all copies are used to fit; the first, without missing columns, is scored.
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
    """Return ROC AUCs of `scores` [N, C], each class against the rest, with bootstrap intervals over objects."""

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
    real: Part, labels: Labels, inputs: Inputs, train: Alerts, evaluation: dict[str, float | int | str]
) -> Description:
    """Return the bundle's description for the card."""
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
            method=f"`real` is the unchanged output of the bundle {card.name} {card.version}. The classes are a "
            "multinomial logistic regression, balanced by class and object, on the logit of `real`, the metadata and "
            "flags of missing metadata. It is fitted to the alerts, and to as many copies from which each group of "
            f"columns is removed with a probability of {LOSS:.0%}. It uses no column from which a label was derived "
            "(ssdistnr, drb, coordinates), and none that reveals when a packet was taken. Two labels are closely "
            "related to its inputs: bogus is defined by the teacher's score, and known asteroids have few detections.",
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects with weak labels: VS by "
            "a positional match with VSX, GCVS or SIMBAD, asteroid by the predicted position of a known asteroid, "
            "bogus by drb < 0.5, SN by TNS or Fink's candidates, AGN by SIMBAD. The probabilities assume that all "
            "classes are equally common. The training data hold few supernovae and active galaxies.",
            evaluation=evaluation,
        ),
    )


def _columns(train: Alerts) -> tuple[MetadataColumn, ...]:
    """Return the columns, each with a flag for missing values, which are replaced by the column's median."""
    medians = np.nanmedian(train.metadata, axis=0)
    return tuple(
        MetadataColumn(name=name, fill=float(fill), flag=True) for name, fill in zip(METADATA, medians, strict=True)
    )
