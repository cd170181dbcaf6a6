"""`anomaly-measures`: compares the measures of the distance from ordinary alerts, to choose the default of the service.

Each class in turn is left out of the ordinary alerts of a reference, and must then be found as anomalous. References
are calibrated and searched as in the service. The bundle is used as it is: the left-out class was part of its training,
which used no labels, so the figures compare measures and do not say how new kinds of alerts are found
(`training.embedding.anomalies` trains without the class).

In each of several rounds, the objects are dealt at random to a reference, to alerts that choose the measure and to test
alerts. No object is in two of these parts of a round. Real LSST alerts are also dealt by visit: then no visit is in two
parts either.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor

from broker_filter.anomalies.neighbours import Embeddings, normalise
from broker_filter.anomalies.reference import (
    Measure,
    ReferenceAlerts,
    ReferenceSetError,
    SurveyCounts,
    make_reference,
)
from broker_filter.anomalies.score import AnomalyScorer
from broker_filter.anomalies.threshold import RateTracker
from broker_filter.config import Runtime
from broker_filter.packets.batch import AlertBatch, Measurement, Survey
from broker_filter.scoring.bundle import Bundle
from broker_filter.scoring.labels import UNLABELLED, Labels, parse_rule, read_labels
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import SCHEMAS
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.build_reference import calibrate
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.scored import ScoredBatch
from training.arguments import positive, seed, share
from training.data.datasets import connected
from training.data.simulated import SimulatedNight
from training.errors import EvaluationError
from training.evaluation.bootstrap import Estimate, resample
from training.evaluation.metrics import Values, Weights, rank, ratio

MEASURES: tuple[Measure, ...] = ("mahalanobis", "neighbours")
"""The measures that can be the default: `centroids` needs labels."""
LOF, FOREST, SNR = "local outlier factor", "isolation forest", "snr"
METHODS = (*MEASURES, LOF, FOREST, SNR)
CHOSEN, DIFFERENCE = "chosen", "difference"
PREFERRED = "neighbours/preferred"
"""Name of the figure: the fraction of the trials in whose round the choice alerts preferred `neighbours`."""
CLASSES = tuple(parse_rule(rule) for rule in ("VS=VS", "asteroid=asteroid", "SN=SN,SN_cand", "AGN=AGN"))
"""The classes that are left out, and their labels in a table or their kinds in a simulated night."""
KINDS = {"variable_star": "VS", "asteroid": "asteroid", "supernova": "SN", "agn": "AGN"}
"""The class of each kind of simulated alert."""
LEAST_OBJECTS = 10
"""Number of objects below which a class is not left out. Its alerts are then ordinary."""
LSSTCAM_VISITS = (2 * 10**12, 3 * 10**12)
"""Range of the ids of LSSTCam's visits: the date (YYYYMMDD) and five digits. Other ids are of HSC or of simulated
images."""
REAL = 0.5
"""Threshold of the survey's `reliability`, and of the bundle's `real` if it recommends none, for ordinary alerts."""
SHARES = (0.5, 0.2, 0.3)
"""Fractions of the objects in the reference, for the choice and for the test."""
REFERENCE, CHOICE, TEST = range(3)
ROUNDS = 10
DETECTIONS = {"1 detection": (1, 1), "2 or 3 detections": (2, 3), "4 detections or more": (4, np.inf)}
SIMULATED = 1500
SIMULATION_SEED = 2031
"""Other simulated nights trained the embedder."""
COLUMNS = ("snr", "ndethist", "visit", "reliability", "sso")
TREES = 200
SEED = 2026
RATE = 0.05
TABLE, FIGURES = "anomaly-measures.md", "anomaly-measures.json"
INTRODUCTION = """\
# Which measure finds anomalies best

Written by `python -m training anomaly-measures`, with the bundle {bundle}. Each class in turn is left out of the
ordinary alerts of a reference, which is calibrated and used as in the service, and must then be found. A cell gives the
ROC AUC for separating the class from ordinary alerts of other objects than those of the reference, the mean of {rounds}
rounds. In each round, half of the objects are dealt to the reference, a fifth to the alerts that choose a measure and
the others to the test; the figures are those of the test. In parentheses: 95 % intervals, bootstrapped over objects,
for the references of these rounds. *Visits apart*: dealt and resampled by groups of visits that share objects.

