"""Measures of anomalies are compared as the service uses them, on other objects than those of the reference."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import Bundle, open_bundle
from broker_filter.simulate import simulate_night
from training.__main__ import main
from training.data.datasets import connected
from training.evaluation.anomaly_measures import (
    CHOICE,
    CLASSES,
    FIGURES,
    LEAST_OBJECTS,
    METHODS,
    REFERENCE,
    SHARES,
    TABLE,
    TEST,
    Sample,
    deal,
    judge,
    try_all,
)

SIZE, PARTS = 96, 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("embedder")


def two_clusters(between: int) -> Sample:
    """Return alerts of class VS around two opposite directions, and `between` asteroids that point elsewhere.

    The mean of the ordinary alerts lies between the clusters, so asteroids near this mean are near no ordinary alert.
    """
    rng = np.random.default_rng(5)
    axis = np.zeros((PARTS, SIZE // PARTS))
    axis[:, 0] = 1
    side = np.where(np.arange(240) % 2, 1, -1)[:, None, None]
    ordinary = side * axis + 0.15 * rng.standard_normal((240, *axis.shape))
    other = 0.15 * rng.standard_normal((between, *axis.shape)) + np.roll(axis, 1, axis=1) * 0.5
    embedding = normalise(np.concatenate([ordinary, other]).reshape(-1, SIZE))
    n = len(embedding)
    names = np.arange(n).astype(np.str_)
    label = np.repeat([0, 1], [240, between])
    visit = np.full(n, np.nan)
    return Sample("made", Survey.ZTF, embedding, np.arange(n), names, visit, names, label, rng.random(n), np.ones(n))


def test_alerts_of_one_object_or_of_one_visit_share_a_group() -> None:
    object_id, visit = np.array(["a", "a", "b", "c", "d"]), np.array([1.0, 2, 2, 3, 4])
    group = connected(object_id, visit)
    assert group[0] == group[1] == group[2]
    assert len(set(group.tolist())) == 3


def test_no_group_is_in_two_parts_and_each_part_has_its_share_of_a_rare_class() -> None:
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(600), 2).astype(np.str_)
    label = np.repeat(np.where(np.arange(600) < 20, 3, 0), 2)
    part = deal(group, label, rng)
    assert (part[::2] == part[1::2]).all()
    for one, share in zip((REFERENCE, CHOICE, TEST), SHARES, strict=True):
        assert (part == one).mean() == pytest.approx(share, abs=0.01)
        assert (part == one)[label == 3].mean() == pytest.approx(share, abs=0.06)


def test_a_measure_that_finds_the_class_is_ahead_of_one_that_does_not(bundle: Bundle) -> None:
    sample = two_clusters(between=100)
    found = judge(sample, try_all(sample, bundle, rounds=2, seed=1, rate=0.05))
    asteroid = CLASSES[1].name
    neighbours, snr = (found[f"{method}/{asteroid}/roc_auc"].value for method in ("neighbours", "snr"))
    assert neighbours is not None
    assert neighbours > 0.95
    assert snr == pytest.approx(0.5, abs=0.2)
    difference = found[f"difference/{asteroid}/roc_auc"]
    assert difference.value == pytest.approx(
        neighbours - (found[f"mahalanobis/{asteroid}/roc_auc"].value or 0), abs=1e-9
    )
    assert found["neighbours/mean/realised"].value == pytest.approx(0.05, abs=0.15)  # calibrated on 20 alerts
    assert found[f"neighbours/{asteroid}/roc_auc/4 detections or more"].value is None  # every alert has one detection


def test_alerts_of_the_left_out_class_are_never_in_the_reference(bundle: Bundle) -> None:
    """Replacing them inside the reference part by other vectors changes no score of another alert."""
    sample = two_clusters(between=100)
    moved = two_clusters(between=100)
    _, asteroids = try_all(sample, bundle, rounds=1, seed=1, rate=0.05)
    inside = (asteroids.part == REFERENCE) & asteroids.anomalous
    moved.embedding[inside] = sample.embedding[: inside.sum()]
    _, again = try_all(moved, bundle, rounds=1, seed=1, rate=0.05)
    for method in METHODS:
        np.testing.assert_array_equal(asteroids.scores[method][~inside], again.scores[method][~inside])


def test_a_class_with_few_objects_is_not_left_out() -> None:
    assert two_clusters(between=LEAST_OBJECTS - 1).left_out == [0]
    assert two_clusters(between=LEAST_OBJECTS).left_out == [0, 1]


def test_the_command_writes_a_page_and_its_figures(tmp_path: Path) -> None:
    night = list(simulate_night(130, seed=3, rates={"variable_star": 3, "asteroid": 1}))
    packets = tmp_path / "packets"
    packets.mkdir()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["candid", "weak_class"])
        for alert in night:
            (packets / f"{alert.alert_id}.avro").write_bytes(alert.packet)
            writer.writerow([alert.alert_id, {"variable_star": "VS"}.get(alert.kind, alert.kind)])
    out = tmp_path / "out"
    few = ["--simulated", "120", "--rounds", "1"]
    labels = ["--labels", str(tmp_path / "labels.csv")]
    assert main(["anomaly-measures", str(packets), *labels, *few, "--out", str(out)]) == 0
    page, figures = (out / TABLE).read_text(), json.loads((out / FIGURES).read_text())
    assert set(figures) == {"ZTF, real alerts", "LSST, simulated alerts"}
    assert "## LSST, real alerts\n\nNo class has" in page
    of_ztf = figures["ZTF, real alerts"]
    assert 0 <= of_ztf["neighbours/asteroid/roc_auc"]["value"] <= 1
    assert {f"{method}/mean/roc_auc" for method in (*METHODS, "chosen", "difference")} <= of_ztf.keys()
