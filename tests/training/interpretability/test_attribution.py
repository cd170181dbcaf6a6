"""Attribution is complete: its terms sum to the pre-activation, and a wrong term is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.interpretability.attribution import (
    Leaf,
    RecursiveAttribution,
    completeness_error,
    direct_attribution,
    head_shares,
    head_shares_by_weights,
)
from training.interpretability.sites.open_site import Attention, open_site

COMPLETE = 1e-5
"""Largest deviation of a sum from its terms, as a share of the terms' absolute values; z is float32."""
FEATURE = 11


def attended(embedded: Any, layer: int) -> Attention:
    with torch.no_grad():
        return open_site(embedded.network, f"light_curve.{layer}").attend(embedded.inputs)


def triples(attention: Attention, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all (alert, query, feature) triples with a query that exists."""
    alerts, queries = attention.queries.nonzero().T
    count = torch.arange(features)
    return alerts.repeat_interleave(features), queries.repeat_interleave(features), count.repeat(len(alerts))


@pytest.mark.parametrize("layer", [0, 2])
def test_direct_attribution_sums_to_the_pre_activation(embedded: Any, layer: int) -> None:
    attention, dictionary = attended(embedded, layer), embedded.dictionaries[layer]
    alerts, queries, features = triples(attention, len(dictionary.threshold))
    by_source, constants = direct_attribution(attention, dictionary, alerts, queries, features)
    z = attention.z[alerts, queries].numpy()
    sums = torch.from_numpy(dictionary.pre_activations(z))[torch.arange(len(features)), features]
    terms = torch.cat([by_source.flatten(1), constants], 1)
    assert completeness_error(terms, sums).max() < COMPLETE
    assert completeness_error(terms[:, :-1], sums).median() > 100 * COMPLETE  # a term less is noticed
    swapped = replace(attention, pattern=attention.pattern.flip(1))
    wrong, _ = direct_attribution(swapped, dictionary, alerts, queries, features)
    assert completeness_error(torch.cat([wrong.flatten(1), constants], 1), sums).max() > 100 * COMPLETE


def test_direct_attribution_of_padding_is_zero(embedded: Any) -> None:
    attention = attended(embedded, 2)
    alerts = torch.arange(len(attention.z))
    by_source, _ = direct_attribution(
        attention, embedded.dictionaries[2], alerts, torch.zeros_like(alerts), alerts + FEATURE
    )
    assert torch.equal((by_source != 0).any(1), attention.sources)


def test_head_shares_are_those_of_the_heads(embedded: Any) -> None:
    dictionary = embedded.dictionaries[0]
    w_dec = dictionary.w_dec.copy()
    w_dec[0, 8:] = 0.0  # the first of four heads alone
    shares = head_shares_by_weights(replace(dictionary, w_dec=w_dec), 4)
    assert shares[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert np.allclose(shares.sum(1), 1.0)
    by_source = torch.tensor([[[3.0, 0.0], [-0.5, -0.5]], [[1.0, -1.0], [0.0, 0.0]]])
    assert head_shares(by_source).tolist() == [[0.75, 0.25], [0.0, 0.0]]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_recursive_attribution_sums_to_the_pre_activation(embedded: Any, depth: int) -> None:
    for alert, query in ((0, 0), (3, 0)):
        curve, mask = (embedded.inputs[name][alert] for name in ("light_curve", "light_curve_mask"))
        attribution = RecursiveAttribution(embedded.network.light_curve, embedded.dictionaries, curve, mask)
        leaves = attribution.leaves(2, query, FEATURE, depth)
        z = attended(embedded, 2).z[alert, query].numpy()
        expected = torch.tensor(embedded.dictionaries[2].pre_activations(z)[FEATURE])[None]
        assert completeness_error(torch.tensor([[leaf.value for leaf in leaves]]), expected) < COMPLETE
        assert {leaf.source for leaf in leaves} == {None, *range(1 + int(mask.sum()))}
        features_left = {leaf.layer for leaf in leaves if leaf.kind == "feature"}
        assert features_left == [{0, 1}, {0}, set()][depth]


def test_an_earlier_layer_without_a_dictionary_is_all_error(embedded: Any) -> None:
    curve, mask = (embedded.inputs[name][0] for name in ("light_curve", "light_curve_mask"))
    own = {2: embedded.dictionaries[2]}
    without = RecursiveAttribution(embedded.network.light_curve, own, curve, mask)
    leaves = without.leaves(2, 0, FEATURE)
    assert "feature" not in {leaf.kind for leaf in leaves}
    assert sum(leaf.value for leaf in leaves) == pytest.approx(without.pre_activation(2, 0, FEATURE), rel=1e-9)
    known = RecursiveAttribution(embedded.network.light_curve, embedded.dictionaries, curve, mask)
    assert by_kind(known.leaves(2, 0, FEATURE))["perceptron"] == pytest.approx(by_kind(leaves)["perceptron"])


def by_kind(leaves: list[Leaf]) -> dict[str, float]:
    return {kind: sum(leaf.value for leaf in leaves if leaf.kind == kind) for kind in {leaf.kind for leaf in leaves}}


def test_a_leaf_is_the_change_when_its_part_is_removed(embedded: Any) -> None:
    """With pattern and scale held fixed, the pre-activation without a token's embedding is smaller by its leaf."""
    curve, mask = (embedded.inputs[name][0].double() for name in ("light_curve", "light_curve_mask"))
    encoder = embedded.network.light_curve
    attribution = RecursiveAttribution(encoder, embedded.dictionaries, curve, mask)
    (leaf,) = [leaf for leaf in attribution.leaves(0, 0, FEATURE) if (leaf.kind, leaf.source) == ("embedding", 3)]
    layer = encoder.layers[0]
    with torch.no_grad():
        x = encoder.tokens(curve[None].float())
        query, key, _ = layer.split(x, 1)
        pattern = torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5, 3)
        centred = x[0, 3] - x[0, 3].mean()
        normed = layer.norm.weight * centred / (x[0, 3].var(correction=0) + layer.norm.eps).sqrt()
        part = (layer.key_value.weight.chunk(2)[1] @ normed).reshape(4, -1)  # by head, without the biases
        z = (pattern[0, :, 0, 3, None] * part).flatten()
        direction = torch.from_numpy(embedded.dictionaries[0].w_enc[:, FEATURE])
    assert leaf.value == pytest.approx(float(z @ direction), rel=1e-4)
