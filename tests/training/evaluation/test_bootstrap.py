"""Intervals over objects: their width, their coverage, and pairing."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from training.evaluation import bootstrap
from training.evaluation.bootstrap import Estimate, estimate, exact_interval, resample
from training.evaluation.metrics import Values, Weights


def mean(values: NDArray[np.float64], weight: Weights) -> dict[str, Values]:
    return {"mean": weight @ values / weight.sum(axis=-1)}


def width(of: Estimate) -> float:
    assert of.low is not None
    assert of.high is not None
    return of.high - of.low


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    objects = np.array([f"object {i}" for i in range(400)])
    found = estimate(partial(mean, values), objects)["mean"]
    assert found.value == values.mean()
    assert found.low is not None
    assert found.high is not None
    standard_error = values.std() / np.sqrt(400)
    assert abs(found.low - (values.mean() - 1.96 * standard_error)) < 0.15 * standard_error
    assert abs(found.high - (values.mean() + 1.96 * standard_error)) < 0.15 * standard_error


def test_ten_alerts_of_an_object_are_one_trial() -> None:
    values = np.tile(np.random.default_rng(2).normal(size=60), 10)
    ten_alerts_each = np.array([f"object {i % 60}" for i in range(600)])
    one_alert_each = np.array([f"object {i}" for i in range(600)])
    wide = estimate(partial(mean, values), ten_alerts_each)["mean"]
    narrow = estimate(partial(mean, values), one_alert_each)["mean"]
    assert 2.5 < width(wide) / width(narrow) < 4  # about the square root of ten


def test_one_object_with_many_alerts_widens_the_interval() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=200)
    values[:100] += 3
    one_each = np.array([f"object {i}" for i in range(200)])
    crowded = np.where(np.arange(200) < 100, "crowd", one_each)
    assert width(estimate(partial(mean, values), crowded)["mean"]) > 4 * width(
        estimate(partial(mean, values), one_each)["mean"]
    )


def test_resamples_do_not_depend_on_the_order_of_alerts_or_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    values, objects = rng.normal(size=90), np.array([f"object {i % 30}" for i in range(90)])
    first = resample(partial(mean, values), objects)["mean"]
    shuffled = rng.permutation(90)
    assert np.allclose(resample(partial(mean, values[shuffled]), objects[shuffled])["mean"], first)
    assert len(first) == bootstrap.RESAMPLES
    monkeypatch.setattr(bootstrap, "ELEMENTS_AT_ONCE", 1000)
    assert np.allclose(resample(partial(mean, values), objects)["mean"], first)


def test_undefined_resamples_are_ignored_and_an_undefined_figure_has_no_interval() -> None:
    assert Estimate.of(0.5, np.array([0.4, np.nan, 0.4])) == Estimate(value=0.5, low=0.4, high=0.4)
    assert Estimate.of(np.nan, np.full(3, np.nan)) == Estimate(value=None, low=None, high=None)


@pytest.mark.parametrize(
    ("share", "trials", "low", "high"),
    [
        (1.0, 39, 0.0252 ** (1 / 39), 1.0),  # 0.9097, as in Clopper and Pearson's tables for 39 of 39
        (0.0, 39, 0.0, 1 - 0.0252 ** (1 / 39)),
        (0.5, 10, 0.1871, 0.8129),  # 5 of 10
        (1.0, 0, 0.0, 1.0),
    ],
)
def test_exact_intervals_agree_with_the_binomial_distribution(
    share: float, trials: float, low: float, high: float
) -> None:
    assert exact_interval(share, trials) == pytest.approx((low, high), abs=5e-4)


def test_a_fraction_that_all_objects_agree_on_has_the_exact_interval_for_the_number_of_objects() -> None:
    objects = np.array([f"object {i // 4}" for i in range(80)])  # twenty objects
    right = np.ones(80)
    found = estimate(partial(mean, right), objects)["mean"]
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 20))
    wrong = estimate(partial(mean, 0 * right), objects)["mean"]
    assert (wrong.value, wrong.low) == (0, 0)
    assert wrong.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_exact_intervals_have_their_nominal_coverage() -> None:
    """With 30 objects and a purity of 0.97, two of five samples have no failure, where the bootstrap has zero width."""
    rng = np.random.default_rng(8)
    objects = np.array([f"object {i}" for i in range(30)])
    perfect = [sample for sample in rng.random((40, 30)) < 0.97 if sample.all()]
    assert len(perfect) > 5
    for sample in perfect:
        found = estimate(partial(mean, sample.astype(np.float64)), objects)["mean"]
        assert found.low is not None
        assert found.low < 0.97 < 1 == found.high
