"""Nearest neighbours: exact for few embeddings, and nearly always found among many."""

from __future__ import annotations

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import EXACT_LIMIT, Embeddings, Neighbours, normalise


def embeddings(n: int, seed: int) -> Embeddings:
    """Return embeddings on a low-dimensional surface, like those of a network."""
    surface = np.random.default_rng(0).standard_normal((6, 32))
    rng = np.random.default_rng(seed)
    return normalise(np.tanh(rng.standard_normal((n, 6)) @ surface) + 0.05 * rng.standard_normal((n, 32)))


def test_search_among_few_finds_exactly_the_nearest() -> None:
    some, asked = embeddings(500, seed=1), embeddings(70, seed=2)
    distances, rows = Neighbours(some).nearest(asked, 5)
    truth = 1 - asked.astype(np.float64) @ some.T
    np.testing.assert_array_equal(rows, np.argsort(truth, axis=1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(truth, axis=1)[:, :5], atol=1e-6)


def test_search_among_many_finds_nearly_all_of_the_nearest() -> None:
    many, asked = embeddings(EXACT_LIMIT + 5_000, seed=1), embeddings(200, seed=2)
    distances, rows = Neighbours(many).nearest(asked, 5)
    truth = 1 - asked @ many.T
    nearest = np.argsort(truth, axis=1)[:, :5]
    assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(rows.tolist(), nearest.tolist(), strict=True)]) > 0.97
    np.testing.assert_allclose(distances.mean(axis=1), np.sort(truth, axis=1)[:, :5].mean(axis=1), atol=0.01)


@pytest.mark.parametrize("n", [300, EXACT_LIMIT + 1_000])
def test_results_do_not_depend_on_the_rest_of_the_query_or_on_the_instance(n: int) -> None:
    some, asked = embeddings(n, seed=1), embeddings(100, seed=2)
    opened = Neighbours(some)
    together, rows = opened.nearest(asked, 5)
    alone = [opened.nearest(asked[i : i + 1], 5) for i in range(len(asked))]
    np.testing.assert_allclose(np.concatenate([one for one, _ in alone]), together, atol=1e-6)
    np.testing.assert_array_equal(Neighbours(some).nearest(asked, 5)[1], rows)


def test_missing_neighbours_have_an_infinite_distance() -> None:
    distances, rows = Neighbours(embeddings(3, seed=1)).nearest(embeddings(1, seed=2), 5)
    assert rows[0, 3:].tolist() == [-1, -1]
    assert np.isinf(distances[0, 3:]).all()


def test_zero_vectors_stay_zero() -> None:
    unit = normalise(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]])
