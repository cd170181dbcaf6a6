"""Metrics, compared with scikit-learn and with their definitions, with and without weights."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sklearn

from training.evaluation.metrics import Reliability, confusion, measure, rank
from training.evaluation.predictions import Predictions


def predictions(truth: NDArray[np.int64], probabilities: NDArray[np.float64], *classes: str) -> Predictions:
    n = len(truth)
    objects = np.array([f"object {i}" for i in range(n)])
    scores = probabilities.reshape(n, -1).astype(np.float32)
    return Predictions(classes, np.arange(n), objects, np.full(n, np.nan), truth, scores, threshold=0.5)


def plain(figures: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


@pytest.fixture
def real_or_bogus() -> Predictions:
    rng = np.random.default_rng(2)
    truth = (rng.random(300) < 0.3).astype(np.int64)
    score = np.round(np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1), 2)  # with ties
    return predictions(truth, score, "bogus", "real")


@pytest.fixture
def classified() -> Predictions:
    rng = np.random.default_rng(3)
    truth = rng.choice(4, 400, p=[0.5, 0.3, 0.15, 0.05])
    logits = rng.normal(size=(400, 4)) + 1.5 * np.eye(4)[truth]
    return predictions(truth, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), "VS", "AGN", "SN", "bogus")


@pytest.mark.parametrize("seed", [None, 5])
def test_binary_metrics_agree_with_scikit_learn(real_or_bogus: Predictions, seed: int | None) -> None:
    n = len(real_or_bogus)
    weight = np.ones(n) if seed is None else np.random.default_rng(seed).integers(0, 4, n).astype(float)
    truth, score, decided = real_or_bogus.truth, real_or_bogus.probabilities[:, 0], real_or_bogus.decided
    figures = measure(real_or_bogus, weight)
    assert figures["roc_auc"] == pytest.approx(sklearn.roc_auc_score(truth, score, sample_weight=weight))
    assert figures["average_precision"] == pytest.approx(
        sklearn.average_precision_score(truth, score, sample_weight=weight)
    )
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(
        truth, decided, sample_weight=weight, average="binary"
    )
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx((precision, recall, f1))
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, decided, sample_weight=weight))
    assert figures["balanced_accuracy"] == pytest.approx(
        sklearn.balanced_accuracy_score(truth, decided, sample_weight=weight)
    )


def test_metrics_of_classes_agree_with_scikit_learn(classified: Predictions) -> None:
    truth, probabilities, decided = classified.truth, classified.probabilities, classified.decided
    figures = measure(classified, np.ones(len(classified)))
    assert figures["roc_auc"] == pytest.approx(
        np.mean([sklearn.roc_auc_score(truth == c, probabilities[:, c]) for c in range(4)])
    )
    assert figures["bogus.average_precision"] == pytest.approx(
        sklearn.average_precision_score(truth == 3, probabilities[:, 3])
    )
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(truth, decided, average="macro")
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx((precision, recall, f1))
    assert figures["balanced_accuracy"] == pytest.approx(sklearn.balanced_accuracy_score(truth, decided))
    assert (confusion(classified, np.ones(len(classified))) == sklearn.confusion_matrix(truth, decided)).all()


def test_a_class_that_is_never_predicted_lowers_the_mean_and_an_absent_class_makes_it_undefined() -> None:
    truth, scores = np.array([0, 1, 2]), np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]])
    figures = measure(predictions(truth, scores, "VS", "AGN", "SN"), np.ones(3))
    assert figures["SN.precision"] == 0
    assert figures["precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    without_sn = measure(predictions(truth, scores, "VS", "AGN", "SN"), np.array([1.0, 1.0, 0.0]))
    assert without_sn["AGN.roc_auc"] == 1
    assert all(np.isnan(without_sn[name]) for name in ("roc_auc", "recall", "balanced_accuracy"))


def test_many_weights_at_once_give_the_same_as_one_at_a_time(classified: Predictions) -> None:
    weights = np.random.default_rng(4).integers(0, 3, (5, len(classified))).astype(float)
    together = measure(classified, weights)
    for r, weight in enumerate(weights):
        alone = measure(classified, weight)
        assert plain({name: values[r] for name, values in together.items()}) == pytest.approx(plain(alone))


def test_a_weight_is_equivalent_to_repeating_an_alert(real_or_bogus: Predictions) -> None:
    times = np.random.default_rng(6).integers(0, 4, len(real_or_bogus))
    rows = np.repeat(np.arange(len(times)), times)
    repeated = predictions(real_or_bogus.truth[rows], real_or_bogus.probabilities[rows], "bogus", "real")
    weighted = measure(real_or_bogus, times.astype(float))
    assert plain(weighted) == pytest.approx(plain(measure(repeated, np.ones(len(rows)))))


def test_equal_scores_give_no_ranking() -> None:
    tied = rank(np.array([True, False, True, False]), np.full(4, 0.5), np.ones(4))
    assert tied.roc_auc == 0.5
    assert tied.average_precision == 0.5
    assert tied.false_positive_rate_missing(0.01) == 1


def test_false_positive_rate_at_a_fixed_false_negative_rate() -> None:
    # A hundred positives from 0.01 to 1; one negative below all of them, one just above the third lowest.
    positive = np.array([True] * 100 + [False] * 2)
    score = np.append(np.arange(1, 101) / 100, [0.001, 0.035])
    ranking = rank(positive, score, np.ones(102))
    assert ranking.false_positive_rate_missing(0.0) == 0.5
    assert ranking.false_positive_rate_missing(0.02) == 0.5
    assert ranking.false_positive_rate_missing(0.03) == 0


def test_only_the_overconfident_model_has_a_calibration_error() -> None:
    rng = np.random.default_rng(7)
    said = rng.random(200_000)
    truth = (rng.random(200_000) < said).astype(np.int64)
    weight = np.ones(len(said))
    assert measure(predictions(truth, said, "bogus", "real"), weight)["ece"] < 0.01
    overconfident = predictions(truth, np.where(said > 0.5, 0.99, 0.01), "bogus", "real")
    assert measure(overconfident, weight)["ece"] == pytest.approx(0.24, abs=0.01)


def test_reliability_of_classes_is_that_of_the_most_probable_one(classified: Predictions) -> None:
    reliability = Reliability.of(classified, np.ones(len(classified)))
    correct = classified.decided == classified.truth
    said = classified.probabilities.max(axis=1)
    inside = (said >= 6 / 15) & (said < 7 / 15)
    assert reliability.weight[6] == inside.sum() > 0
    assert reliability.said[6] == pytest.approx(said[inside].mean())
    assert reliability.happened[6] == pytest.approx(correct[inside].mean())


def test_undefined_metrics_are_nan() -> None:
    only_real = measure(predictions(np.ones(3, np.int64), np.array([0.2, 0.6, 0.9]), "bogus", "real"), np.ones(3))
    assert np.isnan(only_real["roc_auc"])
    assert np.isnan(only_real["fpr_at_fnr_1"])
    assert only_real["recall"] == pytest.approx(2 / 3)
    only_bogus = measure(predictions(np.zeros(2, np.int64), np.array([0.2, 0.1]), "bogus", "real"), np.ones(2))
    assert all(np.isnan(only_bogus[name]) for name in ("average_precision", "precision", "recall", "fpr_at_fnr_5"))
