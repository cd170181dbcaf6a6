"""Evaluation of a bundle: scores equal to those of the service, complete figures, and clear errors."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("galsim", reason="simulated alerts need the extra `demo`")

from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import MetadataColumn, open_bundle
from broker_filter.scoring.labels import parse_rule, read_labels
from broker_filter.scoring.scorer import Model, Scorer, open_model
from broker_filter.simulate import SimulatedAlert, simulate_night
from training.data.build_dataset import build_dataset
from training.data.datasets import Dataset
from training.errors import EvaluationError
from training.evaluation.evaluate import EVALUATION, PREDICTIONS, Evaluation, evaluate, predict
from training.evaluation.predictions import Predictions
from training.evaluation.served_speed import BATCHES

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model() -> Model:
    ztf = open_bundle("default").part("ztf").directory
    return open_model(str(ztf), Runtime(engine="onnxruntime", device="cpu", inference_threads=1))


@pytest.fixture(scope="module")
def night() -> list[SimulatedAlert]:
    return list(simulate_night(120, seed=11))


def build_from(night: list[SimulatedAlert], directory: Path, cutout_size: int = 63) -> Dataset:
    """Return the night as a data set with true labels."""
    packets = directory / "packets"
    packets.mkdir()
    with (directory / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["candid", "truth"])
        for alert in night:
            (packets / f"{alert.alert_id}.avro").write_bytes(alert.packet)
            table.writerow([alert.alert_id, "sky" if alert.is_real else "detector"])
    rules = [parse_rule("bogus=detector"), parse_rule("real=sky")]
    labels = read_labels(directory / "labels.csv", "truth", rules)
    return build_dataset([packets], labels, directory / "dataset", cutout_size=cutout_size)


@pytest.fixture(scope="module")
def dataset(night: list[SimulatedAlert], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build_from(night, tmp_path_factory.mktemp("night"))


def test_scores_are_bit_identical_to_those_of_the_service(
    model: Model, dataset: Dataset, night: list[SimulatedAlert]
) -> None:
    predictions = predict(model, dataset, "train")
    packets = [Packet(alert.packet, FilePosition("night", record=i)) for i, alert in enumerate(night)]
    scorer = Scorer((model,))
    alerts, _ = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=("magpsf",)).decode(packets)
    rows = [alerts.alert_id.tolist().index(one) for one in predictions.alert_id.tolist()]
    assert np.array_equal(predictions.probabilities, scorer.score(alerts).models[0].probabilities[rows])
    assert np.array_equal(predictions.magpsf, alerts.column("magpsf")[rows])
    truly_real = {alert.alert_id for alert in night if alert.is_real}
    assert [one in truly_real for one in predictions.alert_id.tolist()] == (predictions.truth == 1).tolist()


def test_the_files_of_the_command_can_be_read_back(dataset: Dataset, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "evaluate", "default", "--split", "train"]
    command += ["--dataset", str(dataset.directory), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    evaluation = Evaluation.read(tmp_path)
    assert evaluation.classes == ("bogus", "real")
    assert sum(evaluation.alerts.values()) == len(dataset["train"]) == sum(b.alerts for b in evaluation.reliability)
    assert evaluation.dataset_sha256 == dataset.card.sha256
    for figure in evaluation.figures.values():
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        assert 0 <= figure.low <= figure.high <= 1
    assert f"{'roc_auc':30} {evaluation.figures['roc_auc']}" in done.stdout
    assert [speed.batch for speed in evaluation.speed] == list(BATCHES)
    assert all(speed.alerts_per_second > 1 and speed.peak_megabytes > 10 for speed in evaluation.speed)
    predictions = Predictions.read(tmp_path / PREDICTIONS, evaluation.classes, evaluation.threshold)
    assert len(predictions) == len(dataset["train"])
    assert (predictions.decided == predictions.truth).mean() == pytest.approx(evaluation.figures["accuracy"].value)


def test_rows_of_the_confusion_matrix_sum_to_one(model: Model, dataset: Dataset) -> None:
    predictions = predict(model, dataset, "train")
    evaluation = evaluate(model.parts[0].bundle.card, dataset.card, "train", predictions, [])
    recall = evaluation.confusion[1][1].value
    assert recall == evaluation.figures["recall"].value
    for row in evaluation.confusion:
        assert sum(cell.value or 0 for cell in row) == pytest.approx(1)


def test_cutouts_that_are_too_small_are_refused(model: Model, night: list[SimulatedAlert], tmp_path: Path) -> None:
    small = build_from(night[:60], tmp_path, cutout_size=45)
    with pytest.raises(EvaluationError, match=r"cutouts have 45 px, but .* takes 63 px: build it again"):
        predict(model, small, "test")


def test_missing_columns_are_refused(model: Model, dataset: Dataset) -> None:
    card = model.parts[0].bundle.card
    inputs = card.inputs.model_copy(update={"metadata": (MetadataColumn(name="seeing_of_tomorrow", fill=0),)})
    [part] = model.parts
    altered = replace(part.bundle, card=card.model_copy(update={"inputs": inputs}))
    thirsty = replace(model, parts=(replace(part, bundle=altered),))
    with pytest.raises(EvaluationError, match="lacks the columns seeing_of_tomorrow"):
        predict(thirsty, dataset, "test")


def test_a_split_without_a_class_is_refused(model: Model, dataset: Dataset) -> None:
    one_sided = Dataset.open(dataset.directory)
    one_sided.label = np.ones_like(one_sided.label)
    with pytest.raises(EvaluationError, match="split test has no alert of class bogus"):
        predict(model, one_sided, "test")


def test_a_data_set_with_other_classes_is_refused(model: Model, dataset: Dataset) -> None:
    other = Dataset.open(dataset.directory)
    other.card = other.card.model_copy(update={"classes": ("VS", "SN")})
    with pytest.raises(
        EvaluationError, match=r"the model's labels \(real\) do not match the data set's classes \(VS, SN\)"
    ):
        predict(model, other, "test")


def test_a_model_with_more_labels_is_evaluated_on_the_classes_of_the_data_set(dataset: Dataset) -> None:
    model = open_model("classes", Runtime(engine="onnxruntime", device="cpu", inference_threads=1))
    other = Dataset.open(dataset.directory)
    other.card = other.card.model_copy(update={"classes": ("SN", "asteroid")})
    predictions, view = predict(model, other, "test"), other["test"]
    assert predictions.classes == predictions.labels == ("asteroid", "SN")
    chosen = [model.labels.index(name) for name in predictions.labels]
    assert np.array_equal(predictions.probabilities, model.parts[0].run(view.read().raw)["probabilities"][:, chosen])
    assert np.array_equal(predictions.truth, 1 - view.label)


def test_alerts_of_another_survey_are_refused(model: Model, dataset: Dataset) -> None:
    other = Dataset.open(dataset.directory)
    other.card = other.card.model_copy(update={"surveys": ("lsst",)})
    with pytest.raises(EvaluationError, match="alerts of lsst"):
        predict(model, other, "test")


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": "x"}'])
def test_a_truncated_evaluation_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / EVALUATION).write_bytes(content)
    with pytest.raises(EvaluationError, match=r"evaluation\.json: .*evaluate the model again"):
        Evaluation.read(tmp_path)


def test_truncated_predictions_are_refused(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / PREDICTIONS
    predict(model, dataset, "test").write(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(EvaluationError, match="not a table of predictions"):
        Predictions.read(path, ("bogus", "real"), 0.5)


def test_a_perfect_model_has_no_interval_of_zero_width(dataset: Dataset) -> None:
    view = dataset["train"]
    scores = np.where(view.label == 1, 0.99, 0.01).astype(np.float32)[:, None]
    perfect = Predictions(
        ("bogus", "real"), view.alert_id, view.object_id, np.full(len(view), 18.0), view.label, scores, threshold=0.5
    )
    card = open_model("default", Runtime(engine="onnxruntime", device="cpu")).parts[0].bundle.card
    evaluation = evaluate(card, dataset.card, "train", perfect, [])
    bogus = len(np.unique(view.object_id[view.label == 0]))
    real = len(np.unique(view.object_id[view.label == 1]))
    shares = {**evaluation.figures, **{f"bin {i}": found.happened for i, found in enumerate(evaluation.reliability)}}
    shares |= {f"confusion {i}": share for i, share in enumerate(np.array(evaluation.confusion).ravel().tolist())}
    for name, figure in shares.items():
        assert figure.low is not None, name
        assert figure.high is not None, name
        assert figure.high > figure.low, name
    auc, recall = evaluation.figures["roc_auc"], evaluation.figures["recall"]
    assert (auc.value, auc.high, recall.value, recall.high) == (1, 1, 1, 1)
    assert auc.low == pytest.approx(0.025 ** (1 / min(bogus, real)))
    assert recall.low == pytest.approx(0.025 ** (1 / real))
