"""Sparse autoencoders of attention outputs z float32[N, d]: the published one, and BatchTopK, which is the default.

Both hold the same parameters and constrain the rows of the decoder to unit norm. They work on scaled rows, whose
deviation from their mean is 1 per dimension on average; `to_dictionary` folds the scale into the weights, so that the
exported dictionary takes and returns z in its own units. `train_autoencoder` runs the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss, normalize, relu
from torch.optim import Optimizer

from broker_filter.scoring.sparse_dictionary import SparseDictionary

LEAST_SCALE = 1e-6
"""Smallest scale that rows are divided by: rows that are all equal stay finite."""
ACTIVE_VARIANCE = 0.99
"""Fraction of the variance of the rows that lies in their active subspace. The rest is mostly noise; the outputs of
attention layers have 60 % of their dimensions in it on average (arXiv:2508.16929)."""
AUXILIARY = 1 / 32
"""Weight of the auxiliary loss of dead features (Gao et al. 2024, arXiv:2406.04093)."""
RESAMPLED_NORM = 0.2
"""Norm of the encoder vector of a resampled feature, as a fraction of the mean norm of living features."""
RESAMPLE_FROM = 8192
"""Number of rows from which the directions of resampled features are drawn."""


class Autoencoder(nn.Module, ABC):
    """F features in d dimensions: pre-activations (x - b_dec) w_enc + b_enc, reconstruction f w_dec + b_dec.

    x float32[N, d] are scaled rows. A feature is dead if it was silent in the last `dead_after` training steps.
    """

    betas: ClassVar[tuple[float, float]]
    """Adam's decay rates of the mean gradient and of the mean squared gradient."""
    scale: Tensor
    silent: Tensor

    def __init__(self, d: int, features: int, dead_after: int) -> None:
        super().__init__()
        self.dead_after = dead_after
        self.w_enc = nn.Parameter(torch.zeros(d, features))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.w_dec = nn.Parameter(torch.zeros(features, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("silent", torch.zeros(features, dtype=torch.int64))  # steps since a feature was active

    @torch.no_grad()
    def begin(self, rows: Tensor, draws: Generator) -> None:
        """Set the scale, b_dec (the mean of the rows [T, d]) and random initial weights."""
        mean = rows.mean(0)
        self.scale.copy_((rows - mean).square().mean().sqrt().clamp(min=LEAST_SCALE))
        self.b_dec.copy_(mean / self.scale)
        self._draw_weights(rows, draws)

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """Return the training loss of rows z [N, d], averaged over the rows; counts the silent steps of features."""

    @torch.no_grad()
    def finish(self, rows: Tensor, batch: int) -> None:
        """Set what depends on the final weights, from all training rows [T, d] in batches of `batch` rows."""

    def to_dictionary(self) -> SparseDictionary:
        """Return the trained features for rows z in their own units.

        The decoder keeps its unit norm: activations, biases and thresholds are multiplied by the scale.
        """
        return SparseDictionary(
            w_enc=_array(self.w_enc),
            b_enc=_array(self.b_enc * self.scale),
            w_dec=_array(self.w_dec),
            b_dec=_array(self.b_dec * self.scale),
            threshold=np.full(len(self.b_enc), float(self._threshold() * self.scale), np.float32),
        )

    @property
    def dead(self) -> Tensor:
        """The dead features, bool[F]."""
        return self.silent >= self.dead_after

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the part of the decoder's gradient that would change the norm of its rows."""
        gradient = self.w_dec.grad
        assert gradient is not None
        unit = normalize(self.w_dec, dim=1)
        gradient -= (gradient * unit).sum(1, keepdim=True) * unit

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale the rows of the decoder to unit norm."""
        self.w_dec.copy_(normalize(self.w_dec, dim=1))

    def _pre_activations(self, scaled: Tensor) -> Tensor:
        return (scaled - self.b_dec) @ self.w_enc + self.b_enc

    def _decode(self, activations: Tensor) -> Tensor:
        return activations @ self.w_dec + self.b_dec

    @torch.no_grad()
    def _count_silence(self, activations: Tensor) -> None:
        self.silent += 1
        self.silent[(activations > 0).any(0)] = 0

    @abstractmethod
    def _draw_weights(self, rows: Tensor, draws: Generator) -> None: ...

    @abstractmethod
    def _threshold(self) -> Tensor:
        """Return the scalar that the pre-activation of an active feature exceeds, for scaled rows."""


class PublishedSAE(Autoencoder):
    """The sparse autoencoder of Kissane et al. 2024 (arXiv:2406.17759), as they trained those of GELU-2L and GPT-2.

    f = ReLU((x - b_dec) w_enc + b_enc); the loss is |x - x^|^2 + `sparsity` |f|_1 with unit-norm decoder rows. (For
    Gemma the authors used another loss, with the norms of the decoder in the penalty, which is not this one.) Dead
    features are resampled as in Bricken et al. 2023, see `resample_dead`. b_dec starts at the mean of the rows.
    """

    betas = (0.0, 0.9999)

    def __init__(self, d: int, features: int, sparsity: float, dead_after: int) -> None:
        """Make an untrained autoencoder. `sparsity`: the L1 coefficient, for scaled rows."""
        super().__init__(d, features, dead_after)
        self.sparsity = sparsity

    def loss(self, rows: Tensor) -> Tensor:
        """Return the mean over rows z [N, d] of squared error plus L1 penalty; counts the silent steps of features."""
        scaled = rows / self.scale
        activations = relu(self._pre_activations(scaled))
        self._count_silence(activations)
        error = (scaled - self._decode(activations)).square().sum(1)
        return (error + self.sparsity * activations.sum(1)).mean()

    @torch.no_grad()
    def resample_dead(self, rows: Tensor, optimizer: Optimizer, draws: Generator) -> int:
        """Point each dead feature at a row that is reconstructed badly, and return the number of dead features.

        A row is drawn with a probability proportional to its squared loss, from RESAMPLE_FROM of the rows [T, d]. Its
        centred direction becomes the decoder row and the encoder column, the latter with RESAMPLED_NORM of the mean
        norm of living features. The bias becomes 0, and the moments of the optimiser are reset.
        """
        dead = self.dead.nonzero()[:, 0]
        if not len(dead):
            return 0
        scaled = rows[torch.randint(len(rows), (RESAMPLE_FROM,), generator=draws)] / self.scale
        activations = relu(self._pre_activations(scaled))
        loss = (scaled - self._decode(activations)).square().sum(1) + self.sparsity * activations.sum(1)
        chosen = torch.multinomial(loss.square(), len(dead), replacement=True, generator=draws)
        directions = normalize(scaled[chosen] - self.b_dec, dim=1)
        norms = self.w_enc[:, ~self.dead].norm(dim=0)
        living = norms.mean() if len(norms) else torch.ones(())
        self.w_dec[dead] = directions
        self.w_enc[:, dead] = RESAMPLED_NORM * living * directions.T
        self.b_enc[dead] = 0
        for parameter, column in ((self.w_enc, True), (self.b_enc, False), (self.w_dec, False)):
            for name in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][name]
                moment[(slice(None), dead) if column else dead] = 0
        self.silent[dead] = 0
        return len(dead)

    def _draw_weights(self, rows: Tensor, draws: Generator) -> None:  # noqa: ARG002
        nn.init.kaiming_uniform_(self.w_enc, generator=draws)
        nn.init.kaiming_uniform_(self.w_dec, generator=draws)
        self.normalise_decoder()

    def _threshold(self) -> Tensor:
        return torch.zeros(())


class BatchTopKSAE(Autoencoder):
    """The BatchTopK autoencoder of Bussmann et al. 2024 (arXiv:2412.06410), the default.

    Of a batch of B rows, the `active` x B largest activations are kept. The loss is the mean squared error, plus
    AUXILIARY times the mean squared error of the residual as reconstructed by the d / 2 dead features with the largest
    activations (AuxK). The decoder starts in the active subspace of the rows (arXiv:2508.16929), and the encoder as its
    transpose. The exported dictionary has one global threshold: the mean over batches of the smallest kept activation.
    """

    betas = (0.9, 0.999)
    threshold: Tensor

    def __init__(self, d: int, features: int, active: float, dead_after: int) -> None:
        """Make an untrained autoencoder. `active`: mean number of active features per row (the k of BatchTopK)."""
        super().__init__(d, features, dead_after)
        self.active = active
        self.register_buffer("threshold", torch.zeros(()))

    def loss(self, rows: Tensor) -> Tensor:
        """Return the mean squared error of rows z [N, d] plus the auxiliary loss; counts silent steps of features."""
        scaled = rows / self.scale
        positive = relu(self._pre_activations(scaled))
        activations = positive * (positive >= self._least_kept(positive))
        self._count_silence(activations)
        reconstruction = self._decode(activations)
        loss = mse_loss(reconstruction, scaled)
        if auxiliary := min(rows.shape[1] // 2, int(self.dead.sum())):
            dead = self.dead
            of_dead, features = positive[:, dead].topk(auxiliary, dim=1, sorted=False)
            kept = torch.zeros_like(positive[:, dead]).scatter(1, features, of_dead)
            loss = loss + AUXILIARY * mse_loss(kept @ self.w_dec[dead], (scaled - reconstruction).detach())
        return loss

    @torch.no_grad()
    def finish(self, rows: Tensor, batch: int) -> None:
        """Set the global threshold from all training rows [T, d], in batches of `batch` rows."""
        least = [self._least_kept(relu(self._pre_activations(part / self.scale))) for part in torch.split(rows, batch)]
        self.threshold.copy_(torch.stack(least).mean())

    def _least_kept(self, positive: Tensor) -> Tensor:
        """Return the smallest of the largest `active` x N values of positive activations [N, F], a scalar.

        It is greater than 0, so that a feature whose activation is 0 is never kept.
        """
        ascending = -positive.detach().numpy().ravel()  # the many zeros last: numpy is slow if it must part them
        last = min(max(1, round(self.active * len(positive))), len(ascending)) - 1
        least = -np.partition(ascending, last)[last]
        return torch.as_tensor(max(least, np.finfo(np.float32).tiny))

    def _draw_weights(self, rows: Tensor, draws: Generator) -> None:
        basis = active_subspace(rows)
        inside = torch.randn(len(self.w_dec), len(basis), generator=draws) @ basis
        self.w_dec.copy_(normalize(inside, dim=1))
        self.w_enc.copy_(self.w_dec.T)

    def _threshold(self) -> Tensor:
        return self.threshold


def active_subspace(rows: Tensor) -> Tensor:
    """Return the principal directions [R, d] of rows [T, d] that hold ACTIVE_VARIANCE of their variance; R >= 1."""
    centred = (rows - rows.mean(0)).double()
    variance, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    held = variance.flip(0).clamp(min=0).cumsum(0)
    needed = int((held < ACTIVE_VARIANCE * held[-1]).sum()) + 1
    leading: Tensor = directions.T.flip(0)[:needed].to(rows.dtype)
    return leading


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().numpy().astype(np.float32)
    return array
