"""A comparison of evaluations as a self-contained HTML page and as Markdown. Metrics are taken from the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from broker_filter.tables.bts_policies import POLICIES
from training.evaluation import plots
from training.evaluation.bootstrap import RESAMPLES, Estimate
from training.evaluation.evaluate import IF_CALIBRATED
from training.evaluation.evaluations import EvaluatedModel
from training.evaluation.plots import COLOURS, TIMED_BATCH

TEMPLATE = "report.html.jinja"
FIGURES = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "fpr_at_fnr_1": "FPR at FNR 1 %",
    "fpr_at_fnr_5": "FPR at FNR 5 %",
    "ece": "ECE",
}
"""Metrics in the tables, with their titles."""
CALIBRATION = {
    "calibration_slope": "slope",
    "calibration_intercept": "intercept",
    "ece": "ECE",
    IF_CALIBRATED: "ECE if calibrated",
}
"""Columns of the table of calibration, with their titles."""
OF_A_CLASS = ("roc_auc", "average_precision", "precision", "recall", "f1")
SMALLER_IS_BETTER = {"fpr_at_fnr_1", "fpr_at_fnr_5", "ece"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """The table as Markdown, with title and caption."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        cells = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{self.caption}\n\n{cells}\n"


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG picture with title and caption."""

    title: str
    caption: str
    svg: str


def as_markdown(models: Sequence[EvaluatedModel]) -> str:
    """Return the tables as Markdown."""
    return "\n".join([f"# {_title(models)}\n\n{_summary(models)}\n", *(t.markdown for t in _tables(models))])


def as_html(models: Sequence[EvaluatedModel]) -> str:
    """Return the tables and plots as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        title=_title(models),
        summary=_summary(models),
        tables=_tables(models),
        plots=_plots(models),
        models=models,
    )


def _title(models: Sequence[EvaluatedModel]) -> str:
    return models[0].title if len(models) == 1 else f"{len(models)} models compared"


def _summary(models: Sequence[EvaluatedModel]) -> str:
    evaluation = models[0].evaluation
    counts = ", ".join(f"{n:,} {name}" for name, n in evaluation.alerts.items())
    return (
        f"Split {evaluation.split} of data set {evaluation.dataset_sha256[:12]}: {counts} alerts of "
        f"{evaluation.objects:,} objects. Labels: {evaluation.labels}. In parentheses 95 % intervals: percentiles of "
        f"{RESAMPLES:,} bootstrap resamples of the objects, each with all its alerts; if all resamples are equal, "
        "Clopper-Pearson intervals with one trial per object."
    )


def _tables(models: Sequence[EvaluatedModel]) -> list[Table]:
    tables = [_figures_table(models), _calibration_table(models)]
    if len(models) > 1:
        tables += [_differences_table(models), _pairs_table(models)]
    if any(len(runs) > 1 for runs in _by_series(models).values()):
        tables.append(_series_table(models))
    if not models[0].predictions.binary:
        tables += [_classes_table(models, name) for name in OF_A_CLASS]
    if any(name.endswith(".purity") for name in models[0].evaluation.figures):
        tables.append(_policies_table(models))
    return [*tables, _speed_table(models)]


def _figures_table(models: Sequence[EvaluatedModel]) -> Table:
    caption = "Sorted by descending ROC AUC."
    if not models[0].predictions.binary:
        caption += " Means over the classes, each against the rest (macro)."
    if seen := [model.title for model in models if not model.evaluation.unseen]:
        caption += f" Trained on another split, so training may have used these objects: {', '.join(seen)}."
    return Table(
        "Figures",
        caption,
        ["model", *FIGURES.values()],
        [[c.title, *(str(c.figure(name)) for name in FIGURES)] for c in models],
    )


def _calibration_table(models: Sequence[EvaluatedModel]) -> Table:
    return Table(
        "Calibration",
        "A calibrated model has a slope of 1 and an intercept of 0; a slope below 1 means overconfidence. "
        "The last column is the expected ECE of a perfectly calibrated model for the same number of alerts.",
        ["model", *CALIBRATION.values()],
        [[c.title, *(str(c.evaluation.calibration[name]) for name in CALIBRATION)] for c in models],
    )


def _differences_table(models: Sequence[EvaluatedModel]) -> Table:
    first, *others = models
    return Table(
        f"Is {first.title} better?",
        f"{first.title} minus each other model, on the same objects (paired bootstrap). * marks an interval that "
        f"excludes 0 in favour of {first.title}, † one that excludes 0 in favour of the other model; by chance, one "
        "interval in twenty excludes 0.",
        ["against", *FIGURES.values()],
        [[other.title, *(verdict(first.ahead_of(other, name), name) for name in FIGURES)] for other in others],
    )


