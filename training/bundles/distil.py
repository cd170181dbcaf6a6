"""A small network learns from a larger one, the teacher, which labels every augmented image as it is made.

The two look at the same image, and no image comes twice, so that what can be learnt is the teacher's function (Beyer et
al. 2022, arXiv:2106.05237). Besides the answer the student learns what the teacher reads it from: maps and embedding, a
thousand numbers an image instead of one (hints: Romero et al. 2015, arXiv:1412.6550).

The same inputs, seed and number of threads give the same network, whether or not training was interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, smooth_l1_loss
from torch.optim.swa_utils import AveragedModel

from broker_filter.scoring.bundle import ImageInput
from broker_filter.scoring.preprocess import prepare_images
from training.bundles.augment import augment
from training.checkpoint import Checkpoint, Part
from training.data.datasets import Alerts

MAX_LOGIT = 8.0
"""How sure of an alert one is beyond it (1 in 3,000 would be wrong) is of no use to know."""
CHUNK = 64
"""Alerts to a run of the teacher over many."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hint:
    """What a layer of the student tells is to predict what a layer of the teacher tells. They are given by their depth
    in the networks' `features`, which are sequences."""

    student: int
    teacher: int


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
    hints: tuple[Hint, ...] = ()
    hint_weight: float = 1.0
    """Of each hint's distance, in units of the teacher's variance."""
    bogus_share: float = 0.35
    """Of the alerts that images start from: far fewer are bogus, by the teacher, and they are what is to be learnt."""
    averaging: float = 8
    """The result is an average of the weights, over about the last 1 / (1 + averaging) of the steps."""


class _Hints(nn.Module):
    """How far the student is from predicting what the teacher's layers told, in what both were last run on.

    A map is predicted by a convolution that brings the student's to the teacher's size (Romero et al., section 2.2).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, hints: Sequence[Hint], images: Tensor) -> None:
        """`student` and `teacher` in evaluation mode; what they tell of `images` gives sizes and scales."""
        super().__init__()
        self._known = [_Told(student, hint.student) for hint in hints]
        self._wanted = [_Told(teacher, hint.teacher) for hint in hints]
        with torch.inference_mode():
            student(images)
            teacher(images)
        pairs = [(known.told, wanted.told) for known, wanted in zip(self._known, self._wanted, strict=True)]
        self._scales = [(float(wanted.mean()), float(wanted.std())) for _, wanted in pairs]
        self.predict = nn.ModuleList(_predictor(known.shape[1:], wanted.shape[1:]) for known, wanted in pairs)

    def forward(self) -> Tensor:
        """The sum of the hints' mean squared distances, in units of the teacher's variance."""
        distance = torch.zeros(())
        for predict, known, wanted, (mean, deviation) in zip(
            self.predict, self._known, self._wanted, self._scales, strict=True
        ):
            distance = distance + mse_loss(predict(known.told), (wanted.told - mean) / deviation)
        return distance


class _Told:
    """What a layer gave when its network was last run."""

    told: Tensor

    def __init__(self, network: nn.Module, depth: int) -> None:
        """`depth`: the layer's, in the sequence `features`."""
        network.get_submodule(f"features.{depth - 1}").register_forward_hook(self._keep)

    def _keep(self, _layer: nn.Module, _given: object, told: Tensor) -> None:
        self.told = told


def _predictor(known: torch.Size, wanted: torch.Size) -> nn.Module:
    """Of a map [C, H, W] a convolution, of a vector a linear map."""
    if len(known) == 1:
        return nn.Linear(known[0], wanted[0])
    return nn.Conv2d(known[0], wanted[0], kernel_size=(known[1] - wanted[1] + 1, known[2] - wanted[2] + 1))


