"""`active-study`: measures what chosen labels are worth, compared with as many random ones.

The alerts are simulated, so the truth is known and hidden until an alert is "labelled". A classifier on the embedding
learns one kind of alert from random labels and, from the same first labels, from those that `active` chooses. Both are
measured on another simulated night. The draw of the first labels is repeated with several seeds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_filter.config import Runtime, SurveyName
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import SCHEMAS
from broker_filter.streaming.filtering import score_stream
from training.arguments import positive
from training.atomic_write import write_whole
from training.data.simulated import SimulatedNight
from training.errors import DatasetError
from training.evaluation.metrics import rank
from training.labelling.choose import STRANGE, UNCERTAIN, choose, entropy, isolation
from training.labelling.embedded import EmbeddedAlerts, embed
from training.labelling.linear import LinearHead, fit_linear

EMBEDDER = "embedder"
KINDS = ("supernova", "agn", "dipole")
POOL, TEST = 2_500, 2_000
POOL_SEED, TEST_SEED = 11, 12
FIRST, LABELS, ROUNDS = 60, 200, 2
"""Number of random labels at the start, of labels in all, and of rounds in which the other labels are chosen."""
SEEDS = 10
RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Night:
    """A simulated night with its truth."""

    alerts: EmbeddedAlerts  # N
    kind: NDArray[np.str_]  # [N]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `active-study`."""
    parser.add_argument("--survey", choices=["ztf", "lsst"], default="ztf", help="(default: %(default)s)")
    parser.add_argument(
        "--kind",
        action="append",
        dest="kinds",
        help=f"simulated kind of alert that is learnt; may be repeated (default: {', '.join(KINDS)})",
    )
    parser.add_argument("--alerts", type=positive, default=POOL, help="alerts to choose from (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=positive, default=SEEDS, help="draws of the first labels (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="JSON", help="file for all figures")


def run(arguments: argparse.Namespace) -> None:
    """Simulate two nights, learn each kind with each seed, print a table, and write all figures."""
    pool = simulate(arguments.alerts, POOL_SEED, arguments.survey)
    test = simulate(TEST, TEST_SEED, arguments.survey)
    kinds = arguments.kinds or KINDS
    figures = {}
    print(f"{'kind':16} {'random':>8} {'chosen':>8}   chosen - random (95 % interval), average precision")
    for kind in kinds:
        if kind not in pool.kind or kind not in test.kind:
            raise DatasetError(f"no simulated alert is a {kind}: choose from {', '.join(sorted(set(test.kind)))}")
        drawn = np.array([compare(pool, test, kind, seed) for seed in range(arguments.seeds)])
        low, high = interval(drawn[:, 1] - drawn[:, 0])
        figures[kind] = {"random": drawn[:, 0].tolist(), "chosen": drawn[:, 1].tolist(), "difference": [low, high]}
        random, chosen = drawn.mean(axis=0)
        print(f"{kind:16} {random:8.3f} {chosen:8.3f}   {chosen - random:+.3f} ({low:+.3f} to {high:+.3f})")
    write_whole(arguments.out, json.dumps(figures, indent=1).encode())


def simulate(n: int, seed: int, survey: SurveyName) -> Night:
    """Return a simulated night of `n` alerts, embedded."""
    scorer = open_scorer([EMBEDDER], Runtime())
    night = SimulatedNight(n, seed, survey)
    batches = score_stream(night, scorer.decoder(SCHEMAS), scorer)
    alerts = embed(batches, scorer.outputs, EMBEDDER, survey, "the simulated night")
    return Night(alerts, night.kinds(alerts.alert_id))


def compare(pool: Night, test: Night, kind: str, seed: int) -> tuple[float, float]:
    """Return the average precision for alerts of `kind` with LABELS random labels, and with chosen ones."""
    order = np.random.default_rng(seed).permutation(len(pool.alerts))
    first = with_both(order, pool.kind == kind)
    random = order[: max(LABELS, len(first))]
    chosen = first
    for left in range(ROUNDS, 0, -1):
        chosen = further(pool, kind, chosen, (LABELS - len(chosen)) // left)
    return precision(pool, test, kind, random), precision(pool, test, kind, chosen)


def with_both(order: NDArray[np.int64], positive: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the first FIRST rows of `order`, and more until two alerts are `positive` and two are not."""
    enough = np.flatnonzero(np.minimum(np.cumsum(positive[order]), np.cumsum(~positive[order])) >= 2)
    return order[: max(FIRST, int(enough[0]) + 1)]


def further(pool: Night, kind: str, labelled: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the labelled rows of the pool, and `n` more that `choose` takes."""
    alerts = pool.alerts
    p = classifier(pool, kind, labelled).probabilities(alerts.embedding)
    measures = {UNCERTAIN: entropy(np.concatenate([1 - p, p], axis=1)), STRANGE: isolation(alerts.embedding)}
    known = np.zeros(len(alerts), np.bool_)
    known[labelled] = True
    return np.concatenate([labelled, choose(alerts.embedding, measures, n, known).rows])


def classifier(pool: Night, kind: str, rows: NDArray[np.int64]) -> LinearHead:
    """Return a classifier of `kind` that learnt from the labels of these rows of the pool."""
    alerts = pool.alerts[rows]
    label = (pool.kind[rows] == kind).astype(np.int64)
    return fit_linear(alerts.embedding, label, alerts.object_id, ("other", kind))


def precision(pool: Night, test: Night, kind: str, rows: NDArray[np.int64]) -> float:
    """Return the average precision on the test night of a classifier that learnt from these rows of the pool."""
    p = classifier(pool, kind, rows).probabilities(test.alerts.embedding)[:, 0]
    return float(rank(test.kind == kind, p, np.ones(len(p))).average_precision)


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of differences [S], one for each seed."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.percentile(means, PERCENTILES).tolist()
    return low, high
