"""A comparison as one HTML page that needs nothing else, and as Markdown. Says what was measured; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from broker_filter.scoring.bts_policies import POLICIES
from training.evaluation import plots
from training.evaluation.bootstrap import RESAMPLES, Estimate
from training.evaluation.evaluate import IF_CALIBRATED
from training.evaluation.evaluations import Contender
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
"""What the tables show, by figure."""
CALIBRATION = {
    "calibration_slope": "slope",
    "calibration_intercept": "intercept",
    "ece": "ECE",
    IF_CALIBRATED: "ECE if it were calibrated",
}
"""What the table of calibration shows, by figure."""
OF_A_CLASS = ("roc_auc", "average_precision", "precision", "recall", "f1")
SMALLER_IS_BETTER = {"fpr_at_fnr_1", "fpr_at_fnr_5", "ece"}


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """With its title and caption."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        cells = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{self.caption}\n\n{cells}\n"


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture and what to say of it."""

    title: str
    caption: str
    svg: str


def as_markdown(contenders: Sequence[Contender]) -> str:
    """The tables."""
    return "\n".join(
        [f"# {_title(contenders)}\n\n{_summary(contenders)}\n", *(t.markdown for t in _tables(contenders))]
    )


def as_html(contenders: Sequence[Contender]) -> str:
    """The tables and the plots."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        title=_title(contenders),
        summary=_summary(contenders),
        tables=_tables(contenders),
        plots=_plots(contenders),
        contenders=contenders,
    )


def _title(contenders: Sequence[Contender]) -> str:
    return contenders[0].title if len(contenders) == 1 else f"{len(contenders)} models compared"


def _summary(contenders: Sequence[Contender]) -> str:
    evaluation = contenders[0].evaluation
    counts = ", ".join(f"{n:,} {name}" for name, n in evaluation.alerts.items())
    return (
        f"Split {evaluation.split} of data set {evaluation.dataset_sha256[:12]}: {counts} alerts of "
        f"{evaluation.objects:,} objects. Labels: {evaluation.labels}. In parentheses 95 % intervals: percentiles of "
        f"{RESAMPLES:,} resamples of the objects, each with all its alerts; where all of these are alike, "
        "Clopper-Pearson intervals with an object a trial."
    )


def _tables(contenders: Sequence[Contender]) -> list[Table]:
    tables = [_figures_table(contenders), _calibration_table(contenders)]
    if len(contenders) > 1:
        tables += [_differences_table(contenders), _pairs_table(contenders)]
    if any(len(runs) > 1 for runs in _by_series(contenders).values()):
        tables.append(_series_table(contenders))
    if not contenders[0].predictions.binary:
        tables += [_classes_table(contenders, name) for name in OF_A_CLASS]
    if any(name.endswith(".purity") for name in contenders[0].evaluation.figures):
        tables.append(_policies_table(contenders))
    return [*tables, _speed_table(contenders)]


def _figures_table(contenders: Sequence[Contender]) -> Table:
    caption = "The highest ROC AUC first."
    if not contenders[0].predictions.binary:
        caption += " Means over the classes, each against the rest (macro)."
    if seen := [contender.title for contender in contenders if not contender.evaluation.unseen]:
        caption += f" Trained on another split than this, and may have seen these objects: {', '.join(seen)}."
    return Table(
        "Figures",
        caption,
        ["model", *FIGURES.values()],
        [[c.title, *(str(c.figure(name)) for name in FIGURES)] for c in contenders],
    )


def _calibration_table(contenders: Sequence[Contender]) -> Table:
    return Table(
        "Calibration",
        "A calibrated model has a slope of 1 and an intercept of 0; one with a slope below 1 is too sure of itself. "
        "The last column is the ECE that a perfectly calibrated model would show for as many alerts.",
        ["model", *CALIBRATION.values()],
        [[c.title, *(str(c.evaluation.calibration[name]) for name in CALIBRATION)] for c in contenders],
    )


def _differences_table(contenders: Sequence[Contender]) -> Table:
    first, *others = contenders
    return Table(
        f"Is {first.title} better?",
        f"{first.title} less each other model, on the same objects (paired bootstrap). Marked with * where the "
        "interval leaves out 0 in its favour, with † where it does against it; one of twenty does by chance.",
        ["against", *FIGURES.values()],
        [[other.title, *(verdict(first.ahead_of(other, name), name) for name in FIGURES)] for other in others],
    )


