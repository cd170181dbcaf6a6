"""Networks and preprocessing give the results of the published code; effect of its random keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.astrom3.model.network import AstroM3Classifier, Stars, contrastive_losses
from training.astrom3.model.preprocess import prepare_light_curve, prepare_spectrum, to_length

OUTPUTS = 1e-4
PREPROCESSING = 1e-5

Golden = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def given_keys(golden: Golden) -> torch.Tensor:
    return torch.from_numpy(golden["index_sample"])


def largest_difference(ours: torch.Tensor, published: NDArray[Any]) -> float:
    assert ours.shape == published.shape
    return float((ours - torch.from_numpy(published)).abs().max())


def test_parameters_have_the_published_names_and_shapes(
    golden_card: dict[str, Any], golden_network: AstroM3Classifier
) -> None:
    ours = {name: list(tensor.shape) for name, tensor in golden_network.state_dict().items()}
    assert ours == golden_card["params"]
    assert sum(parameter.numel() for parameter in golden_network.parameters()) == golden_card["n_params"]


@torch.inference_mode()
def test_encoders_give_the_features_of_the_published_code(
    golden: Golden, golden_network: AstroM3Classifier, golden_stars: Stars, given_keys: torch.Tensor
) -> None:
    photometry = golden_network.photometry_encoder(golden_stars.photometry, golden_stars.mask, given_keys)
    spectra = golden_network.spectra_encoder(golden_stars.spectra)
    metadata = golden_network.metadata_encoder(golden_stars.metadata)
    assert largest_difference(photometry.mean(1), golden["photometry_encoder_out_mean"]) < OUTPUTS
    assert largest_difference(photometry[:, :256], golden["photometry_encoder_out_first256"]) < OUTPUTS
    assert largest_difference(spectra, golden["spectra_encoder_out"]) < OUTPUTS
    assert largest_difference(metadata, golden["metadata_encoder_out"]) < OUTPUTS


@torch.inference_mode()
def test_embeddings_logits_and_losses_are_those_of_the_published_code(
    golden: Golden, golden_network: AstroM3Classifier, golden_stars: Stars, given_keys: torch.Tensor
) -> None:
    embeddings = golden_network.embed(golden_stars, given_keys)
    for ours, name in zip(embeddings, ("p_emb", "s_emb", "m_emb"), strict=True):
        assert largest_difference(ours, golden[name]) < OUTPUTS
    logits = golden_network.pair_logits(embeddings)
    for pair, name in zip(logits, ("logits_ps", "logits_sm", "logits_mp"), strict=True):
        assert largest_difference(pair, golden[name]) < OUTPUTS
    assert largest_difference(contrastive_losses(logits), golden["losses"]) < OUTPUTS
    assert largest_difference(golden_network(golden_stars, given_keys), golden["class_logits"]) < OUTPUTS


@pytest.mark.parametrize("star", range(6))
def test_preprocessing_is_that_of_the_published_code(golden: Golden, star: int) -> None:
    light_curve = prepare_light_curve(golden[f"raw_lightcurve_{star}"], golden["aux"][star])
    photometry, mask = to_length(light_curve, 200)
    np.testing.assert_allclose(photometry, golden["photometry"][star], rtol=0, atol=PREPROCESSING)
    np.testing.assert_array_equal(mask, golden["mask"][star])
    spectrum = prepare_spectrum(golden[f"raw_spectrum_{star}"])
    np.testing.assert_allclose(spectrum, golden["spectra"][star], rtol=0, atol=PREPROCESSING)


@torch.inference_mode()
def test_with_all_keys_an_embedding_is_deterministic_in_any_batch(
    golden_network: AstroM3Classifier, golden_stars: Stars
) -> None:
    together = golden_network.embed(golden_stars)
    for i in range(len(golden_stars.mask)):
        alone = golden_network.embed(Stars(*(values[i : i + 1] for values in golden_stars)))
        for one, among_others in zip(alone, together, strict=True):
            assert float((one[0] - among_others[i]).abs().max()) < 1e-5


@torch.inference_mode()
def test_all_keys_give_an_embedding_amid_those_of_random_keys(
    golden_network: AstroM3Classifier, golden_stars: Stars
) -> None:
    torch.manual_seed(0)
    encoder = golden_network.photometry_encoder
    all_keys = golden_network.embed(golden_stars).photometry
    drawn = [golden_network.embed(golden_stars, encoder.draw_keys()).photometry for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1])
    to_all_keys = float((drawn[0] * all_keys).sum(1).mean())
    to_each_other = float((drawn[0] * drawn[1]).sum(1).mean())
    assert 1 - to_all_keys < 2 * (1 - to_each_other)
