"""`study`: a grid of networks, regimens, inputs, seeds and amounts of data, fitted one after another.

`study.csv` has a row for each run that is finished; the same command goes on with the others, so a study may be stopped
at any time, and its file may grow. A run that fails is told of and left for the next time. `study.md` says what the
finished ones come to.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from broker_filter.config import Section
from broker_filter.importers.weights import WeightsError
from broker_filter.scoring.bundle import Architecture, BundleError, ImageInput, describe_problems, load_bundle
from training.atomic_write import write_whole
from training.data.datasets import Dataset
from training.errors import DatasetError, EvaluationError, TrainingError
from training.evaluation.evaluate import DECIDED, PREDICTIONS
from training.evaluation.metrics import measure
from training.evaluation.predictions import Predictions
from training.recipe import PUBLISHED_IMAGES, Encoder, Fit, Hardware, Recipe, read_configuration
from training.vision.fit import BUNDLE, fit
from training.vision.study_report import Choice, as_markdown

TABLE = "study.csv"
REPORT = "study.md"
RUNS = "runs"
TRAINED = ("epoch", "validation_loss")
"""Of the card's evaluation, in the table."""
FIGURES = ("roc_auc", "average_precision", "f1", "balanced_accuracy", "accuracy", "fpr_at_fnr_5", "ece")
"""Of `training.evaluation.metrics.measure`; of several classes the mean over them, each against the rest."""

log = logging.getLogger(__name__)


class Network(Section):
    """A network of the study."""

    architecture: Architecture
    takes_metadata: bool = True
    recipe: dict[str, Any] = Field(default={}, description="Keys of the recipe with other values.")


class Regimen(Section):
    """How the weights begin, and what of the recipe is different then."""

    encoders: dict[str, str] | None = Field(
        default=None, description="What each model's encoder begins with, other models are left out; absent: random."
    )
    recipe: dict[str, Any] = Field(default={}, description="Keys of the recipe with other values.")


class Study(Section):
    """`STUDY.yaml`: every combination is a run, seed by seed, and within a seed from the first of each list on."""

    out: Path
    datasets: dict[str, Path] = Field(min_length=1)
    models: dict[str, Network] = Field(min_length=1)
    regimens: dict[str, Regimen] = Field(min_length=1)
    inputs: dict[str, tuple[str, ...]] = Field(
        default={"images": ()}, description="Metadata columns, by what to call them; none: images alone."
    )
    fractions: tuple[float, ...] = Field(
        default=(1.0,), description="Of the training sources; of fewer there are more epochs, and as many steps."
    )
    seeds: tuple[int, ...] = (1, 2, 3)
    images: ImageInput = PUBLISHED_IMAGES
    recipe: Recipe = Recipe()
    hardware: Hardware = Hardware()

    @model_validator(mode="after")
    def _encoders_are_of_its_models(self) -> Self:
        for name, regimen in self.regimens.items():
            if unknown := (regimen.encoders or {}).keys() - self.models.keys():
                missing = ", ".join(sorted(unknown))
                raise ValueError(f"regimens.{name}: encoders of models that are not in the study: {missing}")
        return self


@dataclass(frozen=True, slots=True)
class Run:
    """A cell of the grid, and a seed."""

    choice: Choice
    seed: int

    @property
    def name(self) -> str:
        """Its directory."""
        of = self.choice
        return f"{of.dataset}_{of.model}_{of.regimen}_{of.inputs}_{of.fraction * 100:g}pct_seed{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `study` takes."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="what `training.vision.study.Study` documents")