def verdict(difference: Estimate, name: str) -> str:
    """The difference of a figure, marked with * where it is beyond chance and for the better, with † where worse."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return str(difference)
    return f"{difference} {'*' if (difference.low > 0) != (name in SMALLER_IS_BETTER) else '†'}"


def _pairs_table(contenders: Sequence[Contender]) -> Table:
    return Table(
        "Which one beats which?",
        "ROC AUC of the row less that of the column, marked as above.",
        ["", *(column.title for column in contenders)],
        [
            [
                row.title,
                *(
                    "" if row is column else verdict(row.ahead_of(column, "roc_auc"), "roc_auc")
                    for column in contenders
                ),
            ]
            for row in contenders
        ],
    )


def _series_table(contenders: Sequence[Contender]) -> Table:
    def over_seeds(runs: Sequence[Contender], name: str) -> str:
        values = np.array([run.figure(name).value for run in runs], np.float64)
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" if len(runs) > 1 else f"{values.mean():.4f}"

    rows = []
    for series, runs in _by_series(contenders).items():
        for fraction in sorted({run.evaluation.fraction for run in runs}):
            alike = [run for run in runs if run.evaluation.fraction == fraction]
            figures = [over_seeds(alike, name) for name in FIGURES]
            rows.append([series, f"{fraction:.0%}", str(len(alike)), *figures])
    return Table(
        "Over seeds",
        "Mean and standard deviation of runs that differ in nothing but the seed; share of the training sources.",
        ["network, regimen, inputs", "share", "runs", *FIGURES.values()],
        rows,
    )


def _classes_table(contenders: Sequence[Contender], name: str) -> Table:
    labels, alerts = contenders[0].predictions.labels, contenders[0].evaluation.alerts
    return Table(
        f"Classes: {FIGURES[name]}",
        "Each class against the rest.",
        ["model", *(f"{label} ({alerts[label]:,} alerts)" for label in labels)],
        [[c.title, *(str(c.figure(f"{label}.{name}")) for label in labels)] for c in contenders],
    )


def _policies_table(contenders: Sequence[Contender]) -> Table:
    names = [f"{policy}.{figure}" for policy in POLICIES for figure in ("purity", "completeness")]
    judged = " and ".join(f"{n:,} {name}" for name, n in contenders[0].evaluation.judged.items())
    return Table(
        "Policies",
        f"What the Bright Transient Survey's policies would save of the {judged} objects with a history.",
        ["model", *(name.replace(".", ", ") for name in names)],
        [[c.title, *(str(c.figure(name)) for name in names)] for c in contenders],
    )


def _speed_table(contenders: Sequence[Contender]) -> Table:
    batches = [speed.batch for speed in contenders[0].evaluation.speed]
    threads = ", ".join(
        sorted({f"{speed.threads} on {speed.provider}" for c in contenders for speed in c.evaluation.speed})
    )
    return Table(
        "As served",
        f"Preprocessing and network; threads: {threads}. Peak of resident memory of the whole process, by batch size.",
        ["model", *(f"{what} at {batch}" for batch in batches for what in ("alerts/s", "CPU µs an alert", "MB"))],
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
            for c in contenders
        ],
    )


def _plots(contenders: Sequence[Contender]) -> list[Plot]:
    few = f" The {len(COLOURS)} models of the highest ROC AUC." if len(contenders) > len(COLOURS) else ""
    series = _by_series(contenders)
    drawn = [
        Plot("ROC", f"Each label against the rest.{few}", plots.roc_curves(contenders)),
        Plot("Precision and recall", f"Each label against the rest.{few}", plots.precision_recall_curves(contenders)),
        Plot("Reliability", f"A calibrated model lies on the dashed line.{few}", plots.reliability_diagram(contenders)),
        Plot("Confusion", f"Shares of each true class.{few}", plots.confusion_matrices(contenders)),
        Plot("Accuracy and cost", f"In batches of {TIMED_BATCH}, as served.", plots.accuracy_against_time(series)),
    ]
    grown = {name: runs for name, runs in series.items() if len({run.evaluation.fraction for run in runs}) > 1}
    if grown:
        caption = "A dot a run, lines through the means over seeds."
        drawn.append(Plot("Data efficiency", caption, plots.data_efficiency(grown)))
    return drawn


def _by_series(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    series: dict[str, list[Contender]] = {}
    for contender in contenders:
        series.setdefault(contender.evaluation.series, []).append(contender)
    return series
