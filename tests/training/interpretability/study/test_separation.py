"""Single scores that separate properties of alerts, on scores whose order is known."""

from __future__ import annotations

import numpy as np

from training.interpretability.study.measures import signed
from training.interpretability.study.separation import FEWEST_OBJECTS, best_single, roc_aucs, separate


def test_roc_auc_of_known_orders() -> None:
    positive = np.array([True, True, False, False])
    scores = np.array([[4, 1, 0, 1], [3, 2, 0, 0], [2, 3, 0, 1], [1, 4, 0, 0]], np.float32)
    np.testing.assert_allclose(roc_aucs(scores, positive), [1, 0, 0.5, 0.5])
    assert np.isnan(roc_aucs(scores, np.ones(4, bool))).all()


def test_the_best_single_score_may_be_low_for_the_property() -> None:
    positive = np.array([True, True, False, False])
    scores = np.array([[1, 1], [0, 2], [1, 3], [0, 4]])
    assert best_single(scores, positive) == (1, -1)
    assert signed(np.float32([[1, 2]])).tolist() == [[1, 2, -1, -2]]


def test_separation_chooses_on_training_alerts_and_measures_on_held_out_ones() -> None:
    rng = np.random.default_rng(5)
    n = 600
    positive = rng.random(n) < 0.3
    informative = rng.standard_normal((n, 3))
    informative[:, 1] += 3 * positive
    noise = rng.standard_normal((n, 50))
    held = np.arange(n) >= n // 2
    noise[~held, 7] += 3 * positive[~held]  # it separates the training alerts alone
    objects = np.array([f"object {i // 2}" for i in range(n)])
    methods = {"features": informative, "noise": noise}
    found = separate(methods, {"made": positive.astype(float)}, held, objects)
    assert found.chosen["made"]["features"].column == 1
    assert found.chosen["made"]["noise"].column == 7
    assert found.area["made"]["features"].low > 0.95  # type: ignore[operator]
    assert found.area["made"]["noise"].low < 0.5 < found.area["made"]["noise"].high  # type: ignore[operator]
    assert found.ahead["made"]["noise"].low > 0.3  # type: ignore[operator]
    assert found.mean_ahead["noise"] == found.ahead["made"]["noise"]
    assert found.objects["made"] == len(np.unique(objects[held & positive]))


def test_unknown_alerts_do_not_count() -> None:
    n = 200
    values = np.tile([1.0, 0.0], n // 2)
    score = np.where(values == 1, 2.0, 1.0)
    values[::5] = np.nan
    score[::5] = 99.0
    objects = np.arange(n).astype(np.str_)
    found = separate({"features": score[:, None]}, {"made": values}, np.arange(n) % 3 == 0, objects)
    assert found.area["made"]["features"].value == 1


def test_properties_of_few_objects_are_left_out() -> None:
    n = 100
    few = np.zeros(n)
    few[: FEWEST_OBJECTS - 1] = 1  # all of them are on the training side
    few[n // 2 : n // 2 + FEWEST_OBJECTS] = 1
    objects = np.arange(n).astype(np.str_)
    found = separate({"features": np.zeros((n, 1))}, {"few": few}, np.arange(n) >= n // 2, objects)
    assert not found.area
    assert not found.mean_area


def test_the_mean_is_over_properties() -> None:
    rng = np.random.default_rng(6)
    n = 400
    first, second = (rng.random(n) < 0.5 for _ in range(2))
    scores = np.stack([first, rng.standard_normal(n)], axis=1).astype(float)
    objects = np.arange(n).astype(np.str_)
    properties = {"first": first.astype(float), "second": second.astype(float)}
    found = separate({"features": scores}, properties, np.arange(n) >= n // 2, objects)
    areas = [found.area[name]["features"].value for name in properties]
    assert found.mean_area["features"].value == np.mean(areas)  # type: ignore[arg-type]
