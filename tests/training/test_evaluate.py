"""Figures of merit, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluate import agreement, interval_by_object, roc_auc


def test_roc_auc_is_the_chance_to_rank_a_real_above_a_bogus() -> None:
    rng = np.random.default_rng(2)
    real = rng.random(80) < 0.7
    score = np.round(rng.random(80), 1)  # with ties
    pairs = [(r > b) + 0.5 * (r == b) for r in score[real] for b in score[~real]]
    assert roc_auc(real, score) == pytest.approx(np.mean(pairs))


def test_roc_auc_of_perfect_and_of_reversed_scores() -> None:
    real = np.array([True, True, False])
    assert roc_auc(real, np.array([0.9, 0.8, 0.1])) == 1
    assert roc_auc(real, np.array([0.1, 0.2, 0.9])) == 0
    assert np.isnan(roc_auc(np.array([True]), np.array([0.5])))


def test_agreement_counts_sides_of_one_half() -> None:
    assert agreement(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.1, 0.2])) == 0.75


def test_interval_holds_the_figure_and_takes_an_objects_alerts_for_one_trial() -> None:
    rng = np.random.default_rng(4)
    real = np.tile(rng.random(60) < 0.7, 10)
    score = np.tile(rng.random(60), 10)
    score[real] = score[real] * 0.7 + 0.3
    ten_alerts_each = np.array([f"object {i % 60}" for i in range(600)])
    one_alert_each = np.array([f"object {i}" for i in range(600)])
    low, high = interval_by_object(roc_auc, real, score, ten_alerts_each, seed=1)
    narrow_low, narrow_high = interval_by_object(roc_auc, real, score, one_alert_each, seed=1)
    assert low < roc_auc(real, score) < high
    assert high - low > 2 * (narrow_high - narrow_low)
