"""`suspects`: lists the alerts or stars whose labels are most likely wrong, for a person to inspect.

It changes no label. The method is that of AstroM3 for misclassified and odd stars (Rizhko & Bloom 2024,
arXiv:2411.08842): alerts are ranked by 1 minus the cosine similarity of their embedding to the centroid of their own
class; odd ones are far from the centroids of all classes. The embedding is the served one, which is trained without
labels, or that of a labelled set of embeddings, such as `astrom3-embed` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Embeddings
from broker_filter.anomalies.reference import ReferenceAlerts, read_reference
from broker_filter.anomalies.score import centroids
from broker_filter.cli.archived import score_archives
from broker_filter.cli.parser import UsageError, require_files
from broker_filter.config import Runtime
from broker_filter.console import printable
from broker_filter.scoring.labels import UNLABELLED, parse_rule, read_labels
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.build_reference import Sample, concatenate, ordinary_alerts
from training.arguments import add_labelled_alerts
from training.errors import DatasetError

SHOWN = 20
MOST = 1_000_000
"""Largest number of alerts that are compared, the size of a reference."""


@dataclass(frozen=True, slots=True)
class Suspects:
    """Labelled alerts in descending order of suspicion, and their distances from the centroids."""

    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    label: NDArray[np.int64]  # [N] index into the classes
    distance: NDArray[np.float64]  # [N] 1 - cosine to the centroid of its own class
    nearest: NDArray[np.int64]  # [N] index of the class with the nearest centroid
    nearest_distance: NDArray[np.float64]  # [N] 1 - cosine to that centroid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `suspects`."""
    add_labelled_alerts(parser, "a class, written as for build-dataset", inputs="*", labels_required=False)
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="set of embeddings with classes, from `astrom3-embed` or `broker-filter reference build --labels`: its "
        "alerts or stars take the place of INPUT and --labels",
    )
    parser.add_argument(
        "--odd",
        action="store_true",
        help="rank by the distance from the nearest centroid of any class: what is unlike every class comes first",
    )
    parser.add_argument(
        "--model",
        default="embedder",
        metavar="BUNDLE",
        help="bundle that computes the embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="write all labelled alerts or stars to this file, in their order"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the most suspect alerts or stars, and write all of them to a file if one is given.

    Raises UsageError if options contradict each other, DatasetError if none has a label, and the errors of reading the
    inputs.
    """
    if arguments.reference:
        if given := [option for option in ("inputs", "labels", "classes") if getattr(arguments, option)]:
            raise UsageError(f"--reference holds embeddings and labels: omit {', '.join(given)}")
        some, label, classes = _of_reference(arguments.reference)
    else:
        if not arguments.inputs or arguments.labels is None:
            raise UsageError("name INPUT and --labels, or a set of embeddings with --reference")
        some, label, classes = _of_archives(arguments)
    suspects = find_suspects(some.embedding, label, some.alert_id, some.object_id, odd=arguments.odd)
    shown = suspects.nearest_distance if arguments.odd else suspects.distance
    print(f"{'distance':>8}  {'alert':20}  {'object':20}  {'label':12}  nearest")
    for i in range(min(SHOWN, len(some))):
        row = f"{shown[i]:8.4f}  {suspects.alert_id[i]:<20}  {printable(suspects.object_id[i]):20}"
        print(f"{row}  {classes[suspects.label[i]]:12}  {classes[suspects.nearest[i]]}")
    if arguments.out:
        write_suspects(suspects, classes, arguments.out)


def _of_reference(file: Path) -> tuple[ReferenceAlerts, NDArray[np.int64], tuple[str, ...]]:
    """Return the labelled members of a set of embeddings, their labels int64[N], and the classes."""
    require_files(file)
    reference = read_reference(file)
    parts = list(reference.parts.values())
    label = np.concatenate([part.label for part in parts])
    known = label != UNLABELLED
    if not known.any():
        raise DatasetError(f"{file}: has no labels; build it with `reference build --measure centroids --labels`")
    members = concatenate([part.alerts for part in parts])
    return members[known], label[known], reference.card.classes


def _of_archives(arguments: argparse.Namespace) -> tuple[ReferenceAlerts, NDArray[np.int64], tuple[str, ...]]:
    """Return the labelled alerts of archives, embedded, their labels int64[N], and the classes."""
    labels = read_labels(arguments.labels, arguments.label, [parse_rule(rule) for rule in arguments.classes])
    scorer = open_scorer([arguments.model], Runtime())
    sample = Sample(MOST)
    for scored in score_archives(arguments.inputs, scorer):
        sample.put(ordinary_alerts(scored, scorer.models[0], None))
    alerts = sample.take()
    if not len(alerts):
        raise DatasetError(f"{', '.join(map(str, arguments.inputs))}: no alert was read that {arguments.model} takes")
    label = labels.of(alerts.alert_id, alerts.object_id)
    known = label != UNLABELLED
    if not known.any():
        raise DatasetError(
            f"{arguments.labels}: labels none of the {len(alerts)} alerts; check that its {labels.key} are those of "
            "the alerts"
        )
    return alerts[known], label[known], labels.classes


def find_suspects(
    embedding: Embeddings,
    label: NDArray[np.int64],
    alert_id: NDArray[np.int64],
    object_id: NDArray[np.str_],
    *,
    odd: bool = False,
) -> Suspects:
    """Rank alerts with embeddings [N, D] and labels [N], the most suspect first.

    The rank is by the distance from the centroid of the alert's own class or, if `odd`, from the nearest centroid.
    """
    cosine = embedding.astype(np.float64) @ centroids(embedding, label).T
    cosine[:, np.bincount(label) == 0] = -np.inf  # a class without alerts has no centroid
    distance = 1 - cosine[np.arange(len(label)), label]
    nearest, nearest_distance = cosine.argmax(axis=1), 1 - cosine.max(axis=1)
    order = np.argsort(-(nearest_distance if odd else distance), kind="stable")
    return Suspects(
        alert_id[order], object_id[order], label[order], distance[order], nearest[order], nearest_distance[order]
    )


def write_suspects(suspects: Suspects, classes: Sequence[str], file: Path) -> None:
    """Write a CSV file with a row for each alert."""
    names = np.array(classes)
    table = pa.table(
        {
            "alert_id": suspects.alert_id,
            "object_id": suspects.object_id,
            "label": names[suspects.label],
            "distance": suspects.distance,
            "nearest": names[suspects.nearest],
            "nearest_distance": suspects.nearest_distance,
        }
    )
    pyarrow.csv.write_csv(table, file)
