"""Purity and completeness of what policies save, on histories small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from training.histories import Histories
from training.predictions import Predictions

ALERTS = [
    # object, alert, magnitude, truth, score
    ("found", 2, 18.2, 1, 0.9),
    ("found", 1, 19.5, 1, 0.2),
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


POLICIES = {
    "once": lambda score, magpsf: bool((score > 0.5).any()),
    "rising": lambda score, magpsf: score[-1] > score[0],
}


def test_an_object_counts_once_whatever_the_order_of_its_alerts() -> None:
    histories = Histories.of(predictions(ALERTS), POLICIES)
    assert len(histories.first) == 4
    figures = histories.measure(np.ones(len(ALERTS)))
    assert figures == {
        "once.purity": 0.5,  # found, and the contaminant
        "once.completeness": 0.5,  # found, not missed
        "rising.purity": pytest.approx(2 / 3),  # found, missed, left alone; the contaminant falls
        "rising.completeness": 1,
    }


def test_an_object_that_is_drawn_twice_counts_twice() -> None:
    objects = np.array([alert[0] for alert in ALERTS])
    figures = Histories.of(predictions(ALERTS), POLICIES).measure(np.stack([1 + 1.0 * (objects == "found")]))
    assert figures["once.purity"] == pytest.approx([2 / 3])
    assert figures["once.completeness"] == pytest.approx([2 / 3])


def test_purity_is_not_told_where_every_object_is_true() -> None:
    true = [alert for alert in ALERTS if alert[3] == 1]
    assert Histories.of(predictions(true), POLICIES).measure(np.ones(len(true))) == {}


def test_without_magnitudes_there_are_no_histories() -> None:
    nameless = [(*alert[:2], np.nan, *alert[3:]) for alert in ALERTS]
    assert Histories.of(predictions(nameless), POLICIES).measure(np.ones(len(ALERTS))) == {}
