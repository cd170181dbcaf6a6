"""Ablation removes a feature and leaves the error term; the null removes as much in a random direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.interpretability.ablation import ablate, changes, contribution, in_random_direction
from training.interpretability.sites.open_site import open_site


@pytest.mark.parametrize("layer", [0, 2])
def test_ablated_outputs_are_those_of_z_without_the_feature(embedded: Any, layer: int) -> None:
    network, inputs, dictionary = embedded.network, embedded.inputs, embedded.dictionaries[layer]
    site = open_site(network, f"light_curve.{layer}")
    with torch.no_grad():
        attention = site.attend(inputs)
        activations = torch.from_numpy(dictionary.encode(attention.z.flatten(0, 1).numpy())).unflatten(
            0, attention.queries.shape
        )
        alerts, features = (activations * attention.queries[:, :, None]).amax(1).nonzero()[::7].T
        ablated = ablate(site, attention, dictionary, alerts, features, torch.Generator().manual_seed(1), batch=10)
        for n, (alert, feature) in enumerate(zip(alerts.tolist(), features.tolist(), strict=True)):
            z = attention.z.clone()
            z[alert] -= activations[alert, :, feature, None] * torch.from_numpy(dictionary.w_dec[feature])
            expected = [output[alert] for output in site.splice(inputs, z)]
            unchanged = [output[alert] for output in network(*inputs.values())]
            for mine, spliced in zip((output[n] for output in ablated.after), expected, strict=True):
                assert torch.allclose(mine, spliced, atol=1e-5)
            for mine, served in zip((output[n] for output in ablated.before), unchanged, strict=True):
                assert torch.allclose(mine, served, atol=1e-5)
    assert len(alerts) > 10  # more than one batch
    moved, at_random = changes(ablated.before, ablated.after), changes(ablated.before, ablated.random)
    assert (moved["logits"] == 0).all()  # the trunk's logits do not depend on the light curve
    has_points = inputs["light_curve_mask"].any(1)[alerts]  # without points, the modality's vector is 0
    assert torch.equal(moved["embedding"] > 0, has_points)
    assert torch.equal(at_random["embedding"] > 0, has_points)
    assert (moved["modalities"][:, [0, 2]] == 0).all()
    cosine = torch.cosine_similarity(ablated.before[1].double(), ablated.after[1].double())
    assert torch.allclose(moved["embedding"], 1 - cosine, atol=1e-6)


def test_an_inactive_feature_has_no_effect(embedded: Any) -> None:
    dictionary, site = embedded.dictionaries[2], open_site(embedded.network, "light_curve.2")
    with torch.no_grad():
        attention = site.attend(embedded.inputs)
    alerts, features = torch.from_numpy(dictionary.encode(attention.z[:, 0].numpy()) == 0).nonzero()[:20].T
    ablated = ablate(site, attention, dictionary, alerts, features, torch.Generator())
    assert all((moved == 0).all() for moved in changes(ablated.before, ablated.after).values())


def test_the_null_is_of_equal_size_and_padding_is_left_alone(embedded: Any) -> None:
    dictionary, site = embedded.dictionaries[0], open_site(embedded.network, "light_curve.0")
    with torch.no_grad():
        attention = site.attend(embedded.inputs)
    features = torch.arange(5)
    removed = contribution(attention.z, attention.queries, dictionary, features)
    assert (removed[~attention.queries] == 0).all()
    assert (removed != 0).any()
    null = in_random_direction(removed, torch.Generator().manual_seed(3))
    assert torch.allclose(null.norm(dim=2), removed.norm(dim=2), rtol=1e-5)
    cosine = torch.cosine_similarity(null, removed, dim=2)[removed.any(2)]
    assert cosine.abs().max() < 0.9
