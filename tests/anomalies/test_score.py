"""Anomaly scores and their reasons: distances from a reference, standardised as documented."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import Measure, Reference, SurveyReference
from broker_filter.anomalies.score import AnomalyScorer, Cloud, Mahalanobis, anomaly_scores

from .conftest import MODALITIES


def test_an_alert_of_the_reference_is_its_own_nearest_neighbour(reference: Reference, part: SurveyReference) -> None:
    scorer = AnomalyScorer(reference.card, part)
    for i, named in enumerate(scorer.nearest(3 * part.alerts.embedding, 2)):
        assert (named[0].alert_id, named[0].object_id) == (i - 7, f"ZTF26aaé{i}")
        assert named[0].distance == pytest.approx(0, abs=1e-6)


def test_a_score_does_not_depend_on_what_else_is_scored(reference: Reference, part: SurveyReference) -> None:
    scorer, asked = (
        AnomalyScorer(reference.card, part),
        np.random.default_rng(2).standard_normal((60, 8)).astype(np.float32),
    )
    alone = np.concatenate([scorer.score(one[None]) for one in asked])
    np.testing.assert_allclose(scorer.score(asked), alone, atol=1e-6)


@pytest.mark.parametrize("measure", get_args(Measure))
def test_an_outlier_scores_higher(reference: Reference, part: SurveyReference, measure: Measure) -> None:
    scorer = AnomalyScorer(reference.card.model_copy(update={"measure": measure}), part)
    embedding = part.alerts.embedding[[10, 10, 3]]
    embedding[1, 4:] = embedding[1, 4:][::-1] - part.alerts.embedding[:, 4:].mean(axis=0) * 20  # far from all
    like, unlike, lacking = scorer.score(embedding)
    assert like < unlike
    assert np.isfinite(lacking)


def test_the_reason_names_the_modality_that_is_an_outlier(reference: Reference, part: SurveyReference) -> None:
    ordinary = normalise(np.eye(1, 4) + 0.2 * np.random.default_rng(4).standard_normal((50, 2, 4)))
    alerts = replace(part.alerts, embedding=normalise(ordinary.reshape(50, 8)))
    asked = alerts.embedding[[10, 10, 10]]
    asked[1, 4:] *= -1
    asked[2, 4:] = 0
    reasons = AnomalyScorer(reference.card, replace(part, alerts=alerts)).explain(asked)
    assert reasons[1].most_unlike == "light_curve"
    assert reasons[1].modalities["light_curve"] > reasons[0].modalities["light_curve"]
    assert [len(reason.neighbours) for reason in reasons] == [5, 5, 5]
    assert set(reasons[2].modalities) == {"image"}  # a missing modality is not a reason


def test_a_reason_measures_distances_from_the_neighbours_that_it_names(
    reference: Reference, part: SurveyReference
) -> None:
    scorer, known = AnomalyScorer(reference.card, part), part.alerts
    asked = normalise(np.random.default_rng(3).standard_normal((20, 8)))
    asked[4, :4] = 0
    row_of = {alert_id: row for row, alert_id in enumerate(known.alert_id.tolist())}
    for own, reason in zip(asked, scorer.explain(asked), strict=True):
        theirs = known.embedding[[row_of[one.alert_id] for one in reason.neighbours]]
        expected = {}
        for m, name in enumerate(MODALITIES):
            axes = slice(4 * m, 4 * m + 4)
            with_it = theirs[theirs[:, axes].any(axis=1), axes]
            if own[axes].any():
                distance = (1 - normalise(with_it) @ normalise(own[axes])).mean()
                expected[name] = (distance - part.apart[m, 0]) / part.apart[m, 1]
        assert reason.modalities == pytest.approx(expected, abs=1e-4)
        assert reason.most_unlike == max(expected, key=expected.__getitem__)


def test_distances_use_the_covariance_of_the_ordinary_alerts() -> None:
    """A given step is a larger distance in a direction in which ordinary alerts hardly vary."""
    rng = np.random.default_rng(1)
    ordinary = (rng.standard_normal((2000, 3)) * [1, 0.1, 1]).astype(np.float32)
    steps = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(Mahalanobis(ordinary)(steps), [0, 1, 10], atol=0.8)


def test_neighbours_and_centroids_give_the_documented_distances(part: SurveyReference) -> None:
    """For the whole and for each modality; the fourth alert lacks a modality."""
    known, label, asked = part.alerts.embedding, part.label, part.alerts.embedding[2:5]
    near = Cloud(known, 2, "neighbours", label).distances(asked)
    far = Cloud(known, 2, "centroids", label).distances(asked)
    for column, axes in enumerate((slice(0, 8), slice(0, 4), slice(4, 8))):
        there = known[:, axes].any(axis=1)
        cosine = normalise(asked[:, axes]) @ normalise(known[:, axes]).T
        nearest = np.sort(1 - cosine[:, there], axis=1)[:, :5].mean(axis=1)
        middles = [normalise(normalise(known[:, axes])[there & (label == c)].mean(axis=0)) for c in (0, 1)]
        to_nearest = 1 - (normalise(asked[:, axes]) @ np.stack(middles).T).max(axis=1)
        rows = [0, 2] if column == 2 else [0, 1, 2]
        np.testing.assert_allclose(near[rows, column], nearest[rows], atol=1e-6)
        np.testing.assert_allclose(far[rows, column], to_nearest[rows], atol=1e-6)
    assert np.isnan(near[1, 2])
    assert np.isnan(far[1, 2])


def test_the_distance_of_each_modality_is_standardised(part: SurveyReference) -> None:
    embedding = part.alerts.embedding[:20]
    distances = Cloud(part.alerts.embedding, 2, "mahalanobis", part.label).distances(embedding)
    usual = np.array([[0, 1], [0.2, 0.1], [0.02, 0.01]], np.float32)
    expected = np.nanmean((distances - [0, 0.2, 0.02]) / [1, 0.1, 0.01], axis=1)
    np.testing.assert_allclose(anomaly_scores(distances, usual), expected, rtol=1e-5)
    assert np.isnan(distances[3, 2])
    assert np.isfinite(distances[3, :2]).all()
