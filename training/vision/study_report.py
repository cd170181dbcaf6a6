"""The report on a study as Markdown: each cell of the grid averaged over seeds, and the effect of changing one choice.

Intervals are bootstrapped over objects and over seeds, drawn independently of each other (the pigeonhole bootstrap of
Owen 2007, Annals of Applied Statistics 1, 386). The same resamples are used for every cell, so that differences are
paired: by object, and by seed, which also chooses the training objects. Unfinished runs are not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from training.evaluation.bootstrap import RESAMPLES, SEED, Estimate, resample, weights_by_object
from training.evaluation.metrics import Values, measure, trials
from training.evaluation.predictions import Predictions
from training.evaluation.report import FIGURES, Table, verdict

COMPARED = ("roc_auc", "average_precision", "balanced_accuracy")
"""Metrics whose differences are reported."""
SHOWN = (*COMPARED, "f1")
"""Metrics with a table in the report; `study.csv` has others."""
SEEDS_SEED = SEED + 1
"""Seed of the draws of the seeds, which must differ from that of the objects: the two are drawn independently."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The choices of a run apart from its seed."""

    dataset: str
    model: str
    regimen: str
    inputs: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of a choice, over all seeds."""

    roc_auc: tuple[float, ...]  # by seed
    figures: Mapping[str, float]  # means over the seeds
    resampled: Mapping[str, Values]  # [R] means over seeds drawn anew in each of R resamples of the objects
    trials: Mapping[str, float]  # number of objects behind each figure, the minimum over the seeds

    @classmethod
    def of(cls, runs: Sequence[Predictions]) -> Cell:
        """Return the cell for the predictions of each seed's run on the test split."""
        each = [measure(run, np.ones(len(run))) for run in runs]
        known = [trials(run, weights_by_object(run.object_id)) for run in runs]
        drawn = [resample(partial(measure, run), run.object_id) for run in runs]
        seeds = np.random.default_rng(SEEDS_SEED).integers(len(runs), size=(len(runs), RESAMPLES))
        by_seed = {name: np.stack([figures[name] for figures in drawn]) for name in SHOWN}
        return cls(
            tuple(float(figures["roc_auc"]) for figures in each),
            {name: float(np.mean([figures[name] for figures in each])) for name in SHOWN},
            {name: np.take_along_axis(values, seeds, axis=0).mean(axis=0) for name, values in by_seed.items()},
            {name: min(float(figures[name]) for figures in known) for name in SHOWN},
        )

    def estimate(self, name: str) -> Estimate:
        """Return a metric with its interval."""
        return Estimate.of(self.figures[name], self.resampled[name], self.trials[name])

    def ahead_of(self, other: Cell, name: str) -> Estimate:
        """Return the difference (this cell minus the other cell) of a metric, with its interval."""
        return Estimate.of(self.figures[name] - other.figures[name], self.resampled[name] - other.resampled[name])


def as_markdown(runs: Mapping[Choice, Sequence[Predictions]], planned: int) -> str:
    """Return the tables of each data set, in Markdown.

    `runs`: predictions of each seed, by choice; `planned`: number of runs in the whole grid.
    """
    cells = {choice: Cell.of(seeds) for choice, seeds in runs.items()}
    finished = sum(map(len, runs.values()))
    intro = (
        f"{finished} of {planned} runs. Means over the seeds; in parentheses 95 % intervals: percentiles of "
        f"{RESAMPLES:,} bootstrap resamples of the test split's objects, each with all its alerts, and of the seeds; "
        "if all resamples give the same value, Clopper-Pearson intervals with one trial per object. The interval of a "
        "single seed is that of its objects alone."
    )
    tables = []
    for dataset in dict.fromkeys(choice.dataset for choice in cells):
        here = {choice: cell for choice, cell in cells.items() if choice.dataset == dataset}
        tables += [*_cells_tables(dataset, here), *_differences_tables(dataset, here)]
    return "\n".join([f"{intro}\n", *(table.markdown for table in tables)])


def _cells_tables(dataset: str, cells: Mapping[Choice, Cell]) -> Iterator[Table]:
    """Yield a table of each metric, with a row for each network and its inputs, and a column for each regimen."""
    regimens = list(dict.fromkeys(choice.regimen for choice in cells))
    rows = list(dict.fromkeys((choice.model, choice.inputs, choice.fraction) for choice in cells))
    most = max(len(cell.roc_auc) for cell in cells.values())

    def said(choice: Choice, name: str) -> str:
        if choice not in cells:
            return ""
        seeds = len(cells[choice].roc_auc)
        return str(cells[choice].estimate(name)) + (f" [{seeds}]" if seeds < most else "")

    for name in SHOWN:
        yield Table(
            f"{dataset}: {FIGURES[name]}",
            f"Means over {most} seeds, or over the number in brackets. Share: fraction of the training sources.",
            ["network", "inputs", "share", *regimens],
            [
                [model, inputs, f"{fraction:.0%}"]
                + [said(Choice(dataset, model, regimen, inputs, fraction), name) for regimen in regimens]
                for model, inputs, fraction in rows
            ],
        )


def _differences_tables(dataset: str, cells: Mapping[Choice, Cell]) -> Iterator[Table]:
    """Yield a table of differences for each of regimen, inputs and network, with the other choices equal."""
    for changed, called in (("regimen", "regimens"), ("inputs", "inputs"), ("model", "networks")):
        rows = [
            [_but_for(changed, one), f"{getattr(one, changed)} minus {getattr(other, changed)}"]
            + [verdict(cells[one].ahead_of(cells[other], name), name) for name in COMPARED]
            for one, other in _pairs(cells, changed)
        ]
        if rows:
            yield Table(
                f"{dataset}: {called} compared",
                "Paired differences. * marks an interval that excludes 0 in favour of the first choice, † one that "
                "excludes 0 in favour of the second; by chance, one interval in twenty excludes 0.",
                ["runs", "difference", *(FIGURES[name] for name in COMPARED)],
                rows,
            )


def _pairs(cells: Mapping[Choice, Cell], changed: str) -> Iterator[tuple[Choice, Choice]]:
    """Yield pairs of choices that differ only in `changed`: the later one in the study, then the earlier one."""
    choices = list(cells)
    for i, other in enumerate(choices):
        for one in choices[i + 1 :]:
            if getattr(one, changed) != getattr(other, changed) and _but_for(changed, one) == _but_for(changed, other):
                yield one, other


def _but_for(changed: str, choice: Choice) -> str:
    parts = {"model": choice.model, "regimen": choice.regimen, "inputs": choice.inputs}
    return ", ".join([part for name, part in parts.items() if name != changed] + [f"{choice.fraction:.0%}"])
