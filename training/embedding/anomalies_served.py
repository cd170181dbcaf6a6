"""`anomalies-served`: measures how well classes of real LSST alerts are found with a bundle as it is served.

Each class in turn is left out of the ordinary alerts that form the reference; nothing is trained. Every alert of
LSSTCam is judged by the reference of a fold that shares no visit and no object with it, or, in a second split, no
object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.networks.snrnet import METADATA
from broker_filter.scoring.scorer import LoadedPart
from training.atomic_write import write_whole
from training.bundles.rubin_evaluation import SPLIT_SEED, unrelated
from training.data.datasets import connected, held_out
from training.embedding.anomalies_lsst import CALIBRATION, RELIABLE, SERVED, by_embedding_of_view
from training.embedding.baselines import by_isolation_forest
from training.embedding.lsst_alerts import CLASSES, OF_EVALUATION, LsstAlerts, load_lsst_alerts
from training.embedding.train_embedder import fold_of, side_by_side
from training.embedding.train_embedder_lsst import (
    HISTORY,
    at_first_detection,
    by_compared,
    features_of,
    open_compared,
)
from training.evaluation.anomaly_measures import cell
from training.evaluation.bootstrap import Estimate, resample
from training.evaluation.metrics import Values, Weights, rank, ratio

TABLE, FIGURES = "anomalies_served.md", "anomalies_served.json"
HIDDEN = f"without {', '.join(f'`{name}`' for name in HISTORY)}"
METHODS = {
    f"served/{SERVED}": "`mahalanobis`",
    "served/neighbours, whole and modalities": "`neighbours`",
    f"hidden/{SERVED}": f"`mahalanobis` {HIDDEN}",
    "forest": "isolation forest of features",
}
"""The methods and their titles."""
DETECTIONS = {"1 detection": (1, 1), "4 detections or more": (4, np.inf)}
"""Ranges of the number of light-curve points of both the class and the ordinary alerts."""
LEAST = 10
"""Fewest objects, on each side of a comparison, for a figure."""
RATE = 0.05
INTRODUCTION = """\
Written by `python -m training anomalies-served` with {bundle}, from {alerts} alerts of LSSTCam with a reliability above
{reliable}: {asteroids} of known asteroids, {variables} variable (active nuclei and variable stars) and {others} others.
Each class in turn is left out of the reference and must then be found. The bundle is used as it is served. A cell gives
the ROC AUC for separating the class from the other alerts, with its 95 % interval. *First detection*: each judged alert
is cut to its own detection, as if its object had never been seen before; the reference keeps its histories. A
comparison by number of detections takes alerts of that number on both sides.
"""
SPLIT = """\
### {split}

No reference shares {apart} with the alerts that it judges. Intervals: from resampling {unit}.
"""


@dataclass(frozen=True, slots=True)
class Found:
    """The scores of N alerts by method, with one class left out of the references."""

    class_: int
    view: str
    scores: Mapping[str, NDArray[np.float64]]  # [N] by method
    references: float
    """Mean number of ordinary alerts in a fold's reference; the alerts that calibrate it are not counted."""
    above: NDArray[np.bool_]
    """[N] whether the score SERVED is above the threshold that RATE of the calibrating alerts exceed."""


