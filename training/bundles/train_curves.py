"""Trains the shipped bundle `curves`: types of supernovae from the light curve that a ZTF alert brings.

    python -m training train-curves light_curves.parquet --objects objects.parquet --out curves

The network learns from typed transients, each as it came at different numbers of detections. It sees nothing but the
detections in the packet. The card holds the figures on held-out objects, by number of detections, beside those of a
random forest.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import (
    Architecture,
    Description,
    ImageInput,
    Inputs,
    LightCurveInput,
    Outputs,
    Training,
)
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.curve_classes import CurveClasses
from broker_filter.scoring.preprocess import prepare_light_curves
from training.bundles.distil import schedule
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.data.datasets import held_out, sha256_of
from training.data.light_curve_features import light_curve_features
from training.data.record_distribution import record_outputs
from training.data.typed_transients import HISTORY_DAYS, Transients, read_transients
from training.errors import DatasetError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate
from training.evaluation.evaluate import RELIABILITY, calibration_for_card
from training.evaluation.metrics import Values, Weights, measure, trials
from training.evaluation.predictions import Predictions
from training.evaluation.scaling import Calibration, fit_calibration

VERSION = "1.0"
CLASSES: Mapping[str, Sequence[str]] = {
    "SN_Ia": ("SN Ia", "SN Ia-91T", "SN Ia-91bg", "SN Ia-pec", "SN Iax", "SN Ia-CSM"),
    "SN_II": ("SN II", "SN IIP", "SN IIn", "SN II-pec"),
    "SN_Ibc": ("SN Ib", "SN Ic", "SN Ic-BL", "SN Ib/c", "SN Ib-pec", "SN Ibn", "SN Icn", "SN IIb"),
    "SLSN": ("SLSN-I", "SLSN-II"),
}
"""The classes, and their types in the Bright Transient Survey. The other types have fewer than 20 objects each."""
LEAST_DETECTIONS = 3
"""Fewest detections for which probabilities are given. With two, the cross-validated log-loss was that of the class
frequencies (0.77)."""
DETECTIONS = (3, 5, 10, 20)
"""Numbers of detections by which the figures are given."""
LIGHT_CURVE = LightCurveInput(points=160, flux_scale=100.0, time_scale=1.0, least_detections=LEAST_DETECTIONS)
"""The points include upper limits and forced photometry of the packets, which the network leaves out."""
IMAGES = ImageInput(size=1, order=("difference",), normalisation="l2_image", padding=0.0)
"""The network does not use images, but every bundle has them as an input: one pixel is the smallest."""
ALERTS_OF_OBJECT = 10
"""Largest number of alerts of an object that are trained on, drawn at random."""
HIDDEN = 128
INPUT_DROPOUT, DROPOUT = 0.1, 0.3
STEPS, BATCH = 1000, 256
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.05, 0.05
RARITY = 0.5
"""Classes are drawn in proportion to their number of objects to the power of 1 - RARITY."""
FOLDS = 4
"""Number of folds of the training objects; the calibration is fitted to cross-validated logits."""
AT_ONCE = 2048
"""Number of alerts whose statistics are computed at a time."""
TREES, LEAST_LEAF = 200, 5
"""Size of the random forest, and the fewest alerts of a leaf."""
SEED = 2026
FIGURES = (
    "at_N_: each object once, at its first alert whose packet has N detections. roc_auc of a class is against the "
    "rest, macro_roc_auc their mean; the class frequencies have 0.5. forest_ is a random forest on the features of "
    "training/data/light_curve_features.py, trained on the same objects; ahead_of_forest is the difference of the "
    "macro ROC AUCs. cross_validation_ is over the training objects; the calibration, of one scale and three shifts, "
    "was fitted to the same logits. log_loss_of_frequencies is the log-loss of the class frequencies of the training "
    "objects."
)
"""The description of the figures in the card."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-curves`."""
    parser.add_argument(
        "curves", metavar="CURVES", type=Path, help="Parquet table of detections: ZTFID, mjd, band, mag, magerr"
    )
    parser.add_argument("--objects", required=True, type=Path, help="Parquet table of objects: ZTFID, type")
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")


