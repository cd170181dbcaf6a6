"""`compare`: evaluations side by side, as one HTML page and a Markdown table, and which differences are no chance.

Compares only what was measured on the same alerts with the same labels; measures nothing anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from training.bootstrap import Estimate, resample
from training.errors import EvaluationError
from training.evaluate import PREDICTIONS, Evaluation
from training.metrics import Values, measure
from training.predictions import Predictions

HTML, MARKDOWN = "comparison.html", "comparison.md"


@dataclass(frozen=True, slots=True)
class Contender:
    """A model's evaluation, and each of its figures in every resample of the objects: the same objects for all."""

    title: str
    evaluation: Evaluation
    predictions: Predictions
    resampled: dict[str, Values]  # [R] each

    def figure(self, name: str) -> Estimate:
        """A figure with its interval."""
        return self.evaluation.figures[name]

    def ahead_of(self, other: Contender, name: str) -> Estimate:
        """By how much this one's figure is larger: the paired bootstrap of the difference."""
        mine, its = self.figure(name).value, other.figure(name).value
        difference = np.nan if mine is None or its is None else mine - its
        return Estimate.of(difference, self.resampled[name] - other.resampled[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes."""
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVALUATION", help="what evaluate wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=f"for {HTML} and {MARKDOWN}")


def run(arguments: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from training.report import as_html, as_markdown

    contenders = read_contenders(arguments.evaluations)
    arguments.out.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(contenders)
    (arguments.out / HTML).write_text(as_html(contenders), encoding="utf-8")
    (arguments.out / MARKDOWN).write_text(markdown, encoding="utf-8")
    print(markdown)
    print(arguments.out / HTML)


def read_contenders(directories: Sequence[Path]) -> list[Contender]:
    """The evaluations, the highest ROC AUC first.

    Raises EvaluationError where one cannot be read, or was not measured on the same alerts as the first.
    """
    evaluations = [Evaluation.read(directory) for directory in directories]
    names = [evaluation.model for evaluation in evaluations]
    titles = names if len(set(names)) == len(names) else [str(directory) for directory in directories]
    contenders = []
    for directory, title, evaluation in zip(directories, titles, evaluations, strict=True):
        predictions = Predictions.read(directory / PREDICTIONS, evaluation.classes, evaluation.threshold)
        resampled = resample(partial(measure, predictions), predictions.object_id)
        contenders.append(Contender(title, evaluation, predictions, resampled))
        _check_comparable(directories[0], contenders[0], directory, contenders[-1])
    return sorted(contenders, key=lambda contender: -(contender.figure("roc_auc").value or 0))


def _check_comparable(first_directory: Path, first: Contender, directory: Path, other: Contender) -> None:
    def differ(what: str, ours: object, theirs: object) -> EvaluationError:
        return EvaluationError(f"{first_directory} and {directory} cannot be compared: {what} {ours} and {theirs}")

    a, b = first.evaluation, other.evaluation
    if a.dataset_sha256 != b.dataset_sha256:
        raise differ("data sets", a.dataset_sha256[:12], b.dataset_sha256[:12])
    if a.split != b.split:
        raise differ("splits", a.split, b.split)
    if set(a.classes) != set(b.classes):
        raise differ("classes", ", ".join(a.classes), ", ".join(b.classes))
    if sorted(first.predictions.alert_id) != sorted(other.predictions.alert_id):
        raise differ("alerts,", len(first.predictions), len(other.predictions))
