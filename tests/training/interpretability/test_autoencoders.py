"""Sparse autoencoders: known dictionaries are recovered, and each loss is the published one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, nn
from torch.nn.functional import relu

from training.interpretability.autoencoders import (
    AUXILIARY,
    RESAMPLED_NORM,
    Autoencoder,
    BatchTopKSAE,
    PublishedSAE,
    active_subspace,
)

D, FEATURES = 6, 16


@pytest.fixture
def rows() -> torch.Tensor:
    draws = Generator().manual_seed(1)
    return torch.randn(400, D, generator=draws) * torch.linspace(0.5, 2, D) + torch.linspace(-3, 3, D)


def begun(autoencoder: Autoencoder, rows: torch.Tensor) -> Autoencoder:
    autoencoder.begin(rows, Generator().manual_seed(2))
    return autoencoder


def both(dead_after: int = 1000) -> list[Autoencoder]:
    return [PublishedSAE(D, FEATURES, 0.7, dead_after), BatchTopKSAE(D, FEATURES, 2.0, dead_after)]


def dictionary_weights(autoencoder: Autoencoder) -> tuple[torch.Tensor, ...]:
    return autoencoder.w_enc, autoencoder.b_enc, autoencoder.w_dec, autoencoder.b_dec


def test_the_published_loss_is_squared_error_plus_l1(rows: torch.Tensor) -> None:
    autoencoder = begun(PublishedSAE(D, FEATURES, 0.7, 1000), rows)
    w_enc, b_enc, w_dec, b_dec = dictionary_weights(autoencoder)
    x = rows / autoencoder.scale
    f = relu((x - b_dec) @ w_enc + b_enc)
    expected = ((x - f @ w_dec - b_dec) ** 2).sum(1) + 0.7 * f.abs().sum(1)
    torch.testing.assert_close(autoencoder.loss(rows), expected.mean())


def test_batch_top_k_keeps_the_largest_activations_of_a_batch(rows: torch.Tensor) -> None:
    autoencoder = begun(BatchTopKSAE(D, FEATURES, 2.0, 1000), rows)
    w_enc, b_enc, w_dec, b_dec = dictionary_weights(autoencoder)
    x = rows / autoencoder.scale
    f = relu((x - b_dec) @ w_enc + b_enc)
    kept = torch.zeros(f.numel()).scatter(0, f.flatten().topk(2 * len(rows)).indices, 1.0).reshape(f.shape)
    expected = ((x - (kept * f) @ w_dec - b_dec) ** 2).mean()
    torch.testing.assert_close(autoencoder.loss(rows), expected)


def test_dead_features_alone_reconstruct_the_residual_in_the_auxiliary_loss(rows: torch.Tensor) -> None:
    autoencoder = begun(BatchTopKSAE(D, FEATURES, 2.0, 1), rows)
    alive = autoencoder.loss(rows)
    autoencoder.silent[:8] = 100  # far more than a step can undo, unless the feature is active
    with torch.no_grad():
        autoencoder.b_enc[:4] -= 100  # never active
    autoencoder.loss(rows).backward()
    assert autoencoder.dead.tolist() == [True] * 4 + [False] * 12
    assert autoencoder.w_dec.grad is not None
    assert not autoencoder.w_dec.grad[:4].any(), "a feature with a negative pre-activation has no gradient"

    with torch.no_grad():
        autoencoder.b_enc[:4] += 99.5  # small activations, which BatchTopK does not keep
        autoencoder.silent[:4] = 100
    autoencoder.zero_grad()
    autoencoder.active = 0.01
    loss = autoencoder.loss(rows)
    loss.backward()
    assert autoencoder.w_dec.grad[:4].abs().sum() > 0
    assert autoencoder.w_enc.grad is not None
    assert autoencoder.w_enc.grad[:, :4].abs().sum() > 0
    assert torch.isfinite(alive)
    assert AUXILIARY == 1 / 32


def test_a_step_keeps_the_decoder_at_unit_norm(rows: torch.Tensor) -> None:
    for autoencoder in both():
        begun(autoencoder, rows)
        optimizer = torch.optim.SGD(autoencoder.parameters(), lr=0.01)
        autoencoder.loss(rows).backward()
        autoencoder.remove_parallel_gradient()
        assert autoencoder.w_dec.grad is not None
        parallel = (autoencoder.w_dec.grad * autoencoder.w_dec).sum(1)
        torch.testing.assert_close(parallel, torch.zeros(FEATURES), atol=1e-6, rtol=0)
        optimizer.step()
        autoencoder.normalise_decoder()
        torch.testing.assert_close(autoencoder.w_dec.norm(dim=1), torch.ones(FEATURES))


def test_the_exported_dictionary_equals_the_autoencoder_on_rows_in_their_own_units(rows: torch.Tensor) -> None:
    for autoencoder in both():
        begun(autoencoder, rows)
        autoencoder.finish(rows, batch=100)
        dictionary = autoencoder.to_dictionary()
        w_enc, b_enc, w_dec, b_dec = dictionary_weights(autoencoder)
        x = rows / autoencoder.scale
        pre = (x - b_dec) @ w_enc + b_enc
        threshold = float(dictionary.threshold[0]) / float(autoencoder.scale)
        f = pre * (pre > threshold)
        activations = dictionary.encode(rows.numpy())
        np.testing.assert_allclose(activations, (f * autoencoder.scale).detach(), atol=1e-5)
        reconstruction = ((f @ w_dec + b_dec) * autoencoder.scale).detach()
        np.testing.assert_allclose(dictionary.decode(activations), reconstruction, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(dictionary.w_dec, axis=1), 1, atol=1e-6)
        assert len(np.unique(dictionary.threshold)) == 1


def test_the_global_threshold_keeps_the_requested_number_of_features(rows: torch.Tensor) -> None:
    autoencoder = begun(BatchTopKSAE(D, FEATURES, 2.0, 1000), rows)
    autoencoder.finish(rows, batch=400)
    active = (autoencoder.to_dictionary().encode(rows.numpy()) > 0).sum(1).mean()
    assert active == pytest.approx(2.0, abs=0.02)
    assert (both()[0].to_dictionary().threshold == 0).all(), "ReLU has the threshold 0"


def test_resampled_features_point_at_rows_that_are_reconstructed_badly(rows: torch.Tensor) -> None:
    autoencoder = PublishedSAE(D, FEATURES, 1e-3, dead_after=5)
    begun(autoencoder, rows)
    odd = torch.nn.functional.normalize(torch.arange(1.0, D + 1), dim=0)
    rows = torch.cat([rows, rows.mean(0, keepdim=True) + 1000 * odd])  # its squared loss outweighs all other rows
    optimizer = torch.optim.Adam(autoencoder.parameters(), betas=autoencoder.betas)
    with torch.no_grad():
        autoencoder.b_enc.fill_(-1e4)
    autoencoder.loss(rows).backward()
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        for parameter in (autoencoder.w_enc, autoencoder.b_enc, autoencoder.w_dec):
            optimizer.state[parameter][name].fill_(1.0)
    autoencoder.silent[:3], autoencoder.silent[3:] = 5, 0
    living = autoencoder.w_enc[:, 3:].norm(dim=0).mean()
    untouched = autoencoder.w_dec[3:].clone()
    assert autoencoder.resample_dead(rows, optimizer, Generator().manual_seed(3)) == 3
    torch.testing.assert_close(autoencoder.w_dec[:3], odd.expand(3, D), atol=0.01, rtol=0)
    torch.testing.assert_close(autoencoder.w_enc[:, :3].norm(dim=0), (RESAMPLED_NORM * living).expand(3))
    assert not autoencoder.b_enc[:3].any()
    torch.testing.assert_close(autoencoder.w_dec[3:], untouched)
    for parameter, column in ((autoencoder.w_enc, True), (autoencoder.b_enc, False), (autoencoder.w_dec, False)):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter][name].T if column else optimizer.state[parameter][name]
            assert not moment[:3].any()
            assert (moment[3:] == 1).all()
    assert not autoencoder.dead.any()
    assert autoencoder.resample_dead(rows, optimizer, Generator().manual_seed(3)) == 0


def test_the_decoder_starts_in_the_active_subspace() -> None:
    draws = Generator().manual_seed(4)
    basis = nn.init.orthogonal_(torch.empty(3, D), generator=draws)
    rows = torch.randn(500, 3, generator=draws) @ basis + 1e-3 * torch.randn(500, D, generator=draws) + 5
    assert active_subspace(rows).shape == (3, D)
    autoencoder = begun(BatchTopKSAE(D, FEATURES, 2.0, 1000), rows)
    inside = autoencoder.w_dec @ basis.T
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(FEATURES), atol=1e-3, rtol=0)
    torch.testing.assert_close(autoencoder.w_enc, autoencoder.w_dec.T)


def test_rows_that_are_all_equal_give_a_finite_dictionary() -> None:
    rows = torch.full((50, D), 2.0)
    for autoencoder in both():
        begun(autoencoder, rows)
        assert torch.isfinite(autoencoder.loss(rows))
        autoencoder.finish(rows, batch=20)
        dictionary = autoencoder.to_dictionary()
        np.testing.assert_allclose(dictionary.decode(dictionary.encode(rows.numpy())), rows, atol=1e-4)
