"""`anomalies`: measures how well alerts of a held-out class are found as anomalies.

The embedding is compared with other methods. Each class in turn is left out of the embedder's training, of the ordinary
alerts that form the reference, and of the training of the isolation forests. The split is by object, so that no judged
ordinary alert shares an object with the reference. The figures that compare measures on the validation split use other
objects than all other figures.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from broker_filter.anomalies.neighbours import Embeddings
from broker_filter.anomalies.reference import Measure
from broker_filter.anomalies.score import Cloud
from broker_filter.config import Runtime
from broker_filter.packets.batch import Survey
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import WEIGHTS, Inputs, MetadataColumn
from broker_filter.scoring.labels import UNLABELLED, parse_rule, read_labels
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import LoadedPart, open_model
from broker_filter.streaming.archives import read_packets
from training.arguments import positive, share
from training.bundles.train_classes import COLUMN
from training.data.datasets import held_out, sha256_of
from training.data.light_curve_features import light_curve_features
from training.embedding.baselines import by_isolation_forest, by_pixels
from training.embedding.embedder import Recipe, embed, show, train
from training.embedding.train_embedder import LIGHT_CURVE, METADATA, SIZE, TRUNK, Named, decode, side_by_side
from training.errors import DatasetError, TrainingError
from training.evaluation.bootstrap import Estimate, resample, weights_by_object
from training.evaluation.metrics import Values, Weights, harmonic_mean, rank, ratio

CLASSES = ("VS=VS", "asteroid=asteroid", "SN=SN,SN_cand", "AGN=AGN")
"""Class rules: the weak labels with at least a dozen real objects; each of these classes is left out once."""
BOGUS = "bogus=bogus,likely_bogus"
"""Class rule of the bogus alerts. They are part of the training, as for the shipped embedder, but not of the
reference."""
VALIDATION, TEST = 0.2, 0.25
"""Fractions of the objects; VALIDATION is a fraction of the objects outside the test split."""
SPLIT_SEEDS = {"test": 2026, "validation": 2027}
STEPS = 250
"""Number of training steps for a few hundred alerts; many more steps overfit them."""
SERVED = "mahalanobis, whole and modalities"
FORESTS = ("forest of features", "forest of features, with bogus alerts", "forest of pixels")
INTRODUCTION = """\
# Anomalies: finding held-out classes

