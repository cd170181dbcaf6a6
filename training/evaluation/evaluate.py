"""`evaluate`: scores a split with a bundle, as it is served, and computes all figures with intervals.

It writes `evaluation.json` (an `Evaluation`) and `predictions.parquet` (its `Predictions`). It trains nothing, and
modifies neither the bundle nor the data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from broker_filter.config import Runtime, Section
from broker_filter.console import progress
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import WEIGHTS, Architecture, Card, Training, describe_problems
from broker_filter.scoring.scorer import LoadedPart, Model, open_model
from training.arguments import positive
from training.data.datasets import SPLITS, Dataset, DatasetCard, Split
from training.errors import EvaluationError
from training.evaluation.bootstrap import Estimate, as_card, estimate, resample, weights_by_object
from training.evaluation.histories import Histories
from training.evaluation.metrics import (
    RELIABILITY_BINS,
    Reliability,
    Values,
    Weights,
    confusion,
    confusion_shares,
    errors_if_calibrated,
    measure,
    measure_calibration,
    trials,
)
from training.evaluation.predictions import Predictions
from training.evaluation.served_speed import BATCHES, ServedSpeed, measure_served

EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.parquet"
IF_CALIBRATED = "ece_if_calibrated"
RELIABILITY = "reliability_"
"""Prefix of the bins of the reliability curve in a card."""
MAGNITUDE = "magpsf"
DECIDED = 0.5
"""Threshold that is used if a bundle recommends none."""
ALERTS_AT_ONCE = 256
MAX_EVALUATION_BYTES = 2**24


class ReliabilityBin(Section):
    """Alerts with similar predicted probabilities."""

    alerts: int
    said: float  # mean probability
    happened: Estimate  # the fraction for which the prediction holds

    def __str__(self) -> str:
        return f"{self.alerts} alerts, predicted {self.said:.3f}, observed {self.happened}"


class Evaluation(Section):
    """The contents of `evaluation.json`: the model, the data that it was evaluated on, and all figures."""

    model: str
    version: str
    weights_sha256: str
    architecture: Architecture
    training: Training
    dataset_sha256: str
    labels: str
    split: Split
    classes: tuple[str, ...]
    threshold: float
    alerts: dict[str, int]  # by true class
    objects: int
    figures: dict[str, Estimate]
    calibration: dict[str, Estimate]  # as `describe_calibration` names them
    confusion: tuple[tuple[Estimate, ...], ...]  # fractions of each true class (rows) predicted as each class
    reliability: tuple[ReliabilityBin, ...]
    judged: dict[str, int]  # number of objects that policies are evaluated on, by class
    speed: tuple[ServedSpeed, ...]

    @property
    def series(self) -> str:
        """Name of the series of runs that differ only in seed and amount of data: network, regimen, inputs."""
        network = self.architecture.arguments.get("backbone", self.architecture.name)
        regimen = self.training.evaluation.get("regimen", self.model)
        inputs = "images and metadata" if self.architecture.arguments.get("metadata") else "images"
        return f"{network}, {regimen}, {inputs}"

    @property
    def fraction(self) -> float:
        """Fraction of the training sources that the model was trained on."""
        return float(self.training.evaluation.get("fraction", 1))

    @property
    def unseen(self) -> bool:
        """Whether the model is known to be trained with this split, so that these objects were held out."""
        return self.training.evaluation.get("dataset_sha256") == self.dataset_sha256 and self.split == "test"

    def microseconds(self, batch: int) -> float:
        """Return the CPU time per alert in microseconds, at one of the measured batch sizes."""
        return next(speed.cpu_microseconds for speed in self.speed if speed.batch == batch)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read the evaluation in a directory. Raises EvaluationError if there is none, or if it is invalid."""
        file = path / EVALUATION
        try:
            if file.stat().st_size > MAX_EVALUATION_BYTES:
                raise EvaluationError(f"{file}: larger than {MAX_EVALUATION_BYTES} bytes, the limit for an evaluation")
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError as error:
            raise EvaluationError(f"{path}: not an evaluation: there is no {EVALUATION} in it") from error
        except ValidationError as error:
            raise EvaluationError(f"{file}: {describe_problems(error)}; evaluate the model again") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="name of a shipped bundle, or directory of a bundle")
    parser.add_argument(
        "--dataset", required=True, type=Path, metavar="DIR", help="directory of a data set that build-dataset wrote"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="split to evaluate on (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="inference threads (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory for the evaluation")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the bundle and print its figures."""
    runtime = Runtime(engine="onnxruntime", device="cpu", inference_threads=arguments.threads)
    model = open_model(arguments.bundle, runtime)
    dataset = Dataset.open(arguments.dataset)
    predictions = predict(model, dataset, arguments.split)
    network = network_for(model, dataset).bundle
    speed = [measure_served(network.directory, batch, arguments.threads) for batch in BATCHES]
    card = network.card.model_copy(update={"name": model.name, "version": model.version})
    evaluation = evaluate(card, dataset.card, arguments.split, predictions, speed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    predictions.write(arguments.out / PREDICTIONS)
    (arguments.out / EVALUATION).write_text(evaluation.model_dump_json(indent=1), encoding="utf-8")
    for name, figure in {**evaluation.figures, **evaluation.calibration}.items():
        print(f"{name:30} {figure}")


def predict(model: Model, dataset: Dataset, split: Split) -> Predictions:
    """Return the model's scores for a split, with the bundle's preprocessing and runtime.

    Raises EvaluationError if model and data set do not fit, if the split lacks a class, or if a score is not finite.
    """
    network = network_for(model, dataset)
    _check_fit(model, network, dataset)
    view, labels = dataset[split], model.labels
    classes, truth = _in_terms_of(labels, dataset.card.classes, view.label)
    asked = [network.bundle.card.outputs.labels.index(name) for name in labels if name in classes]
    if absent := [name for name, n in zip(classes, np.bincount(truth, minlength=len(classes)), strict=True) if not n]:
        raise EvaluationError(f"{dataset.directory}: split {split} has no alert of class {', '.join(absent)}")
    said, magpsf = [], []
    with progress(f"Scoring {split}", len(view)) as advance:
        for alerts in view.batches(ALERTS_AT_ONCE):
            said.append(network.run(alerts.raw))
            magpsf.append(
                alerts.metadata[:, alerts.columns.index(MAGNITUDE)]
                if MAGNITUDE in alerts.columns
                else np.full(len(alerts), np.nan)
            )
            advance(len(alerts))
    scores = np.concatenate([outputs["probabilities"][:, asked] for outputs in said])
    if broken := int((~np.isfinite(scores)).any(axis=1).sum()):
        raise EvaluationError(f"{model.bundle.directory}: {broken} of {len(scores)} scores are NaN or infinite")
    threshold = network.bundle.card.outputs.thresholds.get(labels[0], DECIDED)
    embeds = model.bundle.embedding is not None
    return Predictions(
        classes,
        view.alert_id,
        view.object_id,
        np.concatenate(magpsf),
        truth,
        scores,
        threshold,
        np.concatenate([outputs["embedding"] for outputs in said]) if embeds else None,
    )


def evaluate(
    card: Card, dataset: DatasetCard, split: Split, predictions: Predictions, speed: Sequence[ServedSpeed]
) -> Evaluation:
    """Return all figures of the predictions, with intervals over objects."""
    histories = Histories.of(predictions)
    measured = partial(_measure_all, predictions, histories)
    whole, drawn = measured(np.ones(len(predictions))), resample(measured, predictions.object_id)
    shares, drawn_shares = whole.pop("confusion"), drawn.pop("confusion")
    each = weights_by_object(predictions.object_id)
    known: dict[str, float | Values] = {**trials(predictions, each), **histories.trials()}
    of_class = confusion(predictions, each).sum(axis=-1)
    n_classes = len(predictions.classes)
    return Evaluation(
        model=card.name,
        version=card.version,
        weights_sha256=card.files[WEIGHTS],
        architecture=card.architecture,
        training=card.training,
        dataset_sha256=dataset.sha256,
        labels=dataset.labels,
        split=split,
        classes=predictions.classes,
        threshold=predictions.threshold,
        alerts=dict(zip(predictions.classes, np.bincount(predictions.truth).tolist(), strict=True)),
        objects=len(np.unique(predictions.object_id)),
        figures={name: Estimate.of(figure, drawn[name], known[name]) for name, figure in whole.items()},
        calibration=describe_calibration(predictions),
        confusion=tuple(
            tuple(Estimate.of(shares[t, d], drawn_shares[:, t, d], of_class[t]) for d in range(n_classes))
            for t in range(n_classes)
        ),
        reliability=describe_reliability(predictions),
        judged={name: int((histories.truth == c).sum()) for c, name in enumerate(predictions.classes)},
        speed=tuple(speed),
    )


def describe_calibration(predictions: Predictions) -> dict[str, Estimate]:
    """Return the figures of `measure_calibration` with intervals over objects, and `ece_if_calibrated`.

    The latter is the ECE of a perfectly calibrated model with the same predictions: its mean, and the central 95 % of
    its draws.
    """
    errors = errors_if_calibrated(predictions)
    return {
        **estimate(partial(measure_calibration, predictions), predictions.object_id, partial(trials, predictions)),
        IF_CALIBRATED: Estimate.of(float(errors.mean()), errors),
    }


def describe_reliability(predictions: Predictions) -> tuple[ReliabilityBin, ...]:
    """Return the reliability curve: the bins of `Reliability` that hold alerts, with intervals over objects."""

    def happened(weight: Weights) -> dict[str, Values]:
        return {"": Reliability.of(predictions, weight).happened}

    bins = Reliability.of(predictions, np.ones(len(predictions)))
    drawn = resample(happened, predictions.object_id)[""]
    objects = Reliability.of(predictions, weights_by_object(predictions.object_id)).weight
    return tuple(
        ReliabilityBin(
            alerts=int(bins.weight[b]),
            said=bins.said[b],
            happened=Estimate.of(bins.happened[b], drawn[:, b], objects[b]),
        )
        for b in np.flatnonzero(bins.weight).tolist()
    )


def calibration_for_card(predictions: Predictions) -> dict[str, float | int | str]:
    """Return slope, intercept, ECE and reliability curve of the predictions, with intervals, in the format of a card.

    The curve has a text for each bin of probabilities that holds alerts, for example `reliability_0.93_to_1.00`.
    """
    bins = {
        f"{RELIABILITY}{low:.2f}_to_{low + 1 / RELIABILITY_BINS:.2f}": str(one)
        for one in describe_reliability(predictions)
        for low in (min(int(one.said * RELIABILITY_BINS), RELIABILITY_BINS - 1) / RELIABILITY_BINS,)
    }
    return {**as_card(describe_calibration(predictions)), **bins}


def _measure_all(predictions: Predictions, histories: Histories, weight: Weights) -> dict[str, Values]:
    """Return the figures [...] and the normalised confusion matrix [..., C, C]."""
    return {
        **measure(predictions, weight),
        **histories.measure(weight),
        "confusion": confusion_shares(predictions, weight),
    }


def network_for(model: Model, dataset: Dataset) -> LoadedPart:
    """Return the network of the model that scores the alerts of the data set.

    Raises EvaluationError if the model does not take them all, or scores them with several networks.
    """
    where, directory = f"{dataset.directory}: holds alerts of", model.bundle.directory
    surveys = [Survey[name.upper()] for name in dataset.card.surveys]
    if others := [str(survey) for survey in surveys if survey not in model.surveys]:
        raise EvaluationError(
            f"{where} {', '.join(others)}, which {directory} does not take, only those of "
            f"{', '.join(map(str, model.surveys))}"
        )
    networks = [part for part in model.parts if not set(part.surveys).isdisjoint(surveys)]
    if len(networks) > 1:
        raise EvaluationError(
            f"{where} {', '.join(map(str, surveys))}, which different networks of {directory} score: evaluate it on a "
            "data set of each survey"
        )
    return networks[0]


def _check_fit(model: Model, network: LoadedPart, dataset: Dataset) -> None:
    """Raise EvaluationError if the data set's alerts are not valid input for the model's network."""
    card, directory = dataset.card, model.bundle.directory
    size = network.inputs.images.size
    if card.cutout_size < size:
        raise EvaluationError(
            f"{dataset.directory}: its cutouts have {card.cutout_size} px, but {directory} takes {size} px: "
            f"build it again with --cutout-size {size}"
        )
    dataset.check_pixels(network.inputs.images)
    if planes := dataset.missing_planes(network.inputs):
        raise EvaluationError(
            f"{dataset.directory}: it lacks planes that {directory} needs: build it again with --planes "
            f"{' '.join(planes)}"
        )
    if network.inputs.light_curve is not None and not dataset.has_light_curves:
        raise EvaluationError(f"{dataset.directory}: has no light curves, which {directory} takes: build it again")
    if missing := [column.name for column in network.inputs.metadata if column.name not in card.columns]:
        raise EvaluationError(f"{dataset.directory}: lacks the columns {', '.join(missing)}, which {directory} needs")
    for label in model.labels:
        if others := sorted(set(card.surveys) - set(map(str, model.surveys_of(label)))):
            raise EvaluationError(
                f"{dataset.directory}: holds alerts of {', '.join(others)}, for which {label} of {directory} was not "
                "trained: evaluate it on a data set without them"
            )


def _in_terms_of(
    labels: Sequence[str], classes: Sequence[str], label: NDArray[np.int64]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the classes to evaluate, and the class of each alert, given the model's labels and the data set's classes.

    If the model has more labels than the data set has classes (as the bundle `classes`), the data set's classes are
    used. Raises EvaluationError if they do not match.
    """
    if len(labels) == 1 and labels[0] in classes:
        yes = classes.index(labels[0])
        no = classes[1 - yes] if len(classes) == 2 else f"not_{labels[0]}"
        return (no, labels[0]), (label == yes).astype(np.int64)
    if set(classes) <= set(labels):
        asked = tuple(name for name in labels if name in classes)
        return asked, np.array([asked.index(name) for name in classes])[label]
    raise EvaluationError(
        f"the model's labels ({', '.join(labels)}) do not match the data set's classes ({', '.join(classes)})"
    )