def distil(
    student: nn.Module,
    teacher: nn.Module,
    inputs: ImageInput,
    alerts: Alerts,
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Trains `student` on images made of `alerts`; returns the averaged network, in evaluation mode.

    Both networks take `inputs` and give one logit and an embedding. `checkpoint`: a file to save progress in, and to
    continue from where it exists (with the same arguments). Raises TrainingError where it is not whole, or of another
    training.
    """
    student, teacher = (network.to(memory_format=torch.channels_last) for network in (student, teacher.eval()))
    score, _ = run_over(teacher, inputs, alerts)
    chance = _chance_to_be_drawn(score, recipe.bogus_share)
    torch.manual_seed(recipe.seed)
    average = AveragedModel(student, avg_fn=_polynomial_decay(recipe.averaging), use_buffers=True)
    hints = _Hints(student.eval(), teacher, recipe.hints, _images(inputs, alerts[:CHUNK]))
    learner = nn.ModuleDict({"student": student, "hints": hints}).train()
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=recipe.weight_decay)
    parts: dict[str, Part] = {"learner": learner, "average": average, "optimizer": optimizer}
    progress = Checkpoint(checkpoint, repr(recipe), CHECKPOINT_EVERY, parts)
    for step in range(progress.resume(), recipe.steps):
        # Seeded by the step, so that training resumes on the images that it would have gone on with.
        made = make_images(inputs, alerts, chance, recipe.batch, np.random.default_rng([recipe.seed, step]))
        torch.manual_seed((recipe.seed << 32) + step)
        images = torch.from_numpy(made).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            truth, _ = teacher(images)
        logits, _ = student(images)
        loss = _distance(logits, truth, recipe.logit_weight) + recipe.hint_weight * hints()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step / recipe.steps, recipe.warm_up)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
        if (step + 1) % LOG_EVERY == 0:
            log.info("step %d of %d: loss %.3f", step + 1, recipe.steps, loss.item())
        progress.passed(step + 1, recipe.steps)
    network: nn.Module = average.module.to(memory_format=torch.contiguous_format)
    return network.eval()


def run_over(network: nn.Module, inputs: ImageInput, alerts: Alerts) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and embeddings [N, D] of alerts as they are, by a network in evaluation mode."""
    chunks = (alerts[start : start + CHUNK] for start in range(0, len(alerts), CHUNK))
    with torch.inference_mode():
        outputs = [network(_images(inputs, chunk)) for chunk in chunks]
    logits, embedding = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(embedding)


def _images(inputs: ImageInput, alerts: Alerts) -> Tensor:
    return torch.from_numpy(prepare_images(alerts.cutouts, alerts.cutout_box, inputs))


def make_images(
    inputs: ImageInput, alerts: Alerts, chance: NDArray[np.float64], n: int, rng: Generator
) -> NDArray[np.float32]:
    """`n` augmented images as networks are served them, of alerts drawn with `chance` [N]."""
    first, second = rng.choice(len(alerts), (2, n), p=chance)
    with np.errstate(over="ignore", invalid="ignore"):  # pixels of 3.4e38 are among the real ones
        made = np.stack(
            [augment(alerts.cutouts[i], alerts.cutouts[j], rng) for i, j in zip(first, second, strict=True)]
        )
    size = made.shape[-1]
    whole = np.broadcast_to(np.array([0, 0, size, size], np.int16), (n, 3, 4))
    return prepare_images(made, whole, inputs)


def _chance_to_be_drawn(score: Tensor, bogus_share: float) -> NDArray[np.float64]:
    """[N], summing to 1; the alerts with a negative logit in `score` [N, 1] have `bogus_share` of it."""
    bogus = score[:, 0].numpy() < 0
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


def _distance(logits: Tensor, truth: Tensor, logit_weight: float) -> Tensor:
    """Cross-entropy with the teacher's probabilities, and the distance of the logits as far as it matters."""
    cross_entropy = binary_cross_entropy_with_logits(logits, truth.sigmoid())
    apart = smooth_l1_loss(logits.clamp(-MAX_LOGIT, MAX_LOGIT), truth.clamp(-MAX_LOGIT, MAX_LOGIT))
    return cross_entropy + logit_weight * apart


def schedule(progress: float, warm_up: float) -> float:
    """The learning rate's share of its peak: a linear rise, then half a cosine."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