The bundle is used as it is. It was trained without labels, but on alerts of all these classes, so the figures compare
measures; they do not say how well new kinds of alerts are found. For LSST it was trained on simulated alerts alone.

The rule for the default was fixed before the first run: `neighbours` replaces `mahalanobis` if the interval of their
difference in the mean ROC AUC excludes 0 in favour of `neighbours` for the real alerts of at least one survey, and
against it for no sample.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """N alerts of one survey with their embeddings; alerts without a class may be ordinary."""

    name: str
    survey: Survey
    embedding: Embeddings  # [N, D]
    alert_id: NDArray[np.int64]  # [N]
    object_id: NDArray[np.str_]  # [N]
    visit: NDArray[np.float64]  # [N] NaN where there is none
    group: NDArray[np.str_]  # [N] what stays together in a round and in a resample
    label: NDArray[np.int64]  # [N] index into CLASSES, or UNLABELLED
    snr: NDArray[np.float64]  # [N]
    detections: NDArray[np.float64]  # [N] of the object so far

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Sample:
        return replace(self, **{field: getattr(self, field)[rows] for field in ARRAYS})

    @property
    def left_out(self) -> list[int]:
        """The classes with enough objects to be left out."""
        return [c for c in range(len(CLASSES)) if len(np.unique(self.object_id[self.label == c])) >= LEAST_OBJECTS]


ARRAYS = tuple(field.name for field in fields(Sample) if field.name not in ("name", "survey"))