def verdict(difference: Estimate, name: str) -> str:
    """Return a difference as text, with a mark if it is significant.

    The mark is * if the difference is positive for the model, and † if it is negative.
    """
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return str(difference)
    return f"{difference} {'*' if (difference.low > 0) != (name in SMALLER_IS_BETTER) else '†'}"


def _pairs_table(models: Sequence[EvaluatedModel]) -> Table:
    return Table(
        "Pairwise differences",
        "ROC AUC of the row minus that of the column, marked as above.",
        ["", *(column.title for column in models)],
        [
            [
                row.title,
                *("" if row is column else verdict(row.ahead_of(column, "roc_auc"), "roc_auc") for column in models),
            ]
            for row in models
        ],
    )


def _series_table(models: Sequence[EvaluatedModel]) -> Table:
    def over_seeds(runs: Sequence[EvaluatedModel], name: str) -> str:
        values = np.array([run.figure(name).value for run in runs], np.float64)
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" if len(runs) > 1 else f"{values.mean():.4f}"

    rows = []
    for series, runs in _by_series(models).items():
        for fraction in sorted({run.evaluation.fraction for run in runs}):
            alike = [run for run in runs if run.evaluation.fraction == fraction]
            figures = [over_seeds(alike, name) for name in FIGURES]
            rows.append([series, f"{fraction:.0%}", str(len(alike)), *figures])
    return Table(
        "Over seeds",
        "Mean and standard deviation of runs that differ only in the seed. Share: fraction of the training sources.",
        ["network, regimen, inputs", "share", "runs", *FIGURES.values()],
        rows,
    )


def _classes_table(models: Sequence[EvaluatedModel], name: str) -> Table:
    labels, alerts = models[0].predictions.labels, models[0].evaluation.alerts
    return Table(
        f"Classes: {FIGURES[name]}",
        "Each class against the rest.",
        ["model", *(f"{label} ({alerts[label]:,} alerts)" for label in labels)],
        [[c.title, *(str(c.figure(f"{label}.{name}")) for label in labels)] for c in models],
    )


def _policies_table(models: Sequence[EvaluatedModel]) -> Table:
    names = [f"{policy}.{figure}" for policy in POLICIES for figure in ("purity", "completeness")]
    judged = " and ".join(f"{n:,} {name}" for name, n in models[0].evaluation.judged.items())
    return Table(
        "Policies",
        f"Purity and completeness of the Bright Transient Survey's policies on {judged} objects with a history.",
        ["model", *(name.replace(".", ", ") for name in names)],
        [[c.title, *(str(c.figure(name)) for name in names)] for c in models],
    )


def _speed_table(models: Sequence[EvaluatedModel]) -> Table:
    batches = [speed.batch for speed in models[0].evaluation.speed]
    threads = "; ".join(
        sorted({f"threads: {speed.threads}, {speed.provider}" for c in models for speed in c.evaluation.speed})
    )
    return Table(
        "As served",
        f"Speed of preprocessing and network ({threads}), and peak resident memory of the whole process, by batch "
        "size.",
        ["model", *(f"{what} at {batch}" for batch in batches for what in ("alerts/s", "CPU µs/alert", "MB"))],
        [
            [c.title]
            + [
                cell
                for speed in c.evaluation.speed
                for cell in (
                    f"{speed.alerts_per_second:,.0f}",
                    f"{speed.cpu_microseconds:,.0f}",
                    f"{speed.peak_megabytes:,.0f}",
                )
            ]
            for c in models
        ],
    )


def _plots(models: Sequence[EvaluatedModel]) -> list[Plot]:
    few = f" The {len(COLOURS)} models with the highest ROC AUC are shown." if len(models) > len(COLOURS) else ""
    series = _by_series(models)
    curves = {model.title: model.evaluation.reliability for model in models}
    drawn = [
        Plot("ROC", f"Each label against the rest.{few}", plots.roc_curves(models)),
        Plot("Precision and recall", f"Each label against the rest.{few}", plots.precision_recall_curves(models)),
        Plot("Reliability", f"A calibrated model lies on the dashed line.{few}", plots.reliability_diagram(curves)),
        Plot("Confusion", f"Fractions of each true class.{few}", plots.confusion_matrices(models)),
        Plot("Accuracy and cost", f"As served, in batches of {TIMED_BATCH}.", plots.accuracy_against_time(series)),
    ]
    grown = {name: runs for name, runs in series.items() if len({run.evaluation.fraction for run in runs}) > 1}
    if grown:
        caption = "One dot per run; lines connect the means over seeds."
        drawn.append(Plot("Data efficiency", caption, plots.data_efficiency(grown)))
    return drawn


def _by_series(models: Sequence[EvaluatedModel]) -> dict[str, list[EvaluatedModel]]:
    series: dict[str, list[EvaluatedModel]] = {}
    for model in models:
        series.setdefault(model.evaluation.series, []).append(model)
    return series
