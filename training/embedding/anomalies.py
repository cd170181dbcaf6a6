"""`anomalies`: how well alerts of a class that nothing has seen are found as strange, by the embedding and by others.

One class after another is left out: of the embedder's training, of the ordinary alerts that others are compared with,
and of what the isolation forests are grown on. Objects are split, so that no ordinary alert that is judged has another
of its object among those. What measures of the embedding are worth on the validation is said of objects that no other
figure is of.
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

from broker_filter.config import Runtime
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.anomaly import Cloud
from broker_filter.scoring.bundle import WEIGHTS, Inputs, MetadataColumn
from broker_filter.scoring.labels import parse_rule, read_labels
from broker_filter.scoring.neighbours import Embeddings
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.reference import Measure
from broker_filter.scoring.scorer import Model, open_model
from broker_filter.streaming.archives import read_packets
from training.arguments import positive, share
from training.bundles.train_classes import COLUMN, UNLABELLED
from training.data.datasets import held_out, sha256_of
from training.embedding.baselines import by_isolation_forest, by_pixels
from training.embedding.embedder import Recipe, embed, show, train
from training.embedding.light_curve_features import light_curve_features
from training.embedding.train_embedder import LIGHT_CURVE, METADATA, SIZE, TRUNK, Named, decode, side_by_side
from training.errors import DatasetError, TrainingError
from training.evaluation.bootstrap import Estimate, resample, weights_by_object
from training.evaluation.metrics import Values, Weights, harmonic_mean, rank, ratio

CLASSES = ("VS=VS", "asteroid=asteroid", "SN=SN,SN_cand", "AGN=AGN")
"""Of the weak labels, those with a dozen real objects: each is left out."""
BOGUS = "bogus=bogus,likely_bogus"
"""Trained on, as in the embedder that ships; what passes the cut of them stands for nothing ordinary."""
VALIDATION, TEST = 0.2, 0.25
"""Shares of the objects; the first is of those that the second leaves."""
SPLIT_SEEDS = {"test": 2026, "validation": 2027}
STEPS = 250
"""Of training on a few hundred alerts; many more, and they are learnt by heart."""
SERVED = "mahalanobis, whole and modalities"
FORESTS = ("forest of features", "forest of features, bogus ones too", "forest of pixels")
INTRODUCTION = """\
# Anomalies: classes that nothing had seen

