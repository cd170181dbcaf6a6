"""Bundles: a complete bundle loads; for any other, the error names the file at fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from broker_filter.config import Runtime
from broker_filter.scoring.bundle import (
    CARD,
    MAX_CARD_BYTES,
    ONNX,
    SHIPPED,
    TEST_VECTOR,
    WEIGHTS,
    BundleError,
    open_bundle,
    shipped_bundles,
)
from broker_filter.scoring.scorer import open_model


def edit_card(bundle: Path, change: Callable[[Any], Any]) -> None:
    card = yaml.safe_load((bundle / CARD).read_text())
    change(card)
    (bundle / CARD).write_text(yaml.safe_dump(card))


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file and its sha256 in the card, so that only the contents can reveal the change."""
    (bundle / name).write_bytes(data)
    edit_card(bundle, lambda card: card["files"].update({name: hashlib.sha256(data).hexdigest()}))


def test_default_ships() -> None:
    assert "default" in shipped_bundles()
    assert open_bundle("default").directory == SHIPPED / "default"


def test_default_is_small() -> None:
    assert sum(path.stat().st_size for path in open_bundle("default").part("ztf").directory.iterdir()) < 2_000_000


def test_the_default_card_describes_training_and_evaluation() -> None:
    card = open_bundle("default").part("ztf").card
    assert "teacher" in card.training.data
    assert card.outputs.labels == ("real",)
    assert card.surveys == ("ztf",)
    assert 0.95 < float(card.training.evaluation["roc_auc"]) < 1


def test_a_bundle_loads_from_any_directory(own_bundle: Path) -> None:
    assert open_bundle(own_bundle).parts[0].card == open_bundle("default").part("ztf").card


def test_the_error_for_a_missing_bundle_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: not a bundle: .* \(.*default.*\)"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [WEIGHTS, ONNX, TEST_VECTOR])
def test_one_flipped_bit_is_found_and_named(own_bundle: Path, name: str) -> None:
    data = bytearray((own_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (own_bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: corrupted: its sha256"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("name", [WEIGHTS, ONNX, TEST_VECTOR])
def test_a_missing_file_is_named(own_bundle: Path, name: str) -> None:
    (own_bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "..", ""])
def test_a_file_name_cannot_point_outside_the_bundle(own_bundle: Path, name: str) -> None:
    edit_card(own_bundle, lambda card: card["files"].update({name: "0" * 64}))
    with pytest.raises(BundleError, match=r"bundle\.yaml: files"):
        open_bundle(own_bundle)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda card: card.pop("licence"), "licence: Field required"),
        (lambda card: card.update(normalization="l2"), "normalization: Extra inputs are not permitted"),
        (lambda card: card["inputs"]["images"].update(normalisation="zscore"), "inputs.images.normalisation"),
        (lambda card: card["inputs"]["images"].update(size=10**6), "inputs.images.size"),
        (lambda card: card["outputs"].update(thresholds={"fake": 0.5}), "labels that do not exist: fake"),
        (lambda card: card["outputs"].update(surveys={"fake": ["ztf"]}), "labels that do not exist: fake"),
        (lambda card: card["outputs"].update(surveys={"real": ["lsst"]}), "real lists lsst, which `surveys` does not"),
        (lambda card: card.update(name="d6-m7"), "name: String should match pattern"),
        (lambda card: card.update(surveys=["decam"]), "surveys"),
        (lambda card: card.update(format=3), "of format 3, and this version reads the formats 1, 2; install a later"),
        (lambda card: card.update(format=[2]), "of format [2]"),
        (lambda card: card.update(format=2), "networks: Field required"),
        (lambda card: card["files"].pop(ONNX), "model.onnx not listed"),
        (lambda card: card["files"].update({ONNX: "1234"}), "files.model.onnx"),
    ],
)
def test_a_wrong_card_says_what_is_wrong_and_where(
    own_bundle: Path, change: Callable[[Any], Any], problem: str
) -> None:
    edit_card(own_bundle, change)
    with pytest.raises(BundleError) as refused:
        open_bundle(own_bundle)
    assert str(own_bundle / CARD) in str(refused.value)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"", "valid dictionary"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
        (b"#" * (MAX_CARD_BYTES + 1), "larger than"),
    ],
)
def test_a_file_that_is_not_a_card_is_refused(own_bundle: Path, text: bytes, problem: str) -> None:
    (own_bundle / CARD).write_bytes(text)
    with pytest.raises(BundleError, match=problem):
        open_bundle(own_bundle)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_bundle_whose_outputs_are_not_reproduced_does_not_open(own_bundle: Path, engine: str) -> None:
    tensors = load_file(own_bundle / TEST_VECTOR)
    tensors["probabilities"] = tensors["probabilities"] + np.float32(1e-4)
    save_file(tensors, own_bundle / TEST_VECTOR)
    replace_file(own_bundle, TEST_VECTOR, (own_bundle / TEST_VECTOR).read_bytes())
    with pytest.raises(
        BundleError, match=rf"{TEST_VECTOR}: {engine}.* does not reproduce it: probabilities is off by 0\.0001"
    ):
        open_model(str(own_bundle), Runtime.model_validate({"engine": engine}))


