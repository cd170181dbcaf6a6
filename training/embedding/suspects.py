"""`suspects`: lists the alerts whose labels are most likely wrong, for a person to inspect. It changes no label.

The method is that of AstroM3 for misclassified stars (Rizhko & Bloom 2024, arXiv:2411.08842): alerts are ranked by 1
minus the cosine similarity of their embedding to the centroid of their own class. The embedding is the served one,
which is trained without labels.
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

from broker_filter.cli.archived import score_archives
from broker_filter.config import Runtime
from broker_filter.console import printable
from broker_filter.scoring.anomaly import centroids
from broker_filter.scoring.labels import parse_rule, read_labels
from broker_filter.scoring.neighbours import Embeddings
from broker_filter.scoring.reference import UNLABELLED
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.build_reference import Sample, ordinary_alerts
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `suspects`."""
    add_labelled_alerts(parser, "a class, written as for build-dataset")
    parser.add_argument(
        "--model",
        default="embedder",
        metavar="BUNDLE",
        help="bundle that computes the embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="write all labelled alerts to this file, the most suspect first"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the most suspect alerts, and write all of them to a file if one is given."""
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
    some = alerts[known]
    suspects = find_suspects(some.embedding, label[known], some.alert_id, some.object_id)
    print(f"{'distance':>8}  {'alert':20}  {'object':20}  {'label':12}  nearest")
    for i in range(min(SHOWN, len(some))):
        row = f"{suspects.distance[i]:8.4f}  {suspects.alert_id[i]:<20}  {printable(suspects.object_id[i]):20}"
        print(f"{row}  {labels.classes[suspects.label[i]]:12}  {labels.classes[suspects.nearest[i]]}")
    if arguments.out:
        write_suspects(suspects, labels.classes, arguments.out)


def find_suspects(
    embedding: Embeddings, label: NDArray[np.int64], alert_id: NDArray[np.int64], object_id: NDArray[np.str_]
) -> Suspects:
    """Rank alerts with embeddings [N, D] and labels [N] by their distance from their own class's centroid,
    descending."""
    cosine = embedding.astype(np.float64) @ centroids(embedding, label).T
    distance = 1 - cosine[np.arange(len(label)), label]
    order = np.argsort(-distance, kind="stable")
    return Suspects(alert_id[order], object_id[order], label[order], distance[order], cosine.argmax(axis=1)[order])


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
        }
    )
    pyarrow.csv.write_csv(table, file)