@dataclass(frozen=True, slots=True)
class Trial:
    """The scores of a sample's N alerts by each method, in one round with one class left out."""

    class_: int
    anomalous: NDArray[np.bool_]  # [N]
    part: NDArray[np.int64]  # [N] REFERENCE, CHOICE or TEST
    scores: Mapping[str, NDArray[np.float64]]  # [N] by method
    thresholds: Mapping[Measure, float]
    chosen: Measure = MEASURES[0]
    """The measure that the choice alerts of the round prefer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `anomaly-measures`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="alerts: files, folders, archives")
    parser.add_argument(
        "--labels",
        required=True,
        action="append",
        type=Path,
        metavar="TABLE",
        help="table of labels by alert id or object id, .csv or .parquet; may be repeated",
    )
    parser.add_argument(
        "--label", default="weak_class", metavar="COLUMN", help="label column of the tables (default: %(default)s)"
    )
    parser.add_argument("--model", default="embedder", help="bundle with an embedding (default: %(default)s)")
    parser.add_argument("--schema-registry", metavar="URL_OR_DIR", help="schemas of LSST alerts in wire format")
    parser.add_argument(
        "--simulated", type=positive, default=SIMULATED, help="simulated LSST alerts (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="random splits (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=SEED, help="seed of the splits (default: %(default)s)")
    parser.add_argument(
        "--rate", type=share, default=RATE, help="fraction of ordinary alerts to flag (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"directory for {TABLE} and {FIGURES}")


def run(arguments: argparse.Namespace) -> None:
    """Compare the measures, write the results and print the page."""
    scorer = open_scorer([arguments.model], Runtime(engine="onnxruntime", device="cpu"))
    bundle = scorer.models[0].bundle
    if bundle.embedding is None or "real" not in scorer.models[0].labels:
        raise EvaluationError(f"{arguments.model}: gives no embedding, or no probability `real`: choose another bundle")
    tables = [read_labels(table, arguments.label) for table in arguments.labels]
    packets = read_packets(arguments.inputs)
    decoder = scorer.decoder(arguments.schema_registry, columns=COLUMNS)
    real = list(score_stream(packets, decoder, scorer))
    of_lsst = observed(real, Survey.LSST, tables, bundle)
    samples = [
        observed(real, Survey.ZTF, tables, bundle),
        of_lsst,
        visits_apart(of_lsst),
        simulated(scorer, arguments.simulated),
    ]
    pages = [INTRODUCTION.format(bundle=f"{bundle.card.name} {bundle.card.version}", rounds=arguments.rounds)]
    figures: dict[str, dict[str, Estimate]] = {}
    for sample in samples:
        log.info("%s: %d alerts, classes left out: %s", sample.name, len(sample), names_of(sample))
        if not sample.left_out:
            pages.append(f"## {sample.name}\n\nNo class has {LEAST_OBJECTS} objects.\n")
            continue
        trials = try_all(sample, bundle, arguments.rounds, arguments.seed, arguments.rate)
        found = judge(sample, trials)
        figures[sample.name] = found
        pages.append(as_markdown(sample, trials, found, arguments.rate))
    if not figures:
        raise EvaluationError(f"no class of the inputs has {LEAST_OBJECTS} objects with an ordinary alert")
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(pages)
    (arguments.out / TABLE).write_text(text, encoding="utf-8")
    in_json = {
        name: {figure: estimate.model_dump() for figure, estimate in found.items()} for name, found in figures.items()
    }
    (arguments.out / FIGURES).write_text(json.dumps(in_json, indent=1), encoding="utf-8")
    print(text)


def names_of(sample: Sample) -> str:
    """Return the names of the classes that are left out, as text."""
    return ", ".join(CLASSES[c].name for c in sample.left_out) or "none"


def observed(batches: Iterable[ScoredBatch], survey: Survey, tables: Sequence[Labels], bundle: Bundle) -> Sample:
    """Return the alerts of a survey that are likely real and that can be judged.

    ZTF: those with a class, and a `real` above the threshold of the bundle. LSST: those of LSSTCam with a reliability
    above REAL, with a class or not; alerts of known solar-system objects are asteroids even if no table says so.
    """
    threshold = bundle.thresholds_of("real").get("ztf", REAL)
    parts = []
    for scored in batches:
        scores, alerts = scored.scores.models[0], scored.alerts
        rows = scores.taken & ~scored.duplicate & (alerts.survey == survey)
        label = label_of(alerts, tables)
        if survey == Survey.LSST:
            visit = column(alerts, "visit")
            rows &= (visit >= LSSTCAM_VISITS[0]) & (visit < LSSTCAM_VISITS[1]) & (column(alerts, "reliability") > REAL)
            asteroid = next(c for c, rule in enumerate(CLASSES) if rule.name == "asteroid")
            label = np.where((label == UNLABELLED) & (column(alerts, "sso") == 1), asteroid, label)
        else:
            rows &= (scores.probabilities[:, scores.labels.index("real")] > threshold) & (label != UNLABELLED)
        parts.append(sample_of(scored, label)[rows])
    return joined(f"{survey.name}, real alerts", survey, parts)


def visits_apart(sample: Sample) -> Sample:
    """Return the same alerts, grouped such that alerts of one object or of one visit stay together."""
    group = connected(sample.object_id, sample.visit).astype(np.str_)
    return replace(sample, name=f"{sample.name}, visits apart", group=group)


def simulated(scorer: Scorer, n: int) -> Sample:
    """Return `n` simulated real LSST alerts with their true classes."""
    night = SimulatedNight(n, SIMULATION_SEED, "lsst", dict.fromkeys(KINDS, 1.0))
    decoder = scorer.decoder(SCHEMAS, columns=COLUMNS)
    names = [rule.name for rule in CLASSES]
    parts = [
        sample_of(scored, np.array([names.index(KINDS[kind]) for kind in night.kinds(scored.alerts.alert_id).tolist()]))
        for scored in score_stream(iter(night), decoder, scorer)
    ]
    return joined("LSST, simulated alerts", Survey.LSST, parts)


def label_of(alerts: AlertBatch, tables: Sequence[Labels]) -> NDArray[np.int64]:
    """Return the class of each of N alerts, int64[N], by the first table that has one; UNLABELLED for the others."""
    object_id = np.array(alerts.object_id, np.str_)
    label = np.full(len(alerts), UNLABELLED)
    for table in tables:
        class_of = [
            next((c for c, rule in enumerate(CLASSES) if rule.takes(value)), UNLABELLED) for value in table.classes
        ]
        own = np.array([*class_of, UNLABELLED])[table.of(alerts.alert_id, object_id)]  # UNLABELLED is the last element
        label = np.where(label == UNLABELLED, own, label)
    return label


def column(alerts: AlertBatch, name: str) -> NDArray[np.float64]:
    """Return a metadata column, float64[N], NaN where missing."""
    values: NDArray[np.float64] = alerts.metadata[:, alerts.columns.index(name)]
    return values


def sample_of(scored: ScoredBatch, label: NDArray[np.int64]) -> Sample:
    """Return all alerts of a batch, grouped by object.

    The number of detections is the survey's, or that of the packet where the survey gives none, as for asteroids of
    LSST.
    """
    alerts, scores = scored.alerts, scored.scores.models[0]
    assert scores.embedding is not None
    curves = alerts.light_curves
    is_detection = np.append(curves.kind == Measurement.DETECTION, False)  # so that reduceat takes every offset
    in_packet = np.add.reduceat(is_detection.astype(np.int64), curves.offsets)[:-1] * (np.diff(curves.offsets) > 0)
    of_survey = column(alerts, "ndethist")
    detections = np.where(np.isfinite(of_survey), of_survey, in_packet)
    object_id = np.array(alerts.object_id, np.str_)
    return Sample(
        "",
        Survey.ZTF,
        normalise(scores.embedding),
        alerts.alert_id,
        object_id,
        column(alerts, "visit"),
        object_id,
        label,
        column(alerts, "snr"),
        np.maximum(detections, 1),  # the alert itself is a detection
    )


def joined(name: str, survey: Survey, parts: Sequence[Sample]) -> Sample:
    """Return one sample of all parts."""
    arrays = {field: np.concatenate([getattr(part, field) for part in parts]) for field in ARRAYS}
    return Sample(name, survey, **arrays)


def deal(group: NDArray[np.str_], label: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the part of each of N alerts, int64[N]: REFERENCE, CHOICE or TEST, by SHARES of the groups.

    Groups are dealt class by class, so that each part has its share of a rare class. A group counts for the rarest
    class in it.
    """
    groups, index = np.unique(group, return_inverse=True)
    classes, of_class, counts = np.unique(label, return_inverse=True, return_counts=True)
    rarity = np.argsort(np.argsort(counts, kind="stable"))[of_class]  # 0 for the rarest class
    rarest = np.full(len(groups), len(classes))
    np.minimum.at(rarest, index, rarity)
    part = np.empty(len(groups), np.int64)
    ends = np.cumsum(SHARES)
    for one in np.unique(rarest).tolist():
        own = rng.permutation(np.flatnonzero(rarest == one))
        position = (np.arange(len(own)) + rng.random()) / len(own)
        part[own] = np.searchsorted(ends[:-1], position, side="right")
    return part[index]


