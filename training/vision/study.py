"""`study`: fits a grid of networks, pre-trainings (regimens), inputs, seeds and amounts of data, one after another.

`study.csv` gets a row for each finished run. The same command continues with the other runs, so a study may be
interrupted at any time, and runs may be added to its file. A failed run is logged, and tried again the next time.
`study.md` summarises the finished runs.
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
from broker_filter.scoring.bundle import Architecture, BundleError, ImageInput, describe_problems, open_bundle
from training.atomic_write import write_whole
from training.data.datasets import Dataset
from training.errors import DatasetError, EvaluationError, TrainingError
from training.evaluation.evaluate import DECIDED, PREDICTIONS
from training.evaluation.metrics import measure
from training.evaluation.predictions import Predictions
from training.recipe import PUBLISHED_IMAGES, Encoder, Fit, Hardware, Recipe, read_configuration
from training.vision.fit import BUNDLE, fit
from training.vision.frozen_fusion import OF_THE_FUSION
from training.vision.study_report import Choice, as_markdown

TABLE = "study.csv"
REPORT = "study.md"
RUNS = "runs"
TRAINED = ("epoch", "validation_loss")
"""Keys of the card's evaluation that are columns of the table."""
FIGURES = ("roc_auc", "average_precision", "f1", "balanced_accuracy", "accuracy", "fpr_at_fnr_5", "ece")
"""Metrics of `training.evaluation.metrics.measure`; with more than two classes, means over the classes, each against
the rest."""

log = logging.getLogger(__name__)


class Network(Section):
    """A network of the study."""

    architecture: Architecture
    takes_metadata: bool = True
    recipe: dict[str, Any] = Field(default={}, description="Keys of the recipe whose values differ.")


class Regimen(Section):
    """The initial weights, and the keys of the recipe that differ for them."""

    encoders: dict[str, str] | None = Field(
        default=None,
        description="Source of the encoder weights by model; models not listed are skipped. Absent: random weights.",
    )
    recipe: dict[str, Any] = Field(default={}, description="Keys of the recipe whose values differ.")


class Study(Section):
    """The keys of a study's YAML file. Every combination is a run; the seeds are the outermost loop."""

    out: Path
    datasets: dict[str, Path] = Field(min_length=1)
    models: dict[str, Network] = Field(min_length=1)
    regimens: dict[str, Regimen] = Field(min_length=1)
    inputs: dict[str, tuple[str, ...]] = Field(
        default={"images": ()}, description="Sets of metadata columns by name; an empty set means images alone."
    )
    fractions: tuple[float, ...] = Field(
        default=(1.0,),
        description="Fractions of the training sources. The number of epochs is scaled so that the number of steps is "
        "equal.",
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
                raise ValueError(f"regimens.{name}: encoders lists models that are not in the study: {missing}")
        return self


@dataclass(frozen=True, slots=True)
class Run:
    """A cell of the grid with a seed."""

    choice: Choice
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        of = self.choice
        return f"{of.dataset}_{of.model}_{of.regimen}_{of.inputs}_{of.fraction * 100:g}pct_seed{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `study`."""
    parser.add_argument(
        "study", type=Path, metavar="STUDY.yaml", help="YAML file with the keys of `training.vision.study.Study`"
    )


def run(arguments: argparse.Namespace) -> None:
    """Fit all unfinished runs.

    Raises TrainingError if a run's configuration is invalid, and at the end if runs failed.
    """
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
    """Yield the runs in the order of execution: an interrupted study has covered a bit of everything."""
    grid = product(study.seeds, study.fractions, study.inputs, study.datasets, study.regimens, study.models)
    for seed, fraction, inputs, dataset, regimen, model in grid:
        encoders = study.regimens[regimen].encoders
        if encoders is not None and model not in encoders:
            continue
        if study.inputs[inputs] and not study.models[model].takes_metadata:
            continue
        yield Run(Choice(dataset, model, regimen, inputs, fraction), seed)


def configure(study: Study, one: Run) -> Fit:
    """Return the configuration of a run for `fit`. Raises TrainingError if the study's file gives an invalid one."""
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
    metadata, architecture = study.inputs[of.inputs], model.architecture
    if not metadata:  # there is nothing to join with the images
        alone = {name: value for name, value in architecture.arguments.items() if name not in OF_THE_FUSION}
        architecture = Architecture(name=architecture.name, arguments=alone)
    return Fit(
        name=f"{of.model}_{of.regimen}_{of.inputs}",
        version=f"{of.dataset}, {of.fraction:.0%} of the sources, seed {one.seed}",
        dataset=study.datasets[of.dataset],
        out=study.out / RUNS / one.name,
        architecture=architecture,
        encoder=encoder,
        metadata=metadata,
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
    """Return a finished run's predictions on the test split."""
    classes = Dataset.open(config.dataset).card.classes
    thresholds = open_bundle(config.out / BUNDLE).parts[0].card.outputs.thresholds
    return Predictions.read(config.out / PREDICTIONS, classes, thresholds.get(classes[-1], DECIDED))


def _write_report(out: Path, runs: Mapping[Run, Fit]) -> None:
    """Write the report on the finished runs."""
    finished = _finished(out / TABLE)
    found: dict[Choice, list[Predictions]] = {}
    for one, config in runs.items():
        if one.name in finished:
            found.setdefault(one.choice, []).append(_predictions(config))
    write_whole(out / REPORT, as_markdown(found, len(runs)).encode())


def _add_row(table: Path, one: Run, config: Fit, seconds: float) -> None:
    """Append a run's row: its choices, its training and its metrics on the test split."""
    card = open_bundle(config.out / BUNDLE).parts[0].card
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
