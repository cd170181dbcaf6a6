import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from broker_filter.scoring.bundle import WEIGHTS, open_bundle
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.data.datasets import Dataset
from training.interpretability.explorer.attributions import COSINE, OpenLens, ablate, see
from training.interpretability.explorer.contents import MOST_ACTIVE, FeatureTable, Header, choose, contents
from training.interpretability.explorer.data import TOKEN, Kind, Page, as_json
from training.interpretability.sites.open_site import open_site

FEATURES = 24


def lens_of(night_dataset: Dataset, site_name: str, bundle: str = "embedder") -> OpenLens:
    """Return a lens whose directions are differences of rows of z from their mean."""
    part = open_bundle(bundle).part("ztf")
    network = load_network(part.card.architecture, load_file(part.directory / WEIGHTS)).eval()
    site = open_site(network, site_name)
    raw = night_dataset["train"].read().raw
    with torch.no_grad():
        attention = site.attend({name: torch.from_numpy(a) for name, a in prepare(raw, part.card.inputs).items()})
    z = attention.z.numpy()[attention.queries.numpy()]
    mean = z.mean(axis=0)
    directions = z[np.random.default_rng(0).choice(len(z), FEATURES)] - mean
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    threshold = np.maximum(np.quantile((z - mean) @ directions.T, 0.6, axis=0), 0)
    bias = np.full(FEATURES, 0.01, np.float32)
    dictionary = SparseDictionary(directions.T.copy(), bias, directions, mean, threshold.astype(np.float32))
    return OpenLens(site, dictionary, part.card.inputs, part.card.outputs)


@pytest.fixture(scope="module", params=["light_curve.0", "light_curve.1"])
def lens(request: pytest.FixtureRequest, night_dataset: Dataset) -> OpenLens:
    return lens_of(night_dataset, request.param)


@pytest.fixture(scope="module")
def page(lens: OpenLens, night_dataset: Dataset) -> Page:
    table = FeatureTable(
        ("id", "name", "note", "stable_in", "family"),
        [{"id": "3", "name": "rise", "note": "fast", "stable_in": "4", "family": "short-range"}],
        seeds=5,
    )
    return contents(lens, night_dataset["train"], Header("title", [], [], []), table, most_alerts=30)


def test_attributions_and_biases_sum_to_the_pre_activations(lens: OpenLens, night_dataset: Dataset) -> None:
    alerts = night_dataset["train"].read()
    seen = see(lens, night_dataset["train"].batches(32))
    attention, activation = lens.attend(alerts)
    pre = lens.dictionary.pre_activations(attention.z.numpy())[seen.pairs.alert, seen.pairs.query, seen.pairs.feature]
    np.testing.assert_allclose(seen.pairs.sources.sum(axis=1) + seen.pairs.bias, pre, atol=1e-5)
    np.testing.assert_allclose(seen.pairs.heads.sum(axis=1), seen.pairs.sources.sum(axis=1), atol=1e-12)
    np.testing.assert_allclose(seen.activation, activation.max(axis=1), rtol=1e-5)
    assert len(seen.pairs.alert) == (seen.activation > 0).sum() > 0
    rows = attention.queries.numpy()
    z = attention.z.numpy()[rows]
    rebuilt = lens.dictionary.decode(activation)[rows]
    first = rows[0].sum()
    expected = ((z - rebuilt) ** 2)[:first].sum() / ((z - z.mean(axis=0)) ** 2)[:first].sum()
    assert seen.unexplained[0] == pytest.approx(expected, rel=1e-3)


def test_ablation_of_an_inactive_feature_changes_nothing_and_of_an_active_one_the_embedding(
    lens: OpenLens, night_dataset: Dataset
) -> None:
    alerts = night_dataset["train"].read()
    seen = see(lens, night_dataset["train"].batches(32))
    cosine = lens.output_names.index(COSINE)
    idle = np.argwhere(seen.activation == 0)[:5]
    ablated = ablate(lens, alerts, idle[:, 0], idle[:, 1])
    np.testing.assert_allclose(ablated.before[:, cosine], 1, atol=1e-6)
    np.testing.assert_allclose(ablated.after, ablated.before[idle[:, 0]], atol=1e-6)
    own = ablate(lens, alerts, seen.pairs.alert[:20], seen.pairs.feature[:20])
    assert (own.after[:, cosine] < 1 - 1e-7).any()
    probability = own.after[:, 0] - own.before[own.alert, 0]
    np.testing.assert_allclose(probability, 0, atol=1e-6)  # the trunk does not see the light curve