def try_all(sample: Sample, bundle: Bundle, rounds: int, seed: int, rate: float) -> list[Trial]:
    """Return the trials of all rounds and classes; without those whose reference would have too few alerts.

    Raises EvaluationError if there is none.
    """
    rng = np.random.default_rng(seed)
    done = []
    for _ in range(rounds):
        part = deal(sample.group, sample.label, rng)
        trials = []
        for c in sample.left_out:
            try:
                trials.append(leave_out(sample, c, part, bundle, rate))
            except ReferenceSetError as error:
                log.warning("%s, without %s: a round is left out: %s", sample.name, CLASSES[c].name, error)
        done += [replace(trial, chosen=chosen(trials)) for trial in trials]
    if not done:
        raise EvaluationError(f"{sample.name}: too few alerts for a reference: add alerts")
    return done


def leave_out(sample: Sample, class_: int, part: NDArray[np.int64], bundle: Bundle, rate: float) -> Trial:
    """Return the scores of all alerts by a reference without one class.

    Raises ReferenceSetError if the reference has too few alerts.
    """
    anomalous = sample.label == class_
    seen = (part == REFERENCE) & ~anomalous
    ordinary = sample[seen]
    alerts = ReferenceAlerts(
        ordinary.embedding, ordinary.alert_id, ordinary.object_id, np.full(len(ordinary), sample.survey, np.uint8)
    )
    scores: dict[str, NDArray[np.float64]] = {}
    thresholds = {}
    for measure in MEASURES:
        reference = calibrate(alerts, np.full(len(alerts), UNLABELLED), len(bundle.modalities), measure)
        counts = SurveyCounts(
            read=len(alerts), passed=len(alerts), kept=len(reference.alerts), held_out=len(reference.scores)
        )
        made = make_reference(bundle, None, {sample.survey: reference}, {sample.survey: counts}, measure)
        scores[measure] = AnomalyScorer(made.card, reference).score(sample.embedding).astype(np.float64)
        thresholds[measure] = RateTracker(reference.scores, rate).threshold
    factor = LocalOutlierFactor(novelty=True).fit(ordinary.embedding)
    forest = IsolationForest(n_estimators=TREES, random_state=SEED).fit(ordinary.embedding)
    scores[LOF], scores[FOREST] = (-model.score_samples(sample.embedding) for model in (factor, forest))
    scores[SNR] = np.nan_to_num(sample.snr)
    return Trial(class_, anomalous, part, scores, thresholds)


