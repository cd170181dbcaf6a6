"""Calibration slope and intercept, compared with scikit-learn and with simulated truths, also for few alerts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from training.evaluation.calibration import slope_and_intercept
from training.evaluation.evaluate import describe_calibration
from training.evaluation.predictions import Predictions


def outcomes(logit: NDArray[np.float64], slope: float, intercept: float, seed: int) -> NDArray[np.bool_]:
    """Draw outcomes with logits of `slope` times the given logit plus `intercept`."""
    chance = 1 / (1 + np.exp(-(slope * logit + intercept)))
    return np.random.default_rng(seed).random(len(logit)) < chance


def as_predictions(probability: NDArray[np.float64], happened: NDArray[np.bool_], alerts_each: int = 1) -> Predictions:
    n = len(probability)
    objects = np.array([f"object {i // alerts_each}" for i in range(n)])
    scores = probability.astype(np.float32)[:, None]
    return Predictions(
        ("no", "yes"), np.arange(n), objects, np.full(n, np.nan), happened.astype(np.int64), scores, threshold=0.5
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_slope_and_intercept_of_many_alerts_agree_with_logistic_regression(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    logit = rng.normal(1, 3, 20000)
    happened = outcomes(logit, 0.6, -1, seed=2)
    weight = rng.integers(0, 4, len(logit)).astype(float) if weighted else np.ones(len(logit))
    expected = LogisticRegression(C=np.inf, tol=1e-8).fit(logit[:, None], happened, sample_weight=weight)
    slope, intercept = slope_and_intercept(logit, happened, weight)
    assert slope == pytest.approx(expected.coef_[0, 0], abs=2e-3)
    assert intercept == pytest.approx(expected.intercept_[0], abs=5e-3)


def test_a_resample_gives_the_same_estimate_alone() -> None:
    rng = np.random.default_rng(3)
    logit = rng.normal(0, 2, 60)
    happened = outcomes(logit, 1, 0, seed=4)
    weight = rng.integers(0, 3, (20, 60)).astype(float)
    together = np.stack(slope_and_intercept(logit, happened, weight), axis=1)
    alone = [slope_and_intercept(logit, happened, row) for row in weight]
    assert together == pytest.approx(np.array(alone), abs=1e-5)


def test_separated_classes_have_a_finite_slope_and_a_single_class_has_none() -> None:
    logit = np.concatenate([np.linspace(-9, -2, 50), np.linspace(2, 9, 300)])
    slope, _ = slope_and_intercept(logit, logit > 0, np.ones(350))
    assert 0.5 < slope < 10
    assert np.isnan(slope_and_intercept(logit, np.ones(350, np.bool_), np.ones(350))).all()
    assert np.isnan(slope_and_intercept(np.zeros(350), logit > 0, np.ones(350))).all()


@pytest.mark.parametrize(("slope", "calibrated"), [(1.0, True), (0.4, False)])
def test_intervals_distinguish_a_calibrated_from_an_overconfident_model(slope: float, calibrated: bool) -> None:
    logit = np.random.default_rng(5).normal(0, 3, 600)
    found = describe_calibration(as_predictions(1 / (1 + np.exp(-logit)), outcomes(logit, slope, 0, seed=6)))
    low, high = found["calibration_slope"].low, found["calibration_slope"].high
    expected = found["ece_if_calibrated"].high
    assert low is not None
    assert high is not None
    assert expected is not None
    assert found["ece"].value is not None
    assert (low < 1 < high) == calibrated
    assert low < slope < high
    assert (found["ece"].value <= expected) == calibrated


def test_the_expected_ece_of_a_calibrated_model_is_right() -> None:
    logit = np.random.default_rng(7).normal(0, 2, 200)
    probability = 1 / (1 + np.exp(-logit))
    found = [describe_calibration(as_predictions(probability, outcomes(logit, 1, 0, seed))) for seed in range(3)]
    expected = found[0]["ece_if_calibrated"].value
    assert expected == pytest.approx(np.mean([float(each["ece"].value or 0) for each in found]), abs=0.03)
    crowded = as_predictions(np.repeat(probability[::10], 10), np.repeat(outcomes(logit[::10], 1, 0, 0), 10), 10)
    of_twenty_objects = describe_calibration(crowded)["ece_if_calibrated"].value
    assert expected is not None
    assert of_twenty_objects is not None
    assert of_twenty_objects > 1.5 * expected  # although there are as many alerts
