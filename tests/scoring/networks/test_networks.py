"""Networks by name: their outputs, and bad names and arguments in a card."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from broker_filter.config import Runtime
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.batch import AlertBatch
from broker_filter.scoring.bundle import (
    Architecture,
    BundleError,
    Description,
    ImageInput,
    Inputs,
    MetadataColumn,
    Outputs,
)
from broker_filter.scoring.networks import build_network, load_network
from broker_filter.scoring.scorer import open_scorer
from tests.network_description import describe

PATCHES_OF_63: dict[str, Any] = {"image_size": 63, "patch_size": 9, "embed_dim": 48, "depth": 1, "num_heads": 3}
"""A vision transformer for stamps of 63 px: 7 x 7 patches."""


def timm_network(**arguments: Any) -> Architecture:
    return Architecture(name="timm", arguments=arguments)


def vision(architecture: Architecture, embedding: int) -> Description:
    columns = ("magpsf", "fwhm")[: int(architecture.arguments.get("metadata", 0))]  # type: ignore[arg-type]
    return describe(
        name="vision",
        task="real/bogus classification",
        surveys=("ztf",),
        inputs=Inputs(
            images=ImageInput(
                size=63, order=("science", "template", "difference"), normalisation="l2_image", padding=1e-9
            ),
            metadata=tuple(MetadataColumn(name=name, fill=0) for name in columns),
        ),
        outputs=Outputs(labels=("real",), activation="sigmoid", embedding=embedding),
        architecture=architecture,
    )


@pytest.mark.parametrize(
    ("architecture", "features"),
    [
        (timm_network(backbone="test_vit"), 64),  # takes only 160 px: interpolated in the graph
        (timm_network(backbone="test_vit", **PATCHES_OF_63), 48),  # takes 63 px as they are
        (Architecture(name="btsbot_cnn", arguments={"metadata": 2, "fusion": "frozen"}), 64 * 7 * 7 + 128),
    ],
    ids=lambda value: "-".join(map(str, value.arguments.values())) if isinstance(value, Architecture) else str(value),
)
def test_every_engine_gives_the_same_outputs(
    architecture: Architecture, features: int, tmp_path: Path, make_batch: Callable[..., AlertBatch]
) -> None:
    torch.manual_seed(5)
    write_bundle(tmp_path / "vision", vision(architecture, features), build_network(architecture).eval())
    rng = np.random.default_rng(1)
    batch = make_batch(
        rng.normal(0, 1, (3, 3, 63, 63)).astype(np.float32),
        columns=("magpsf", "fwhm"),
        metadata=rng.normal(0, 1, (3, 2)),
    )
    onnx, reference = (
        open_scorer([str(tmp_path / "vision")], Runtime.model_validate({"engine": engine, "device": "cpu"}))
        .score(batch)
        .models[0]
        for engine in ("onnxruntime", "torch")
    )
    assert onnx.embedding is not None
    assert reference.embedding is not None
    np.testing.assert_allclose(onnx.probabilities, reference.probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(onnx.embedding, reference.embedding, rtol=1e-4, atol=1e-5)


def test_the_embedding_is_the_pooled_normalised_output_of_the_backbone() -> None:
    network = build_network(timm_network(backbone="test_convnext", labels=5)).eval()
    backbone = timm.create_model("test_convnext", num_classes=3).eval()
    weights = network.encoder.backbone.state_dict()
    assert not backbone.load_state_dict(weights, strict=False).unexpected_keys
    images = torch.randn(2, 3, 63, 63)
    with torch.inference_mode():
        logits, embedding = network(images)
        expected = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(embedding, expected)


def test_images_are_interpolated_for_a_backbone_of_fixed_size() -> None:
    network = build_network(timm_network(backbone="test_maxvit")).eval()
    images = torch.randn(2, 3, 63, 63)
    larger = torch.nn.functional.interpolate(images, (160, 160), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), network(larger))


@pytest.mark.parametrize(
    ("arguments", "block", "tokens", "outer"),
    [
        ({"backbone": "test_vit", **PATCHES_OF_63}, "blocks.0", 1 + 7 * 7, 2),
        # The map has 8 x 8 px. Pixels at the same place of each patch of 2 x 2 px see each other.
        ({"backbone": "mobilevit_xxs"}, "stages.2.1.transformer.0", 4 * 4, 2 * 4),
    ],
    ids=["vit", "mobilevit"],
)
def test_attention_maps_can_be_read_out(arguments: dict[str, Any], block: str, tokens: int, outer: int) -> None:
    network = build_network(timm_network(**arguments)).eval()
    images = torch.randn(2, 3, 63, 63)
    attention = network.get_submodule(f"encoder.backbone.{block}.attn")
    maps = []
    attention.attn_drop.register_forward_hook(lambda _, given, __: maps.append(given[0]))
    with torch.inference_mode():
        fused = network(images)
        attention.fused_attn = False  # the fused kernel never holds the attention map
        torch.testing.assert_close(network(images), fused)
    [weights] = maps
    assert weights.shape == (outer, attention.num_heads, tokens, tokens)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_weights_load_into_a_network_with_computed_buffers() -> None:
    """MaxViT computes its indices of relative positions; no file contains them."""
    architecture = timm_network(backbone="test_maxvit")
    trained = build_network(architecture).eval()
    images = torch.randn(1, 3, 63, 63)
    with torch.inference_mode():
        torch.testing.assert_close(load_network(architecture, trained.state_dict())(images), trained(images))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"backbone": "no_such_net"}, "has no backbone named 'no_such_net'"),
        ({"backbone": "hf_hub:someone/something"}, "has no backbone named"),  # a card must not cause a download
        ({"backbone": "local-dir:/tmp"}, "has no backbone named"),
        ({}, "does not take"),
        ({"backbone": "test_convnext", "colour": 3}, "does not take"),
        ({"backbone": "test_vit", "depth": 10**9}, "depth must be between 1 and 64, not 1000000000"),
        ({"backbone": "test_convnext", "embed_dim": 9}, "does not take"),
        ({"backbone": "test_convnext", "metadata": 2, "fusion": "cold"}, "fusion .cold. joint or frozen"),
    ],
)
def test_a_card_with_a_wrong_argument_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BundleError, match=complaint):
        build_network(timm_network(**arguments))


def test_torch_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BundleError, match=r"needs timm: pip install 'broker-filter\[gpu\]'"):
        build_network(timm_network(backbone="test_convnext"))


def test_other_networks_do_not_import_timm() -> None:
    program = (
        "import sys\n"
        "from broker_filter.scoring.bundle import Architecture\n"
        "from broker_filter.scoring.networks import build_network\n"
        "build_network(Architecture(name='btsbot_cnn'))\n"
        "sys.exit('timm' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", ["vgg6", "btsbot_cnn"])
def test_networks_designed_in_keras_are_initialised_as_in_keras(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(Architecture(name=name))
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {torch.nn.Conv2d, torch.nn.Linear}
    for layer in layers:
        outputs, inputs, *kernel = layer.weight.shape
        largest = (6 / (math.prod(kernel) * (inputs + outputs))) ** 0.5
        assert 0.8 * largest < float(layer.weight.detach().abs().max()) <= largest
        assert not layer.bias.any()