def run(arguments: argparse.Namespace) -> None:
    """Train, evaluate and write the bundle. Raises TrainingError or DatasetError if the input cannot be used."""
    refuse_existing(arguments.out)
    torch.set_num_threads(1)
    transients = read_transients(arguments.curves, arguments.objects, CLASSES)
    unseen = held_out(transients.object_id, TEST_FRACTION, SPLIT_SEED)
    check_sides(transients.label, unseen)
    log.info("%d objects, %d of them held out", len(unseen), unseen.sum())

    rows = np.unique(np.concatenate([choose(transients), *at_detections(transients).values()]))
    seen = statistics(transients, rows)
    scores = cross_validate(seen, transients, rows, unseen)
    training = ~unseen[transients.owner[rows]]
    share = frequencies(transients.label[~unseen])
    calibration = fit_calibration(
        scores[training], transients.label[transients.owner[rows[training]]], RARITY * np.log(share)
    )
    network = fit(seen[torch.from_numpy(training)], transients, rows[training], SEED)
    last = network.head[-1]
    assert isinstance(last, nn.Linear)
    calibration.merge_into(last)
    found = logits_of(network, seen)
    calibrated = np.where(training[:, None], calibration(scores), found)
    forest = forest_scores(transients, unseen)
    evaluation: dict[str, float | int | str] = {
        "truth": "spectroscopic types of the Bright Transient Survey",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}, held out from training",
        "intervals": INTERVALS,
        "figures": FIGURES,
        **evaluate(transients, rows, calibrated, unseen, forest, share),
        **prefixed("cross_validation_", evaluate(transients, rows, calibrated, ~unseen, None, share)),
        "dataset_sha256": sha256_of(transients.object_id[~unseen], transients.points.mjd, transients.points.flux),
    }
    log.info("figures: %s", evaluation)
    write_bundle(arguments.out, describe(transients, unseen, calibration, evaluation), network)
    probabilities = torch.from_numpy(found[training]).softmax(1).numpy()
    of = f"{training.sum():,} alerts of the training objects, made from their light curves"
    record_outputs(arguments.out, of, Survey.ZTF, dict(zip(CLASSES, probabilities.T, strict=True)))


def architecture() -> Architecture:
    """Return the network's architecture for the card."""
    return Architecture(
        name="curve_classes",
        arguments={"time_scale": LIGHT_CURVE.time_scale, "classes": len(CLASSES), "hidden": HIDDEN},
    )


def new_network() -> CurveClasses:
    """Return the network with initial parameters."""
    network = build_network(architecture())
    assert isinstance(network, CurveClasses)
    return network


def check_sides(label: NDArray[np.int64], unseen: NDArray[np.bool_]) -> None:
    """Raise DatasetError if a class has fewer than FOLDS training objects or no held-out object."""
    for c, name in enumerate(CLASSES):
        if (label[~unseen] == c).sum() < FOLDS or not (label[unseen] == c).any():
            raise DatasetError(
                f"class {name} has {(label[~unseen] == c).sum()} training and {(label[unseen] == c).sum()} held-out "
                f"objects, and at least {FOLDS} and 1 are needed: add light curves of the types "
                f"{', '.join(CLASSES[name])}"
            )


