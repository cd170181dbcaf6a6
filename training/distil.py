"""A small network learns from a served one, the teacher, which labels every augmented image as it is made.

The same inputs, seed and number of threads give the same network, whether or not training was interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from torch.optim.swa_utils import AveragedModel

from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import Model
from training.augment import augment
from training.datasets import Alerts

MAX_LOGIT = 8.0
"""Beyond it a float32 probability says little of the teacher's logit, and nothing of use."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What distillation is done with."""

    steps: int
    seed: int
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises to its peak; then it falls as a cosine."""
    logit_weight: float = 0.1
    """Of the logits' distance in the loss, beside the cross-entropy: it teaches by the clear cases too."""
    bogus_share: float = 0.35
    """Of the alerts that images start from: far fewer are bogus, by the teacher, and they are what is to be learnt."""
    averaging: float = 8
    """The result is an average of the weights, over about the last 1 / (1 + averaging) of the steps."""


@dataclass(frozen=True, slots=True)
class _Progress:
    """What training has come to, as a file keeps it."""

    student: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer

    def save(self, step: int, checkpoint: Path) -> None:
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save(
            {
                "step": step,
                "student": self.student.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            unfinished,
        )
        unfinished.replace(checkpoint)

    def resume(self, checkpoint: Path | None) -> int:
        """Restores what was saved; returns how many steps that were."""
        if checkpoint is None or not checkpoint.exists():
            return 0
        saved = torch.load(checkpoint, weights_only=True)
        self.student.load_state_dict(saved["student"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        log.info("continuing from %s after step %d", checkpoint, saved["step"])
        return int(saved["step"])


def distil(
    student: nn.Module, teacher: Model, alerts: Alerts, recipe: Recipe, checkpoint: Path | None = None
) -> nn.Module:
    """Trains `student` on images made of `alerts`; returns the averaged network, in evaluation mode.

    `checkpoint`: a file to save progress in, and to continue from where it exists (with the same arguments).
    """
    student.train()
    average = AveragedModel(student, avg_fn=_polynomial_decay(recipe.averaging), use_buffers=True)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=recipe.weight_decay)
    chance = _chance_to_be_drawn(teacher, alerts, recipe.bogus_share)
    progress = _Progress(student, average, optimizer)
    for step in range(progress.resume(checkpoint), recipe.steps):
        # Seeded by the step, so that training resumes on the images that it would have gone on with.
        images = make_images(teacher, alerts, chance, recipe.batch, np.random.default_rng([recipe.seed, step]))
        torch.manual_seed((recipe.seed << 32) + step)
        labels = torch.from_numpy(teacher.network.run({"images": images})["probabilities"])
        logits, _ = student(torch.from_numpy(images))
        loss = _distance(logits, labels, recipe.logit_weight)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step / recipe.steps, recipe.warm_up)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update_parameters(student)
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d of %d: loss %.3f", step + 1, recipe.steps, loss.item())
        if checkpoint and (step + 1) % CHECKPOINT_EVERY == 0:
            progress.save(step + 1, checkpoint)
    network: nn.Module = average.module
    return network.eval()


def make_images(
    teacher: Model, alerts: Alerts, chance: NDArray[np.float64], n: int, rng: Generator
) -> NDArray[np.float32]:
    """`n` augmented images, as the teacher and the student are served them."""
    first, second = rng.choice(len(alerts), (2, n), p=chance)
    with np.errstate(over="ignore", invalid="ignore"):  # pixels of 3.4e38 are among the real ones
        made = np.stack(
            [augment(alerts.cutouts[i], alerts.cutouts[j], rng) for i, j in zip(first, second, strict=True)]
        )
    size = made.shape[-1]
    whole = np.broadcast_to(np.array([0, 0, size, size], np.int16), (n, 3, 4))
    return prepare_images(made, whole, teacher.bundle.card.inputs.images)


def _chance_to_be_drawn(teacher: Model, alerts: Alerts, bogus_share: float) -> NDArray[np.float64]:
    """[N], summing to 1; those that the teacher calls bogus have `bogus_share` of it."""
    no_metadata = np.empty((len(alerts), 0))
    score = teacher.run(alerts.cutouts, alerts.cutout_box, no_metadata, ())["probabilities"]
    bogus = score[:, 0] < 0.5
    chance: NDArray[np.float64] = np.where(bogus, bogus_share / bogus.sum(), (1 - bogus_share) / (~bogus).sum())
    return chance


def _polynomial_decay(eta: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Shamir & Zhang 2013 (arXiv:1212.1824), section 4: an average that forgets where training began.

    An exponential one of 500 steps would keep e^-6 of the initial values through 3,000: as much as the whole variance
    that batch normalisation finds in images of unit norm.
    """

    def update(average: Tensor, latest: Tensor, averaged: Tensor | int) -> Tensor:
        return average + (latest - average) * (eta + 1) / (int(averaged) + 1 + eta)

    return update


def _distance(logits: Tensor, labels: Tensor, logit_weight: float) -> Tensor:
    """Cross-entropy with the teacher's probabilities, and the distance of the logits as far as those can be told."""
    cross_entropy = binary_cross_entropy_with_logits(logits, labels)
    apart = smooth_l1_loss(logits.clamp(-MAX_LOGIT, MAX_LOGIT), labels.logit().clamp(-MAX_LOGIT, MAX_LOGIT))
    return cross_entropy + logit_weight * apart


def _schedule(progress: float, warm_up: float) -> float:
    """The learning rate's share of its peak: a linear rise, then half a cosine."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
