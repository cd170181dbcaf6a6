"""Held-out classes are found as anomalies, and the page states how well each method finds them."""

from __future__ import annotations

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.packets.batch import LightCurves, Measurement
from training.data.light_curve_features import NAMES, light_curve_features
from training.embedding.anomalies import (
    FORESTS,
    SERVED,
    LeftOut,
    as_markdown,
    by_embedding,
    held_out_of_each,
    judge,
    on_validation,
)
from training.embedding.baselines import by_isolation_forest, by_pixels


def case(name: str, seed: int, skill: dict[str, float]) -> LeftOut:
    """Return 400 alerts, a quarter of them of the class; each measure scores these some deviations higher."""
    rng = np.random.default_rng(seed)
    anomalous, validation = rng.random(400) < 0.25, np.arange(400) % 2 == 0
    scores = {measure: rng.standard_normal(400) + distance * anomalous for measure, distance in skill.items()}
    return LeftOut(name, 100, anomalous, validation, ~validation, scores)


@pytest.fixture
def cases() -> list[LeftOut]:
    skill = {SERVED: 1.0, "good": 3.0, FORESTS[0]: 1.5, FORESTS[1]: 1.0, FORESTS[2]: 0.0}
    return [case("SN", 1, skill), case("AGN", 2, skill)]


def test_the_default_and_the_best_measure_are_evaluated_on_the_test_split(cases: list[LeftOut]) -> None:
    objects = np.arange(400).astype(np.str_)
    figures, resampled = judge(cases, 0.1, objects)
    assert figures["good/mean/roc_auc"] == pytest.approx(0.98, abs=0.02)
    assert figures[f"{FORESTS[2]}/mean/roc_auc"] == pytest.approx(0.5, abs=0.1)
    assert figures["good/SN/recall"] > 0.85
    assert figures["good/SN/realised"] == pytest.approx(0.1, abs=0.08)
    page = as_markdown(cases, on_validation(cases), 0.1, figures, resampled)
    assert f"| **{SERVED}** | 0.7" in page
    assert f"`{SERVED}` (the default of the service)" in page
    assert "`good` (best on validation)" in page
    assert f"of the {FORESTS[2]} by 0.4" in page or f"of the {FORESTS[2]} by 0.5" in page


def test_test_alerts_do_not_influence_the_validation(cases: list[LeftOut]) -> None:
    before = on_validation(cases)
    for one in cases:
        one.scores["good"][one.test] *= -1
    assert on_validation(cases) == before
    assert before["good"] == pytest.approx(0.98, abs=0.02)


def test_a_class_that_the_validation_lacks_is_not_in_its_mean() -> None:
    """Its ROC AUC is undefined: the mean over all classes would be NaN, and no measure the best."""
    skill = {"fair": 1.0, "good": 3.0}
    cases = [case("SN", 1, skill), case("AGN", 2, skill)]
    cases[1].validation[cases[1].anomalous] = False
    assert on_validation(cases) == on_validation(cases[:1])
    assert np.isfinite(list(on_validation(cases).values())).all()


def test_every_class_has_objects_in_the_validation() -> None:
    objects = np.array([f"ZTF{i // 2}" for i in range(400)])  # two alerts per object
    label = np.where(np.arange(400) < 20, 1, 0)
    held = held_out_of_each(objects, label, 0.2, seed=1)
    assert [len(set(objects[held & (label == c)].tolist())) for c in (0, 1)] == [38, 2]
    np.testing.assert_array_equal(held[::2], held[1::2])


def test_every_method_finds_a_distant_cluster() -> None:
    rng = np.random.default_rng(3)
    middles = np.eye(2, 12)
    ordinary = middles[rng.integers(2, size=300)] + 0.1 * rng.standard_normal((300, 12))
    asked = np.concatenate([ordinary[:30] + 0.01, -middles[[0] * 30] + 0.1 * rng.standard_normal((30, 12))])
    label = ordinary[:, 1].round().astype(np.int64)
    known, embedding = normalise(ordinary), normalise(asked)
    ways = {
        "features": by_isolation_forest(ordinary, asked),
        "pixels": by_pixels(known.reshape(300, 3, 2, 2), embedding.reshape(60, 3, 2, 2)),
    }
    seen, others = np.arange(360) < 200, (np.arange(360) >= 200) & (np.arange(360) < 300)
    everything = np.concatenate([known, embedding])
    measures = by_embedding(everything, seen, others, np.concatenate([label, np.zeros(60, np.int64)]))
    ways |= {name: scores[300:] for name, scores in measures.items()}
    for name, scores in ways.items():
        assert np.median(scores[30:]) > np.median(scores[:30]), name


def test_features_use_the_measurements_of_a_band_and_no_upper_limits() -> None:
    kind = np.array([Measurement.DETECTION] * 3 + [Measurement.UPPER_LIMIT, Measurement.FORCED], np.uint8)
    curves = LightCurves(
        offsets=np.array([0, 5, 5]),
        mjd=np.array([0.0, 1, 2, 3, 1]),
        band=np.array([1, 1, 1, 1, 2], np.uint8),
        flux=np.array([10, 20, 30, 0, 7], np.float32),
        flux_err=np.array([1, 1, 1, 50, 2], np.float32),
        kind=kind,
    )
    features = light_curve_features(curves).reshape(2, 2, len(NAMES))
    of = dict(zip(NAMES, features[0, 0].tolist(), strict=True))
    assert of["points"] == 3
    assert of["weighted_mean"] == pytest.approx(20)
    assert of["amplitude"] == pytest.approx(10)
    assert of["slope"] == pytest.approx(10)
    assert of["reduced_chi2"] == pytest.approx(100)
    assert features[0, 1, 0] == 1
    assert features[1, :, 0].tolist() == [0, 0]
    assert np.isnan(features[1, :, 1:]).all()
