import numpy as np
import pytest

from training.interpretability.explorer.features import (
    LAG_DAYS,
    TOP,
    LabelledActivations,
    lags,
    most_enriched,
    nearest,
    shares,
)


@pytest.fixture
def activations() -> LabelledActivations:
    """60 alerts of 30 objects; feature 0 grows with the number of the alert, feature 1 is never active."""
    number = np.arange(60)
    activation = np.stack([np.maximum(number - 19, 0), np.zeros(60)], axis=1).astype(np.float32)
    label = np.where(number < 40, 0, 1)
    label[:5] = -1
    return LabelledActivations(activation, np.char.add("Z", (number // 2).astype(str)), label, ["AGN", "SN", "none"])


def test_top_alerts_are_of_different_objects_and_most_active_first(activations: LabelledActivations) -> None:
    top = activations.top(0)
    assert [example.alert for example in top] == [59 - 2 * i for i in range(TOP)]
    assert top[0].activation == 40
    assert activations.top(1) == []


def test_groups_partition_the_active_alerts_by_activation(activations: LabelledActivations) -> None:
    groups = activations.groups(0, np.ones(60, np.bool_))
    assert [[example.alert for example in group.examples] for group in groups] == [
        [59, 54, 50],
        [49, 44, 40],
        [39, 34, 30],
        [29, 24, 20],
    ]
    assert groups[0].label == "Activations between the 75% and the 100% quantile (10 alerts)"
    assert activations.groups(1, np.ones(60, np.bool_)) == []
    some = activations.groups(0, np.arange(60) >= 50)
    assert [[example.alert for example in group.examples] for group in some] == [[59, 54, 50]]


def test_histogram_counts_every_alert_once(activations: LabelledActivations) -> None:
    for feature in (0, 1):
        histogram = activations.histogram(feature)
        assert sum(histogram.counts) + histogram.zero == 60
        assert len(histogram.edges) == len(histogram.counts) + 1
    assert activations.histogram(0).zero == 20


def test_enrichment_compares_labelled_alerts_alone(activations: LabelledActivations) -> None:
    rows, never_active = activations.enrichment()
    assert [row.name for row in rows] == ["SN", "AGN"]
    assert (rows[0].alerts, rows[0].share) == (20, 0.5)
    assert rows[0].lift.value == pytest.approx(0.5 / (20 / 55))
    assert rows[0].lift.low < rows[0].lift.value < rows[0].lift.high
    assert most_enriched(rows) == rows[0]
    assert never_active == []
    assert most_enriched([]) is None


def test_lags_separate_token_alert_and_earlier_points() -> None:
    attribution = np.array([[0.5, -0.25, 0.25, 0.0], [0.5, 0.25, 0.0, 0.25]])
    days = np.array([[np.nan, 100.0, 1.0, 0.0]] * 2)
    found = {lag.label: lag for lag in lags(attribution, days)}
    assert len(found) == len(LAG_DAYS) + 1
    assert found["token"].signed == pytest.approx(0.5)
    assert found["the alert"].signed == pytest.approx(0.125)
    assert found["up to 1.5 d"].signed == pytest.approx(0.125)
    assert (found["over 32 d"].signed, found["over 32 d"].share) == (0, pytest.approx(0.25))
    assert sum(lag.share for lag in found.values()) == pytest.approx(1)
    assert lags(attribution[:0], days[:0]) == []


def test_heads_share_the_absolute_attribution() -> None:
    sizes = np.array([[2.0, 2.0], [3.0, 1.0]])
    np.testing.assert_allclose(shares(sizes), [5 / 8, 3 / 8])
    np.testing.assert_allclose(shares(sizes[:0]), [0.5, 0.5])


def test_nearest_features_are_ordered_by_cosine_and_exclude_the_feature() -> None:
    decoder = np.array([[1, 0], [2, 2], [-1, 0], [0, 3]], np.float32)
    found = nearest(decoder, 0)
    assert [one.feature for one in found] == [1, 3, 2]
    assert found[0].cosine == pytest.approx(np.sqrt(0.5))
