"""The alert embedder: padding and missing values have no influence, and the trunk's output is that of the trunk
alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.photometry import NO_VALUE
from broker_filter.scoring.bundle import (
    LIGHT_CURVE_FEATURES,
    Architecture,
    ImageInput,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    Outputs,
)
from broker_filter.scoring.networks.alert_embedder import MODALITIES, AlertEmbedder
from tests.network_description import describe

POINTS, COLUMNS, SIZE = 7, 3, 8


@pytest.fixture(scope="module")
def embedder() -> AlertEmbedder:
    torch.manual_seed(8)
    return AlertEmbedder("stampnet", COLUMNS, SIZE).eval()


@pytest.fixture
def alerts() -> list[Tensor]:
    """Four alerts: with all points, with two points, with one point, and without points and metadata."""
    generator = torch.Generator().manual_seed(8)
    mask = (torch.arange(POINTS) < torch.tensor([[POINTS], [2], [1], [0]])).float()
    metadata = torch.randn(4, COLUMNS, generator=generator)
    metadata[1, 0] = metadata[3] = NO_VALUE
    points = torch.randn(4, POINTS, LIGHT_CURVE_FEATURES, generator=generator) * mask.unsqueeze(2)
    return [torch.randn(4, 3, 63, 63, generator=generator) / 8, metadata, points, mask]


@torch.inference_mode()
def test_an_embedding_is_the_normalised_concatenation_of_its_modalities(
    embedder: AlertEmbedder, alerts: list[Tensor]
) -> None:
    _, embedding, modalities = embedder(*alerts)
    assert modalities.shape == (4, len(MODALITIES), SIZE)
    there = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(modalities.norm(dim=2), there)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embedding, modalities.flatten(1) / there.sum(1, keepdim=True).sqrt())
    cosine = (embedding[0] * embedding[1]).sum()
    torch.testing.assert_close(cosine, (modalities[0] * modalities[1]).sum(1).mean())


@torch.inference_mode()
def test_padding_has_no_influence(embedder: AlertEmbedder, alerts: list[Tensor]) -> None:
    images, metadata, points, mask = alerts
    expected = embedder(*alerts)
    noise = torch.where(mask.unsqueeze(2) > 0, points, 1e3)
    longer = torch.cat([noise, torch.full((4, 5, LIGHT_CURVE_FEATURES), -7.0)], dim=1)
    found = embedder(images, metadata, longer, torch.cat([mask, torch.zeros(4, 5)], dim=1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.inference_mode()
def test_every_point_has_influence_and_their_order_has_none(embedder: AlertEmbedder, alerts: list[Tensor]) -> None:
    images, metadata, points, mask = alerts
    _, _, expected = embedder(*alerts)
    _, _, turned = embedder(images, metadata, points.flip(1), mask.flip(1))
    torch.testing.assert_close(turned, expected)
    for i in range(POINTS):
        without = mask.clone()
        without[0, i] = 0
        _, _, found = embedder(images, metadata, points, without)
        assert not torch.allclose(found[0, 1], expected[0, 1], atol=1e-4)
        torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 2]])


@torch.inference_mode()
def test_a_missing_value_differs_from_every_measured_value(embedder: AlertEmbedder, alerts: list[Tensor]) -> None:
    images, metadata, points, mask = alerts
    _, _, expected = embedder(*alerts)
    metadata[1, 0] = 0.0  # the mean, as initialised
    _, _, found = embedder(images, metadata, points, mask)
    assert not torch.allclose(found[1, 2], expected[1, 2], atol=1e-4)


@torch.inference_mode()
def test_the_trunk_gives_the_same_output_as_alone(embedder: AlertEmbedder, alerts: list[Tensor]) -> None:
    logits, _, _ = embedder(*alerts)
    alone, _ = embedder.trunk.network(alerts[0])
    torch.testing.assert_close(logits, alone)


def test_a_timm_backbone_can_be_the_trunk(tmp_path: Path) -> None:
    trunk = "test_convnext"
    torch.manual_seed(9)
    description = describe(
        name="embedder",
        task="embedding",
        surveys=("ztf", "lsst"),
        inputs=Inputs(
            images=ImageInput(size=63, order=("science", "template", "difference"), normalisation="l2_row", padding=0),
            metadata=tuple(MetadataColumn(name=f"column{i}", fill=NO_VALUE) for i in range(COLUMNS)),
            light_curve=LightCurveInput(points=POINTS, flux_scale=100, time_scale=1),
        ),
        outputs=Outputs(labels=("real",), activation="sigmoid", embedding=3 * SIZE, modalities=MODALITIES),
        architecture=Architecture(
            name="alert_embedder", arguments={"trunk": trunk, "metadata": COLUMNS, "size": SIZE, "width": 8}
        ),
    )
    network = AlertEmbedder(trunk, COLUMNS, SIZE, width=8)
    write_bundle(tmp_path / "embedder", description, network.eval())  # verifies the bundle with both engines
