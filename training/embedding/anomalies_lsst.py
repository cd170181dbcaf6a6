"""`anomalies-lsst`: measures how well alerts of a held-out class of LSST are found as anomalies.

Real alerts: each class in turn is left out of the embedder's training and of the ordinary alerts that form the
reference. Each alert of LSSTCam is judged by the network and the reference of a fold whose alerts share no visit and no
object with it. Simulated alerts: each kind in turn is left out; half of the alerts is learnt from, the other half is
judged.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker_filter.anomalies.reference import Measure
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import WEIGHTS, Part
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.scoring.scorer import LoadedPart
from training.atomic_write import write_whole
from training.bundles.rubin_evaluation import SPLIT_SEED, unrelated
from training.bundles.train_rubin import resumed
from training.data.datasets import held_out
from training.embedding.anomalies import by_embedding
from training.embedding.baselines import by_isolation_forest
from training.embedding.embedder import Recipe, Shown, embed
from training.embedding.lsst_alerts import CLASSES
from training.embedding.train_embedder import side_by_side
from training.embedding.train_embedder_lsst import (
    KINDS,
    Data,
    add_data_arguments,
    at_first_detection,
    by_compared,
    by_pixels,
    data_sha256,
    features_of,
    held_out_of,
    learn,
    load,
    new_network,
    open_trunk,
    recipe_of,
    show,
    untrained,
)
from training.evaluation.bootstrap import Estimate, resample
from training.evaluation.metrics import Values, Weights, rank

FOLDS = 3
RELIABLE = 0.5
"""Real alerts are judged, and are ordinary, if the survey's reliability is above this value."""
CALIBRATION = 0.25
"""Fraction of the objects of the ordinary alerts that standardise the distances; the others form the reference."""
MEASURES: tuple[Measure, ...] = ("mahalanobis", "neighbours")
TABLE, FIGURES = "anomalies_lsst.md", "anomalies_lsst.json"

log = logging.getLogger(__name__)