def test_page_shows_the_most_active_alerts_of_every_feature(page: Page) -> None:
    assert page.kind is Kind.POINTS
    assert len(page.features) == FEATURES
    for number, feature in enumerate(page.features):
        for example in [*feature.top, *(one for group in feature.groups for one in group.examples)]:
            active = {one.feature: one for one in page.alerts[example.alert].active}
            assert active[number].activation == pytest.approx(example.activation)
        assert len({page.alerts[example.alert].object for example in feature.top}) == len(feature.top)
        if feature.top:
            assert sum(feature.heads_by_dfa) == pytest.approx(1)
            assert sum(lag.share for lag in feature.lags) == pytest.approx(1)
            assert feature.effects[0].output == COSINE
            assert feature.effect == feature.effects[0].effect


def test_page_takes_names_and_families_from_the_table(page: Page) -> None:
    named = page.features[3]
    assert (named.name, named.note, named.stable_in, named.family) == ("rise", "fast", 4, "short-range")
    assert page.features[4].stable_in is None


def test_alerts_have_one_source_for_the_token_and_each_point_that_the_network_takes(page: Page) -> None:
    for alert in page.alerts:
        assert alert.points[0] == TOKEN
        assert alert.actives >= len(alert.active)
        activations = [active.activation for active in alert.active]
        assert activations == sorted(activations, reverse=True)
        for active in alert.active:
            assert len(active.sources) == len(alert.points)
            assert active.query in alert.points
            assert len(active.after) == len(page.outputs) == len(alert.before)


def test_cells_of_an_image_network_lie_in_the_stamp_and_have_a_source_each(night_dataset: Dataset) -> None:
    lens = lens_of(night_dataset, "stages.4.1.transformer.2", "attention")
    some = night_dataset["train"][np.arange(8)]
    page = contents(lens, some, Header("title", [], [], []), FeatureTable((), [], 1), most_alerts=8)
    assert page.kind is Kind.CELLS
    assert all(min(y, x) >= 0 and max(y + height, x + width) <= 63 for y, x, height, width in page.cells)
    size = len(page.cells)
    assert all(len(feature.cells) == size for feature in page.features if feature.top)
    for alert in page.alerts:
        assert not alert.points
        for active in alert.active:
            assert len(active.sources) == size
            assert 0 <= active.query < size
    changed = [abs(active.after[0] - alert.before[0]) for alert in page.alerts for active in alert.active]
    assert max(changed) > 0, "the image network's probability depends on its cells"


def test_page_is_plain_json(page: Page) -> None:
    assert len(json.loads(as_json(page))["alerts"]) == len(page.alerts)


def test_choice_keeps_what_is_wanted_and_fills_up_at_random() -> None:
    assert np.flatnonzero(choose(10, {3, 7}, 1)).tolist() == [3, 7]
    filled = choose(10, {3, 7}, 6)
    assert filled.sum() == 6
    assert filled[[3, 7]].all()
    np.testing.assert_array_equal(filled, choose(10, {3, 7}, 6))
    assert choose(4, set(), 9).all()


def test_only_the_most_active_features_of_an_alert_are_held_besides_examples(page: Page) -> None:
    examples = {
        (example.alert, feature.id)
        for feature in page.features
        for example in [*feature.top, *(one for group in feature.groups for one in group.examples)]
    }
    for number, alert in enumerate(page.alerts):
        others = [active for active in alert.active[MOST_ACTIVE:] if (number, active.feature) not in examples]
        assert not others
    assert any(alert.actives > MOST_ACTIVE for alert in page.alerts)
