"""Classes of LSST alerts as anomalies of the shipped embedder: who is judged by what, and the page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.embedding import anomalies_served
from training.embedding.anomalies_lsst import SERVED
from training.embedding.anomalies_served import as_markdown, comparisons, judge, leave_out, splits
from training.embedding.lsst_alerts import CLASSES, LsstAlerts
from training.embedding.train_embedder_lsst import Data, at_first_detection
from training.evaluation import bootstrap

ASTEROID = CLASSES.index("asteroid")


def distinct(alerts: LsstAlerts, class_: int) -> LsstAlerts:
    """Return the alerts, with images inverted and metadata enlarged for one class, so that it is unlike the others."""
    raw, chosen = alerts.named.raw, alerts.label == class_
    cutouts = np.where(chosen[:, None, None, None], -raw.cutouts, raw.cutouts)
    metadata = np.where(chosen[:, None], 1e3 * raw.metadata, raw.metadata)
    return replace(alerts, named=replace(alerts.named, raw=replace(raw, cutouts=cutouts, metadata=metadata)))


def test_no_reference_shares_an_object_or_a_visit_with_the_alerts_that_it_judges(lsst_data: Data) -> None:
    alerts = lsst_data.lsstcam
    by_object, by_visit = splits(alerts)
    shared = ((by_object, alerts.named.object_id), (by_visit, alerts.named.object_id), (by_visit, alerts.visit))
    for split, values in shared:
        assert len(np.unique(split.fold)) > 1
        for value in np.unique(values):
            assert len(np.unique(split.fold[values == value])) == 1, split.name


def test_a_class_that_looks_different_is_found_without_being_in_the_reference(
    lsst_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    monkeypatch.setattr(anomalies_served, "LEAST", 2)
    alerts = distinct(lsst_data.lsstcam, ASTEROID)
    by_object, _ = splits(alerts)
    found = leave_out(alerts, lsst_data.compared, ASTEROID, by_object.fold)
    assert [one.view for one in found] == ["as they came", "first detection"]
    for one in found:
        assert all(np.isfinite(scores).all() for scores in one.scores.values())
        assert one.references < (alerts.label != ASTEROID).sum()
    estimates = judge(alerts, found, by_object.group)
    mahalanobis = estimates[f"asteroid/as they came/all others/served/{SERVED}"]
    assert mahalanobis.value is not None
    assert mahalanobis.value > 0.8
    recall, flagged = (estimates[f"asteroid/as they came/{what}/"].value for what in ("recall", "flagged"))
    assert recall is not None
    assert flagged is not None
    assert recall > flagged
    page = as_markdown(found, estimates)
    assert "| asteroid | first detection | variable alone |" in page
    assert page.count("\n| asteroid | as they came |") == len(comparisons(alerts, found[0])) + 1


def test_both_sides_of_a_comparison_have_the_same_number_of_detections(
    lsst_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anomalies_served, "LEAST", 1)
    alerts = lsst_data.lsstcam
    first = replace(alerts, named=replace(alerts.named, raw=at_first_detection(alerts.named.raw)))
    found = anomalies_served.Found(ASTEROID, "as they came", {}, 0.0, np.zeros(len(alerts), np.bool_))
    assert comparisons(first, found)["1 detection"].all()
    assert "4 detections or more" not in comparisons(first, found)
    assert set(comparisons(first, replace(found, view="first detection"))) == {"all others", "variable alone"}