def roc_auc(trial: Trial, method: str, rows: NDArray[np.bool_], weight: Weights) -> Values:
    """Return the probability that an alert of the class scores higher than an ordinary alert, over `rows` [N].

    It is NaN where the rows lack one of the two.
    """
    if not rows.any():
        return np.full(weight.shape[:-1], np.nan)
    return rank(trial.anomalous[rows], trial.scores[method][rows], weight[..., rows]).roc_auc


def chosen(trials: Sequence[Trial]) -> Measure:
    """Return the measure with the highest mean ROC AUC, over the classes, on the choice alerts of a round."""

    def mean(measure: Measure) -> float:
        of_class = [roc_auc(one, measure, one.part == CHOICE, np.ones(len(one.part))) for one in trials]
        return float(np.nanmean(of_class)) if np.isfinite(of_class).any() else -np.inf

    return max(MEASURES, key=mean)


def judge(sample: Sample, trials: Sequence[Trial]) -> dict[str, Estimate]:
    """Return every figure with its interval, by name.

    `<method>/<class>/roc_auc` is measured on the test alerts, and with `/<detections>` on some of them. The measures
    also have `recall` and `realised`: the fractions of the class and of ordinary alerts above the
    threshold. The method `chosen` is, in each round, the measure that the choice alerts prefer; `difference` is
    neighbours minus mahalanobis. The class `mean` is the mean over the classes.
    """
    classes = sorted({trial.class_ for trial in trials})
    bins = {"": np.ones(len(sample), bool)} | {
        f"/{name}": (sample.detections >= low) & (sample.detections <= high) for name, (low, high) in DETECTIONS.items()
    }

    def figures(weight: Weights) -> dict[str, Values]:
        of_classes = {
            CLASSES[c].name: of_class([trial for trial in trials if trial.class_ == c], bins, weight) for c in classes
        }
        names = next(iter(of_classes.values()))
        of_classes["mean"] = {name: mean_of_known([own[name] for own in of_classes.values()]) for name in names}
        return {
            f"{method}/{class_}/{figure}": value
            for class_, own in of_classes.items()
            for (method, figure), value in own.items()
        }

    whole, drawn = figures(np.ones(len(sample))), resample(figures, sample.group)
    found = {name: Estimate.of(value, drawn[name]) for name, value in whole.items()}
    preferred = float(np.mean([trial.chosen == "neighbours" for trial in trials]))
    return found | {PREFERRED: Estimate(value=preferred, low=None, high=None)}


def of_class(
    trials: Sequence[Trial], bins: Mapping[str, NDArray[np.bool_]], weight: Weights
) -> dict[tuple[str, str], Values]:
    """Return the figures of one class by method and name: the means over its trials.

    `bins` [N]: alerts by the end of the figure's name. Only the measures are judged in bins of some alerts.
    """
    found: dict[tuple[str, str], Values] = {}
    for name, inside in bins.items():
        rows = [(one.part == TEST) & inside for one in trials]
        of_rounds = {
            method: [roc_auc(one, method, own, weight) for one, own in zip(trials, rows, strict=True)]
            for method in (MEASURES if name else METHODS)
        }
        of_rounds[CHOSEN] = [of_rounds[trial.chosen][r] for r, trial in enumerate(trials)]
        mean = {method: mean_of_known(values) for method, values in of_rounds.items()}
        mean[DIFFERENCE] = mean["neighbours"] - mean["mahalanobis"]
        found |= {(method, f"roc_auc{name}"): value for method, value in mean.items()}
    for measure in MEASURES:
        for name, side in (("recall", True), ("realised", False)):
            found[measure, name] = mean_of_known([share_above(one, measure, side, weight) for one in trials])
    return found


