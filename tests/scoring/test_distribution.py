"""Distributions in bundles: bins of equal frequency, the population stability index, and files that are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import BundleError, open_bundle, shipped_bundles, write_card
from broker_filter.scoring.distribution import (
    BINS,
    DISTRIBUTION,
    QUANTITIES,
    bins_of,
    population_stability_index,
)


def test_bins_hold_equally_many_values_and_missing_ones_are_counted_apart() -> None:
    values = np.random.default_rng(1).normal(size=5000)
    values[:1000] = np.nan
    bins = bins_of(values)
    assert bins.counts[-1] == 1000
    assert len(bins.edges) == BINS - 1
    assert max(bins.counts[:-1]) - min(bins.counts[:-1]) <= 2


def test_a_frequent_value_has_a_bin_of_its_own() -> None:
    detections = np.repeat([1.0, 2.0, 7.0, 900.0], [600, 30, 170, 200])
    bins = bins_of(detections)
    assert bins.edges[0] == 2
    assert bins.counts[0] == 600
    assert sum(bins.counts) == 1000


def test_few_values_have_few_bins_and_equal_ones_a_single_bin() -> None:
    assert len(bins_of(np.arange(60.0)).edges) == 1
    assert bins_of(np.full(500, 3.0)).counts == (500, 0)
    assert bins_of(np.full(500, np.nan)).counts == (0, 500)


def test_edges_of_probabilities_do_not_resolve_rounding_errors_near_one() -> None:
    probability = 1 - np.geomspace(1e-8, 1, 4000)
    found, exact = bins_of(probability, probabilities=True), bins_of(probability)
    assert max(found.edges) < 1
    assert max(found.edges) < max(exact.edges)
    moved = np.searchsorted(found.edges, probability - 1e-6, side="right")
    assert np.mean(moved != np.searchsorted(found.edges, probability, side="right")) < 0.01


def test_psi_is_the_published_sum() -> None:
    expected, found = np.array([100, 200, 700]), np.array([3000, 3000, 4000])
    e, f = np.array([0.1, 0.2, 0.7]), np.array([0.3, 0.3, 0.4])
    assert population_stability_index(expected, expected) == 0
    assert population_stability_index(expected * 1000, found * 1000) == pytest.approx(
        np.sum((f - e) * np.log(f / e)), rel=1e-4
    )
    assert np.isfinite(population_stability_index(expected, np.array([0, 0, 1000])))


def test_psi_of_two_samples_of_one_population_has_the_stated_mean() -> None:
    rng = np.random.default_rng(2)
    share = np.full(10, 0.1)
    drawn = [
        population_stability_index(rng.multinomial(2000, share), rng.multinomial(1000, share)) for _ in range(2000)
    ]
    assert np.mean(drawn) == pytest.approx(9 * (1 / 2000 + 1 / 1000), rel=0.05)


@pytest.mark.parametrize("name", shipped_bundles())
def test_a_shipped_bundle_records_each_output_and_quantity_of_its_surveys(name: str) -> None:
    bundle = open_bundle(name)
    for part in bundle.parts:
        distribution = part.distribution()
        assert distribution
        assert "archive as served" in distribution.of
        for survey in part.surveys:
            recorded = distribution.of_survey(Survey[survey.upper()])
            assert recorded
            assert {label for label in part.card.outputs.labels if survey in part.card.surveys_of(label)} == set(
                recorded.outputs
            )
            assert tuple(recorded.quantities) == QUANTITIES[survey]
            for bins in (*recorded.outputs.values(), *recorded.quantities.values()):
                assert sum(bins.counts) == recorded.alerts


def test_a_bundle_without_a_distribution_opens(own_bundle: Path) -> None:
    card = open_bundle(own_bundle).parts[0].card
    (own_bundle / DISTRIBUTION).unlink()
    files = {name: sha256 for name, sha256 in card.files.items() if name != DISTRIBUTION}
    write_card(own_bundle, card.model_copy(update={"files": files}))
    assert open_bundle(own_bundle).parts[0].distribution() is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "not YAML"),
        ("format: 2", "format: Input should be 1"),
        ("format: 1\nof: x\nsurveys: {}", "surveys: Dictionary should have at least 1 item"),
        (
            "of: x\nsurveys: {ztf: {alerts: 9, outputs: {}, quantities: {snr: {edges: [2, 1], counts: [3, 3, 3, 0]}}}}",
            "edges must ascend",
        ),
        (
            "of: x\nsurveys: {ztf: {alerts: 9, outputs: {real: {edges: [.nan], counts: [9, 0, 0]}}, quantities: {}}}",
            "edges.0: Input should be a finite number",
        ),
        (
            "of: x\nsurveys: {ztf: {alerts: 9, outputs: {real: {edges: [1], counts: [9]}}, quantities: {}}}",
            "1 edges need 3 counts, not 1",
        ),
        ("x" * (2**20 + 1), "larger than"),
    ],
)
def test_a_malformed_distribution_is_named(own_bundle: Path, text: str, problem: str) -> None:
    card = open_bundle(own_bundle).parts[0].card
    (own_bundle / DISTRIBUTION).write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    write_card(own_bundle, card.model_copy(update={"files": card.files | {DISTRIBUTION: sha256}}))
    with pytest.raises(BundleError, match=DISTRIBUTION) as refused:
        open_bundle(own_bundle).parts[0].distribution()
    assert problem in str(refused.value)