Written by `python -m training anomalies`. Each class in turn is left out of the embedder's training (self-supervised,
on the labelled alerts that are left, bogus ones among them, and no simulated ones), of the ordinary alerts that others
are compared with, and of what the isolation forests are grown on. A cell has the ROC AUC of telling the class from
ordinary alerts of unseen objects (95 %, bootstrap by object), and the recall at the threshold that {rate:.0%} of the
ordinary alerts of other unseen objects are above, the validation's; the last column has the ROC AUC among those.
The trunk stays as it is: it has learnt real and bogus from alerts of all classes.
"""
TABLE, FIGURES = "anomalies.md", "anomalies.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What became of one class's leaving out: over all N alerts, of which some are judged."""

    name: str
    ordinary: int  # alerts that the others are compared with
    anomalous: NDArray[np.bool_]  # [N] is of the class
    validation: NDArray[np.bool_]  # [N] measures are chosen, and thresholds found, by these
    test: NDArray[np.bool_]  # [N] and figures are of these
    scores: dict[str, NDArray[np.float64]]  # [N] each, by measure; NaN where it was not judged

    def threshold(self, measure: str, rate: float) -> float:
        """What a share `rate` of the ordinary alerts of the validation is above."""
        return float(np.quantile(self.scores[measure][self.validation & ~self.anomalous], 1 - rate))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `anomalies` takes."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="ZTF alerts: files, folders, archives")
    parser.add_argument("--labels", required=True, type=Path, help=f"table with the column {COLUMN}, by candid")
    parser.add_argument("--trunk", default="default", help="bundle of StampNet (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--rate", type=share, default=0.05, help="share to flag (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"for {TABLE} and {FIGURES}")


def run(arguments: argparse.Namespace) -> None:
    """Trains and judges once for each class, and prints the table."""
    torch.set_num_threads(1)
    trunk = open_model(arguments.trunk, Runtime(engine="onnxruntime", device="cpu", inference_threads=1))
    if trunk.bundle.card.architecture.name != TRUNK:
        raise TrainingError(f"{arguments.trunk}: is no {TRUNK}: its network cannot be the trunk")
    labels = read_labels(arguments.labels, COLUMN, [parse_rule(rule) for rule in (*CLASSES, BOGUS)])
    alerts = decode(read_packets(arguments.inputs), trunk.bundle.card.inputs.images.size)
    label = labels.of(alerts.alert_id, alerts.object_id)
    threshold = trunk.bundle.card.outputs.thresholds[trunk.labels[0]]
    known = label != UNLABELLED
    if not known.any():
        raise DatasetError(f"{arguments.labels}: none of its labels is of one of the {len(label)} alerts of the inputs")
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
    """Where the training that a class is left out of keeps what it has come to."""
    return out / f"{class_}.ckpt"


def leave_out(
    trunk: Model,
    alerts: Named,
    label: NDArray[np.int64],
    passes: NDArray[np.bool_],
    classes: Sequence[str],
    recipe: Recipe,
    out: Path,
) -> list[LeftOut]:
    """Leaves each of the classes out. `label` [N]: an index into them, or beyond; `passes` [N]: the cut, what does not
    is trained on and not judged. `out`: where each training keeps a checkpoint, to go on from."""
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
    images = prepare_images(alerts.raw.cutouts, alerts.raw.cutout_box, inputs.images)
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
        unseen = test | (trained_on & (label == c))  # of what is left out, what would be trained on is unseen, too
        cases.append(LeftOut(name, int(seen.sum()), label == c, validation & passes, unseen & passes, scores))
        log.info("%s left out: %d ordinary alerts, %d of it to find", name, seen.sum(), (unseen & (label == c)).sum())
    return cases


def held_out_of_each(
    object_id: NDArray[np.str_], label: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.bool_]:
    """True for the alerts [N] of a random share of the objects of each class: a rare one has objects there, too.

    An object whose alerts have several labels is of the first one's class.
    """
    objects, first, index = np.unique(object_id, return_index=True, return_inverse=True)
    chosen = np.zeros(len(objects), np.bool_)
    for c in np.unique(label[first]).tolist():
        of_class = label[first] == c
        chosen[of_class] = held_out(objects[of_class], share, seed)
    held: NDArray[np.bool_] = chosen[index]
    return held


def new_network(trunk: Model, seed: int) -> AlertEmbedder:
    """An embedder that is not trained, on the trunk."""
    torch.manual_seed(seed)
    network = AlertEmbedder(TRUNK, len(METADATA), SIZE)
    network.trunk.network.load_state_dict(load_file(trunk.bundle.directory / WEIGHTS))
    return network.eval()


def by_embedding(
    embedding: Embeddings, seen: NDArray[np.bool_], others: NDArray[np.bool_], label: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """The scores [N] by each measure of the embedding [N, D], as they are served, and by its parts; `seen` are the
    ordinary ones, `others` the ordinary ones by which distances are put in units of what is usual."""
    scores: dict[str, NDArray[np.float64]] = {}
    for measure in get_args(Measure):
        distances = Cloud(embedding[seen], len(MODALITIES), measure, label[seen]).distances(embedding)
        unusual = standardised(distances, distances[others])
        scores |= {
            f"{measure}, whole and modalities": unusual.mean(axis=1),
            f"{measure}, modalities": unusual[:, 1:].mean(axis=1),
            f"{measure}, whole": unusual[:, 0],
        }
    return scores


def standardised(distances: NDArray[np.float64], ordinary: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances [N, P] in deviations of ordinary alerts' [K, P]. (Every real alert has all modalities.)"""
    unusual: NDArray[np.float64] = (distances - ordinary.mean(axis=0)) / ordinary.std(axis=0)
    return unusual


def on_validation(cases: Sequence[LeftOut]) -> dict[str, float]:
    """How well each measure finds the classes among the objects of the validation: the mean over those that are
    there."""
    there = [case for case in cases if (case.validation & case.anomalous).any()]
    return {
        name: float(np.mean([roc_auc(case, name, case.validation, np.ones(len(case.validation))) for case in there]))
        for name in cases[0].scores
    }


def roc_auc(case: LeftOut, measure: str, rows: NDArray[np.bool_], weight: Weights) -> Values:
    """The chance that an alert of the class is called stranger than an ordinary one, over `rows` [N]."""
    return rank(case.anomalous[rows], case.scores[measure][rows], weight[..., rows]).roc_auc


def judge(
    cases: Sequence[LeftOut], rate: float, object_id: NDArray[np.str_]
) -> tuple[dict[str, float], dict[str, Values]]:
    """Every figure by name, `<measure>/<class>/<figure>`, and in every resample of the objects; the class `mean` is the
    mean of the others."""

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
    """How many objects each figure of `judge` is of."""
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
    """The page: what was done, a table of how well each class is found, and what two measures are ahead by: the one
    that is served, and the embedding's that is the best on validation, by `found`. `known`: what `trials` gave."""
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
        " | ".join(["| left out", *names, "mean", "ordinary ones flagged", "mean on validation |"]),
        "|".join(["", *["---"] * (len(names) + 4), ""]),
        " | ".join(["| alerts compared with; to find; on validation", *to_find, "", "", "|"]),
    ]
    for measure in cases[0].scores:
        title = f"**{measure}**" if measure == SERVED else measure
        cells = [cell(measure, class_) for class_ in (*names, "mean")]
        cells += [f"{figures[f'{measure}/mean/realised']:.1%}", f"{found[measure]:.3f} |"]
        lines.append(" | ".join([f"| {title}", *cells]))
    best = max((measure for measure in found if measure not in FORESTS), key=found.__getitem__)
    for measure, what in {SERVED: "what is served unless another is asked for", best: "best on validation"}.items():
        lines += ["", f"The mean ROC AUC of `{measure}`, {what}, is ahead"]
        for forest in FORESTS:
            mine, its = (f"{name}/mean/roc_auc" for name in (measure, forest))
            ahead = Estimate.of(figures[mine] - figures[its], resampled[mine] - resampled[its])
            lines.append(f"of the {forest} by {ahead}{'.' if forest == FORESTS[-1] else ','}")
    return "\n".join(lines) + "\n"