Written by `python -m training anomalies`. Each class in turn is left out of the self-supervised training of the
embedder (which uses the other labelled alerts, including bogus ones, and no simulated alerts), of the ordinary alerts
that form the reference, and of the training of the isolation forests. A cell gives the ROC AUC for separating the
class from ordinary alerts of held-out objects (95 % intervals, bootstrapped over objects), and the recall at the
threshold that {rate:.0%} of the ordinary alerts of the validation objects exceed. The last column gives the ROC AUC on
the validation objects. The trunk is unchanged: it has learnt to separate real from bogus on alerts of all classes.
"""
TABLE, FIGURES = "anomalies.md", "anomalies.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The result of leaving out one class, over all N alerts, some of which are judged."""

    name: str
    ordinary: int  # number of ordinary alerts in the reference
    anomalous: NDArray[np.bool_]  # [N] alerts of the left-out class
    validation: NDArray[np.bool_]  # [N] alerts for choosing measures and thresholds
    test: NDArray[np.bool_]  # [N] alerts for the figures
    scores: dict[str, NDArray[np.float64]]  # [N] by measure; NaN where not judged

    def threshold(self, measure: str, rate: float) -> float:
        """Return the score that a fraction `rate` of the ordinary validation alerts exceeds."""
        return float(np.quantile(self.scores[measure][self.validation & ~self.anomalous], 1 - rate))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `anomalies`."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the columns candid and {COLUMN}")
    parser.add_argument("--trunk", default="default", help="bundle with the network StampNet (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="steps of each training (default: %(default)s)")
    parser.add_argument(
        "--rate", type=share, default=0.05, help="fraction of ordinary alerts to flag (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"directory for {TABLE} and {FIGURES}")


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate once for each class, write the results and print the table."""
    torch.set_num_threads(1)
    trunk = open_model(arguments.trunk, Runtime(engine="onnxruntime", device="cpu", inference_threads=1)).part(
        Survey.ZTF
    )
    if trunk.bundle.card.architecture.name != TRUNK:
        raise TrainingError(f"{arguments.trunk}: its network is not {TRUNK}, so it cannot be the trunk")
    labels = read_labels(arguments.labels, COLUMN, [parse_rule(rule) for rule in (*CLASSES, BOGUS)])
    alerts = decode(read_packets(arguments.inputs), trunk.bundle.card.inputs)
    label = labels.of(alerts.alert_id, alerts.object_id)
    threshold = trunk.bundle.card.outputs.thresholds[trunk.bundle.card.outputs.labels[0]]
    known = label != UNLABELLED
    if not known.any():
        raise DatasetError(f"{arguments.labels}: no label matches any of the {len(label)} alerts of the inputs")
    alerts, label = Named(alerts.raw[known], alerts.alert_id[known], alerts.object_id[known]), label[known]
    passes = (trunk.run(alerts.raw)["probabilities"][:, 0] > threshold) & (label < len(CLASSES))
    for c, name in enumerate(labels.classes[: len(CLASSES)]):
        if not (passes & (label == c)).any():
            raise DatasetError(f"{arguments.labels}: no alert of class {name} passes the cut, so it cannot be left out")
    cases = leave_out(
        trunk, alerts, label, passes, labels.classes[: len(CLASSES)], Recipe(steps=arguments.steps), arguments.out
    )
    found = on_validation(cases)
    figures, resampled = judge(cases, arguments.rate, alerts.object_id)
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = trials(cases, alerts.object_id)
    text = as_markdown(cases, found, arguments.rate, figures, resampled, known)
    (arguments.out / TABLE).write_text(text, encoding="utf-8")
    estimates = {name: Estimate.of(value, resampled[name], known[name]).model_dump() for name, value in figures.items()}
    (arguments.out / FIGURES).write_text(json.dumps({"validation": found, "figures": estimates}, indent=1))
    print(text)
    for case in cases:
        checkpoint_of(arguments.out, case.name).unlink(missing_ok=True)


def checkpoint_of(out: Path, class_: str) -> Path:
    """Return the path of the checkpoint of the training without `class_`."""
    return out / f"{class_}.ckpt"


def leave_out(
    trunk: LoadedPart,
    alerts: Named,
    label: NDArray[np.int64],
    passes: NDArray[np.bool_],
    classes: Sequence[str],
    recipe: Recipe,
    out: Path,
) -> list[LeftOut]:
    """Leave each of the classes out in turn.

    `label` [N]: index into `classes`, or larger for other alerts. `passes` [N]: whether an alert passes the real/bogus
    cut; alerts that do not are trained on but not judged. `out`: directory of the checkpoints, to resume from.
    """
    inputs = Inputs(
        images=trunk.bundle.card.inputs.images,
        metadata=tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in METADATA),
        light_curve=LIGHT_CURVE,
    )
    network = new_network(trunk, recipe.seed)
    shown = show(network, alerts.raw, inputs)
    curves = alerts.raw.light_curves
    assert curves is not None
    features = np.concatenate([alerts.raw.metadata, light_curve_features(curves)], axis=1)
    images = prepare_images(alerts.raw.cutouts, alerts.raw.cutout_box, inputs.images, alerts.raw.variance)
    test = held_out(alerts.object_id, TEST, SPLIT_SEEDS["test"])
    rest = np.where(test, UNLABELLED, label)
    validation = ~test & held_out_of_each(alerts.object_id, rest, VALIDATION, SPLIT_SEEDS["validation"])
    trained_on = ~test & ~validation
    cases = []
    for c, name in enumerate(classes):
        rest = trained_on & (label != c)
        seen = rest & passes
        network = new_network(trunk, recipe.seed)
        of = f"{name} left out of {sha256_of(alerts.alert_id[rest])}, on {trunk.bundle.card.files[WEIGHTS]}"
        train(network, [(shown[rest], 1.0)], recipe, checkpoint=checkpoint_of(out, name), of=of)
        scores = {
            **by_embedding(side_by_side(embed(network, shown)), seen, validation & passes & (label != c), label),
            FORESTS[0]: by_isolation_forest(features[seen], features),
            FORESTS[1]: by_isolation_forest(features[rest], features),
            FORESTS[2]: by_pixels(images[seen], images),
        }
        unseen = test | (trained_on & (label == c))  # training objects of the left-out class are held out, too
        cases.append(LeftOut(name, int(seen.sum()), label == c, validation & passes, unseen & passes, scores))
        log.info(
            "%s left out: %d ordinary alerts, %d anomalous alerts to find",
            name,
            seen.sum(),
            (unseen & (label == c)).sum(),
        )
    return cases


def held_out_of_each(
    object_id: NDArray[np.str_], label: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.bool_]:
    """Return a mask bool[N]: True for alerts of a random fraction of the objects of each class.

    The fraction is drawn within each class, so that rare classes are included. An object whose alerts have several
    labels counts for the class of its first alert.
    """
    objects, first, index = np.unique(object_id, return_index=True, return_inverse=True)
    chosen = np.zeros(len(objects), np.bool_)
    for c in np.unique(label[first]).tolist():
        of_class = label[first] == c
        chosen[of_class] = held_out(objects[of_class], share, seed)
    held: NDArray[np.bool_] = chosen[index]
    return held


def new_network(trunk: LoadedPart, seed: int) -> AlertEmbedder:
    """Return an untrained embedder with the given trunk."""
    torch.manual_seed(seed)
    network = AlertEmbedder(TRUNK, len(METADATA), SIZE)
    network.trunk.network.load_state_dict(load_file(trunk.bundle.directory / WEIGHTS))
    return network.eval()


def by_embedding(
    embedding: Embeddings,
    seen: NDArray[np.bool_],
    others: NDArray[np.bool_],
    label: NDArray[np.int64],
    measures: Sequence[Measure] = get_args(Measure),
) -> dict[str, NDArray[np.float64]]:
    """Return the scores float64[N] of embeddings [N, D], by name.

    There is one name for each distance measure and each combination of parts. `seen`: the ordinary alerts of the
    reference; `others`: held-out ordinary alerts that standardise the distances.
    """
    scores: dict[str, NDArray[np.float64]] = {}
    for measure in measures:
        distances = Cloud(embedding[seen], len(MODALITIES), measure, label[seen]).distances(embedding)
        unusual = standardised(distances, distances[others])
        scores |= {
            f"{measure}, whole and modalities": unusual.mean(axis=1),
            f"{measure}, modalities": unusual[:, 1:].mean(axis=1),
            f"{measure}, whole": unusual[:, 0],
        }
    return scores


def standardised(distances: NDArray[np.float64], ordinary: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardise distances [N, P] with mean and standard deviation of `ordinary` [K, P].

    Returns float64[N, P]. No value is missing, because every real alert has all modalities.
    """
    unusual: NDArray[np.float64] = (distances - ordinary.mean(axis=0)) / ordinary.std(axis=0)
    return unusual


def on_validation(cases: Sequence[LeftOut]) -> dict[str, float]:
    """Return the mean ROC AUC of each measure over the classes that occur in the validation split."""
    there = [case for case in cases if (case.validation & case.anomalous).any()]
    return {
        name: float(np.mean([roc_auc(case, name, case.validation, np.ones(len(case.validation))) for case in there]))
        for name in cases[0].scores
    }


def roc_auc(case: LeftOut, measure: str, rows: NDArray[np.bool_], weight: Weights) -> Values:
    """Return the probability that an alert of the class scores higher than an ordinary alert, over `rows` [N]."""
    return rank(case.anomalous[rows], case.scores[measure][rows], weight[..., rows]).roc_auc


def judge(
    cases: Sequence[LeftOut], rate: float, object_id: NDArray[np.str_]
) -> tuple[dict[str, float], dict[str, Values]]:
    """Return every figure by name, `<measure>/<class>/<figure>`, and the same figures in every resample of the objects.

    The class `mean` is the mean over the classes.
    """

    def figures(weight: Weights) -> dict[str, Values]:
        found: dict[str, Values] = {}
        for measure in cases[0].scores:
            of_class = [_figures(case, measure, rate, weight) for case in cases]
            for case, values in zip(cases, of_class, strict=True):
                found |= {f"{measure}/{case.name}/{name}": value for name, value in values.items()}
            for name in of_class[0]:
                found[f"{measure}/mean/{name}"] = np.mean([values[name] for values in of_class], axis=0)
        return found

    whole = {name: float(value) for name, value in figures(np.ones(len(object_id))).items()}
    return whole, resample(figures, object_id)


def trials(cases: Sequence[LeftOut], object_id: NDArray[np.str_]) -> dict[str, float]:
    """Return the number of objects behind each figure of `judge`, by name."""
    each = weights_by_object(object_id)
    found: dict[str, float] = {}
    for measure in cases[0].scores:
        of_case = []
        for case in cases:
            anomalous, ordinary = (float(each @ (case.test & side)) for side in (case.anomalous, ~case.anomalous))
            of_case.append({"roc_auc": min(anomalous, ordinary), "recall": anomalous, "realised": ordinary})
        for case, known in zip(cases, of_case, strict=True):
            found |= {f"{measure}/{case.name}/{name}": value for name, value in known.items()}
        for name in of_case[0]:
            found[f"{measure}/mean/{name}"] = float(harmonic_mean([np.asarray(known[name]) for known in of_case]))
    return found


def _figures(case: LeftOut, measure: str, rate: float, weight: Weights) -> dict[str, Values]:
    rows, flagged = case.test, case.scores[measure] > case.threshold(measure, rate)
    weight_of = {True: weight[..., rows & case.anomalous], False: weight[..., rows & ~case.anomalous]}
    share = {
        anomalous: ratio(weight_of[anomalous] @ flagged[rows & (case.anomalous == anomalous)], part.sum(axis=-1))
        for anomalous, part in weight_of.items()
    }
    return {"roc_auc": roc_auc(case, measure, rows, weight), "recall": share[True], "realised": share[False]}


def as_markdown(
    cases: Sequence[LeftOut],
    found: Mapping[str, float],
    rate: float,
    figures: Mapping[str, float],
    resampled: Mapping[str, Values],
    known: Mapping[str, float] | None = None,
) -> str:
    """Return the page of results, in Markdown.

    It says what was done, how well each class is found, and how much better two measures are than the isolation
    forests: the served measure, and the measure of the embedding that is the best on validation, by `found`. `known`:
    the result of `trials`.
    """
    names = [case.name for case in cases]

    def cell(measure: str, class_: str) -> str:
        at = f"{measure}/{class_}"
        name = f"{at}/roc_auc"
        auc = Estimate.of(figures[name], resampled[name], (known or {}).get(name))
        return f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f}); {figures[f'{at}/recall']:.0%}"

    to_find = [
        f"{case.ordinary}; {(case.test & case.anomalous).sum()}; {(case.validation & case.anomalous).sum()}"
        for case in cases
    ]
    lines = [
        INTRODUCTION.format(rate=rate),
        " | ".join(["| left out", *names, "mean", "ordinary alerts flagged", "mean on validation |"]),
        "|".join(["", *["---"] * (len(names) + 4), ""]),
        " | ".join(["| reference alerts; anomalous test alerts; anomalous validation alerts", *to_find, "", "", "|"]),
    ]
    for measure in cases[0].scores:
        title = f"**{measure}**" if measure == SERVED else measure
        cells = [cell(measure, class_) for class_ in (*names, "mean")]
        cells += [f"{figures[f'{measure}/mean/realised']:.1%}", f"{found[measure]:.3f} |"]
        lines.append(" | ".join([f"| {title}", *cells]))
    best = max((measure for measure in found if measure not in FORESTS), key=found.__getitem__)
    for measure, what in {SERVED: "the default of the service", best: "best on validation"}.items():
        lines += ["", f"The mean ROC AUC of `{measure}` ({what}) exceeds"]
        for forest in FORESTS:
            mine, its = (f"{name}/mean/roc_auc" for name in (measure, forest))
            ahead = Estimate.of(figures[mine] - figures[its], resampled[mine] - resampled[its])
            lines.append(f"that of the {forest} by {ahead}{'.' if forest == FORESTS[-1] else ','}")
    return "\n".join(lines) + "\n"
