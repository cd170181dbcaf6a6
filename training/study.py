"""`study`: a grid of networks, regimens, inputs, seeds and amounts of data, fitted one after another.

`study.csv` has a row for each run that is finished; the same command goes on with the others, so a study may be stopped
at any time, and its file may grow. A run that fails is told of and left for the next time.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from broker_filter.config import Section
from broker_filter.scoring.bundle import Architecture, BundleError, ImageInput, load_bundle
from broker_filter.scoring.weights import WeightsError
from training.datasets import Dataset
from training.errors import DatasetError, TrainingError
from training.evaluate import PREDICTIONS
from training.fit import BUNDLE, THRESHOLD, fit
from training.metrics import measure
from training.predictions import Predictions
from training.recipe import PUBLISHED_IMAGES, Encoder, Fit, Hardware, Recipe, read_configuration

TABLE = "study.csv"
RUNS = "runs"
TRAINED = ("epoch", "validation_loss")
"""Of the card's evaluation, in the table."""
FIGURES = ("roc_auc", "average_precision", "f1", "balanced_accuracy", "accuracy", "fpr_at_fnr_5", "ece")
"""Of `training.metrics.measure`; of several classes the mean over them, each against the rest."""

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
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (1, 2, 3)
    images: ImageInput = PUBLISHED_IMAGES
    recipe: Recipe = Recipe()
    hardware: Hardware = Hardware()


@dataclass(frozen=True, slots=True)
class Run:
    """A cell of the grid."""

    seed: int
    fraction: float
    inputs: str
    dataset: str
    regimen: str
    model: str

    @property
    def name(self) -> str:
        """Its directory."""
        return f"{self.dataset}_{self.model}_{self.regimen}_{self.inputs}_{self.fraction * 100:g}pct_seed{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `study` takes."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="what `training.study.Study` documents")


def run(arguments: argparse.Namespace) -> None:
    """Fits what is not fitted yet. Raises TrainingError at the end where runs failed."""
    study = read_configuration(Study, arguments.study)
    study.out.mkdir(parents=True, exist_ok=True)
    runs = list(plan(study))
    finished = _finished(study.out / TABLE)
    failed = []
    for number, cell in enumerate(runs, 1):
        if cell.name in finished:
            continue
        log.info("run %d of %d: %s", number, len(runs), cell.name)
        started = time.monotonic()
        try:
            config = configure(study, cell)
            fit(config)
            _add_row(study.out / TABLE, cell, config, time.monotonic() - started)
        except (TrainingError, DatasetError, BundleError, WeightsError) as error:
            log.error("%s: %s", cell.name, error)
            failed.append(cell.name)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, see the log: {', '.join(failed)}")
    print(f"{study.out / TABLE}: {len(runs)} runs")


def plan(study: Study) -> Iterator[Run]:
    """The runs, in the order in which they are made: a study that was stopped early has something of everything."""
    grid = product(study.seeds, study.fractions, study.inputs, study.datasets, study.regimens, study.models)
    for cell in (Run(*values) for values in grid):
        encoders = study.regimens[cell.regimen].encoders
        if encoders is not None and cell.model not in encoders:
            continue
        if study.inputs[cell.inputs] and not study.models[cell.model].takes_metadata:
            continue
        yield cell


def configure(study: Study, cell: Run) -> Fit:
    """What `fit` is told for a run."""
    regimen, model = study.regimens[cell.regimen], study.models[cell.model]
    changes = {**model.recipe, **regimen.recipe, "seed": cell.seed, "fraction": cell.fraction}
    encoder = Encoder(regimen=cell.regimen, source=regimen.encoders[cell.model]) if regimen.encoders else None
    return Fit(
        name=f"{cell.model}_{cell.regimen}_{cell.inputs}",
        version=f"{cell.dataset}, {cell.fraction:.0%} of the sources, seed {cell.seed}",
        dataset=study.datasets[cell.dataset],
        out=study.out / RUNS / cell.name,
        architecture=model.architecture,
        encoder=encoder,
        metadata=study.inputs[cell.inputs],
        images=study.images,
        recipe=Recipe(**{**study.recipe.model_dump(), **changes}),
        hardware=study.hardware,
    )


def _finished(table: Path) -> set[str]:
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        return {row["run"] for row in csv.DictReader(file)}


def _add_row(table: Path, cell: Run, config: Fit, seconds: float) -> None:
    """What the run was, how it went, and its figures on the test split."""
    card = load_bundle(config.out / BUNDLE).card
    classes = Dataset.open(config.dataset).card.classes
    predictions = Predictions.read(config.out / PREDICTIONS, classes, THRESHOLD)
    figures = measure(predictions, np.ones(len(predictions)))
    row: dict[str, object] = {
        "run": cell.name,
        **asdict(cell),
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