def test_a_test_vector_of_other_shapes_is_refused(own_bundle: Path) -> None:
    tensors = load_file(own_bundle / TEST_VECTOR)
    tensors["cutouts"] = tensors["cutouts"][..., :30]
    save_file(tensors, own_bundle / TEST_VECTOR)
    replace_file(own_bundle, TEST_VECTOR, (own_bundle / TEST_VECTOR).read_bytes())
    with pytest.raises(BundleError, match=f"{TEST_VECTOR}: holds"):
        open_bundle(own_bundle).parts[0].test_vector()


@pytest.mark.parametrize(("engine", "name"), [("onnxruntime", ONNX), ("torch", WEIGHTS)])
@pytest.mark.parametrize("data", [b"", b"no network", b"\x80\x04\x95pickle", b"\xff" * 64])
def test_files_that_are_not_networks_are_refused_by_name(own_bundle: Path, engine: str, name: str, data: bytes) -> None:
    replace_file(own_bundle, name, data)
    with pytest.raises(BundleError, match=name):
        open_model(str(own_bundle), Runtime.model_validate({"engine": engine}))


def test_weights_of_another_network_are_refused_by_the_first_tensor_that_differs(own_bundle: Path) -> None:
    edit_card(own_bundle, lambda card: card.update(architecture={"name": "vgg6"}))
    with pytest.raises(BundleError, match=rf"{WEIGHTS}: \d+ tensors do not fit the network 'vgg6'; the first is"):
        open_model(str(own_bundle), Runtime(engine="torch"))


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [
        ({"name": "resnet9000"}, "no network is called 'resnet9000'"),
        ({"name": "vgg6", "arguments": {"depth": 3}}, "network 'vgg6' does not take"),
        ({"name": "vgg6", "arguments": {"labels": 10**12}}, "do not fit the network 'vgg6'"),
    ],
)
def test_an_unknown_architecture_is_refused(own_bundle: Path, architecture: Any, problem: str) -> None:
    edit_card(own_bundle, lambda card: card.update(architecture=architecture))
    with pytest.raises(BundleError, match=problem):
        open_model(str(own_bundle), Runtime(engine="torch"))


def test_an_onnx_graph_that_does_not_fit_the_card_is_refused(own_bundle: Path) -> None:
    edit_card(own_bundle, lambda card: card["outputs"].update(labels=["real", "fake"], thresholds={}))
    with pytest.raises(BundleError, match=rf"{ONNX}: its inputs and outputs are .*'probabilities': \(1,\).*\(2,\)"):
        open_model(str(own_bundle), Runtime(engine="onnxruntime"))


@pytest.mark.parametrize("embedding", [None, 31])
def test_an_embedding_size_that_is_no_multiple_of_the_modalities_is_refused(
    own_bundle: Path, embedding: int | None
) -> None:
    modalities = {"embedding": embedding, "modalities": ["image", "light_curve", "metadata"]}
    edit_card(own_bundle, lambda card: card["outputs"].update(modalities))
    with pytest.raises(
        BundleError, match=f"embedding has size {embedding}, which is not a multiple of its number of modalities, 3"
    ):
        open_bundle(own_bundle)