def run(arguments: argparse.Namespace) -> None:
    """Fits what is not fitted yet. Raises TrainingError where a run cannot be configured, and at the end where some
    failed."""
    study = read_configuration(Study, arguments.study)
    study.out.mkdir(parents=True, exist_ok=True)
    runs = {one: configure(study, one) for one in plan(study)}
    finished = _finished(study.out / TABLE)
    failed = []
    for number, (one, config) in enumerate(runs.items(), 1):
        if one.name in finished:
            continue
        log.info("run %d of %d: %s", number, len(runs), one.name)
        started = time.monotonic()
        try:
            fit(config)
            _add_row(study.out / TABLE, one, config, time.monotonic() - started)
        except (TrainingError, DatasetError, EvaluationError, BundleError, WeightsError) as error:
            log.error("%s: %s", one.name, error)
            failed.append(one.name)
    _write_report(study.out, runs)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, see the log: {', '.join(failed)}")
    print(f"{study.out / TABLE}, {study.out / REPORT}: {len(runs)} runs")


def plan(study: Study) -> Iterator[Run]:
    """The runs, in the order in which they are made: a study that was stopped early has something of everything."""
    grid = product(study.seeds, study.fractions, study.inputs, study.datasets, study.regimens, study.models)
    for seed, fraction, inputs, dataset, regimen, model in grid:
        encoders = study.regimens[regimen].encoders
        if encoders is not None and model not in encoders:
            continue
        if study.inputs[inputs] and not study.models[model].takes_metadata:
            continue
        yield Run(Choice(dataset, model, regimen, inputs, fraction), seed)


def configure(study: Study, one: Run) -> Fit:
    """What `fit` is told for a run. Raises TrainingError where the study's file says what cannot be."""
    try:
        return _configure(study, one)
    except ValidationError as error:
        raise TrainingError(f"{one.name}: {describe_problems(error)}") from error


def _configure(study: Study, one: Run) -> Fit:
    of = one.choice
    regimen, model = study.regimens[of.regimen], study.models[of.model]
    recipe = Recipe(**{**study.recipe.model_dump(), **model.recipe, **regimen.recipe})
    often = round(1 / of.fraction)
    encoder = Encoder(regimen=of.regimen, source=regimen.encoders[of.model]) if regimen.encoders else None
    return Fit(
        name=f"{of.model}_{of.regimen}_{of.inputs}",
        version=f"{of.dataset}, {of.fraction:.0%} of the sources, seed {one.seed}",
        dataset=study.datasets[of.dataset],
        out=study.out / RUNS / one.name,
        architecture=model.architecture,
        encoder=encoder,
        metadata=study.inputs[of.inputs],
        images=study.images,
        recipe=recipe.model_copy(
            update={
                "seed": one.seed,
                "fraction": of.fraction,
                "epochs": often * recipe.epochs,
                "warm_up_epochs": often * recipe.warm_up_epochs,
                "patience": often * recipe.patience,
            }
        ),
        hardware=study.hardware,
    )


def _finished(table: Path) -> set[str]:
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        return {row["run"] for row in csv.DictReader(file)}


def _predictions(config: Fit) -> Predictions:
    """What a finished run says of the test split."""
    classes = Dataset.open(config.dataset).card.classes
    thresholds = load_bundle(config.out / BUNDLE).card.outputs.thresholds
    return Predictions.read(config.out / PREDICTIONS, classes, thresholds.get(classes[-1], DECIDED))


def _write_report(out: Path, runs: Mapping[Run, Fit]) -> None:
    """Of the runs that are finished."""
    finished = _finished(out / TABLE)
    found: dict[Choice, list[Predictions]] = {}
    for one, config in runs.items():
        if one.name in finished:
            found.setdefault(one.choice, []).append(_predictions(config))
    write_whole(out / REPORT, as_markdown(found, len(runs)).encode())


def _add_row(table: Path, one: Run, config: Fit, seconds: float) -> None:
    """What the run was, how it went, and its figures on the test split."""
    card = load_bundle(config.out / BUNDLE).card
    predictions = _predictions(config)
    figures = measure(predictions, np.ones(len(predictions)))
    row: dict[str, object] = {
        "run": one.name,
        **asdict(one.choice),
        "seed": one.seed,
        **{name: card.training.evaluation[name] for name in TRAINED},
        "seconds": round(seconds),
        **{name: f"{figures[name]:.4f}" for name in FIGURES},
    }
    begins = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if begins:
            writer.writeheader()
        writer.writerow(row)