def mean_of_known(values: Sequence[Values]) -> Values:
    """Return the mean of the values [...] that are defined, NaN where none is."""
    stacked = np.stack([np.asarray(value, np.float64) for value in values])
    known = np.isfinite(stacked)
    return ratio(np.where(known, stacked, 0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def share_above(trial: Trial, measure: Measure, anomalous: bool, weight: Weights) -> Values:
    """Return the fraction of the anomalous, or of the ordinary, test alerts above the threshold of the measure."""
    rows = (trial.part == TEST) & (trial.anomalous == anomalous)
    own = weight[..., rows]
    return ratio(own @ (trial.scores[measure][rows] > trial.thresholds[measure]), own.sum(axis=-1))


def as_markdown(sample: Sample, trials: Sequence[Trial], found: Mapping[str, Estimate], rate: float) -> str:
    """Return the section of a sample: its alerts, the table of methods, and the measures by number of detections."""
    rounds = Counter(trial.class_ for trial in trials)
    names = [CLASSES[c].name for c in sorted(rounds)]
    others = int((~np.isin(sample.label, sample.left_out)).sum())
    of_class = {CLASSES[c].name: sample[sample.label == c] for c in sample.left_out}
    counts = ", ".join(
        f"{len(own)} {name} of {len(np.unique(own.object_id))} objects" for name, own in of_class.items()
    )
    lines = [
        f"## {sample.name}",
        "",
        f"{len(sample)} alerts of {len(np.unique(sample.object_id))} objects in {len(np.unique(sample.group))} groups: "
        f"{counts}; {others} others. Rounds with enough alerts for a reference: "
        f"{', '.join(f'{n} without {CLASSES[c].name}' for c, n in sorted(rounds.items()))}. "
        f"The choice alerts preferred `neighbours` in {found[PREFERRED].value:.0%} of them.",
        "",
        " | ".join(["| left out", *names, "mean |"]),
        "|".join(["", *["---"] * (len(names) + 2), ""]),
    ]
    titles = {method: f"`{method}`" if method in MEASURES else method for method in METHODS}
    titles |= {CHOSEN: "the measure that the choice alerts prefer", DIFFERENCE: "`neighbours` minus `mahalanobis`"}
    for method, title in titles.items():
        cells = [cell(found[f"{method}/{name}/roc_auc"]) for name in (*names, "mean")]
        lines.append(" | ".join([f"| {title}", *cells]) + " |")
    for measure in MEASURES:
        above = cell(found[f"{measure}/mean/realised"])
        title = f"recall of `{measure}` above its threshold for {rate:.0%}; ordinary alerts above it: {above}"
        cells = [cell(found[f"{measure}/{name}/recall"]) for name in (*names, "mean")]
        lines.append(" | ".join([f"| {title}", *cells]) + " |")
    lines += [
        "",
        "By number of detections, of the class and of the ordinary alerts alike (ROC AUC), where each of the two has "
        f"at least {LEAST_OBJECTS} objects:",
        "",
    ]
    lines += ["| detections | left out | `mahalanobis` | `neighbours` | `neighbours` minus `mahalanobis` |"]
    lines += ["|---|---|---|---|---|"]
    for name, (low, high) in DETECTIONS.items():
        inside = sample[(sample.detections >= low) & (sample.detections <= high)]
        for c in sorted(rounds):
            sides = (inside[inside.label == c], inside[inside.label != c])
            if min(len(np.unique(side.object_id)) for side in sides) < LEAST_OBJECTS:
                continue
            class_ = CLASSES[c].name
            cells = [cell(found[f"{method}/{class_}/roc_auc/{name}"]) for method in (*MEASURES, DIFFERENCE)]
            if found[f"{DIFFERENCE}/{class_}/roc_auc/{name}"].value is not None:
                lines.append(" | ".join([f"| {name}", class_, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell(estimate: Estimate) -> str:
    """Return a figure and its interval in three digits."""
    if estimate.value is None:
        return "undefined"
    interval = "" if estimate.low is None else f" ({estimate.low:.3f} to {estimate.high:.3f})"
    return f"{estimate.value:.3f}{interval}"
