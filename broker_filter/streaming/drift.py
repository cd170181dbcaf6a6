"""Drift: how far the alerts of the last day are from those whose distribution a bundle records.

The counts are histograms over a moving window of time, for each model and survey. Duplicates are left out. This module
never changes a score.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import Survey
from broker_filter.packets.surveys import COLUMNS
from broker_filter.scoring.distribution import (
    Bins,
    SurveyDistribution,
    population_stability_index,
    quantities_of,
)
from broker_filter.scoring.scorer import Model
from broker_filter.scoring.scores import ModelScores, output_name
from broker_filter.streaming.scored import ScoredBatch

BLOCK_S = 3600.0
BLOCKS = 24
"""The window is the current block of BLOCK_S seconds and those before it: one day, so that it holds a whole night."""
KNOWN_COLUMNS = frozenset(column.name for column in COLUMNS)
LEAST_ALERTS = 1000
"""Fewest alerts in the window for which a distance is given. Sampling alone then raises it by 0.01 on average."""

NOT_RECORDED = (
    "%s %s records no distribution of %s alerts: its drift is not measured (`broker-filter models record-distribution` "
    "records one)"
)

log = logging.getLogger(__name__)


class Drift(NamedTuple):
    """The drift of one quantity. `quantity`: the name of an output, `<model>.<label>`, or of a quantity of alerts."""

    survey: str
    model: str
    quantity: str
    psi: float


class DriftWindow:
    """The counts of alerts of one survey in the bins that a model's bundle records, over the last day."""

    def __init__(self, model: str, survey: Survey, recorded: SurveyDistribution, labels: Sequence[str]) -> None:
        """`labels`: the labels of the model. Other labels, and columns that this version does not know, are ignored."""
        self.model, self.survey = model, survey
        self.labels = tuple(label for label in recorded.outputs if label in labels)
        self.quantities = tuple(name for name in recorded.quantities if name in KNOWN_COLUMNS)
        self._bins = [recorded.outputs[label] for label in self.labels]
        self._bins += [recorded.quantities[name] for name in self.quantities]
        width = max((len(bins.edges) for bins in self._bins), default=0)
        self._edges = np.full((len(self._bins), width), math.inf)
        for row, bins in zip(self._edges, self._bins, strict=True):
            row[: len(bins.edges)] = bins.edges
        # The last two columns of a block are the bin above the highest edge, and the missing values.
        self._blocks = np.zeros((BLOCKS, len(self._bins), width + 2), np.int64)
        self._alerts = np.zeros(BLOCKS, np.int64)
        self._now = 0
        self._lock = threading.Lock()

    def counts_as(self, other: DriftWindow) -> bool:
        """Return whether both windows count the same values in the same bins."""
        return (self.model, self.survey, self.labels, self.quantities, self._bins) == (
            other.model,
            other.survey,
            other.labels,
            other.quantities,
            other._bins,
        )

    def count(self, now: int, scored: ScoredBatch, scores: ModelScores) -> None:
        """Count the alerts of a batch that the model scored, without duplicates. `now`: number of the current block."""
        rows = np.flatnonzero(scores.taken & (scored.alerts.survey == self.survey) & ~scored.duplicate)
        if not len(rows):
            return
        values = np.empty((len(rows), len(self._bins)))
        n_outputs = len(self.labels)
        values[:, :n_outputs] = scores.probabilities[rows][:, [scores.labels.index(label) for label in self.labels]]
        values[:, n_outputs:] = quantities_of(scored.alerts, self.quantities)[rows]
        # A comparison with NaN is false: the bin of a missing value is set afterwards.
        place = (values[:, :, None] >= self._edges).sum(axis=2)
        width = self._blocks.shape[2]
        place[np.isnan(values)] = width - 1
        place += np.arange(len(self._bins)) * width
        counts = np.bincount(place.ravel(), minlength=len(self._bins) * width).reshape(-1, width)
        with self._lock:
            self._advance(now)
            self._blocks[now % BLOCKS] += counts
            self._alerts[now % BLOCKS] += len(rows)

    def read(self, now: int) -> tuple[int, list[Drift]]:
        """Return the number of alerts in the window, and the drift of each output and quantity.

        `now`: the number of the current block. There are no drifts if there are fewer than LEAST_ALERTS alerts.
        """
        with self._lock:
            self._advance(now)
            alerts, counts = int(self._alerts.sum()), self._blocks.sum(axis=0)
        if alerts < LEAST_ALERTS:
            return alerts, []
        names = [*(output_name(self.model, label) for label in self.labels), *self.quantities]
        return alerts, [
            Drift(str(self.survey), self.model, name, _psi(bins, found))
            for name, bins, found in zip(names, self._bins, counts, strict=True)
        ]

    def _advance(self, now: int) -> None:
        """Empty the blocks that have left the window since the last call."""
        passed = np.arange(max(self._now, now - BLOCKS) + 1, now + 1) % BLOCKS
        self._blocks[passed] = 0
        self._alerts[passed] = 0
        self._now = max(self._now, now)


def _psi(bins: Bins, found: NDArray[np.int64]) -> float:
    n_bins = len(bins.edges) + 1
    return population_stability_index(np.array(bins.counts), np.append(found[:n_bins], found[-1]))


class DriftMonitor:
    """The windows of all models. Thread-safe: one thread counts while another reads the drifts."""

    def __init__(self, models: Sequence[Model], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: returns the time in seconds.

        A model whose bundle records no distribution for a survey is logged once, and its drift is not measured. Raises
        BundleError if a distribution is malformed.
        """
        self._clock = clock
        self._windows: list[DriftWindow] = []
        for model in models:
            for part in model.parts:
                distribution = part.bundle.distribution()
                for survey in part.surveys:
                    if distribution and (recorded := distribution.of_survey(survey)):
                        self._windows.append(DriftWindow(model.name, survey, recorded, model.labels))
                    else:
                        log.info(NOT_RECORDED, model.name, model.version, survey)

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns that must be decoded, without repetition."""
        return tuple(dict.fromkeys(name for window in self._windows for name in window.quantities))

    def continue_from(self, earlier: DriftMonitor) -> None:
        """Take over the windows of an earlier monitor that count the same values in the same bins."""
        self._windows = [
            next((one for one in earlier._windows if one.counts_as(window)), window) for window in self._windows
        ]

    def count(self, scored: ScoredBatch) -> None:
        """Count the alerts of a batch. Raises ValueError if it lacks one of `columns`."""
        now = self._block()
        scores = {one.model: one for one in scored.scores.models}
        for window in self._windows:
            window.count(now, scored, scores[window.model])

    def read(self) -> tuple[dict[tuple[str, str], int], list[Drift]]:
        """Return the number of alerts in each window, by survey and model, and all drifts."""
        now = self._block()
        read = [(window, *window.read(now)) for window in self._windows]
        return (
            {(str(window.survey), window.model): alerts for window, alerts, _ in read},
            [drift for _, _, drifts in read for drift in drifts],
        )

    def _block(self) -> int:
        return int(self._clock() // BLOCK_S)
