"""What a study found, as Markdown: each cell of its grid over the seeds, and what a change of one thing is worth.

Intervals by object, as everywhere: the same objects are drawn for every run, so that differences are paired. Seeds are
averaged within each resample. Never says anything of a run that is not finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from training.evaluation.bootstrap import RESAMPLES, Estimate, resample, weights_by_object
from training.evaluation.metrics import Values, measure, trials
from training.evaluation.predictions import Predictions
from training.evaluation.report import FIGURES, Table, verdict

COMPARED = ("roc_auc", "average_precision", "balanced_accuracy")
"""Figures of which differences are shown."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs have in common that differ in the seed alone."""

    dataset: str
    model: str
    regimen: str
    inputs: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of a choice, taken together."""

    roc_auc: tuple[float, ...]  # of each seed
    figures: Mapping[str, float]  # means over the seeds
    resampled: Mapping[str, Values]  # [R] the same in every resample of the objects
    trials: Mapping[str, float]  # objects that each figure is of, of the seeds the fewest

    @classmethod
    def of(cls, runs: Sequence[Predictions]) -> Cell:
        """From what each seed's run says of the test split."""
        each = [measure(run, np.ones(len(run))) for run in runs]
        known = [trials(run, weights_by_object(run.object_id)) for run in runs]
        drawn = [resample(partial(measure, run), run.object_id) for run in runs]
        return cls(
            tuple(float(figures["roc_auc"]) for figures in each),
            {name: float(np.mean([figures[name] for figures in each])) for name in FIGURES},
            {name: np.mean([figures[name] for figures in drawn], axis=0) for name in FIGURES},
            {name: min(float(figures[name]) for figures in known) for name in FIGURES},
        )

    def estimate(self, name: str) -> Estimate:
        """A figure with its interval."""
        return Estimate.of(self.figures[name], self.resampled[name], self.trials[name])

    def ahead_of(self, other: Cell, name: str) -> Estimate:
        """By how much this cell's figure is larger."""
        return Estimate.of(self.figures[name] - other.figures[name], self.resampled[name] - other.resampled[name])


def as_markdown(runs: Mapping[Choice, Sequence[Predictions]], planned: int) -> str:
    """The tables of each data set. `runs`: of each choice its seeds; `planned`: how many runs the whole grid has."""
    cells = {choice: Cell.of(seeds) for choice, seeds in runs.items()}
    finished = sum(map(len, runs.values()))
    intro = (
        f"{finished} of {planned} runs. Means over the seeds; in parentheses 95 % intervals, percentiles of "
        f"{RESAMPLES:,} resamples of the test split's objects, each with all its alerts; where all of these "
        "are alike, Clopper-Pearson intervals with an object a trial."
    )
    tables = []
    for dataset in dict.fromkeys(choice.dataset for choice in cells):
        here = {choice: cell for choice, cell in cells.items() if choice.dataset == dataset}
        tables += [_cells_table(dataset, here), *_differences_tables(dataset, here)]
    return "\n".join([f"{intro}\n", *(table.markdown for table in tables)])


def _cells_table(dataset: str, cells: Mapping[Choice, Cell]) -> Table:
    return Table(
        dataset,
        "Share: of the training sources. Spread: standard deviation of the ROC AUC over the seeds.",
        ["network", "regimen", "inputs", "share", "seeds", "spread", *FIGURES.values()],
        [
            [
                choice.model,
                choice.regimen,
                choice.inputs,
                f"{choice.fraction:.0%}",
                str(len(cell.roc_auc)),
                f"{np.std(cell.roc_auc, ddof=1):.4f}" if len(cell.roc_auc) > 1 else "",
                *(str(cell.estimate(name)) for name in FIGURES),
            ]
            for choice, cell in cells.items()
        ],
    )


def _differences_tables(dataset: str, cells: Mapping[Choice, Cell]) -> Iterator[Table]:
    """What another regimen, other inputs or another network is worth, everything else being the same."""
    for changed, called in (("regimen", "regimens"), ("inputs", "inputs"), ("model", "networks")):
        rows = [
            [_but_for(changed, one), f"{getattr(one, changed)} less {getattr(other, changed)}"]
            + [verdict(cells[one].ahead_of(cells[other], name), name) for name in COMPARED]
            for one, other in _pairs(cells, changed)
        ]
        if rows:
            yield Table(
                f"{dataset}: {called} compared",
                "Paired differences, marked with * where the interval leaves out 0 in favour of the first, with † "
                "where it does against it; one of twenty does by chance.",
                ["of", "difference", *(FIGURES[name] for name in COMPARED)],
                rows,
            )


def _pairs(cells: Mapping[Choice, Cell], changed: str) -> Iterator[tuple[Choice, Choice]]:
    """Choices that differ in `changed` alone, the later one of the study's less the earlier one."""
    choices = list(cells)
    for i, other in enumerate(choices):
        for one in choices[i + 1 :]:
            if getattr(one, changed) != getattr(other, changed) and _but_for(changed, one) == _but_for(changed, other):
                yield one, other


def _but_for(changed: str, choice: Choice) -> str:
    parts = {"model": choice.model, "regimen": choice.regimen, "inputs": choice.inputs}
    return ", ".join([part for name, part in parts.items() if name != changed] + [f"{choice.fraction:.0%}"])
