"""Trains the shipped bundle `classes`: classes of alerts, computed in the same pass as the real/bogus score.

    python -m training train-classes ztf_alerts.tar --labels labels.parquet --real default --out classes

The classifier is a small perceptron on weak labels. Its inputs are the maps and the logit of the bundle `default`,
whose network stays unchanged, and a few metadata columns. It never uses a column from which a label was derived. It is
also trained on each alert as it would have come at the first, second and third detection, and on simulated supernovae
and active galaxies. The card lists the columns, and the figures measured on held-out objects by number of detections.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from broker_filter.scoring.labels import UNLABELLED, Labels, parse_rule, read_labels
from broker_filter.scoring.networks import build_network, load_network
from broker_filter.scoring.networks.alert_embedder import Standardise
from broker_filter.scoring.networks.stampnet_classes import StampNetClasses
from broker_filter.scoring.preprocess import prepare_images, prepare_metadata
from training.bundles.distil import schedule
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION, data_sha256
from training.data.datasets import Alerts, decode_alerts, held_out, load_alerts
from training.data.record_distribution import record_archives
from training.data.simulated import SimulatedNight
from training.errors import DatasetError, refuse_existing
from training.evaluation.bootstrap import INTERVALS, as_card, estimate, weights_by_object
from training.evaluation.evaluate import RELIABILITY, calibration_for_card
from training.evaluation.metrics import Values, Weights, measure, trials
from training.evaluation.predictions import Predictions
from training.evaluation.scaling import fit_calibration
from training.learner import SYMMETRIES

VERSION = "3.0"
COLUMN = "weak_class"
CLASSES = ("VS=VS", "asteroid=asteroid", "bogus=bogus,likely_bogus", "SN=SN", "AGN=AGN")
"""Class rules (`scoring.labels`). The five classes are those of ALeRCE's stamp classifier (Carrasco-Davis et al. 2021,
arXiv:2008.03309); no other class has enough labelled objects. Supernova candidates (SN_cand) are left out: many lie on
stars."""
METADATA = ("magpsf", "sigmapsf", "isdiffpos", "ndethist", "distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""Columns on brightness, number of detections and neighbouring sources. Excluded are columns from which labels were
derived (ssdistnr, drb, positions), and columns that reveal when or by whom a packet was collected rather than what it
shows (dates, fields, columns that older schemas lack)."""
DETECTIONS = "ndethist"
"""The column with the number of detections, the only one on the history of an alert."""
FEWEST = (1, 2, 3)
"""Numbers of detections to which the histories of copies are cut, and by which the figures are given."""
DISTANCES = ("distnr", "distpsnr1")
STAR = "sgscore1"
NO_SOURCE_ARCSEC = 30.0
"""The distance that replaces a missing one: the radius within which ZTF's packets list catalogued sources."""
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
"""Probability that a copy lacks a group of columns, for half of the copies."""
HOST = ("distnr", "magnr", "distpsnr1", "sgscore1", "nmtchps")
"""Columns on sources near an alert; they are missing for a supernova whose galaxy is too faint for the catalogues."""
NO_SOURCE = ("distpsnr1", "nmtchps")
"""Columns by which a packet says that Pan-STARRS has no source nearby: the first one is missing, and the second one is
mostly 0."""
SIMULATED = 1100
SIMULATION_SEED = 77
SIMULATED_KINDS = {"supernova": "SN", "agn": "AGN"}
"""Simulated kinds of alerts and their classes: the two with few real objects."""
SIMULATED_RATES = {"supernova": 5.0, "agn": 2.0}
SIMULATED_SHARE = 0.5
"""Weight of the simulated alerts in a class that has them."""
MEMBERS = 5
"""Number of perceptrons with different seeds whose mean logits are the classes, as one wider perceptron."""
HIDDEN = 32
"""Width of the hidden layer of a member."""
INPUT_DROPOUT, DROPOUT = 0.25, 0.5
STEPS = 400
BATCH = 128
LEARNING_RATE = 3e-3
WARM_UP = 0.3
WEIGHT_DECAY = 0.1
"""Width, dropout, steps, rates and decay were chosen by cross-validation."""
FOLDS = 5
"""Number of folds of the cross-validations: that over the training objects, to which the calibration is fitted, and
that over all objects, because the test split holds few supernovae and active galaxies."""
ASTEROIDS_KEPT = 0.90
"""Share of the asteroids at the first detection that must stay the most probable class; within it, supernovae are
favoured as much as possible."""
AT_ONCE = 64
"""Number of alerts that the real/bogus network takes at a time."""
SMALLEST = 1e-12
"""Smallest divisor, for a class without simulated alerts."""
FIGURES = (
    "without prefix: alerts as published; at_1_, at_2_, at_3_: the same alerts with ndethist cut to this number of "
    "detections. recall: share of a class whose most probable class is correct; recall_by_object: the same with equal "
    "weight for each object. calibration_slope, calibration_intercept and ece are measured after the probabilities are "
    "converted to the class frequencies of these alerts; ece_if_calibrated is the expected ECE of a perfectly "
    "calibrated model for as many alerts; reliability_: the mean predicted probability of the most probable class, and "
    "how often it is right."
)
"""The description of the figures in the card."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Examples:
    """N labelled alerts as the network sees them."""

    copies: Tensor  # [COPIES, N, D] evidence of augmented copies, for training
    seen: Tensor  # [V, N, D] evidence of the alerts as published, and with the history cut to each of FEWEST
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N]
    simulated: NDArray[np.bool_]  # [N]

    def __getitem__(self, rows: NDArray[np.bool_]) -> Examples:
        chosen = torch.from_numpy(rows)
        return Examples(
            self.copies[:, chosen], self.seen[:, chosen], self.object_id[rows], self.label[rows], self.simulated[rows]
        )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted classifier: class scores are the mean of the members' outputs."""

    standardise: Standardise
    members: list[nn.Sequential]


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A map of class scores [..., C] to `scale * scores + prior`."""

    scale: float
    prior: NDArray[np.float64]  # [C] logarithm of the assumed frequencies of the classes, up to a constant

    def __call__(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the adjusted scores [..., C]."""
        return self.scale * scores + self.prior


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train-classes`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the columns candid and {COLUMN}")
    parser.add_argument(
        "--real", default="default", help="real/bogus bundle with the network StampNet (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the new bundle")


def run(arguments: argparse.Namespace) -> None:
    """Fit, evaluate and write the bundle.

    Raises TrainingError or DatasetError before fitting if the input cannot be used.
    """
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
    simulated, simulated_label = simulate(images.size, labels)

    inputs = Inputs(images=images, metadata=_columns(alerts[~unseen]))
    architecture = architecture_of(inputs, labels)
    network = build_network(architecture).eval()
    assert isinstance(network, StampNetClasses)
    stampnet = load_network(Architecture(name="stampnet"), load_file(real.directory / WEIGHTS))
    network.trunk.network.load_state_dict(stampnet.state_dict())
    found, made = see(network, inputs, alerts), see(network, inputs, simulated)
    everything = Examples(
        torch.cat([found[0], made[0]], dim=1),
        torch.cat([found[1], made[1]], dim=1),
        np.concatenate([alerts.object_id, [f"simulated {name}" for name in simulated.object_id.tolist()]]),
        np.concatenate([label, simulated_label]),
        np.arange(len(alerts) + len(simulated)) >= len(alerts),
    )
    train = everything[np.concatenate([~unseen, np.ones(len(simulated), bool)])]
    log.info("%d training alerts, %d of them simulated", len(train.label), train.simulated.sum())

    fitted = fit(train)
    adjustment = adjust(cross_validate(train), train.label[~train.simulated])
    network.standardise, network.classes = fitted.standardise, merge(fitted.members, adjustment)
    hostless = alerts.metadata.copy()
    hostless[:, [METADATA.index(name) for name in HOST]] = np.nan
    without_host = score(fitted, evidence_of(network, inputs, alerts, hostless)[torch.from_numpy(unseen)])
    test = everything[np.concatenate([unseen, np.zeros(len(simulated), bool)])]
    adjusted, prior = adjust_crosswise(cross_validate(everything), alerts.object_id, label)
    evaluation: dict[str, float | int | str] = {
        "truth": f"{COLUMN}: weak labels",
        "split": f"{TEST_FRACTION:.0%} of the objects, seed {SPLIT_SEED}, held out from training",
        "intervals": INTERVALS,
        "figures": FIGURES,
        **evaluate(adjustment(score(fitted, test.seen)), adjustment.prior, labels.classes, test.object_id, test.label),
        "without_host": f"the same alerts with the columns {', '.join(HOST)} removed",
        **_prefixed("without_host_", figures(adjustment(without_host), labels.classes, test.object_id, test.label)),
        "cross_validation": f"{FOLDS} folds of all objects; the real/bogus network was trained on most of them",
        **_prefixed("cross_validation_", evaluate(adjusted, prior, labels.classes, alerts.object_id, label)),
        "dataset_sha256": data_sha256(alerts[~unseen]),
    }
    log.info("on held-out objects: %s", evaluation)
    description = describe(real, inputs, architecture, labels, adjustment, alerts[~unseen], evaluation)
    write_bundle(arguments.out, description, network)
    record_archives(arguments.out, arguments.inputs)


def simulate(size: int, labels: Labels) -> tuple[Alerts, NDArray[np.int64]]:
    """Return simulated alerts of the classes of SIMULATED_KINDS, and their class indices int64[N].

    The alerts have cutouts of `size` px.
    """
    night = SimulatedNight(SIMULATED, SIMULATION_SEED, "ztf", SIMULATED_RATES)
    alerts = decode_alerts(iter(night), "the simulation", size, METADATA)
    kinds = night.kinds(alerts.alert_id).tolist()
    return alerts, np.array([labels.classes.index(SIMULATED_KINDS[kind]) for kind in kinds])


def classes_of(alerts: Alerts, labels: Labels) -> NDArray[np.int64]:
    """Return the class index of each alert, int64[N]; UNLABELLED for an alert without a label.

    Raises DatasetError if no alert has a label.
    """
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


def see(network: StampNetClasses, inputs: Inputs, alerts: Alerts) -> tuple[Tensor, Tensor]:
    """Return the evidence of augmented copies [COPIES, N, D], and of alerts with whole and cut histories [V, N, D].

    There is one copy for each symmetry of the images. The copies have a whole history, or one that is cut to a number
    of detections of FEWEST; half of them lack columns.
    """
    histories = [alerts.metadata, *(cut_history(alerts.metadata, n) for n in FEWEST)]
    seen = torch.stack([evidence_of(network, inputs, alerts, history) for history in histories])
    rng = np.random.default_rng(SPLIT_SEED)
    copies = []
    for k in range(SYMMETRIES):
        history = histories[k % len(histories)]
        metadata = lose_columns(history, rng) if k >= SYMMETRIES // 2 else history
        copies.append(evidence_of(network, inputs, alerts, metadata, symmetry=k))
    return torch.stack(copies), seen


def evidence_of(
    network: StampNetClasses, inputs: Inputs, alerts: Alerts, metadata: NDArray[np.float64], symmetry: int = 0
) -> Tensor:
    """Return the evidence [N, D] that the network collects on alerts.

    `metadata` [N, F] replaces the metadata of the alerts. `symmetry`: index into SYMMETRIES of the rotation or
    reflection of the images.
    """
    images = torch.from_numpy(prepare_images(alerts.cutouts, alerts.cutout_box, inputs.images))
    turned = torch.rot90(images, symmetry % 4, (-2, -1))
    oriented = turned.flip(-1) if symmetry >= SYMMETRIES // 2 else turned
    columns = torch.from_numpy(prepare_metadata(metadata, METADATA, inputs.metadata))
    with torch.inference_mode():
        chunks = zip(torch.split(oriented, AT_ONCE), torch.split(columns, AT_ONCE), strict=True)
        parts = []
        for image, column in chunks:
            logit, features = network.trunk(image)
            parts.append(network.evidence(logit, features, column))
    return torch.cat(parts)


def cut_history(metadata: NDArray[np.float64], detections: int) -> NDArray[np.float64]:
    """Return METADATA [N, F] as they would have been at the given number of detections; NaN stays NaN."""
    cut = metadata.copy()
    column = METADATA.index(DETECTIONS)
    cut[:, column] = np.minimum(cut[:, column], detections)
    return cut


def lose_columns(metadata: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return METADATA [N, F] with some groups of columns set to NaN."""
    distance, sources = (METADATA.index(name) for name in NO_SOURCE)
    copy = metadata.copy()
    for group in LOST_TOGETHER:
        lost = rng.random(len(metadata)) < LOSS
        for name in group:
            copy[lost, METADATA.index(name)] = np.nan
    copy[np.isnan(copy[:, distance]) & ~np.isnan(copy[:, sources]), sources] = 0
    return copy


def weights_of(examples: Examples) -> NDArray[np.float64]:
    """Return the weight of each alert, float64[N], with sum 1.

    All classes have the same total weight, and so have all objects of a class, however many alerts they have. If a
    class has both real and simulated alerts, the simulated ones have SIMULATED_SHARE of its weight.
    """
    weight = weights_by_object(examples.object_id)
    for c in np.unique(examples.label):
        sides = [(examples.label == c) & side for side in (~examples.simulated, examples.simulated)]
        shares = (1 - SIMULATED_SHARE, SIMULATED_SHARE) if all(side.any() for side in sides) else (1.0, 1.0)
        for side, share in zip(sides, shares, strict=True):
            weight[side] *= share / max(weight[side].sum(), SMALLEST)
    weight /= weight.sum()
    return weight


def fit(examples: Examples) -> Fitted:
    """Return a classifier that is fitted to the copies of the examples."""
    standardise = Standardise(examples.copies.shape[2])
    standardise.fit(examples.copies.flatten(0, 1))
    unit = standardise(examples.copies)
    members = [fit_member(unit, examples.label, weights_of(examples), seed) for seed in range(MEMBERS)]
    return Fitted(standardise, members)


def fit_member(unit: Tensor, label: NDArray[np.int64], weight: NDArray[np.float64], seed: int) -> nn.Sequential:
    """Fit one perceptron to standardised copies `unit` [copies, N, D] of alerts.

    The alerts are drawn in proportion to `weight` [N].
    """
    torch.manual_seed(seed)
    member = nn.Sequential(
        nn.Dropout(INPUT_DROPOUT),
        nn.Linear(unit.shape[2], HIDDEN),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, len(CLASSES)),
    )
    optimizer = torch.optim.AdamW(member.parameters(), weight_decay=WEIGHT_DECAY)
    truth, chance = torch.from_numpy(label), torch.from_numpy(weight)
    for step in range(STEPS):
        rows = torch.multinomial(chance, BATCH, replacement=True)
        copy = torch.randint(len(unit), (BATCH,))
        loss = cross_entropy(member(unit[copy, rows]), truth[rows])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / STEPS, WARM_UP)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return member.eval()


def score(fitted: Fitted, evidence: Tensor) -> NDArray[np.float64]:
    """Return the mean class scores of the members, float64[..., C], for evidence [..., D]."""
    with torch.inference_mode():
        unit = fitted.standardise(evidence)
        scores = torch.stack([member(unit) for member in fitted.members])
    mean: NDArray[np.float64] = scores.double().mean(0).numpy()
    return mean


def merge(members: Sequence[nn.Sequential], adjustment: Adjustment) -> nn.Sequential:
    """Return one perceptron whose output is the adjusted mean of the members' outputs."""
    linear = [[layer for layer in member if isinstance(layer, nn.Linear)] for member in members]
    hidden, outputs = zip(*linear, strict=True)
    first = nn.Linear(hidden[0].in_features, HIDDEN * len(members))
    last = nn.Linear(first.out_features, outputs[0].out_features)
    with torch.no_grad():
        first.weight.copy_(torch.cat([layer.weight for layer in hidden]))
        first.bias.copy_(torch.cat([layer.bias for layer in hidden]))
        last.weight.copy_(adjustment.scale * torch.cat([layer.weight for layer in outputs], dim=1) / len(members))
        mean = torch.stack([layer.bias for layer in outputs]).mean(0)
        last.bias.copy_(adjustment.scale * mean + torch.from_numpy(adjustment.prior))
    return nn.Sequential(first, nn.ReLU(), last).eval()


def cross_validate(examples: Examples) -> NDArray[np.float64]:
    """Return class scores of the real alerts, float64[V, N, C], by cross-validation.

    Each alert is scored by a classifier that was fitted without the alert's fold of objects.
    """
    real = ~examples.simulated
    fold = np.where(real, 0, UNLABELLED)
    fold[real] = folds_of(examples.object_id[real])
    scores = np.empty((*examples.seen.shape[:2], len(CLASSES)))
    for left_out in range(FOLDS):
        rows = fold == left_out
        scores[:, rows] = score(fit(examples[~rows]), examples.seen[:, torch.from_numpy(rows)])
    return scores[:, real]


def folds_of(object_id: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return the fold of each alert, int64[N]; alerts of an object share a fold."""
    objects, index = np.unique(object_id, return_inverse=True)
    fold: NDArray[np.int64] = (np.random.default_rng(SPLIT_SEED).permutation(len(objects)) % FOLDS)[index]
    return fold


def adjust(scores: NDArray[np.float64], label: NDArray[np.int64]) -> Adjustment:
    """Return the adjustment of cross-validated scores [V, N, C] of alerts with classes `label` [N].

    The scale (temperature) calibrates the alerts as published and at the first detection together. It is fitted along
    with a shift for each class, at the class frequencies of the alerts; the shifts are not applied, because few objects
    determine those of SN and AGN. Then SN is favoured by the largest factor with which ASTEROIDS_KEPT of the asteroids
    stay asteroids at the first detection.
    """
    published, first = scores[:2]
    share = np.log(np.bincount(label, minlength=len(CLASSES)) / len(label))
    scale = fit_calibration(np.concatenate([published, first]), np.tile(label, 2), share).scale
    names = [rule.partition("=")[0] for rule in CLASSES]
    asteroid, supernova = names.index("asteroid"), names.index("SN")
    asteroids = scale * first[label == asteroid]
    others = np.delete(asteroids, supernova, axis=1).max(axis=1)
    margin = np.where(asteroids[:, asteroid] == others, others - asteroids[:, supernova], -np.inf)
    lost = int((1 - ASTEROIDS_KEPT) * len(margin))
    favour = max(0.0, np.floor(np.sort(margin)[lost] * 100) / 100)
    return Adjustment(scale, np.where(np.arange(len(names)) == supernova, favour, 0.0))


def adjust_crosswise(
    scores: NDArray[np.float64], object_id: NDArray[np.str_], label: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return adjusted scores [V, N, C] and the prior of each alert, [N, C].

    The adjustment of a fold of objects is fitted to the other folds.
    """
    fold = folds_of(object_id)
    adjusted, prior = np.empty_like(scores), np.empty(scores.shape[1:])
    for one in range(FOLDS):
        adjustment = adjust(scores[:, fold != one], label[fold != one])
        adjusted[:, fold == one] = adjustment(scores[:, fold == one])
        prior[fold == one] = adjustment.prior
    return adjusted, prior


def evaluate(
    scores: NDArray[np.float64],
    prior: NDArray[np.float64],
    classes: Sequence[str],
    object_id: NDArray[np.str_],
    label: NDArray[np.int64],
) -> dict[str, float | int | str]:
    """Return the card's figures of `scores` [V, N, C], by number of detections, and the calibration.

    `prior` [C] or [N, C]: logarithms of the class frequencies that the scores assume. The probabilities are converted
    to the class frequencies of these alerts before their calibration is measured.
    """
    card: dict[str, float | int | str] = {
        "alerts": len(label),
        "objects": len(np.unique(object_id)),
        **{f"objects_{name}": len(np.unique(object_id[label == c])) for c, name in enumerate(classes)},
    }
    found = np.log(np.bincount(label, minlength=len(classes)) / len(label)) - prior
    for of, prefix in zip(scores, ("", *(f"at_{n}_" for n in FEWEST)), strict=True):
        card |= _prefixed(prefix, figures(of, classes, object_id, label))
        converted = calibration_for_card(_predictions(of + found, classes, object_id, label))
        chosen = {
            name.replace("SN.", "SN_"): figure
            for name, figure in converted.items()
            if "." not in name or name.startswith("SN.") or (name.startswith(RELIABILITY) and not prefix)
        }
        card |= _prefixed(prefix, chosen)
    return card


def figures(
    scores: NDArray[np.float64], classes: Sequence[str], object_id: NDArray[np.str_], label: NDArray[np.int64]
) -> dict[str, float | int | str]:
    """Return ROC AUCs and recalls of `scores` [N, C], by name, with bootstrap intervals over objects.

    Each class is compared with all other classes.
    """
    predictions = _predictions(scores, classes, object_id, label)
    each = weights_by_object(object_id)

    def select(of: dict[str, Values], by_object: dict[str, Values]) -> dict[str, Values]:
        return {
            "macro_roc_auc": of["roc_auc"],
            **{f"roc_auc_{name}": of[f"{name}.roc_auc"] for name in classes},
            "balanced_accuracy": of["balanced_accuracy"],
            **{f"recall_{name}": of[f"{name}.recall"] for name in classes},
            "recall_by_object_SN": by_object["SN.recall"],
        }

    def values(weight: Weights) -> dict[str, Values]:
        return select(measure(predictions, weight), measure(predictions, weight * each))

    def behind(weight: Weights) -> dict[str, Values]:
        of = trials(predictions, weight)
        return select(of, of)

    return as_card(estimate(values, object_id, behind))


def _predictions(
    scores: NDArray[np.float64], classes: Sequence[str], object_id: NDArray[np.str_], label: NDArray[np.int64]
) -> Predictions:
    """Return the softmax of class scores [N, C] as predictions."""
    n = len(label)
    probabilities = torch.from_numpy(scores).softmax(dim=1).numpy().astype(np.float32)
    return Predictions(tuple(classes), np.arange(n), object_id, np.full(n, np.nan), label, probabilities, threshold=0.5)


def _prefixed(prefix: str, figures: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    return {f"{prefix}{name}": figure for name, figure in figures.items()}


def describe(
    real: Part,
    inputs: Inputs,
    architecture: Architecture,
    labels: Labels,
    adjustment: Adjustment,
    train: Alerts,
    evaluation: dict[str, float | int | str],
) -> Description:
    """Return the bundle's description for the card."""
    card = real.card
    favour = float(np.exp(adjustment.prior.max()))
    return Description(
        name="classes",
        version=VERSION,
        task="real/bogus and classification: variable star, asteroid, bogus, supernova, active galactic nucleus",
        surveys=("ztf",),
        inputs=inputs,
        outputs=Outputs(labels=("real", *labels.classes), activation="sigmoid", thresholds=card.outputs.thresholds),
        architecture=architecture,
        licence="BSD-3-Clause",
        source="training/bundles/train_classes.py of broker-filter",
        citation=card.citation,
        training=Training(
            method=f"`real` is the unchanged output of the bundle {card.name} {card.version}. The classes are the mean "
            f"of {MEMBERS} perceptrons with {HIDDEN} hidden units, on the logit and maps of `real`, the metadata, and "
            "the proximity of catalogued sources. The training is balanced by class and object. Copies of each alert "
            "are trained on: all symmetries of the images, with the whole history and with ndethist cut to "
            f"{', '.join(map(str, FEWEST))}; half of them lack each group of columns with a probability of {LOSS:.0%}. "
            f"Half of the weight of SN and AGN is on {SIMULATED} simulated alerts. A scale of "
            f"{adjustment.scale:.3f} (temperature) calibrates the probabilities; it was fitted to cross-validated "
            "scores of the training objects. The network uses no column from which a label was "
            "derived (ssdistnr, drb, coordinates), and none that reveals when a packet was taken; ndethist is its only "
            "column on the history. Two labels are closely related to its inputs: bogus is defined by the teacher's "
            "score, and known asteroids have few detections. The recipe was chosen by cross-validation over all "
            "objects, the held-out ones included, and shifts of single classes were dropped after the held-out figures "
            "had been seen: the held-out figures are somewhat optimistic.",
            data=f"{len(train)} public ZTF alerts of {len(np.unique(train.object_id))} objects with weak labels: VS by "
            "a positional match with VSX, GCVS or SIMBAD, asteroid by the predicted position of a known asteroid, "
            "bogus by drb < 0.5, SN by TNS, AGN by SIMBAD. Candidates of supernovae are left out. The probabilities "
            f"assume that SN is {favour:.2f} times as common as each of the other classes, which are equally common. "
            f"This is the largest factor with which {ASTEROIDS_KEPT:.0%} of the asteroids stay asteroids at the first "
            "detection, in cross-validation over the training objects. The training data hold few supernovae and "
            "active galaxies, and no supernova with fewer than four detections: the figures at_1_, at_2_, at_3_ are "
            "of later alerts whose ndethist was cut, and whose brightness is that of the later alert.",
            evaluation=evaluation,
        ),
    )


def architecture_of(inputs: Inputs, labels: Labels) -> Architecture:
    """Return the network's architecture for the card."""
    return Architecture(
        name="stampnet_classes",
        arguments={
            "metadata": inputs.shapes()["metadata"][0],
            "classes": len(labels.classes),
            "hidden": MEMBERS * HIDDEN,
            "distances": tuple(METADATA.index(name) for name in DISTANCES),
            "star": METADATA.index(STAR),
        },
    )


def _columns(train: Alerts) -> tuple[MetadataColumn, ...]:
    """Return the metadata columns, each with a flag for missing values.

    A missing value is replaced by the column's median, or by NO_SOURCE_ARCSEC in a column of distances.
    """
    medians = np.nanmedian(train.metadata, axis=0)
    return tuple(
        MetadataColumn(name=name, fill=NO_SOURCE_ARCSEC if name in DISTANCES else float(median), flag=True)
        for name, median in zip(METADATA, medians, strict=True)
    )
