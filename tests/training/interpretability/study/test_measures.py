"""The measures of a sparse autoencoder, on arrays whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from training.interpretability.study.measures import (
    Pca,
    enrichment,
    explained_variance,
    greatest_cosines,
    greatest_of_alerts,
    loss_recovered,
    random_features,
    sparse,
    sparsity,
    stable_in,
    standardised,
)


def test_sparsity_counts_active_dead_and_dense_features() -> None:
    features = np.zeros((20, 4), np.float32)
    features[:, 0] = 1  # dense
    features[0, 1] = 2
    features[:3, 2] = 1  # 15 % of the rows: dense
    found = sparsity(features)
    assert found.l0 == pytest.approx(24 / 20)
    assert (found.alive, found.dead, found.dense) == (0.75, 0.25, 0.5)


def test_explained_variance_is_one_for_a_copy_and_zero_for_the_mean() -> None:
    z = np.random.default_rng(1).standard_normal((100, 6)).astype(np.float32) + 5
    assert explained_variance(z, z) == 1
    assert explained_variance(z, np.broadcast_to(z.mean(axis=0), z.shape)) == pytest.approx(0, abs=1e-6)


def test_loss_recovered_is_relative_to_the_ablation() -> None:
    assert loss_recovered(clean=1.0, ablated=3.0, replaced=1.0) == 1
    assert loss_recovered(clean=1.0, ablated=3.0, replaced=3.0) == 0
    assert loss_recovered(clean=1.0, ablated=3.0, replaced=1.5) == 0.75
    assert np.isnan(loss_recovered(clean=1.0, ablated=1.0, replaced=1.5))


def test_greatest_cosine_ignores_the_feature_itself() -> None:
    decoder = np.array([[1, 0], [3, 3], [0, 1], [-1, 0]], np.float32)
    np.testing.assert_allclose(greatest_cosines(decoder), [np.sqrt(0.5), np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-12)


def test_pca_recovers_rows_of_low_rank() -> None:
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0][:2]
    z = (rng.standard_normal((500, 2)) * [5, 1] @ basis + 3).astype(np.float32)
    pca = Pca.fit(z)
    assert abs(pca.components[0] @ basis[0]) > 0.99
    np.testing.assert_allclose(pca.reconstruct(z, 2), z, atol=1e-4)
    assert explained_variance(z, pca.reconstruct(z, 1)) < 0.99
    np.testing.assert_allclose(pca.project(z).var(axis=0)[2:], 0, atol=1e-6)


def test_random_features_have_the_requested_sparsity_in_training_rows() -> None:
    z = np.random.default_rng(3).standard_normal((2000, 12)).astype(np.float32)
    z[1000:] += 10
    train = np.arange(2000) < 1000
    features = random_features(z, 24, 3.0, 1, train)
    assert features.shape == (2000, 24)
    assert sparsity(features[train]).l0 == pytest.approx(3.0, abs=0.05)
    assert sparsity(features[~train]).l0 > 5


def test_sparse_keeps_the_largest_values_of_all_columns() -> None:
    values = np.array([[3, 1], [2, 9], [0.5, -4], [0.1, 0.2]])
    np.testing.assert_array_equal(sparse(values, 0.5, np.ones(4, bool)), [[3, 0], [0, 9], [0, 0], [0, 0]])
    assert (sparse(values, 2.0, np.ones(4, bool)) >= 0).all()


def test_standardised_columns_have_unit_deviation() -> None:
    train = np.array([True, True, True, False])
    found = standardised(np.array([[1.0, 7], [3, 7], [5, 7], [1000, 7]]), train)
    np.testing.assert_allclose(found[train].std(axis=0), [1, 0], atol=1e-6)
    np.testing.assert_allclose(found[train].mean(axis=0), 0, atol=1e-6)


def test_greatest_of_alerts_takes_unordered_rows_and_alerts_without_rows() -> None:
    values = np.array([[1, -5], [4, -2], [3, -3]], np.float32)
    found = greatest_of_alerts(values, np.array([2, 0, 2]), 3)
    np.testing.assert_array_equal(found, [[4, -2], [0, 0], [3, -3]])


def test_stability_finds_permuted_features_and_not_foreign_ones() -> None:
    rng = np.random.default_rng(4)
    first = rng.standard_normal((6, 40))
    order = rng.permutation(6)
    second = 3 * first[order] + 0.01 * rng.standard_normal((6, 40))
    third = rng.standard_normal((6, 40))
    third[0] = first[5]
    alive = [np.ones(6, bool)] * 3
    np.testing.assert_array_equal(stable_in([first, second, third], alive), [2, 2, 2, 2, 2, 3])


def test_a_feature_is_matched_only_once_and_dead_features_never() -> None:
    twins = np.eye(4)[[0, 0, 1, 2]]
    single = np.eye(4)[[0, 1, 2, 3]]
    living = np.array([True, True, True, False])
    found = stable_in([twins, single], [living, np.ones(4, bool)])
    assert sorted(found[:2].tolist()) == [1, 2]
    assert found[2:].tolist() == [2, 0]


def test_enrichment_names_the_class_that_a_feature_selects() -> None:
    label = np.repeat([0, 1, 2], 100)
    active = label == 1
    active[:10] = True
    found = enrichment(active, label, ("a", "b", "c"), np.arange(300).astype(np.str_))
    assert found is not None
    assert found.name == "b"
    assert found.lift.value == pytest.approx((100 / 110) / (1 / 3))
    assert found.lift.low < found.lift.value < found.lift.high  # type: ignore[operator]
    assert enrichment(np.zeros(300, bool), label, ("a", "b", "c"), np.arange(300).astype(np.str_)) is None
