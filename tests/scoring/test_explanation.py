"""Explanations: the attribution adds up, and rarity and unexplained share are what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest

from broker_filter.scoring.explanation import (
    completeness_error,
    direct_attribution,
    percentile_of,
    rarity,
    shares,
    unexplained_share,
    usual_activations,
)
from broker_filter.scoring.lens_files import OrdinaryFeatures, sorted_activations
from broker_filter.scoring.sparse_dictionary import SparseDictionary

HEADS, SIZE, SOURCES, FEATURES = 4, 6, 9, 10


def ordinary_features() -> OrdinaryFeatures:
    """Return 999 ordinary alerts: feature 0 is active in one, feature 1 in all but nine, feature 2 in none."""
    strongest = np.zeros((999, 3), np.float32)
    strongest[7, 0] = 2.0
    strongest[9:, 1] = np.arange(1, 991) / 100
    activations, offsets = sorted_activations(strongest)
    return OrdinaryFeatures(activations, offsets, np.linspace(0, 1, 999, dtype=np.float32), np.zeros(4, np.float32))


def test_rarity_counts_the_ordinary_alerts_in_which_a_feature_is_at_least_as_active() -> None:
    ordinary = ordinary_features()
    assert rarity(2.5, 0, ordinary) == pytest.approx(3.0)
    assert rarity(2.0, 0, ordinary) == pytest.approx(-np.log10(2 / 1000))
    assert rarity(0.001, 1, ordinary) == pytest.approx(-np.log10(991 / 1000))
    assert rarity(1.0, 2, ordinary) == pytest.approx(3.0)


def test_absent_feature_is_as_rare_as_its_absence() -> None:
    ordinary = ordinary_features()
    assert rarity(0.0, 1, ordinary) == pytest.approx(2.0)  # absent in 9 of 999 ordinary alerts
    assert rarity(0.0, 2, ordinary) == pytest.approx(0.0)


def test_only_features_of_nearly_all_ordinary_alerts_have_a_usual_activation() -> None:
    usual = usual_activations(ordinary_features())
    assert usual[[0, 2]].tolist() == [0, 0]
    assert usual[1] == pytest.approx(4.91)  # the median of all 999, of which nine are 0


def test_attribution_by_head_and_source_adds_up_to_the_pre_activation() -> None:
    rng = np.random.default_rng(0)
    pattern = rng.dirichlet(np.ones(SOURCES), HEADS).astype(np.float32)
    values = rng.standard_normal((HEADS, SOURCES, SIZE)).astype(np.float32)
    z = np.einsum("hp,hpc->hc", pattern, values).reshape(1, -1).astype(np.float32)
    d = HEADS * SIZE
    dictionary = SparseDictionary(
        rng.standard_normal((d, FEATURES)).astype(np.float32),
        rng.standard_normal(FEATURES).astype(np.float32),
        rng.standard_normal((FEATURES, d)).astype(np.float32),
        rng.standard_normal(d).astype(np.float32),
        np.zeros(FEATURES, np.float32),
    )
    pre = dictionary.pre_activations(z)[0]
    for feature in range(FEATURES):
        terms = direct_attribution(pattern, values, dictionary.w_enc[:, feature])
        assert terms.shape == (HEADS, SOURCES)
        assert completeness_error(terms, feature, float(pre[feature]), dictionary) < 1e-6
        assert completeness_error(terms + 1, feature, float(pre[feature]), dictionary) > 0.01
        assert np.abs(shares(terms)).sum() == pytest.approx(1.0)


def test_unexplained_share_is_one_for_the_mean_and_zero_for_a_perfect_reconstruction() -> None:
    z, mean = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32), np.ones(8, np.float32)
    assert unexplained_share(z, z, mean) == 0
    assert unexplained_share(z, np.tile(mean, (3, 1)), mean) == pytest.approx(1.0)
    assert unexplained_share(z, (z + mean) / 2, mean) == pytest.approx(0.25)
    assert unexplained_share(z, z, z[0]) == 0
    assert np.isfinite(unexplained_share(z[:1], z[1:2], z[0]))  # no deviation at all


def test_percentile_is_the_share_of_smaller_values() -> None:
    assert percentile_of(0.5, np.linspace(0, 1, 11, dtype=np.float32)) == pytest.approx(100 * 5 / 11)
    assert percentile_of(2.0, np.zeros(4, np.float32)) == 100
