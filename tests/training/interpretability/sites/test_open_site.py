"""Sites: z is what the network computes, is made of pattern and values, and can be put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import pytest
import torch

pytest.importorskip("timm", reason="image networks with attention need the extra `train`")

from timm.layers import RelPosBias
from torch import Tensor, nn

from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import LIGHT_CURVE_FEATURES, Architecture
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder
from broker_filter.scoring.networks.snrnet import METADATA
from broker_filter.scoring.networks.timm_network import timm_network
from training.errors import LensError
from training.interpretability.sites.open_site import (
    TOKEN,
    Attention,
    Box,
    CellSite,
    LightCurveSite,
    Site,
    open_site,
    site_names,
)

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


@cache
def mobilevit() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(3)
    network = timm_network("mobilevit_xxs", metadata=COLUMNS).eval()
    return network, {"images": torch.randn(2, 3, 63, 63), "metadata": torch.randn(2, COLUMNS)}


@cache
def maxvit() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(4)
    network = timm_network("maxvit_tiny_rw_224", image_size=96).eval()
    for block in network.modules():
        if isinstance(block, RelPosBias):  # the initial biases are too small to be missed
            nn.init.normal_(block.relative_position_bias_table)
    return network, {"images": torch.randn(2, 3, 63, 63)}


OPENED = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make, names in {
        for_ztf: ("light_curve.0", "light_curve.1", "light_curve.2"),
        for_lsst: ("light_curve.0", "light_curve.1"),
        mobilevit: ("stages.2.1.transformer.1", "stages.3.1.transformer.0", "stages.4.1.transformer.2"),
        maxvit: ("stages.2.blocks.4.attn_block", "stages.2.blocks.4.attn_grid", "stages.3.blocks.1.attn_grid"),
    }.items()
    for name in names
]
every_site = pytest.mark.parametrize(("make", "name"), OPENED)
Make = Callable[[], tuple[nn.Module, Inputs]]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
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
    hook = site.output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network(*inputs.values())
    hook.remove()
    assert attention.z.shape == (*attention.queries.shape, site.heads * site.d_head)
    if isinstance(site, LightCurveSite):
        assert torch.allclose(attention.z[attention.queries], seen[0][attention.queries], atol=Z_TOLERANCE)
    else:  # the rows are in another order: test_cells_are_in_the_order_of_the_map tells which
        assert torch.equal(attention.z.flatten().sort().values, seen[0].flatten().sort().values)


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
    hook = site.output.register_forward_pre_hook(lambda _, arguments: (10 * arguments[0],))
    outputs = network(*inputs.values())
    hook.remove()
    assert not torch.allclose(outputs[-1], site.splice(inputs, attention.z)[-1], atol=1e-5)
    for mine, networks in zip(site.splice(inputs, 10 * attention.z), outputs, strict=True):
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


GROUPS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "stages.2.1.transformer.1": lambda row, column: (row % 2, column % 2),
    "stages.2.blocks.4.attn_block": lambda row, column: (row // 3, column // 3),
    "stages.2.blocks.4.attn_grid": lambda row, column: (row % 2, column % 2),
}
"""The group of a cell by its row and column, by site: MobileViT's patches are 2 x 2 cells; MaxViT's map of 6 x 6 cells
has windows of 3 x 3, and its grids of 3 x 3 take every second cell."""


@pytest.mark.parametrize(("make", "name"), [each for each in OPENED if each.values[1] in GROUPS])
def test_a_cell_is_where_it_is_in_the_map(make: Make, name: str) -> None:
    network, inputs, site, attention = opened(make, name)
    assert isinstance(site, CellSite)
    side, row, column = round(attention.z.shape[1] ** 0.5), 4, 1

    def perturb(images: Tensor) -> Tensor:
        images = images.clone()
        images[:, row, column] += torch.randn(images.shape[3])
        return images

    if "blocks" in name:
        block = network.get_submodule(f"encoder.backbone.{name}")
        hook = block.register_forward_pre_hook(lambda _, arguments: (perturb(arguments[0]),))
    else:  # the first transformer block is replaced, so that the perturbed cell is not mixed with others
        layer = network.get_submodule("encoder.backbone.stages.2.1.conv_1x1")
        site = open_site(network, name.replace("transformer.1", "transformer.0"))
        attention = site.attend(inputs)
        hook = layer.register_forward_hook(lambda *given: perturb(given[2].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    moved = (site.attend(inputs).values != attention.values).any(3).any(1)
    hook.remove()
    assert moved.all(0).nonzero().flatten().tolist() == [row * side + column]
    assert moved.any(0).sum() == 1
    groups = [GROUPS[name](*divmod(cell, side)) for cell in range(side**2)]
    same_group = torch.tensor([[mine == other for other in groups] for mine in groups])
    assert torch.equal(attention.pattern[0, 0] > 0, same_group)


def test_a_box_is_around_what_the_cell_sees() -> None:
    network, inputs = mobilevit()
    site = open_site(network, "stages.2.1.transformer.0")
    row, column, side, stamp = 3, 4, 8, 63
    images = inputs["images"].clone().requires_grad_()
    with torch.enable_grad():
        cells = site.attend({**inputs, "images": images}).rest["map"]
        (gradient,) = torch.autograd.grad(cells[:, :, row, column].square().sum(), images)
    weights = gradient.square().sum((0, 1))
    pixels = torch.arange(stamp) + 0.5
    centre = ((weights.sum(1) @ pixels) / weights.sum(), (weights.sum(0) @ pixels) / weights.sum())
    box = site.where(side**2, stamp)[row * side + column]
    assert isinstance(box, Box)
    assert (box.bottom - box.top, box.right - box.left) == (8, 8)
    assert torch.allclose(torch.stack(centre), torch.tensor([box.top + 4, box.left + 4]), atol=1.5)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(name="stampnet", arguments={"labels": 1}),
        Architecture(name="vgg6", arguments={}),
        Architecture(name="timm", arguments={"backbone": "convnext_pico"}),
        Architecture(name="timm", arguments={"backbone": "mobilevitv2_050"}),  # linear attention has no pattern
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
