"""Evaluations of several models on the same alerts, and the significance of the differences between models.

Evaluations on different alerts, or with different labels, are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from training.errors import EvaluationError
from training.evaluation.bootstrap import Estimate, resample
from training.evaluation.evaluate import PREDICTIONS, Evaluation
from training.evaluation.metrics import Values, measure
from training.evaluation.predictions import Predictions


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model's evaluation, and its figures in every resample of the objects.

    The resamples are the same for all models.
    """

    title: str
    evaluation: Evaluation
    predictions: Predictions
    resampled: dict[str, Values]  # [R] each

    def figure(self, name: str) -> Estimate:
        """Return a figure with its interval."""
        return self.evaluation.figures[name]

    def ahead_of(self, other: EvaluatedModel, name: str) -> Estimate:
        """Return the difference (this model minus the other model) of a figure, with a paired bootstrap interval."""
        mine, its = self.figure(name).value, other.figure(name).value
        difference = np.nan if mine is None or its is None else mine - its
        return Estimate.of(difference, self.resampled[name] - other.resampled[name])


def read_evaluations(directories: Sequence[Path]) -> list[EvaluatedModel]:
    """Read evaluations, sorted by descending ROC AUC.

    Raises EvaluationError if one cannot be read, or was not measured on the same alerts as the first.
    """
    evaluations = [Evaluation.read(directory) for directory in directories]
    names = [evaluation.model for evaluation in evaluations]
    titles = names if len(set(names)) == len(names) else [str(directory) for directory in directories]
    models = []
    for directory, title, evaluation in zip(directories, titles, evaluations, strict=True):
        predictions = Predictions.read(directory / PREDICTIONS, evaluation.classes, evaluation.threshold)
        resampled = resample(partial(measure, predictions), predictions.object_id)
        models.append(EvaluatedModel(title, evaluation, predictions, resampled))
        _check_comparable(directories[0], models[0], directory, models[-1])
    return sorted(models, key=lambda model: -(model.figure("roc_auc").value or 0))


def _check_comparable(first_directory: Path, first: EvaluatedModel, directory: Path, other: EvaluatedModel) -> None:
    def differ(what: str, ours: object, theirs: object) -> EvaluationError:
        return EvaluationError(f"{first_directory} and {directory} cannot be compared: {what} {ours} and {theirs}")

    a, b = first.evaluation, other.evaluation
    if a.dataset_sha256 != b.dataset_sha256:
        raise differ("data sets", a.dataset_sha256[:12], b.dataset_sha256[:12])
    if a.split != b.split:
        raise differ("splits", a.split, b.split)
    if set(a.classes) != set(b.classes):
        raise differ("classes", ", ".join(a.classes), ", ".join(b.classes))
    if not np.array_equal(np.sort(first.predictions.alert_id), np.sort(other.predictions.alert_id)):
        raise differ("alerts,", len(first.predictions), len(other.predictions))
