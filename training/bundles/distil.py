"""Knowledge distillation: a small network, the student, learns from a larger one, the teacher.

The teacher labels augmented images as they are made. Student and teacher see the same image, and no image is repeated,
so the student learns the teacher's function (Beyer et al. 2022, arXiv:2106.05237). Besides the score, the student
learns to predict intermediate maps and the embedding of the teacher: a thousand numbers per image instead of one
(hints: Romero et al. 2015, arXiv:1412.6550).

The result depends on inputs, seed and number of threads only, whether or not training was interrupted.
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
from training.bundles.augment import augment, move
from training.checkpoint import Checkpoint, Part
from training.data.datasets import Alerts, no_plane

MAX_LOGIT = 8.0
"""Largest absolute value of a logit in the loss (error probability 1 in 3,000). Logits beyond it are clipped, because
larger values carry no useful information."""
CHUNK = 64
"""Number of alerts that a network takes at a time."""
CHECKPOINT_EVERY = 250
LOG_EVERY = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hint:
    """A layer of the teacher that a layer of the student learns to predict, each by its name in the network."""

    student: str
    teacher: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """The hyperparameters of a distillation."""

    steps: int
    seed: int
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.1
    """Fraction of the steps in which the learning rate rises linearly to its peak, before a cosine decay."""
    logit_weight: float = 0.1
    """Weight of the distance of the logits in the loss, beside the cross-entropy; clear cases contribute to it as
    well."""
    hints: tuple[Hint, ...] = ()
    hint_weight: float = 1.0
    """Weight of each hint's squared distance, in units of the teacher's variance."""
    bogus_share: float = 0.35
    """Fraction of images that start from alerts that the teacher classifies as bogus; these are rarer among the alerts,
    and harder to learn."""
    averaging: float = 8
    """Order of the average of the weights, which covers about the last 1 / (1 + averaging) of the steps."""
    labelled_batch: int = 16
    """Number of labelled images in each step, beside those that the teacher labels."""
    labelled_weight: float = 1.0
    """Weight of their cross-entropy in the loss."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """M alerts that have labels of their own, because the teacher was not trained for their survey."""

    cutouts: NDArray[np.float32]  # [M, 3, S, S]
    real: NDArray[np.float32]  # [M] probability that the alert is real
    chance: NDArray[np.float64]  # [M] probability that an image is made of this alert

    def draw(self, n: int, inputs: ImageInput, rng: Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return `n` preprocessed images and their labels [n].

        Each image is an alert in a random orientation, slightly shifted.
        """
        rows = rng.choice(len(self.real), n, p=self.chance)
        return _prepared(np.stack([move(self.cutouts[row], rng) for row in rows]), inputs), self.real[rows]


class _Hints(nn.Module):
    """The distance between the teacher's layers and the student's predictions of them, for the images of the last run.

    A map is predicted by a convolution that reduces the student's map to the teacher's size (Romero et al., section
    2.2).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, hints: Sequence[Hint], images: Tensor) -> None:
        """`student` and `teacher` are in evaluation mode; their outputs for `images` set the sizes and scales."""
        super().__init__()
        self._student_layers = [_LayerOutput(student, hint.student) for hint in hints]
        self._teacher_layers = [_LayerOutput(teacher, hint.teacher) for hint in hints]
        with torch.inference_mode():
            student(images)
            teacher(images)
        pairs = [
            (known.output, wanted.output)
            for known, wanted in zip(self._student_layers, self._teacher_layers, strict=True)
        ]
        self._scales = [(float(wanted.mean()), float(wanted.std())) for _, wanted in pairs]
        self.predict = nn.ModuleList(_predictor(known.shape[1:], wanted.shape[1:]) for known, wanted in pairs)

    def forward(self) -> Tensor:
        """Return the sum of the hints' mean squared distances, a scalar, in units of the teacher's variance.

        The teacher saw the first of the student's images, or all.
        """
        distance = torch.zeros(())
        for predict, known, wanted, (mean, deviation) in zip(
            self.predict, self._student_layers, self._teacher_layers, self._scales, strict=True
        ):
            predicted = predict(known.output[: len(wanted.output)])
            distance = distance + mse_loss(predicted, (wanted.output - mean) / deviation)
        return distance


class _LayerOutput:
    """Keeps the output of a layer in the last run of its network."""

    output: Tensor

    def __init__(self, network: nn.Module, layer: str) -> None:
        network.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, _layer: nn.Module, _given: object, output: Tensor) -> None:
        self.output = output


def _predictor(known: torch.Size, wanted: torch.Size) -> nn.Module:
    """Return a convolution to predict a map [C, H, W], or a linear layer to predict a vector."""
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
    labelled: Labelled | None = None,
) -> nn.Module:
    """Train `student` on images made of `alerts`, and return the averaged network in evaluation mode.

    Both networks take `inputs` and return one logit and an embedding. The student also learns the labels of
    `labelled`. `checkpoint`: a file to save progress in, and to resume from if it exists (with the same arguments).
    Raises TrainingError if this file is incomplete, or of another training.
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
        # Seeded by the step, so that a resumed training sees the same images as an uninterrupted one.
        rng = np.random.default_rng([recipe.seed, step])
        made = make_images(inputs, alerts, chance, recipe.batch, rng)
        real = np.empty(0, np.float32)
        if labelled:
            others, real = labelled.draw(recipe.labelled_batch, inputs, rng)
            made = np.concatenate([made, others])
        torch.manual_seed((recipe.seed << 32) + step)
        images = torch.from_numpy(made).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            truth, _ = teacher(images[: recipe.batch])
        logits, _ = student(images)
        loss = _distance(logits[: recipe.batch], truth, recipe.logit_weight) + recipe.hint_weight * hints()
        if labelled:
            known = torch.from_numpy(real)
            loss = loss + recipe.labelled_weight * binary_cross_entropy_with_logits(logits[recipe.batch :, 0], known)
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
    """Return logits [N, C] and embeddings [N, D] of unmodified alerts, by a network in evaluation mode."""
    chunks = (alerts[start : start + CHUNK] for start in range(0, len(alerts), CHUNK))
    with torch.inference_mode():
        outputs = [network(_images(inputs, chunk)) for chunk in chunks]
    logits, embedding = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(embedding)


