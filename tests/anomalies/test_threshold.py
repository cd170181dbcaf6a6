"""The threshold flags the requested share of alerts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.anomalies.threshold import RateTracker


def ordinary(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.sort(np.random.default_rng(seed).gamma(3, 0.1, n).astype(np.float32))


def flags(tracker: RateTracker, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    return tracker.flag(scores, np.ones(len(scores), np.bool_))[1]


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("n", [40, 10_000])
def test_threshold_starts_near_the_requested_rate(n: int, rate: float) -> None:
    tracker = RateTracker(ordinary(n), rate)
    realised = (ordinary(1_000_000, seed=1) > tracker.threshold).mean()
    factor = 1.2 if n * rate > 100 else 8  # forty alerts hardly constrain a quantile of 0.999
    assert rate / factor < realised < rate * factor


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
def test_threshold_keeps_the_rate_if_the_stream_differs_from_the_reference(shift: float) -> None:
    rate, tracker = 0.01, RateTracker(ordinary(5_000), 0.01)
    stream = np.random.default_rng(2).gamma(3, 0.1, 100_000).astype(np.float32) + np.float32(shift)
    flagged = flags(tracker, stream)
    assert flagged.mean() == pytest.approx(rate, rel=0.1)
    assert flagged[50_000:].mean() == pytest.approx(rate, rel=0.1)


def test_threshold_keeps_the_rate_if_scores_keep_rising() -> None:
    """The distribution changes all the time: the bound of the method holds for any sequence."""
    tracker = RateTracker(ordinary(5_000), 0.01)
    begins = tracker.threshold
    stream = np.linspace(0, 5, 50_000, dtype=np.float32)
    flagged = flags(tracker, stream)
    assert flagged.sum() - 0.01 * len(stream) == pytest.approx((tracker.threshold - begins) / tracker.step, rel=1e-3)
    assert flagged[-10_000:].mean() < 0.02


def test_threshold_keeps_the_rate_if_the_highest_reference_scores_are_equal() -> None:
    """For example one alert that was sent repeatedly: such a tail has no scale for the step."""
    alike = np.minimum(ordinary(1_000), np.float32(0.2))
    stream = np.random.default_rng(5).gamma(3, 0.1, 50_000).astype(np.float32)
    flagged = flags(RateTracker(alike, 0.01), stream)
    assert flagged[10_000:].mean() == pytest.approx(0.01, rel=0.1)


def test_highest_scores_are_flagged() -> None:
    tracker = RateTracker(ordinary(5_000), 0.01)
    stream = np.random.default_rng(3).gamma(3, 0.1, 50_000).astype(np.float32)
    flagged = flags(tracker, stream)
    strangest = stream > np.quantile(stream, 0.99)
    assert (flagged & strangest).sum() / flagged.sum() > 0.75
    assert stream[flagged].min() > np.quantile(stream, 0.97)


def test_batching_has_no_influence() -> None:
    stream = np.random.default_rng(4).gamma(3, 0.2, 5_000).astype(np.float32)
    whole = flags(RateTracker(ordinary(1_000), 0.01), stream)
    tracker = RateTracker(ordinary(1_000), 0.01)
    parts = [flags(tracker, part) for part in np.split(stream, [1, 2, 70, 1_000, 4_999])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_alerts_that_do_not_count_are_flagged_but_do_not_move_the_threshold() -> None:
    tracker = RateTracker(ordinary(1_000), 0.01)
    begins = tracker.threshold
    scores = np.array([9.0, np.nan, 0.0], np.float32)
    thresholds, flagged = tracker.flag(scores, np.array([False, True, False]))
    assert flagged.tolist() == [True, False, False]
    assert tracker.threshold == begins
    np.testing.assert_array_equal(thresholds, np.float32(begins))
