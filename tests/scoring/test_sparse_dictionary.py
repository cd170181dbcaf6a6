"""Sparse dictionaries: the equation, the file format of SAELens, and files that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from broker_filter.scoring.sparse_dictionary import (
    CONFIGURATION,
    DICTIONARY_WEIGHTS,
    MAX_CARD_BYTES,
    DictionaryError,
    DictionarySource,
    SparseDictionary,
    read_dictionary,
    write_dictionary,
)

HEADS, D_HEAD, FEATURES = 3, 4, 20
D = HEADS * D_HEAD
SOURCE = DictionarySource(
    bundle="embedder",
    version="1.1",
    weights_sha256="0" * 64,
    site="light_curve.1",
    heads=HEADS,
    d_head=D_HEAD,
    split="train",
)


@pytest.fixture
def dictionary() -> SparseDictionary:
    draws = np.random.default_rng(1)
    return SparseDictionary(
        w_enc=draws.normal(size=(D, FEATURES)).astype(np.float32),
        b_enc=draws.normal(size=FEATURES).astype(np.float32),
        w_dec=draws.normal(size=(FEATURES, D)).astype(np.float32),
        b_dec=draws.normal(size=D).astype(np.float32),
        threshold=draws.uniform(size=FEATURES).astype(np.float32),
    )


@pytest.fixture
def directory(dictionary: SparseDictionary, tmp_path: Path) -> Path:
    write_dictionary(tmp_path / "sae", dictionary, SOURCE)
    return tmp_path / "sae"


def test_a_feature_is_active_only_above_its_threshold(dictionary: SparseDictionary) -> None:
    one = SparseDictionary(
        w_enc=np.eye(2, dtype=np.float32),
        b_enc=np.zeros(2, np.float32),
        w_dec=np.eye(2, dtype=np.float32),
        b_dec=np.array([1, 0], np.float32),
        threshold=np.array([0.5, 0], np.float32),
    )
    z = np.array([[1.5, 0], [1.75, 2], [-3, -1]], np.float32)
    np.testing.assert_array_equal(one.encode(z), [[0, 0], [0.75, 2], [0, 0]])
    np.testing.assert_array_equal(one.decode(one.encode(z)), [[1, 0], [1.75, 2], [1, 0]])


def test_a_written_dictionary_is_read_bit_for_bit(dictionary: SparseDictionary, directory: Path) -> None:
    again, card = read_dictionary(directory)
    z = np.random.default_rng(2).normal(size=(5, D)).astype(np.float32)
    np.testing.assert_array_equal(again.encode(z), dictionary.encode(z))
    np.testing.assert_array_equal(again.decode(again.encode(z)), dictionary.decode(dictionary.encode(z)))
    assert card.metadata == SOURCE
    assert {file.name for file in directory.iterdir()} == {CONFIGURATION, DICTIONARY_WEIGHTS}


def test_files_have_the_keys_and_shapes_of_saelens(directory: Path) -> None:
    card = json.loads((directory / CONFIGURATION).read_bytes())
    assert {key: value for key, value in card.items() if key != "metadata"} == {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert card["metadata"]["sae_lens_version"] == "6.0.0", "sae-lens discards the metadata of older formats"
    assert {name: array.shape for name, array in load_file(directory / DICTIONARY_WEIGHTS).items()} == {
        "W_enc": (D, FEATURES),
        "W_dec": (FEATURES, D),
        "b_enc": (FEATURES,),
        "b_dec": (D,),
        "threshold": (FEATURES,),
    }


def test_encodes_as_saelens_states_it(dictionary: SparseDictionary) -> None:
    """`JumpReLUSAE.encode` of SAELens: relu(hidden_pre) * (hidden_pre > threshold)."""
    z = np.random.default_rng(3).normal(size=(50, D)).astype(np.float32)
    hidden_pre = (z.astype(np.float64) - dictionary.b_dec) @ dictionary.w_enc + dictionary.b_enc
    theirs = np.maximum(hidden_pre, 0) * (hidden_pre > dictionary.threshold)
    np.testing.assert_allclose(dictionary.encode(z), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "architecture: Input should be 'jumprelu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: Input should be 'none'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input: Input should be True"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: Extra inputs are not permitted"),
        ({"d_in": D + 1}, r"d_in is 13, but metadata\.heads x metadata\.d_head is 12"),
        ({"d_sae": FEATURES + 1}, r"holds W_dec float32\[20, 12\].* requires W_dec float32\[21, 12\]"),
        ({"d_sae": 10**9}, "d_sae: Input should be less than or equal to 65536"),
        ({"d_sae": 0}, "d_sae: Input should be greater than 0"),
        ({"metadata": {}}, r"metadata\.bundle: Field required"),
    ],
)
def test_a_card_that_means_another_equation_is_refused(
    change: dict[str, object], message: str, directory: Path
) -> None:
    card = json.loads((directory / CONFIGURATION).read_bytes())
    (directory / CONFIGURATION).write_text(json.dumps(card | change))
    with pytest.raises(DictionaryError, match=message):
        read_dictionary(directory)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_enc", np.full((D, FEATURES), np.nan, np.float32), "W_enc holds NaN or infinite values"),
        ("threshold", np.full(FEATURES, -1, np.float32), "a threshold is negative"),
        ("b_dec", np.zeros(D + 1, np.float32), r"b_dec float32\[13\]"),
        ("b_dec", np.zeros(D, np.float64), r"b_dec float64\[12\]"),
        ("more", np.zeros(1, np.float32), r"more float32\[1\]"),
        ("more", np.zeros(2**20, np.float32), "has 4196.* bytes, but the arrays .* have 2128"),
    ],
)
def test_weights_that_do_not_fit_the_card_are_refused(
    name: str, value: np.ndarray, message: str, directory: Path
) -> None:
    file = directory / DICTIONARY_WEIGHTS
    save_file(load_file(file) | {name: value}, file)
    with pytest.raises(DictionaryError, match=message):
        read_dictionary(directory)


def test_a_damaged_or_absent_file_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"nowhere: not a sparse dictionary.*No such file"):
        read_dictionary(tmp_path / "nowhere")
    weights = directory / DICTIONARY_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DictionaryError, match="not a safetensors file"):
        read_dictionary(directory)
    (directory / CONFIGURATION).write_bytes(b"[" * 1000)
    with pytest.raises(DictionaryError, match="Invalid JSON"):
        read_dictionary(directory)
    (directory / CONFIGURATION).write_bytes(b" " * (MAX_CARD_BYTES + 1))
    with pytest.raises(DictionaryError, match="a card may have at most"):
        read_dictionary(directory)
