"""Training of sparse autoencoders on rows float32[T, d]: the loop, its schedule, and its checkpoints.

The same rows and recipe give the same autoencoder with the same number of threads, also after an interruption.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator

from broker_filter.config import Section
from broker_filter.scoring.sparse_dictionary import MAX_FEATURES, SparseDictionary
from training.arguments import MAX_SEED
from training.checkpoint import Checkpoint, Part
from training.data.datasets import sha256_of
from training.interpretability.autoencoders import Autoencoder, BatchTopKSAE, PublishedSAE

RESAMPLED_AT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Fractions of the training after which dead features are resampled: those of Bricken et al. 2023, after 25,000,
50,000, 75,000 and 100,000 of 200,000 steps."""
DEAD_AFTER = 1 / 16
"""Fraction of the training in which a dead feature was silent: 12,500 of 200,000 steps of Bricken et al. 2023."""
DECAY = 0.2
"""Fraction of the training, at its end, in which the learning rate falls linearly to 0."""
CHECKPOINT_EVERY = 1000
"""Number of steps between checkpoints: some seconds."""
LOG_EVERY = 1000

log = logging.getLogger(__name__)


class Recipe(Section):
    """The hyperparameters of an autoencoder's training."""

    kind: Literal["batch_top_k", "published"] = "batch_top_k"
    features: int = Field(gt=0, le=MAX_FEATURES, description="Number of features.")
    active: float = Field(default=4.0, gt=0, description="batch_top_k: mean number of active features per row.")
    sparsity: float = Field(default=2.0, gt=0, description="published: coefficient of the L1 penalty.")
    steps: int = Field(default=6000, gt=0, description="Training steps.")
    batch: int = Field(default=2048, gt=0, description="Rows per step, drawn with replacement.")
    learning_rate: float = Field(default=3e-3, gt=0, description="Peak learning rate of Adam.")
    warm_up: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Fraction of the steps in which the learning rate rises linearly, at the start and after each "
        "resampling.",
    )


class Draws:
    """The random number generator of a training, as a part of its checkpoint."""

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore a state that `state_dict` returned."""
        self.generator.set_state(state_dict["generator"])


def train(rows: NDArray[np.float32], recipe: Recipe, seed: int, checkpoint: Path | None = None) -> SparseDictionary:
    """Train an autoencoder on rows float32[T, d] and return its dictionary.

    `checkpoint`: a file to save progress in, and to resume from if it exists; it is removed at the end. Raises
    TrainingError if it is incomplete, or of another training.
    """
    assert 0 <= seed <= MAX_SEED
    data = torch.from_numpy(np.ascontiguousarray(rows))
    draws = Draws(seed)
    autoencoder = make(recipe, data.shape[1])
    autoencoder.begin(data, draws.generator)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=recipe.learning_rate, betas=autoencoder.betas)
    resampled_at = [round(share * recipe.steps) for share in RESAMPLED_AT] if recipe.kind == "published" else []
    of = f"{recipe} {seed} {sha256_of(rows)}" if checkpoint else ""
    parts: dict[str, Part] = {"autoencoder": autoencoder, "optimizer": optimizer, "draws": draws}
    progress = Checkpoint(checkpoint, of, CHECKPOINT_EVERY, parts)
    for step in range(progress.resume(), recipe.steps):
        if step in resampled_at and isinstance(autoencoder, PublishedSAE):
            n = autoencoder.resample_dead(data, optimizer, draws.generator)
            log.info("step %d of %d: %d dead features resampled", step, recipe.steps, n)
        chosen = torch.randint(len(data), (recipe.batch,), generator=draws.generator)
        loss = autoencoder.loss(data[chosen])
        for parameters in optimizer.param_groups:
            parameters["lr"] = recipe.learning_rate * rate(step, recipe, resampled_at)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        autoencoder.remove_parallel_gradient()
        optimizer.step()
        autoencoder.normalise_decoder()
        if (step + 1) % LOG_EVERY == 0:
            dead = int(autoencoder.dead.sum())
            log.info("step %d of %d: loss %.4f, %d dead features", step + 1, recipe.steps, loss.item(), dead)
        progress.passed(step + 1, recipe.steps)
    autoencoder.finish(data, recipe.batch)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return autoencoder.to_dictionary()


def make(recipe: Recipe, d: int) -> Autoencoder:
    """Return an autoencoder of rows with d dimensions, before its training."""
    dead_after = max(1, round(DEAD_AFTER * recipe.steps))
    if recipe.kind == "published":
        return PublishedSAE(d, recipe.features, recipe.sparsity, dead_after)
    return BatchTopKSAE(d, recipe.features, recipe.active, dead_after)


def rate(step: int, recipe: Recipe, restarts: list[int]) -> float:
    """Return the learning rate at a step, as a fraction of its peak, greater than 0.

    It rises from the start and from each of the `restarts`, because the moments of resampled features start at 0, and
    falls linearly in the last steps (DECAY).
    """
    since = step - max(restart for restart in (0, *restarts) if restart <= step)
    rise = min(1.0, (since + 1) / max(1, round(recipe.warm_up * recipe.steps)))
    fall = min(1.0, (recipe.steps - step) / (DECAY * recipe.steps))
    return rise * fall