KINDS_OF: dict[str, tuple[str, ...]] = {"asteroid": ("asteroid",), "variable": ("agn", "variable_star")}
"""The kinds of simulated alerts of each of CLASSES."""
VIEWS: dict[str, Callable[[RawAlerts], RawAlerts]] = {"": lambda alerts: alerts, "first": at_first_detection}
"""The judged alerts: as they came, or as if each were the first detection of its object."""
SERVED = "mahalanobis, whole and modalities"
INTRODUCTION = """\
# Anomalies of LSST: finding held-out classes

Written by `python -m training anomalies-lsst`. Each class in turn is left out of the self-supervised training and of
the ordinary alerts that form the reference. A cell gives the ROC AUC for separating the class from ordinary alerts (95
% intervals, bootstrapped over objects). *First*: each judged alert is cut to its own detection, as if its object had
never been seen before; the reference keeps its histories. Real alerts are those of LSSTCam with a reliability above
{reliable}; each is judged by a network and a reference of other visits and objects. Simulated alerts are labelled by
their truth; one half is learnt from, the other is judged. The trunk is unchanged: it has learnt the reliability of
all alerts, and the truth of simulated ones. *Compared*: the bundle of `--compare`, which is not trained without the
class.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """N judged alerts, of which some are of the left-out class, and their anomaly scores by view and method."""

    name: str
    anomalous: NDArray[np.bool_]  # [N]
    object_id: NDArray[np.str_]  # [N]
    ordinary: int  # number of ordinary alerts for reference and calibration (the mean over the folds)
    scores: Mapping[str, NDArray[np.float64]]  # [N] by "view/method"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `anomalies-lsst`."""
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"directory for {TABLE} and {FIGURES}")


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate once for each class and fold, write the results and print the table."""
    torch.set_num_threads(1)
    trunk = open_trunk(arguments.trunk)
    data = load(arguments, trunk)
    recipe = recipe_of(arguments)
    weights = (trunk.card.files[WEIGHTS], data.compared.bundle.card.files[WEIGHTS])
    made_of = f"{recipe} {data_sha256(data)} {weights}"
    parts = arguments.out / "parts"
    cases = [real_case(name, data, trunk, recipe, parts, made_of) for name in CLASSES]
    cases += [simulated_case(kind, data, trunk, recipe, parts, made_of) for kind in KINDS]
    estimates = {case.name: judge(case) for case in cases}
    text = as_markdown(cases, estimates)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out / TABLE, text.encode())
    figures = {name: {m: one.model_dump() for m, one in found.items()} for name, found in estimates.items()}
    write_whole(arguments.out / FIGURES, json.dumps(figures, indent=1).encode())
    print(text)


def real_case(name: str, data: Data, trunk: Part, recipe: Recipe, parts: Path, made_of: str) -> Case:
    """Leave a class of real alerts out; `parts`: the directory of results, to resume from."""
    sky, left_out = data.lsstcam, CLASSES.index(name)
    anomalous, reliable = sky.label == left_out, sky.reliability > RELIABLE
    fold = unrelated(sky.visit, sky.named.object_id, SPLIT_SEED) % FOLDS
    histories = name == "asteroid"  # the objects of histories may be variable, and are no asteroids
    simulated = ~np.isin(data.kind, KINDS_OF[name])
    scores: dict[str, NDArray[np.float64]] = {}
    references = []
    for one in range(FOLDS):
        rows = (fold != one) & ~anomalous
        ordinary = rows & reliable
        references.append(int(ordinary.sum()))
        groups = data.groups(rows, histories, simulated)
        learn = partial(scored, trunk, data.compared, recipe, groups, sky.named.raw, sky.named.object_id, ordinary)
        for method, tensor in resumed(parts / f"{name}_{one}.safetensors", made_of, learn).items():
            scores.setdefault(method, np.full(len(sky), np.nan))[fold == one] = tensor.numpy()[fold == one]
        log.info("%s left out, fold %d of %d", name, one + 1, FOLDS)
    own = {method: values[reliable] for method, values in scores.items()}
    return Case(name, anomalous[reliable], sky.named.object_id[reliable], round(np.mean(references)), own)


def simulated_case(kind: str, data: Data, trunk: Part, recipe: Recipe, parts: Path, made_of: str) -> Case:
    """Leave a kind of simulated alerts out; `parts`: the directory of results, to resume from."""
    classes = [CLASSES.index(name) for name, kinds in KINDS_OF.items() if kind in kinds]
    rows = ~np.isin(data.lsstcam.label, classes)
    named = data.simulated
    known, real = ~held_out_of(named), np.isin(data.kind, KINDS)
    ordinary = known & real & (data.kind != kind)
    groups = data.groups(rows, kind == "asteroid", known & (data.kind != kind))
    learn = partial(scored, trunk, data.compared, recipe, groups, named.raw, named.object_id, ordinary)
    found = resumed(parts / f"simulated_{kind}.safetensors", made_of, learn)
    judged = ~known & real
    scores = {method: tensor.numpy()[judged] for method, tensor in found.items()}
    log.info("simulated %s left out", kind)
    return Case(f"simulated {kind}", data.kind[judged] == kind, named.object_id[judged], int(ordinary.sum()), scores)


def scored(
    trunk: Part,
    compared: LoadedPart,
    recipe: Recipe,
    groups: Mapping[str, Shown],
    alerts: RawAlerts,
    object_id: NDArray[np.str_],
    ordinary: NDArray[np.bool_],
) -> dict[str, Tensor]:
    """Return the anomaly scores float64[N] of N alerts by `view/method`, given which are `ordinary` bool[N].

    The ordinary alerts of a part of the objects form the reference, those of the others standardise the distances. The
    embedder learns from `groups`; the network `compared` is not trained again, and may have seen the class.
    """
    calibration = np.zeros(len(alerts), np.bool_)
    calibration[ordinary] = held_out(object_id[ordinary], CALIBRATION, SPLIT_SEED)
    reference = ordinary & ~calibration
    network = new_network(trunk, recipe.seed)
    learn(network, groups, recipe)
    torch.manual_seed(recipe.seed)
    random = untrained(trunk)
    whole = show(random, alerts)
    random.features.fit(whole.features[ordinary].flatten(0, 1))
    random.metadata.fit(whole.metadata[ordinary])
    embedders: dict[str, Callable[[RawAlerts], NDArray[np.float32]]] = {
        "": lambda some: side_by_side(embed(network, show(network, some))),
        "untrained, ": lambda some: side_by_side(embed(random, show(random, some))),
        "compared, ": partial(by_compared, compared),
    }
    usual = {name: embedded(alerts) for name, embedded in embedders.items()}
    features, pixels = features_of(alerts), by_pixels(alerts).astype(np.float64)
    scores: dict[str, Tensor] = {}
    for view, cut in VIEWS.items():
        judged = cut(alerts)
        for name, embedded in embedders.items():
            for method, found in by_embedding_of_view(usual[name], embedded(judged), reference, calibration).items():
                scores[f"{view}/{name}{method}"] = torch.tensor(found)
        for method, ours, theirs in (("features", features, features_of(judged)), ("pixels", pixels, pixels)):
            found = by_isolation_forest(ours[ordinary], theirs)
            scores[f"{view}/forest of {method}"] = torch.tensor(found)
    return scores


def by_embedding_of_view(
    usual: NDArray[np.float32],
    judged: NDArray[np.float32],
    reference: NDArray[np.bool_],
    calibration: NDArray[np.bool_],
) -> dict[str, NDArray[np.float64]]:
    """Return the scores float64[N] of embeddings `judged` [N, D] by method.

    The embeddings `usual` [N, D] of the alerts in `reference` bool[N] form the reference; those in `calibration`
    bool[N] standardise the distances.
    """
    n = len(usual)
    nothing = np.zeros(n, np.bool_)
    scores = by_embedding(
        np.concatenate([usual, judged]),
        np.concatenate([reference, nothing]),
        np.concatenate([calibration, nothing]),
        np.full(2 * n, UNLABELLED),
        MEASURES,
    )
    return {method: values[n:] for method, values in scores.items()}


def judge(case: Case) -> dict[str, Estimate]:
    """Return the ROC AUC of each view and method, and the difference of the served method from each other method."""

    def measure(weight: Weights) -> dict[str, Values]:
        found = {method: rank(case.anomalous, scores, weight).roc_auc for method, scores in case.scores.items()}
        for method in case.scores:
            view, _, name = method.partition("/")
            found[f"{view}/ahead of {name}"] = found[f"{view}/{SERVED}"] - found[method]
        return found

    whole, resampled = measure(np.ones(len(case.anomalous))), resample(measure, case.object_id)
    return {name: Estimate.of(float(value), resampled[name]) for name, value in whole.items()}


def as_markdown(cases: Sequence[Case], estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return the page: how well each class is found, by view and method."""
    to_find = [f"{one.ordinary}; {one.anomalous.sum()}; {(~one.anomalous).sum()}" for one in cases]
    lines = [
        INTRODUCTION.format(reliable=RELIABLE),
        " | ".join(["| left out", *(case.name for case in cases), "mean of simulated |"]),
        "|".join(["", *["---"] * (len(cases) + 2), ""]),
        " | ".join(["| ordinary alerts learnt from; anomalous and ordinary alerts judged", *to_find, "|"]),
    ]
    for method in estimates[cases[0].name]:
        view, _, name = method.partition("/")
        title = f"first: {name}" if view else name
        found = [estimates[case.name][method] for case in cases]
        mean = np.mean([one.value for one, case in zip(found, cases, strict=True) if case.name not in CLASSES])
        cells = [f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})" for one in found]
        lines.append(" | ".join([f"| {title}", *cells, f"{mean:.3f} |"]))
    return "\n".join(lines) + "\n"
