"""Any network can be written as a bundle that runs on every engine, including metadata and embedding."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as arrays_to_bytes
from torch import Tensor, nn

from broker_filter.cli.models import _describe
from broker_filter.config import Runtime
from broker_filter.importers.write_bundle import _test_alerts, write_bundle
from broker_filter.packets.batch import PSF_SIZE, AlertBatch, Survey
from broker_filter.packets.packet import Packet
from broker_filter.scoring import networks
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import (
    CARD,
    LIGHT_CURVE_FEATURES,
    MAX_TOLERANCE,
    ONNX,
    TEST_VECTOR,
    WEIGHTS,
    Architecture,
    BundleError,
    Description,
    ImageInput,
    Inputs,
    LightCurveInput,
    MetadataColumn,
    Outputs,
    PsfInput,
    open_bundle,
)
from broker_filter.scoring.cuda_graphs import CudaGraphNetwork
from broker_filter.scoring.networks.stampnet import StampNet
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import simulate_night
from tests.network_description import describe


class Fusion(nn.Module):
    """A network that takes images and metadata and returns three classes and an embedding."""

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


class Joined(nn.Module):
    """A network that takes light curves, and returns modalities and the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Linear(3, 4)
        self.points = nn.Linear(LIGHT_CURVE_FEATURES, 4)

    def forward(self, images: Tensor, light_curve: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.images(images.mean((2, 3)))
        past = (self.points(light_curve) * mask.unsqueeze(2)).sum(1)
        modalities = torch.nn.functional.normalize(torch.stack([seen, past], 1), dim=2)
        return seen, torch.nn.functional.normalize(modalities.flatten(1), dim=1), modalities


class WithPsf(nn.Module):
    """A network that takes images and PSF images, with one label."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(3, 4, 3)
        self.psf = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(8, 1)

    def forward(self, images: Tensor, psf: Tensor) -> tuple[Tensor, Tensor]:
        embedding = torch.cat([torch.relu(self.images(images)).mean((2, 3)), self.psf(psf).mean((2, 3))], dim=1)
        return self.head(embedding), embedding


@pytest.fixture
def description(monkeypatch: pytest.MonkeyPatch) -> Description:
    monkeypatch.setitem(networks.NETWORKS, "fusion", Fusion)
    return describe(
        name="classes",
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
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return Fusion(width=8).eval()


def test_every_engine_serves_a_network_with_metadata_and_embedding(
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
    np.testing.assert_allclose(onnx.embedding[:, 8], filled, rtol=1e-4)  # batch normalisation with initial parameters


def test_every_engine_serves_a_network_with_planes(
    tmp_path: Path, description: Description, monkeypatch: pytest.MonkeyPatch, make_batch: Callable[..., AlertBatch]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "with_psf", WithPsf)
    psf_input = PsfInput(size=15, order=("difference",), normalisation="sum", fallback_fwhm={"lsst": 5, "ztf": 2})
    images = ImageInput(size=31, order=("science", "template", "difference"), normalisation="snr", padding=0)
    with_planes = description.model_copy(
        update={
            "inputs": Inputs(images=images, psf=psf_input),
            "outputs": Outputs(labels=("real",), activation="sigmoid", embedding=8),
            "architecture": Architecture(name="with_psf"),
        }
    )
    torch.manual_seed(5)
    network = WithPsf().eval()
    write_bundle(tmp_path / "planes", with_planes, network)
    assert open_bundle(tmp_path / "planes").parts[0].card.inputs == with_planes.inputs
    [planes] = [line for line in _describe(open_bundle(tmp_path / "planes")) if line.strip().startswith("planes")]
    assert "variance" in planes
    assert "psf" in planes
    rng = np.random.default_rng(1)
    variance = rng.uniform(1, 4, (70, 3, 31, 31)).astype(np.float32)
    variance[::7] = np.nan
    psf = rng.uniform(size=(70, 3, PSF_SIZE, PSF_SIZE)).astype(np.float32)
    psf[::5] = np.nan
    pixels = rng.normal(0, 2, (70, 3, 31, 31)).astype(np.float32)
    batch = make_batch(pixels, survey=[Survey.ZTF, Survey.LSST] * 35, variance=variance, psf=psf)
    served = []
    for engine in ("onnxruntime", "torch"):
        scorer = open_scorer([str(tmp_path / "planes")], Runtime.model_validate({"engine": engine, "device": "cpu"}))
        assert scorer.planes == ("variance", "psf")
        served.append(scorer.score(batch).models[0])
        with pytest.raises(KeyError, match="variance planes"):
            scorer.score(make_batch(pixels))
    np.testing.assert_allclose(served[0].probabilities, served[1].probabilities, rtol=0, atol=1e-5)
    assert not np.isnan(served[0].probabilities).any()
    on_device = CudaGraphNetwork(
        networks.ServedNetwork(network, with_planes.outputs),
        with_planes.inputs.shapes(),
        tuple(with_planes.outputs.shapes()),
        torch.device("cpu"),
        "float32",
        1e-5,
    )
    computed = on_device.run(prepare(raw_alerts(batch), with_planes.inputs))
    np.testing.assert_allclose(computed["probabilities"], served[1].probabilities, rtol=0, atol=1e-5)
    alerts, _ = scorer.decoder().decode([Packet(alert.packet) for alert in simulate_night(3, seed=1)])
    assert alerts.variance is not None
    assert np.isnan(alerts.variance).all()  # ZTF
    assert np.isfinite(scorer.score(alerts).models[0].probabilities).all()


def test_every_engine_serves_a_network_with_light_curves_and_modalities(
    tmp_path: Path, description: Description, monkeypatch: pytest.MonkeyPatch, make_batch: Callable[..., AlertBatch]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "joined", Joined)
    joined = description.model_copy(
        update={
            "inputs": Inputs(
                images=description.inputs.images, light_curve=LightCurveInput(points=6, flux_scale=10, time_scale=1)
            ),
            "outputs": Outputs(
                labels=("a", "b", "c", "d"), activation="softmax", embedding=8, modalities=("image", "light_curve")
            ),
            "architecture": Architecture(name="joined"),
        }
    )
    torch.manual_seed(4)
    write_bundle(tmp_path / "joined", joined, Joined().eval())
    vector = open_bundle(tmp_path / "joined").parts[0].test_vector()
    rows = np.random.default_rng(2).integers(4, size=150)
    assert vector.light_curves is not None
    assert np.diff(vector.light_curves.offsets).tolist() == [1, 9, 0, 5]
    batch = make_batch(
        vector.cutouts[rows],
        vector.cutout_box[rows],
        survey=[Survey.ZTF if row % 2 else Survey.LSST for row in rows],
        mjd=np.full(len(rows), 61000.0),
        light_curves=vector.light_curves[rows],
    )
    for engine in ("onnxruntime", "torch"):
        runtime = Runtime.model_validate({"engine": engine, "device": "cpu"})
        (scores,) = open_scorer([str(tmp_path / "joined")], runtime).score(batch).models
        assert scores.modalities is not None
        assert scores.embedding is not None
        np.testing.assert_allclose(scores.modalities, vector.outputs["modalities"][rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores.embedding, vector.outputs["embedding"][rows], rtol=1e-5, atol=1e-5)


def test_a_graph_with_a_fixed_batch_size_is_refused(
    tmp_path: Path, description: Description, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Fusion):
        def forward(self, images: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
            logits, embedding = super().forward(images, metadata)
            return logits + torch.zeros(1).expand(len(images), -1), embedding

    monkeypatch.setitem(networks.NETWORKS, "fusion", Counting)
    counting = Counting(width=8).eval()
    counting.load_state_dict(network.state_dict())
    with pytest.raises(BundleError, match="accepts a single batch size only, because of images"):
        write_bundle(tmp_path / "classes", description, counting)


def test_a_test_vector_with_inconsistent_light_curves_is_refused(
    tmp_path: Path, description: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "joined", Joined)
    inputs = Inputs(
        images=description.inputs.images, light_curve=LightCurveInput(points=6, flux_scale=10, time_scale=1)
    )
    changes = {"inputs": inputs, "outputs": Outputs(labels=("a", "b", "c", "d"), activation="softmax")}
    write_bundle(
        tmp_path / "joined",
        description.model_copy(update={**changes, "architecture": Architecture(name="joined")}),
        Joined().eval(),
    )
    path = tmp_path / "joined" / TEST_VECTOR
    tensors = load_file(path)
    tensors["light_curves.offsets"][-1] += 1
    save_file(tensors, path)
    card = yaml.safe_load((tmp_path / "joined" / CARD).read_text())
    card["files"][TEST_VECTOR] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "joined" / CARD).write_text(yaml.safe_dump(card))
    with pytest.raises(BundleError, match=r"offsets .* do not fit the number of points"):
        open_bundle(tmp_path / "joined").parts[0].test_vector()


def test_a_bundle_never_replaces_another(tmp_path: Path, description: Description, network: nn.Module) -> None:
    (tmp_path / "classes").mkdir()
    with pytest.raises(BundleError, match="classes: exists already"):
        write_bundle(tmp_path / "classes", description, network)


def test_a_failed_bundle_leaves_no_files(tmp_path: Path, description: Description, network: nn.Module) -> None:
    wrong = description.model_copy(update={"outputs": Outputs(labels=("real",), activation="softmax", embedding=10)})
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "wrong", wrong, network)
    assert list(tmp_path.iterdir()) == []


def test_the_graph_contains_no_local_paths(tmp_path: Path, description: Description, network: nn.Module) -> None:
    write_bundle(tmp_path / "classes", description, network)
    graph = (open_bundle(tmp_path / "classes").directory / ONNX).read_bytes()
    assert b"/" + b"test_export.py" not in graph
    assert str(Path.home()).encode() not in graph


def differences_of_large_numbers(size: float) -> StampNet:
    """Return a network whose outputs, of about 1, are small differences of large numbers.

    With a `size` of 3e5, rounding errors are about 1e-3, as in a network of a hundred layers.
    """
    inputs = open_bundle("default").part("ztf").card.inputs
    images = torch.from_numpy(prepare(_test_alerts(inputs), inputs)["images"])
    torch.manual_seed(5)
    network = StampNet(dropout=0).eval()
    with torch.inference_mode():
        embedding = network.features(images).double()
        active = embedding.any(0)
        _, _, directions = torch.linalg.svd(embedding[:, active], full_matrices=True)
        weight = (
            size * directions[-1] + torch.linalg.pinv(embedding[:, active]) @ torch.tensor([-1.0, 0.5, 1, 0.1]).double()
        )
        network.head.weight.zero_()[:, active] = weight.float()
        # Rounding the weights to float32 shifts every logit; a constant undoes the shift.
        network.head.bias.copy_(-network.head(network.features(images)).mean())
    return network


def of_stampnet() -> Description:
    """Return the description of a StampNet bundle with the inputs of `default`, and with its embedding."""
    card = open_bundle("default").part("ztf").card
    outputs = card.outputs.model_copy(update={"embedding": 64})
    fields = {name: getattr(card, name) for name in Description.model_fields}
    return Description(**fields | {"outputs": outputs})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "deep"
    write_bundle(directory, of_stampnet(), differences_of_large_numbers(3e5))
    return directory


@pytest.fixture
def deep(made: Path, tmp_path: Path) -> Path:
    """The bundle of such a network, for tests that damage it."""
    return Path(shutil.copytree(made, tmp_path / "deep"))


def test_the_tolerance_covers_the_rounding_errors_of_the_network(deep: Path) -> None:
    """They are measured by a run in float64, and written into the card."""
    tolerances = open_bundle(deep).parts[0].card.tolerances
    assert 1e-4 < tolerances["probabilities"] < MAX_TOLERANCE
    assert tolerances["embedding"] < 1e-4
    for engine in ("onnxruntime", "torch"):
        open_scorer([str(deep)], Runtime.model_validate({"engine": engine, "device": "cpu"}))


@pytest.mark.parametrize("name", ["head.bias", "features.0.weight", "features.10.body.0.1.running_mean"])
def test_a_damaged_network_is_refused_in_spite_of_its_tolerance(deep: Path, name: str) -> None:
    weights = load_file(deep / WEIGHTS)
    damaged = arrays_to_bytes(weights | {name: weights[name] * np.float32(0.95) + np.float32(0.05)})
    (deep / WEIGHTS).write_bytes(damaged)
    card = yaml.safe_load((deep / CARD).read_text())
    card["files"][WEIGHTS] = hashlib.sha256(damaged).hexdigest()
    (deep / CARD).write_text(yaml.safe_dump(card))
    with pytest.raises(BundleError, match="does not reproduce it: probabilities is off by"):
        open_scorer([str(deep)], Runtime(engine="torch", device="cpu"))


def test_a_bundle_without_tolerances_is_checked_strictly(deep: Path) -> None:
    card = yaml.safe_load((deep / CARD).read_text())
    del card["tolerances"]
    (deep / CARD).write_text(yaml.safe_dump(card))
    with pytest.raises(BundleError, match="does not reproduce it: probabilities is off by"):
        open_scorer([str(deep)], Runtime(engine="onnxruntime", device="cpu"))


def test_a_network_that_is_dominated_by_rounding_errors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="rounding errors dominate"):
        write_bundle(tmp_path / "noise", of_stampnet(), differences_of_large_numbers(1e8))
    assert not (tmp_path / "noise").exists()
