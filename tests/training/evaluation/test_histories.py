"""Purity and completeness of policies, on histories that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from broker_filter.tables.bts_policies import POLICIES
from training.evaluation.histories import Histories
from training.evaluation.predictions import Predictions

ALERTS = [
    # object, alert, magnitude, truth, score
    ("found", 2, 18.2, 1, 0.9),
    ("found", 1, 19.5, 1, 0.2),
    ("found", 14, 18.7, 1, 0.8),
    ("missed", 3, 18.0, 1, 0.3),
    ("missed", 4, 18.1, 1, 0.4),
    ("contaminant", 5, 18.3, 0, 0.8),
    ("contaminant", 6, 18.3, 0, 0.1),
    ("left alone", 7, 17.0, 0, 0.1),
    ("left alone", 8, 17.0, 0, 0.2),
    ("seen once", 9, 17.0, 1, 0.9),
    ("seen once with a magnitude", 10, 17.0, 1, 0.9),
    ("seen once with a magnitude", 11, np.nan, 1, 0.9),
    ("never bright", 12, 18.6, 1, 0.9),
    ("never bright", 13, 18.9, 1, 0.9),
]


def predictions(alerts: list[tuple[str, int, float, int, float]]) -> Predictions:
    objects, alert_id, magpsf, truth, score = (np.array(column) for column in zip(*alerts, strict=True))
    return Predictions(("no", "yes"), alert_id, objects, magpsf, truth, score[:, None].astype(np.float32), 0.5)


def test_an_object_counts_once_for_any_order_of_its_alerts() -> None:
    histories = Histories.of(predictions(ALERTS))
    assert len(histories.first) == 4
    figures = histories.measure(np.ones(len(ALERTS)))
    # Two alerts above 0.5: only the true object; one above 0.85: the same, since the contaminant has 0.8.
    assert (figures["bts_p1.purity"], figures["bts_p1.completeness"]) == (1, 0.5)
    assert (figures["prod_p2.purity"], figures["prod_p2.completeness"]) == (1, 0.5)


def test_a_saved_contaminant_lowers_the_purity() -> None:
    alerts = [(*alert[:4], 0.9) if alert[0] == "contaminant" else alert for alert in ALERTS]
    figures = Histories.of(predictions(alerts)).measure(np.ones(len(alerts)))
    assert {name: figures[f"{name}.purity"] for name in POLICIES} == dict.fromkeys(POLICIES, 0.5)


def test_an_object_with_weight_two_counts_twice() -> None:
    objects = np.array([alert[0] for alert in ALERTS])
    figures = Histories.of(predictions(ALERTS)).measure(np.stack([1 + 1.0 * (objects == "found")]))
    assert figures["bts_p1.completeness"] == pytest.approx([2 / 3])


def test_there_is_no_purity_if_every_object_is_true() -> None:
    true = [alert for alert in ALERTS if alert[3] == 1]
    histories = Histories.of(predictions(true))
    assert len(histories.first) == 2
    assert histories.measure(np.ones(len(true))) == {}


def test_without_magnitudes_there_are_no_histories() -> None:
    blind = [(*alert[:2], np.nan, *alert[3:]) for alert in ALERTS]
    assert len(Histories.of(predictions(blind)).first) == 0
    assert Histories.of(predictions(blind)).measure(np.ones(len(ALERTS))) == {}