def frequencies(label: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the fraction of each class, float64[C]."""
    share: NDArray[np.float64] = np.bincount(label, minlength=len(CLASSES)) / len(label)
    return share


def choose(transients: Transients) -> NDArray[np.int64]:
    """Return at most ALERTS_OF_OBJECT random alerts of each object that have LEAST_DETECTIONS or more, int64[N]."""
    rng = np.random.default_rng(SEED)
    rows = rng.permutation(np.flatnonzero(transients.detections >= LEAST_DETECTIONS))
    rows = rows[np.argsort(transients.owner[rows], kind="stable")]
    owner = transients.owner[rows]
    chosen: NDArray[np.int64] = rows[np.arange(len(rows)) - np.searchsorted(owner, owner) < ALERTS_OF_OBJECT]
    return chosen


def at_detections(transients: Transients) -> dict[int, NDArray[np.int64]]:
    """Return the first alert of each object whose packet has n detections, for each n of DETECTIONS."""
    first = {}
    for n in DETECTIONS:
        rows = np.flatnonzero(transients.detections == n)
        first[n] = rows[np.unique(transients.owner[rows], return_index=True)[1]]
    return first


@torch.inference_mode()
def statistics(transients: Transients, rows: NDArray[np.int64]) -> Tensor:
    """Return the statistics [N, D] that the network computes for the alerts `rows` [N], as it does when it serves."""
    network, parts = new_network(), []
    for chunk in np.array_split(rows, max(1, len(rows) // AT_ONCE)):
        points, mask = prepare_light_curves(*transients.alerts(chunk), LIGHT_CURVE)
        parts.append(network.statistics(torch.from_numpy(points), torch.from_numpy(mask)))
    return torch.cat(parts)


def fit(seen: Tensor, transients: Transients, rows: NDArray[np.int64], seed: int) -> CurveClasses:
    """Return a network that is fitted to the statistics `seen` [N, D] of the alerts `rows` [N].

    Every object of a class counts once, however many alerts it has.
    """
    torch.manual_seed(seed)
    network = new_network()
    network.standardise.fit(seen)
    unit = network.standardise(seen)
    first, activation, last = network.head
    learner = nn.Sequential(nn.Dropout(INPUT_DROPOUT), first, activation, nn.Dropout(DROPOUT), last)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    owner = transients.owner[rows]
    label = transients.label[owner]
    objects = frequencies(transients.label[np.unique(owner)])
    chance = objects[label] ** -RARITY / np.bincount(owner)[owner]
    draws = np.random.default_rng(seed).choice(len(rows), (STEPS, BATCH), p=chance / chance.sum())
    truth = torch.from_numpy(label)
    for step, drawn in enumerate(torch.from_numpy(draws)):
        loss = cross_entropy(learner(unit[drawn]), truth[drawn])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / STEPS, WARM_UP)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@torch.inference_mode()
def logits_of(network: CurveClasses, seen: Tensor) -> NDArray[np.float64]:
    """Return the logits float64[N, C] of alerts with the statistics `seen` [N, D]."""
    logits: NDArray[np.float64] = network.head(network.standardise(seen)).double().numpy()
    return logits


def cross_validate(
    seen: Tensor, transients: Transients, rows: NDArray[np.int64], unseen: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return logits float64[N, C] of the alerts `rows` of training objects, NaN for those of `unseen` objects [O].

    Each alert is scored by a network that was trained without the alert's fold of objects.
    """
    fold = np.random.default_rng(SEED).permutation(len(unseen)) % FOLDS
    fold[unseen] = FOLDS
    scores = np.full((len(rows), len(CLASSES)), np.nan)
    for one in range(FOLDS):
        inside = fold[transients.owner[rows]]
        train, asked = (inside != one) & (inside != FOLDS), inside == one
        network = fit(seen[torch.from_numpy(train)], transients, rows[train], one)
        scores[asked] = logits_of(network, seen[torch.from_numpy(asked)])
    return scores


def forest_scores(transients: Transients, unseen: NDArray[np.bool_]) -> dict[int, NDArray[np.float64]]:
    """Return the probabilities [N, C] of a random forest for the held-out alerts of `at_detections`, by n."""
    from sklearn.ensemble import RandomForestClassifier

    rows = at_detections(transients)
    features = {n: np.nan_to_num(light_curve_features(transients.alerts(of)[0]), nan=-1.0) for n, of in rows.items()}
    hidden = {n: unseen[transients.owner[of]] for n, of in rows.items()}
    forest = RandomForestClassifier(TREES, min_samples_leaf=LEAST_LEAF, random_state=SEED)
    forest.fit(
        np.concatenate([features[n][~hidden[n]] for n in DETECTIONS]),
        np.concatenate([transients.label[transients.owner[rows[n][~hidden[n]]]] for n in DETECTIONS]),
    )
    return {n: forest.predict_proba(features[n][hidden[n]]) for n in DETECTIONS}


def evaluate(
    transients: Transients,
    rows: NDArray[np.int64],
    scores: NDArray[np.float64],
    objects: NDArray[np.bool_],
    forest: Mapping[int, NDArray[np.float64]] | None,
    share: NDArray[np.float64],
) -> dict[str, float | int | str]:
    """Return the card's figures of `scores` [N, C] of alerts `rows` [N], for the chosen `objects` bool[O].

    `forest`: the probabilities of the forest for the same alerts, by number of detections. `share` [C]: the class
    frequencies of the training objects.
    """
    card: dict[str, float | int | str] = {
        f"objects_{name}": int((transients.label[objects] == c).sum()) for c, name in enumerate(CLASSES)
    }
    for n, of in at_detections(transients).items():
        of = of[objects[transients.owner[of]]]
        owner = transients.owner[of]
        label, names = transients.label[owner], transients.object_id[owner]
        probabilities = torch.from_numpy(scores[np.searchsorted(rows, of)]).softmax(1).numpy()
        ours = _predictions(probabilities, names, label)
        other = None if forest is None else _predictions(forest[n], names, label)
        calibration = {
            name: figure
            for name, figure in calibration_for_card(ours).items()
            if "." not in name or name.startswith(RELIABILITY)
        }
        card |= prefixed(
            f"at_{n}_",
            {
                "objects": len(label),
                **_ranked(ours, other),
                "log_loss": round(float(-np.log(probabilities[np.arange(len(label)), label]).mean()), 4),
                "log_loss_of_frequencies": round(float(-np.log(share[label]).mean()), 4),
                **calibration,
            },
        )
    return card


def _ranked(ours: Predictions, forest: Predictions | None) -> dict[str, float | int | str]:
    """Return ROC AUCs of the network and of the forest, and their difference, with intervals over objects."""

    def select(of: dict[str, Values]) -> dict[str, Values]:
        return {
            "macro_roc_auc": of["roc_auc"],
            **{f"roc_auc_{name}": of[f"{name}.roc_auc"] for name in CLASSES},
            "balanced_accuracy": of["balanced_accuracy"],
        }

    def values(weight: Weights) -> dict[str, Values]:
        own = select(measure(ours, weight))
        if forest is None:
            return own
        theirs = measure(forest, weight)["roc_auc"]
        return own | {"forest_macro_roc_auc": theirs, "ahead_of_forest": own["macro_roc_auc"] - theirs}

    return as_card(estimate(values, ours.object_id, lambda weight: select(trials(ours, weight))))


def _predictions(probabilities: NDArray[np.float64], names: NDArray[np.str_], label: NDArray[np.int64]) -> Predictions:
    n = len(label)
    as_served = probabilities.astype(np.float32)
    return Predictions(tuple(CLASSES), np.arange(n), names, np.full(n, np.nan), label, as_served, threshold=0.5)


def prefixed(prefix: str, figures: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """Return the figures with the prefix before each name."""
    return {f"{prefix}{name}": figure for name, figure in figures.items()}


def describe(
    transients: Transients,
    unseen: NDArray[np.bool_],
    calibration: Calibration,
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the bundle's description for the card."""
    share = frequencies(transients.label[~unseen])
    common = ", ".join(f"{name} {of:.1%}" for name, of in zip(CLASSES, share, strict=True))
    types = "; ".join(f"{name}: {', '.join(of)}" for name, of in CLASSES.items())
    return Description(
        name="curves",
        version=VERSION,
        task="type of a supernova from its light curve: Ia, II, Ib/c, superluminous",
        surveys=("ztf",),
        inputs=Inputs(images=IMAGES, light_curve=LIGHT_CURVE),
        outputs=Outputs(labels=tuple(CLASSES), activation="softmax"),
        architecture=architecture(),
        licence="BSD-3-Clause",
        source="training/bundles/train_curves.py of broker-filter",
        citation="Bright Transient Survey: Fremling et al. 2020 (arXiv:1910.12973), Perley et al. 2020 "
        "(arXiv:2009.01242)",
        training=Training(
            method=f"A perceptron with {HIDDEN} hidden units on statistics of the detections in the packet, in g, in r "
            "and in both: number, brightness, slope, curvature, scatter, peak, times, colours. Upper limits, forced "
            "photometry and images are not used. Every object counts once; rare classes are drawn more often, which is "
            f"undone afterwards. A scale of {calibration.scale:.3f} and a shift of each logit calibrate the "
            f"probabilities; they were fitted to cross-validated logits of the training objects ({FOLDS} folds).",
            data=f"{(~unseen).sum()} typed transients of ZTF's Bright Transient Survey (to 2021), each at up to "
            f"{ALERTS_OF_OBJECT} of its alerts. An alert has the detections of the {HISTORY_DAYS:.0f} days before it. "
            f"Types: {types}. The probabilities hold for an alert that is a supernova of one of these types, and for "
            f"the class frequencies of this survey of bright transients: {common}. "
            "For any other alert (variable star, asteroid, active galaxy, artefact) they mean nothing: use them with "
            "the bundle `classes`. The training data have no negative differences.",
            evaluation=evaluation,
        ),
    )
