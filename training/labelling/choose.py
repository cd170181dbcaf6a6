"""`active`: chooses the alerts of a night to label next, as a list that `broker-filter watch --list` opens.

Three measures say why a label of an alert would teach a model something: the model is uncertain about it (its entropy;
Lewis & Gale 1994, arXiv:cmp-lg/9407020), models disagree about it (query by committee; Seung et al. 1992), or the alert
is unlike all others (the distance of its embedding to its neighbours). Each measure proposes its highest alerts. Of
these, the ones are taken that are farthest from each other and from the labelled ones (greedy k-centre; Sener &
Savarese 2018, arXiv:1708.00489), because ten labels of the same kind teach little more than one.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Embeddings, Neighbours
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.labels import UNLABELLED, read_labels
from broker_filter.scoring.scores import output_name
from training.arguments import positive
from training.atomic_write import write_whole
from training.errors import DatasetError
from training.labelling.embedded import EmbeddedAlerts, embed_archives
from training.labelling.fit_head import add_survey_options

ALERTS = 200
PROPOSED = 4
"""Number of alerts that a measure proposes for each one that is taken."""
NEIGHBOURS = 5
"""The distance to this many neighbours says how unlike all others an alert is."""
UNCERTAIN, DISAGREEING, STRANGE = "uncertain", "disagreeing", "strange"
COLUMNS = ("alert_id", "object_id", "survey", "rank", "reason", "score")
SMALLEST = 1e-9
"""Probabilities are at least this far from 0, for their logarithm."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows of alerts in the order in which a person should label them, each with the measure that proposed it."""

    rows: NDArray[np.int64]  # [K]
    reasons: list[str]  # [K]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `active`."""
    parser.add_argument("inputs", nargs="+", type=Path, metavar="NIGHT", help="file, folder or archive of alerts")
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="BUNDLE",
        help="bundle that is to learn; further ones are compared with it where they have the same labels (default: "
        "`default`)",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="TABLE", help="labels so far: these alerts are not chosen, nor alerts like them"
    )
    parser.add_argument("--label", default="label", metavar="COLUMN", help="label column of the table (default: label)")
    parser.add_argument(
        "--alerts", type=positive, default=ALERTS, metavar="N", help="number of alerts to choose (default: %(default)s)"
    )
    add_survey_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="CSV", help=f"the list: {', '.join(COLUMNS)}")


def run(arguments: argparse.Namespace) -> None:
    """Write the list, and print how many alerts each measure proposed."""
    models = arguments.models or ["default"]
    alerts = embed_archives(arguments.inputs, models, arguments.embedder, arguments.survey, arguments.schema_registry)
    labelled = np.zeros(len(alerts), np.bool_)
    if arguments.labels:
        table = read_labels(arguments.labels, arguments.label)
        labelled = table.of(alerts.alert_id, alerts.object_id) != UNLABELLED
    names = [open_bundle(model).card.name for model in models]
    labels = [open_bundle(model).part(arguments.survey).card.outputs.labels for model in models]
    measures = measure(alerts, dict(zip(names, labels, strict=True)))
    choice = choose(alerts.embedding, measures, arguments.alerts, labelled)
    write_whole(arguments.out, as_csv(alerts, measures, choice))
    counts = ", ".join(f"{name} {choice.reasons.count(name)}" for name in measures)
    print(f"{arguments.out}: {len(choice.rows)} of {len(alerts)} alerts ({counts})")


def measure(alerts: EmbeddedAlerts, labels: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.float64]]:
    """Return the measures of N alerts, float64[N] each, by name: the higher, the more a label would teach.

    `labels`: the labels of each model, by the name of the model, that of the learning model first. DISAGREEING is left
    out if no other model has a label of the first.
    """
    names = list(labels)
    first = probabilities(alerts, names[0], labels[names[0]])
    measures = {UNCERTAIN: entropy(first)}
    differences = []
    for other in names[1:]:
        for label in set(labels[names[0]]) & set(labels[other]):
            mine = alerts.outputs[output_name(names[0], label)].astype(np.float64)
            differences.append(np.abs(mine - alerts.outputs[output_name(other, label)]))
    if differences:
        measures[DISAGREEING] = np.nan_to_num(np.max(differences, axis=0))
    measures[STRANGE] = isolation(alerts.embedding)
    return measures


def probabilities(alerts: EmbeddedAlerts, model: str, labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the outputs of a model for its labels, float64[N, C]; for one label, [N, 2] with its complement first."""
    columns = [alerts.outputs[output_name(model, label)].astype(np.float64) for label in labels]
    if len(columns) == 1:
        columns = [1 - columns[0], columns[0]]
    return np.stack(columns, axis=1)


def entropy(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of each of N rows of C probabilities in nats, float64[N]; 0 where a probability is NaN.

    Rows are divided by their sums first, because labels need not exclude each other.
    """
    shares = np.clip(probabilities / probabilities.sum(axis=1, keepdims=True), SMALLEST, 1)
    return np.asarray(np.nan_to_num(-(shares * np.log(shares)).sum(axis=1)))


def isolation(embedding: Embeddings) -> NDArray[np.float64]:
    """Return the cosine distance of each of N embeddings to its NEIGHBOURS-th nearest neighbour, float64[N]."""
    k = min(NEIGHBOURS + 1, len(embedding))  # the nearest neighbour is the alert itself
    distance, _ = Neighbours(embedding).nearest(embedding, k)
    return distance[:, -1].astype(np.float64)


def choose(
    embedding: Embeddings,
    measures: Mapping[str, NDArray[np.float64]],
    n: int,
    labelled: NDArray[np.bool_],
) -> Choice:
    """Choose `n` of N alerts with embeddings [N, D], an equal number by each measure; all if fewer are unlabelled.

    `labelled` bool[N]: the alerts that have a label. Raises DatasetError if all alerts have one.
    """
    free = ~labelled
    if not free.any():
        raise DatasetError("every alert has a label already: give another night")
    nearest = np.full(len(embedding), np.inf)
    for i in np.flatnonzero(labelled).tolist():
        nearest = np.minimum(nearest, 1 - embedding @ embedding[i])
    taken: dict[str, list[int]] = {}
    left = min(n, int(free.sum()))
    for k, (name, values) in enumerate(measures.items()):
        quota = left // (len(measures) - k)
        left -= quota
        rows = np.flatnonzero(free)
        proposed = rows[np.argsort(-values[rows], kind="stable")[: PROPOSED * quota]]
        taken[name] = []
        for _ in range(quota):
            one = int(proposed[np.argmax(np.where(free[proposed], nearest[proposed], -np.inf))])
            taken[name].append(one)
            free[one] = False
            nearest = np.minimum(nearest, 1 - embedding @ embedding[one])
    in_turns = zip_longest(*([(row, name) for row in rows] for name, rows in taken.items()))
    pairs = [pair for pair in chain.from_iterable(in_turns) if pair is not None]
    return Choice(np.array([row for row, _ in pairs], np.int64), [name for _, name in pairs])


def as_csv(alerts: EmbeddedAlerts, measures: Mapping[str, NDArray[np.float64]], choice: Choice) -> bytes:
    """Return the list as CSV with the columns COLUMNS: `score` is the value of the measure that is the reason."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for rank, (row, reason) in enumerate(zip(choice.rows.tolist(), choice.reasons, strict=True), start=1):
        score = f"{measures[reason][row]:.6g}"
        table.writerow([alerts.alert_id[row], alerts.object_id[row], alerts.survey, rank, reason, score])
    return text.getvalue().encode()