@dataclass(frozen=True, slots=True)
class Split:
    """A split of N alerts into folds, and its description in the text."""

    name: str
    fold: NDArray[np.int64]  # [N]
    group: NDArray[np.str_]  # [N] alerts of a group are resampled together
    apart: str
    unit: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `anomalies-served`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="LSST alerts: files, folders, archives")
    parser.add_argument("--schemas", help="schema registry, or directory of schemas, of alerts in wire format")
    parser.add_argument("--labels", type=Path, required=True, help="Parquet file with diaSourceId and weak_class")
    parser.add_argument("--model", default="embedder", help="bundle with an embedding (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"directory for {TABLE} and {FIGURES}")


def run(arguments: argparse.Namespace) -> None:
    """Judge all alerts, write the results and print the page."""
    part = open_compared(arguments.model)
    alerts = load(arguments, part)
    alerts = alerts[alerts.of_lsstcam & (alerts.reliability > RELIABLE)]
    card = part.bundle.card
    counts = {name: (alerts.label == c).sum() for c, name in enumerate(CLASSES)}
    introduction = INTRODUCTION.format(
        bundle=f"{card.name} {card.version}",
        alerts=len(alerts),
        reliable=RELIABLE,
        asteroids=counts["asteroid"],
        variables=counts["variable"],
        others=len(alerts) - sum(counts.values()),
    )
    pages, figures = [introduction], {}
    for split in splits(alerts):
        found = [one for class_ in range(len(CLASSES)) for one in leave_out(alerts, part, class_, split.fold)]
        estimates = judge(alerts, found, split.group)
        heading = SPLIT.format(split=split.name, apart=split.apart, unit=split.unit)
        pages.append(f"{heading}\n{as_markdown(found, estimates)}")
        figures[split.name] = {name: one.model_dump() for name, one in estimates.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(pages)
    write_whole(arguments.out / TABLE, text.encode())
    write_whole(arguments.out / FIGURES, json.dumps(figures, indent=1).encode())
    print(text)


def load(arguments: argparse.Namespace, part: LoadedPart) -> LsstAlerts:
    """Return the LSST alerts that the arguments name. Raises DatasetError if there is none of LSSTCam."""
    names = {column.name for column in part.inputs.metadata}
    columns = (*METADATA, *sorted(names - {*METADATA, *OF_EVALUATION}))
    return load_lsst_alerts(arguments.inputs, arguments.schemas, arguments.labels, part.inputs, columns)


def splits(alerts: LsstAlerts) -> list[Split]:
    """Return the splits of the alerts into folds: by object, and by visit and object."""
    objects = alerts.named.object_id
    groups = connected(objects, alerts.visit).astype(np.str_)
    of_visits = unrelated(alerts.visit, objects, SPLIT_SEED)
    return [
        Split("Objects apart", fold_of(objects), objects, "an object", "objects"),
        Split("Visits apart", of_visits, groups, "a visit or an object", "groups of visits that share objects"),
    ]


def embedded(part: LoadedPart, alerts: RawAlerts) -> NDArray[np.float32]:
    """Return the embedding float32[N, D] of alerts, as served."""
    return side_by_side(torch.from_numpy(part.run(alerts)["modalities"]))


def leave_out(alerts: LsstAlerts, part: LoadedPart, class_: int, fold: NDArray[np.int64]) -> list[Found]:
    """Return the scores of the alerts by references without a class: as they came, and as first detections.

    The reference of an alert holds alerts of all other folds.
    """
    raw, label, objects = alerts.named.raw, alerts.label, alerts.named.object_id
    embedders = {"served": partial(embedded, part), "hidden": partial(by_compared, part)}
    usual = {name: embedder(raw) for name, embedder in embedders.items()}
    features = features_of(raw)
    results = []
    for view, judged in (("as they came", raw), ("first detection", at_first_detection(raw))):
        vectors = {name: embedder(judged) for name, embedder in embedders.items()}
        judged_features = features_of(judged)
        scores = {name: np.full(len(alerts), np.nan) for name in METHODS}
        above, sizes = np.zeros(len(alerts), np.bool_), []
        for one in np.unique(fold).tolist():
            ordinary, inside = (fold != one) & (label != class_), fold == one
            calibration = np.zeros(len(alerts), np.bool_)
            calibration[ordinary] = held_out(objects[ordinary], CALIBRATION, SPLIT_SEED)
            reference = ordinary & ~calibration
            sizes.append(reference.sum())
            for name in embedders:
                by_measure = by_embedding_of_view(usual[name], vectors[name], reference, calibration)
                for measure, values in by_measure.items():
                    if (method := f"{name}/{measure}") in METHODS:
                        scores[method][inside] = values[inside]
            of_usual = by_embedding_of_view(usual["served"], usual["served"], reference, calibration)[SERVED]
            threshold = np.quantile(of_usual[calibration], 1 - RATE)
            above[inside] = scores[f"served/{SERVED}"][inside] > threshold
            scores["forest"][inside] = by_isolation_forest(features[ordinary], judged_features)[inside]
        results.append(Found(class_, view, scores, float(np.mean(sizes)), above))
    return results


def comparisons(alerts: LsstAlerts, found: Found) -> dict[str, NDArray[np.bool_]]:
    """Return which alerts are compared, bool[N], by the name of the comparison: the class and some of the others.

    A comparison with fewer than LEAST objects on one side is left out.
    """
    curves = alerts.named.raw.light_curves
    assert curves is not None
    points, label = np.diff(curves.offsets), alerts.label
    everything = np.ones(len(alerts), np.bool_)
    asked = {"all others": everything}
    asked |= {
        f"{name} alone": (label == c) | (label == found.class_) for c, name in enumerate(CLASSES) if c != found.class_
    }
    if found.view == "as they came":
        asked |= {name: (points >= low) & (points <= high) for name, (low, high) in DETECTIONS.items()}
    objects = alerts.named.object_id

    def enough(rows: NDArray[np.bool_]) -> bool:
        sides = (rows & (label == found.class_), rows & (label != found.class_))
        return min(len(np.unique(objects[side])) for side in sides) >= LEAST

    return {name: rows for name, rows in asked.items() if enough(rows)}


def judge(alerts: LsstAlerts, found: list[Found], group: NDArray[np.str_]) -> dict[str, Estimate]:
    """Return the ROC AUC of each method in each comparison, and shares above the threshold, by name."""

    def measure(weight: Weights) -> dict[str, Values]:
        values: dict[str, Values] = {}
        for one in found:
            anomalous = alerts.label == one.class_
            for comparison, rows in comparisons(alerts, one).items():
                for method, scores in one.scores.items():
                    ranked = rank(anomalous[rows], scores[rows], weight[..., rows])
                    values[name_of(one, comparison, method)] = ranked.roc_auc
            for what, rows in (("flagged", ~anomalous), ("recall", anomalous)):
                values[name_of(one, what, "")] = ratio(weight @ (one.above & rows), weight @ rows)
        return values

    whole, resampled = measure(np.ones(len(alerts))), resample(measure, group)
    return {name: Estimate.of(value, resampled[name]) for name, value in whole.items()}


def name_of(found: Found, comparison: str, method: str) -> str:
    """Return the name of a figure."""
    return f"{CLASSES[found.class_]}/{found.view}/{comparison}/{method}"


def as_markdown(found: list[Found], estimates: Mapping[str, Estimate]) -> str:
    """Return the figures as tables: the ROC AUC by method, and the shares of alerts above the threshold."""
    columns = ["left out", "judged", "compared with", *METHODS.values()]
    lines = [f"| {' | '.join(columns)} |", "|".join(["", *["---"] * len(columns), ""])]
    for one in found:
        prefix = f"{CLASSES[one.class_]}/{one.view}/"
        names = dict.fromkeys(name.removeprefix(prefix).partition("/")[0] for name in estimates if prefix in name)
        for comparison in (name for name in names if name not in ("flagged", "recall")):
            cells = [cell(estimates[name_of(one, comparison, method)]) for method in METHODS]
            lines.append(f"| {' | '.join([CLASSES[one.class_], one.view, comparison, *cells])} |")
    above = f"Share of alerts above the threshold that {RATE:.0%} of the calibrating alerts exceed (`mahalanobis`):"
    columns = ["left out", "judged", "alerts in the reference", "ordinary alerts", "the class"]
    lines += ["", above, "", f"| {' | '.join(columns)} |", "|".join(["", *["---"] * len(columns), ""])]
    for one in found:
        shares = [cell(estimates[name_of(one, what, "")]) for what in ("flagged", "recall")]
        lines.append(f"| {' | '.join([CLASSES[one.class_], one.view, f'{one.references:.0f}', *shares])} |")
    return "\n".join(lines) + "\n"
