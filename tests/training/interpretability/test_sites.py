"""Sites: z is what the network computes, is made of pattern and values, and can be put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import LIGHT_CURVE_FEATURES, Architecture
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder
from broker_filter.scoring.networks.snrnet import METADATA
from training.errors import LensError
from training.interpretability.sites import TOKEN, Attention, LightCurveSite, Site, open_site, site_names

ALERTS, POINTS, COLUMNS = 5, 7, 4
EXISTING = (7, 3, 1, 0, 5)
"""Number of points in the light curve of each alert."""
Z_TOLERANCE = 1e-5

Inputs = Mapping[str, Tensor]


def light_curves() -> dict[str, Tensor]:
    """Light curves of EXISTING points; the padding holds numbers, so that a site that reads it is noticed."""
    mask = (torch.arange(POINTS) < torch.tensor(EXISTING)[:, None]).float()
    return {"light_curve": 3 * torch.randn(ALERTS, POINTS, LIGHT_CURVE_FEATURES), "light_curve_mask": mask}


def for_ztf() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(1)
    metadata = torch.randn(ALERTS, COLUMNS)
    metadata[0] = NO_VALUE
    inputs = {"images": torch.randn(ALERTS, 3, 63, 63), "metadata": metadata, **light_curves()}
    return AlertEmbedder("stampnet", COLUMNS, layers=3).eval(), inputs


def for_lsst() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(2)
    inputs = {
        "images": torch.randn(ALERTS, 3, 31, 31),
        "metadata": torch.rand(ALERTS, len(METADATA)),
        **light_curves(),
        "psf": torch.rand(ALERTS, 1, 31, 31),
    }
    return SnrEmbedder(members=1, classes=4, orientations=1).eval(), inputs


OPENED = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make in (for_ztf, for_lsst)
    for name in site_names(make()[0])
]
every_site = pytest.mark.parametrize(("make", "name"), OPENED)
Make = Callable[[], tuple[nn.Module, Inputs]]


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.no_grad():
        yield


def opened(make: Make, name: str) -> tuple[nn.Module, Inputs, Site, Attention]:
    network, inputs = make()
    site = open_site(network, name)
    return network, inputs, site, site.attend(inputs)


@every_site
def test_z_is_the_input_of_the_output_projection(make: Make, name: str) -> None:
    network, inputs, site, attention = opened(make, name)
    seen: list[Tensor] = []
    site.output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network(*inputs.values())
    assert attention.z.shape == (*attention.queries.shape, site.heads * site.d_head)
    assert torch.allclose(attention.z[attention.queries], seen[0][attention.queries], atol=Z_TOLERANCE)


@every_site
def test_z_is_made_of_pattern_and_values(make: Make, name: str) -> None:
    _, _, site, attention = opened(make, name)
    by_head = attention.z.unflatten(2, (site.heads, site.d_head))
    for pattern, same in ((attention.pattern, True), (attention.pattern.roll(1, 3), False)):
        made = torch.einsum("nhqp,nhpd->nqhd", pattern, attention.values)
        assert torch.allclose(made, by_head, atol=Z_TOLERANCE) == same
    assert torch.allclose(attention.pattern.sum(3), torch.ones(()))


@every_site
def test_z_in_its_own_place_changes_no_output(make: Make, name: str) -> None:
    network, inputs, site, attention = opened(make, name)
    outputs = network(*inputs.values())
    spliced = site.splice(inputs, attention.z)
    assert len(spliced) == len(outputs)
    for mine, networks in zip(spliced, outputs, strict=True):
        assert torch.allclose(mine, networks, atol=1e-6)


@every_site
def test_another_z_does_what_it_does_in_the_network(make: Make, name: str) -> None:
    network, inputs, site, attention = opened(make, name)
    other = attention.z + torch.randn_like(attention.z)
    hook = site.output.register_forward_pre_hook(lambda *_: (other,))
    outputs = network(*inputs.values())
    hook.remove()
    assert not torch.allclose(outputs[-1], site.splice(inputs, attention.z)[-1])
    for mine, networks in zip(site.splice(inputs, other), outputs, strict=True):
        assert torch.allclose(mine, networks, atol=1e-6)


@pytest.mark.parametrize(("make", "name"), [each for each in OPENED if "light_curve" in str(each.id)])
def test_padding_is_no_row_no_source_and_has_no_effect(make: Make, name: str) -> None:
    network, inputs, site, attention = opened(make, name)
    last = name == site_names(network)[-1]
    existing = torch.tensor(EXISTING)
    assert torch.equal(attention.queries.sum(1), torch.ones_like(existing) if last else 1 + existing)
    assert torch.equal(attention.sources.sum(1), 1 + existing)
    assert (attention.pattern.amax(2)[~attention.sources[:, None].expand(-1, site.heads, -1)] == 0).all()
    assert site.where(attention.sources.shape[1], 63) == [TOKEN, *range(POINTS)]
    other = attention.z.clone()
    other[~attention.queries] = 1000.0
    for changed, unchanged in zip(site.splice(inputs, other), network(*inputs.values()), strict=True):
        assert torch.allclose(changed, unchanged, atol=1e-6)


def test_rows_can_be_repeated() -> None:
    network, inputs, site, attention = opened(for_ztf, "light_curve.1")
    rest = {name: tensor[[0, 0, 4]] for name, tensor in attention.rest.items()}
    repeated = site.resume(rest, attention.z[[0, 0, 4]])
    for some, all_alerts in zip(repeated, network(*inputs.values()), strict=True):
        assert torch.allclose(some, all_alerts[[0, 0, 4]], atol=1e-6)


def test_a_source_token_is_the_point_of_its_index() -> None:
    _, inputs, site, attention = opened(for_ztf, "light_curve.0")
    assert isinstance(site, LightCurveSite)
    point = 3
    inputs["light_curve"][:, point] += 1.0
    moved = (site.attend(inputs).values != attention.values).any(3).any(1)
    assert moved.all(0).nonzero().flatten().tolist() == [site.where(moved.shape[1], 63).index(point)]


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(name="stampnet", arguments={"labels": 1}),
        Architecture(name="vgg6", arguments={}),
        Architecture(name="timm", arguments={"backbone": "convnext_pico"}),
    ],
    ids=lambda architecture: architecture.name,
)
def test_a_network_without_attention_is_refused(architecture: Architecture) -> None:
    network = build_network(architecture)
    assert site_names(network) == []
    with pytest.raises(LensError, match="has no attention layer"):
        open_site(network, "light_curve.0")


def test_an_unknown_site_is_refused_with_the_names_of_those_that_exist() -> None:
    with pytest.raises(LensError, match=r"no site 'light_curve.3'; its sites are light_curve.0, light_curve.1"):
        open_site(for_ztf()[0], "light_curve.3")
