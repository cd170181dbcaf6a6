"""The plots of a comparison. Each public function returns one plot as SVG text.

Only curves are computed here, from predictions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from training.evaluation.bootstrap import Estimate
from training.evaluation.evaluate import ReliabilityBin
from training.evaluation.evaluations import EvaluatedModel
from training.evaluation.metrics import Ranking, rank

COLOURS = mpl.color_sequences["tab10"]
"""Colours of models. Only the best models are drawn, as many as there are colours, so that curves can be told apart."""
SERIES_COLOURS = mpl.color_sequences["tab20"]
PANEL = 4.2
"""Height, and default width, of a panel in inches."""
LEGEND_LINE = 0.21
PANELS_IN_A_ROW = 3
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "broker-filter"}
"""Settings of the SVG output: text is stored as text, and the same numbers give the same file."""
TIMED_BATCH = 32
TITLE_LETTERS = 40
"""Characters per line of a panel's title."""


def roc_curves(models: Sequence[EvaluatedModel]) -> str:
    """Return a plot of true- against false-positive rate, one panel per label."""

    def draw(axes: Axes, ranking: Ranking, **line: Any) -> None:
        axes.plot(ranking.false_positive_rate, ranking.recall, **line)

    return _curves(models, draw, "false-positive rate", "true-positive rate")


def precision_recall_curves(models: Sequence[EvaluatedModel]) -> str:
    """Return a plot of precision against recall, one panel per label."""

    def draw(axes: Axes, ranking: Ranking, **line: Any) -> None:
        axes.step(ranking.recall, ranking.precision, where="pre", **line)

    return _curves(models, draw, "recall", "precision")


def reliability_diagram(curves: Mapping[str, Sequence[ReliabilityBin]]) -> str:
    """Return a plot of observed frequency against predicted probability, with intervals, one line per named curve."""
    figure, [axes] = _panels(1)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    for (title, bins), colour in zip(curves.items(), COLOURS, strict=False):
        happened = [found.happened for found in bins]
        axes.errorbar(
            [found.said for found in bins],
            np.array([found.value for found in happened], np.float64),
            yerr=_bars(happened),
            color=colour,
            label=title,
            marker="o",
            markersize=3,
            linewidth=1,
        )
    axes.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(-0.02, 1.02))
    _legend(figure, axes)
    return _svg(figure)


def confusion_matrices(models: Sequence[EvaluatedModel]) -> str:
    """Return a plot of the normalised confusion matrices, one panel per model."""
    figure, panels = _panels(min(len(models), len(COLOURS)))
    for axes, model in zip(panels, models, strict=False):
        classes = model.evaluation.classes
        shares = np.array([[cell.value for cell in row] for row in model.evaluation.confusion], np.float64)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (t, d), share in np.ndenumerate(shares):
            axes.text(d, t, f"{share:.1%}", ha="center", va="center", color="white" if share > 0.5 else "black")
        axes.set_xticks(range(len(classes)), classes, rotation=30)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted class", ylabel="true class", title=fill(model.title, TITLE_LETTERS))
    return _svg(figure)


def accuracy_against_time(series: Mapping[str, Sequence[EvaluatedModel]]) -> str:
    """Return a plot of ROC AUC, with intervals, against CPU time per alert."""
    figure, [axes] = _panels(1, width=2 * PANEL)
    for colour, (name, runs) in zip(cycle(SERIES_COLOURS), series.items(), strict=False):
        auc = [run.figure("roc_auc") for run in runs]
        axes.errorbar(
            [run.evaluation.microseconds(TIMED_BATCH) for run in runs],
            np.array([one.value for one in auc], np.float64),
            yerr=_bars(auc),
            color=colour,
            label=name,
            fmt="o",
            linewidth=0.8,
        )
    axes.set(xlabel=f"CPU microseconds per alert, served in batches of {TIMED_BATCH}", ylabel="ROC AUC", xscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    _legend(figure, axes)
    return _svg(figure)


def data_efficiency(series: Mapping[str, Sequence[EvaluatedModel]]) -> str:
    """Return a plot of ROC AUC against the fraction of training sources: dots for runs, lines for means over seeds."""
    figure, [axes] = _panels(1, width=2 * PANEL)
    for colour, (name, runs) in zip(cycle(SERIES_COLOURS), series.items(), strict=False):
        fraction = np.array([run.evaluation.fraction for run in runs])
        auc = np.array([run.figure("roc_auc").value for run in runs], np.float64)
        at = np.unique(fraction)
        axes.plot(fraction, auc, "o", color=colour, markersize=3)
        axes.plot(at, [auc[fraction == one].mean() for one in at], color=colour, label=name)
    axes.set(xlabel="fraction of the training sources", ylabel="ROC AUC", xscale="log")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_minor_formatter("")
    _legend(figure, axes)
    return _svg(figure)


def _curves(models: Sequence[EvaluatedModel], draw: Callable[..., None], x: str, y: str) -> str:
    """Return curves, as SVG, with one panel per label and one line per model.

    `draw` draws the ranking of a label against all other labels.
    """
    labels = models[0].predictions.labels
    figure, panels = _panels(len(labels))
    for axes, label in zip(panels, labels, strict=True):
        for model, colour in zip(models, COLOURS, strict=False):
            predictions = model.predictions
            positive = predictions.truth == predictions.classes.index(label)
            score = predictions.probabilities[:, predictions.labels.index(label)]
            ranking = rank(positive, score, np.ones(len(predictions)))
            draw(axes, ranking, color=colour, linewidth=1, label=model.title)
        axes.set(xlabel=x, ylabel=y, title=label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _legend(figure, panels[0])
    return _svg(figure)


def _panels(n: int, width: float = PANEL) -> tuple[Figure, list[Axes]]:
    """Return a figure with n panels, up to three in a row."""
    columns = min(n, PANELS_IN_A_ROW)
    rows = -(-n // columns)
    figure = Figure(figsize=(width * columns, PANEL * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def _legend(figure: Figure, axes: Axes) -> None:
    """Add the legend of `axes`, common to all panels, below them, because names may be long."""
    handles, names = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * len(names))
    figure.legend(handles, names, loc="outside lower center", frameon=False)


def _bars(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    """Return the lengths of error bars below and above, [2, N]; 0 without an interval."""
    value, low, high = np.array([[one.value, one.low, one.high] for one in estimates], np.float64).T
    # The interval of an ECE may lie above the ECE itself.
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
