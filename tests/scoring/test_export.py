"""Any network becomes a bundle that runs on every engine, metadata and embedding included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from broker_filter.config import Runtime
from broker_filter.packets.batch import AlertBatch
from broker_filter.scoring import networks
from broker_filter.scoring.bundle import (
    ONNX,
    Architecture,
    BundleError,
    Description,
    ImageInput,
    Inputs,
    MetadataColumn,
    Outputs,
    Training,
    load_bundle,
)
from broker_filter.scoring.export import write_bundle
from broker_filter.scoring.scorer import open_scorer


class Fusion(nn.Module):
    """Images and metadata into three classes: what a network with every kind of input and output looks like."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, width, 5, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.metadata = nn.BatchNorm1d(2)
        self.head = nn.Linear(width + 2, 3)

    def forward(self, images: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
        embedding = torch.cat([self.images(images).flatten(1), self.metadata(metadata)], dim=1)
        return self.head(embedding), embedding


@pytest.fixture
def description(monkeypatch: pytest.MonkeyPatch) -> Description:
    monkeypatch.setitem(networks.NETWORKS, "fusion", Fusion)
    return Description(
        name="classes",
        version="1",
        task="classification",
        surveys=("ztf", "lsst"),
        inputs=Inputs(
            images=ImageInput(
                size=51, order=("science", "template", "difference"), normalisation="l2_image", padding=0
            ),
            metadata=(MetadataColumn(name="magpsf", fill=20), MetadataColumn(name="ndethist", fill=0)),
        ),
        outputs=Outputs(labels=("SN", "AGN", "VS"), activation="softmax", embedding=10),
        architecture=Architecture(name="fusion", arguments={"width": 8}),
        licence="BSD-3-Clause",
        source="this test",
        citation="none",
        training=Training(method="none", data="none"),
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return Fusion(width=8).eval()


def test_a_network_with_metadata_and_embedding_is_served_alike_by_every_engine(
    tmp_path: Path, description: Description, network: nn.Module, make_batch: Callable[..., AlertBatch]
) -> None:
    write_bundle(tmp_path / "classes", description, network)
    rng = np.random.default_rng(1)
    batch = make_batch(
        rng.normal(0, 1, (70, 3, 63, 63)).astype(np.float32),
        columns=("ndethist", "ra", "magpsf"),
        metadata=np.where(rng.random((70, 3)) < 0.2, np.nan, rng.normal(10, 5, (70, 3))),
    )
    served = []
    for engine in ("onnxruntime", "torch"):
        scorer = open_scorer([str(tmp_path / "classes")], Runtime.model_validate({"engine": engine, "device": "cpu"}))
        assert scorer.columns == ("magpsf", "ndethist")
        assert scorer.cutout_size == 51
        served.append(scorer.score(batch).models[0])
    onnx, reference = served
    assert onnx.labels == ("SN", "AGN", "VS")
    assert onnx.embedding is not None
    assert reference.embedding is not None
    assert onnx.embedding.shape == (70, 10)
    np.testing.assert_allclose(onnx.probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(onnx.probabilities, reference.probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(onnx.embedding, reference.embedding, rtol=1e-5, atol=1e-5)
    filled = np.where(np.isnan(batch.metadata[:, 2]), 20, batch.metadata[:, 2])
    np.testing.assert_allclose(onnx.embedding[:, 8], filled, rtol=1e-4)  # BatchNorm as initialised


def test_a_bundle_never_replaces_another(tmp_path: Path, description: Description, network: nn.Module) -> None:
    (tmp_path / "classes").mkdir()
    with pytest.raises(BundleError, match="classes: exists already"):
        write_bundle(tmp_path / "classes", description, network)


def test_a_bundle_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, description: Description, network: nn.Module
) -> None:
    wrong = description.model_copy(update={"outputs": Outputs(labels=("real",), activation="softmax", embedding=10)})
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "wrong", wrong, network)
    assert list(tmp_path.iterdir()) == []


def test_the_graph_tells_nothing_of_the_machine_that_made_it(
    tmp_path: Path, description: Description, network: nn.Module
) -> None:
    write_bundle(tmp_path / "classes", description, network)
    graph = (load_bundle(tmp_path / "classes").directory / ONNX).read_bytes()
    assert b"/" + b"test_export.py" not in graph
    assert str(Path.home()).encode() not in graph
