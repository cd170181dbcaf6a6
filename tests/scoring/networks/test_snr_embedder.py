"""The embedder for Rubin: its probabilities are those of SnrNet, and missing values and points have no influence."""

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
    PsfInput,
)
from broker_filter.scoring.networks.alert_embedder import MODALITIES
from broker_filter.scoring.networks.snr_embedder import SnrEmbedder
from broker_filter.scoring.networks.snrnet import FLAGGED, METADATA, SIZE, SnrNet
from tests.network_description import describe

POINTS, DIMENSIONS = 5, 8
ARGUMENTS = {"members": 2, "classes": 2, "orientations": 4, "size": DIMENSIONS, "width": 8, "layers": 1}
MISSING = METADATA.index(FLAGGED[2])


def make_embedder() -> SnrEmbedder:
    """Return a small network with random weights."""
    torch.manual_seed(8)
    return SnrEmbedder(**ARGUMENTS).eval()


@pytest.fixture
def alerts() -> list[Tensor]:
    """Three alerts: with all points, with one point and a missing value, and without points and metadata."""
    generator = torch.Generator().manual_seed(8)
    mask = (torch.arange(POINTS) < torch.tensor([[POINTS], [1], [0]])).float()
    metadata = torch.randn(3, len(METADATA), generator=generator)
    metadata[1, MISSING] = metadata[2] = NO_VALUE
    points = torch.randn(3, POINTS, LIGHT_CURVE_FEATURES, generator=generator) * mask.unsqueeze(2)
    images, psf = (torch.randn(3, n, SIZE, SIZE, generator=generator) for n in (3, 1))
    return [images, metadata, points, mask, psf]


@torch.inference_mode()
def test_probabilities_are_those_of_the_trunk_alone(alerts: list[Tensor]) -> None:
    embedder = make_embedder()
    images, metadata, _, _, psf = alerts
    missing = metadata == NO_VALUE
    flags = missing[:, [METADATA.index(name) for name in FLAGGED]].float()
    alone = SnrNet(members=2, classes=2, orientations=4).eval()
    alone.load_state_dict(embedder.trunk.state_dict())
    expected, _ = alone(images, torch.cat([metadata.masked_fill(missing, 0), flags], dim=1), psf)
    logits, _, _ = embedder(*alerts)
    torch.testing.assert_close(logits, expected)
    assert flags[1].tolist() == [float(name == FLAGGED[2]) for name in FLAGGED]


@torch.inference_mode()
def test_an_embedding_is_the_normalised_concatenation_of_its_modalities(alerts: list[Tensor]) -> None:
    _, embedding, modalities = make_embedder()(*alerts)
    there = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(modalities.norm(dim=2), there)
    torch.testing.assert_close(embedding, modalities.flatten(1) / there.sum(1, keepdim=True).sqrt())


@torch.inference_mode()
def test_each_modality_depends_on_its_own_inputs_only(alerts: list[Tensor]) -> None:
    embedder = make_embedder()
    _, _, expected = embedder(*alerts)
    for i, changed in ((0, 0), (1, 2), (2, 1), (4, 0)):  # images, metadata, light curve, PSF
        others = [tensor + 0.5 if place == i else tensor for place, tensor in enumerate(alerts)]
        _, _, found = embedder(*others)
        same = [m for m in range(len(MODALITIES)) if m != changed]
        torch.testing.assert_close(found[0, same], expected[0, same])
        assert not torch.allclose(found[0, changed], expected[0, changed], atol=1e-4)


def test_metadata_are_masked_in_training_only(alerts: list[Tensor]) -> None:
    encoder = make_embedder().metadata
    metadata = alerts[1][:1]
    assert torch.equal(encoder(metadata), encoder(metadata))
    encoder.train().lost = 1.0
    assert not encoder(metadata).any()


def test_it_is_served_by_both_engines(tmp_path: Path) -> None:
    description = describe(
        name="embedder",
        task="embedding",
        surveys=("lsst",),
        inputs=Inputs(
            images=ImageInput(size=SIZE, order=("science", "template", "difference"), normalisation="snr", padding=0),
            metadata=tuple(MetadataColumn(name=name, fill=NO_VALUE) for name in METADATA),
            light_curve=LightCurveInput(points=POINTS, flux_scale=100, time_scale=1),
            psf=PsfInput(size=SIZE, order=("difference",), normalisation="peak", fallback_fwhm={"lsst": 5.0}),
        ),
        outputs=Outputs(
            labels=("real", "one", "two"), activation="sigmoid", embedding=3 * DIMENSIONS, modalities=MODALITIES
        ),
        architecture=Architecture(name="snr_embedder", arguments=dict(ARGUMENTS)),
    )
    write_bundle(tmp_path / "embedder", description, make_embedder())  # verifies the bundle with both engines