def _images(inputs: ImageInput, alerts: Alerts) -> Tensor:
    return torch.from_numpy(prepare_images(alerts.cutouts, alerts.cutout_box, inputs, alerts.raw.variance))


def make_images(
    inputs: ImageInput, alerts: Alerts, chance: NDArray[np.float64], n: int, rng: Generator
) -> NDArray[np.float32]:
    """Return `n` augmented and preprocessed images of alerts drawn with probabilities `chance` [N].

    The images have no variance planes, as ZTF publishes none: a normalisation by noise estimates it from the pixels.
    """
    first, second = rng.choice(len(alerts), (2, n), p=chance)
    with np.errstate(over="ignore", invalid="ignore"):  # real images contain pixels of 3.4e38
        made = np.stack(
            [augment(alerts.cutouts[i], alerts.cutouts[j], rng) for i, j in zip(first, second, strict=True)]
        )
    return _prepared(made, inputs)


def _prepared(made: NDArray[np.float32], inputs: ImageInput) -> NDArray[np.float32]:
    """Return preprocessed images of cutouts [n, 3, S, S]; all pixels count as pixels of the stamp."""
    n, size = len(made), made.shape[-1]
    whole = np.broadcast_to(np.array([0, 0, size, size], np.int16), (n, 3, 4))
    return prepare_images(made, whole, inputs, no_plane(n, size))


def _chance_to_be_drawn(score: Tensor, bogus_share: float) -> NDArray[np.float64]:
    """Return the probability that each alert is drawn, float64[N]; the sum is 1.

    Alerts with a negative logit in `score` [N, 1] have a total probability of `bogus_share`.
    """
    bogus = score[:, 0].numpy() < 0
    chance: NDArray[np.float64] = np.where(bogus, bogus_share / bogus.sum(), (1 - bogus_share) / (~bogus).sum())
    return chance


def _polynomial_decay(eta: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Return an update of the averaged weights that forgets the initial weights (Shamir & Zhang 2013, section 4).

    The method is polynomial-decay averaging (arXiv:1212.1824). An exponential average over 500 steps would keep a share
    e^-6 of the initial values after 3,000 steps, which is as large as the variance that batch normalisation finds in
    images of unit norm.
    """

    def update(average: Tensor, latest: Tensor, averaged: Tensor | int) -> Tensor:
        return average + (latest - average) * (eta + 1) / (int(averaged) + 1 + eta)

    return update


def _distance(logits: Tensor, truth: Tensor, logit_weight: float) -> Tensor:
    """Return the mean loss of logits [N, 1] for the teacher's logits `truth` [N, 1].

    The loss is the cross-entropy with the teacher's probabilities, plus `logit_weight` times the smooth L1 distance of
    the clipped logits.
    """
    cross_entropy = binary_cross_entropy_with_logits(logits, truth.sigmoid())
    apart = smooth_l1_loss(logits.clamp(-MAX_LOGIT, MAX_LOGIT), truth.clamp(-MAX_LOGIT, MAX_LOGIT))
    return cross_entropy + logit_weight * apart


def schedule(progress: float, warm_up: float) -> float:
    """Return the learning rate as a fraction of its peak: a linear rise, then a cosine decay to 0.

    `progress` and `warm_up` are fractions of the steps.
    """
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
