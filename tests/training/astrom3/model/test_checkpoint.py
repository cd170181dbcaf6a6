"""Checkpoints in the published layout: read by name and shape, refused by name if they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from broker_filter.scoring.bundle import BundleError
from training.astrom3.model.checkpoint import NETWORKS, Network, load_network, write_network
from training.astrom3.model.informer import InformerArguments, PhotometryClassifier
from training.astrom3.model.network import AstroM3, AstroM3Arguments, AstroM3Classifier, Stars

SMALL: dict[str, dict[str, Any]] = {
    "p_enc_in": {"p_d_model": 8, "p_n_heads": 2, "p_d_ff": 16, "p_e_layers": 1, "hidden_dim": 16, "m_hidden_dim": 8},
    "enc_in": {"d_model": 8, "n_heads": 2, "d_ff": 16, "e_layers": 1},
    "conv_channels": {"conv_channels": (3, 4, 4, 4, 4)},
    "input_dim": {"hidden_dim": 8},
}


def write_small(directory: Path) -> AstroM3:
    torch.manual_seed(0)
    network = AstroM3(AstroM3Arguments(**SMALL["p_enc_in"]))
    write_network(directory, network)
    return network


@torch.inference_mode()
def test_a_folder_in_the_published_layout_gives_the_published_logits(
    tmp_path: Path, golden_card: dict[str, Any], golden_network: AstroM3Classifier, golden_stars: Stars
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"classification": True, **golden_card["kwargs"]}))
    save_file(golden_network.state_dict(), tmp_path / "model.safetensors")
    loaded = load_network(tmp_path)
    assert isinstance(loaded, AstroM3Classifier)
    assert torch.equal(loaded(golden_stars), golden_network(golden_stars))


@pytest.mark.parametrize("classification", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_read_back_as_it_was_written(tmp_path: Path, kind: str, classification: bool) -> None:
    arguments, encoder, classifier = NETWORKS[kind]
    made: Network = (classifier if classification else encoder)(arguments(classification=classification, **SMALL[kind]))
    write_network(tmp_path, made)
    loaded = load_network(tmp_path)
    assert type(loaded) is type(made)
    assert loaded.arguments == made.arguments
    assert not loaded.training
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_small(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["spectra_proj.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        BundleError,
        match=r"1 tensors do not fit .* 'spectra_proj.bias': \(\(3,\), 'F32'\) instead of \(\(16,\), 'F32'\)",
    ):
        load_network(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_small(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["metadata_encoder.model.3.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"'metadata_encoder.model.3.weight': absent instead of \(\(8, 8\), 'F32'\)"):
        load_network(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = write_small(tmp_path)
    network.metadata_proj.bias.data[0] = float("nan")
    write_network(tmp_path, network)
    with pytest.raises(BundleError, match=r"metadata_proj.bias holds NaN"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    ("configuration", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "has none of the keys p_enc_in"),
        ('{"hidden": 3}', "not a configuration of a network"),
        ('{"enc_in": 9, "d_model": 129}', "d_model 129 is odd or not a multiple of 4 heads"),
        ('{"enc_in": 9, "e_layers": 1000000000}', "e_layers"),
        ('{"enc_in": 9, "activation": "relu"}', "activation"),
        ('{"conv_channels": [3, 4, 4, 4, 4, 4, 4, 4]}', "no features are left of 2575 wavelengths"),
    ],
)
def test_a_configuration_of_no_network_is_refused(tmp_path: Path, configuration: str, complaint: str) -> None:
    write_small(tmp_path)
    (tmp_path / "config.json").write_text(configuration)
    with pytest.raises(BundleError, match=complaint):
        load_network(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"not safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any) -> None:
    write_small(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BundleError, match=r"model.safetensors: not a complete safetensors file"):
        load_network(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config.json: cannot be read"):
        load_network(tmp_path)


def test_a_photometry_classifier_has_the_published_names(tmp_path: Path) -> None:
    write_network(tmp_path, PhotometryClassifier(InformerArguments(classification=True, **SMALL["enc_in"])))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"enc_embedding.position_embedding.pe", "encoder.attn_layers.0.conv1.weight", "fc.weight"} <= names
