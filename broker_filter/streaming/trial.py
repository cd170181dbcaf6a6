"""Tries filters on archived alerts: how many pass, when, what each term removes, and a few examples.

A trial changes nothing and publishes nothing. Its counts are sums over batches, so a night of any size fits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import AlertBatch
from broker_filter.pictures.filter_page import HOURS, Example, FilterReport, TermReport
from broker_filter.pictures.png import masked_png
from broker_filter.sky.watchlist import NO_TARGET
from broker_filter.streaming.account import SECONDS_PER_DAY, exposure_times
from broker_filter.streaming.expressions import Expression, Term
from broker_filter.streaming.scored import ScoredBatch

SECONDS_PER_HOUR = 3600.0
REMOVED_EXAMPLES = 4
"""Examples of the alerts that a term alone removes."""
ILLUSTRATED_TERMS = 10
"""Terms of a filter with such examples; a filter of 2,000 characters can have hundreds of terms."""
MISSING = "missing"


class RandomExamples:
    """A random sample of at most `size` alerts, each with the same chance, the same in every run."""

    def __init__(self, size: int) -> None:
        self.examples: list[Example] = []
        self._size = size
        self._offered = 0
        self._random = np.random.default_rng(0)

    def offer(self, alerts: AlertBatch, rows: NDArray[np.int64], describe: Callable[[int], Mapping[str, str]]) -> None:
        """Let alerts of a batch into the sample, or not. `describe`: returns what the filter read of a row, as text."""
        for row in rows.tolist() if self._size else ():
            self._offered += 1
            place = self._offered - 1 if self._offered <= self._size else int(self._random.integers(self._offered))
            if place < self._size:
                self.examples[place : place + 1] = [_example(alerts, row, describe(row))]


@dataclass(slots=True)
class _TermTrial:
    term: Term
    sample: RandomExamples
    false: int = 0
    missing: int = 0
    alone: int = 0


class FilterTrial:
    """Counts what one filter does with the scored alerts of some batches. Duplicates are not counted."""

    def __init__(self, name: str, expression: Expression, limit: float | None, examples: int) -> None:
        """Begin with nothing counted.

        `limit`: largest fraction of the scored alerts that the filter should pass; None without a limit. `examples`:
        number of examples to keep of the alerts that pass.
        """
        self._name = name
        self._expression = expression
        self._limit = limit
        self._scored = self._passed = 0
        self._hours = np.zeros((HOURS, 2), np.int64)  # scored, passed
        self._sample = RandomExamples(examples)
        few = min(REMOVED_EXAMPLES, examples)
        self._terms = [
            _TermTrial(term, RandomExamples(few if k < ILLUSTRATED_TERMS else 0))
            for k, term in enumerate(expression.terms)
        ]

    def add(self, scored: ScoredBatch) -> None:
        """Count the alerts of a batch."""
        alerts, n = scored.alerts, len(scored.alerts)
        counted = scored.scores.taken & ~scored.duplicate
        values = self._expression.values(alerts, scored.scores.columns())
        describe = partial(_describe, self._expression, values)
        truths = [one.term.truth(values, n) for one in self._terms]
        failing = np.sum([~truth.true for truth in truths], axis=0)  # terms that do not let the alert pass
        for one, truth in zip(self._terms, truths, strict=True):
            alone = counted & ~truth.true & (failing == 1)
            one.false += int((counted & truth.false).sum())
            one.missing += int((counted & ~truth.true & ~truth.false).sum())
            one.alone += int(alone.sum())
            one.sample.offer(alerts, np.flatnonzero(alone), describe)
        passed = counted & (failing == 0)
        self._sample.offer(alerts, np.flatnonzero(passed), describe)
        hours = _hours(alerts)
        for k, which in enumerate((counted, passed)):
            self._hours[:, k] += np.bincount(hours[which], minlength=HOURS)
        self._scored += int(counted.sum())
        self._passed += int(passed.sum())

    def report(self) -> FilterReport:
        """Return what was counted so far."""
        return FilterReport(
            name=self._name,
            where=self._expression.text,
            revision=self._expression.revision,
            limit=self._limit,
            scored=self._scored,
            passed=self._passed,
            hours=tuple((scored, passed) for scored, passed in self._hours.tolist()),
            terms=tuple(
                TermReport(one.term.text, one.false, one.missing, one.alone, tuple(one.sample.examples))
                for one in self._terms
            ),
            examples=tuple(self._sample.examples),
        )


def _hours(alerts: AlertBatch) -> NDArray[np.int64]:
    """Return the hour of the day (UTC) of the exposure of N alerts, int64[N]; 0 for an alert without a time."""
    seconds = np.nan_to_num(exposure_times(alerts), nan=0.0, posinf=0.0, neginf=0.0)
    hours: NDArray[np.int64] = np.minimum(seconds % SECONDS_PER_DAY // SECONDS_PER_HOUR, HOURS - 1).astype(np.int64)
    return hours


def _example(alerts: AlertBatch, row: int, values: Mapping[str, str]) -> Example:
    identity = alerts.identity(row)
    title = f"{identity.object_id or '?'}: {identity.survey} {identity.alert_id}"
    return Example(title, values, tuple(masked_png(pixels) for pixels in alerts.stamps(row) if pixels.size))


def _describe(expression: Expression, values: Mapping[str, Any], row: int) -> dict[str, str]:
    """Return what a filter read of an alert, as text, by name."""
    described = {name: _said(values[name][row]) for name in sorted(expression.names)}
    for near in expression.nears:
        target, separation = values[near.call].row[row], values[near.call].separation[row]
        found = target != NO_TARGET
        described[near.call] = (
            f"{near.file.content.name(int(target))}, {separation:.2f} arcsec" if found else "no target"
        )
    return described


def _said(value: Any) -> str:
    """Return a value that a filter read as text."""
    if isinstance(value, np.floating | float):
        return MISSING if np.isnan(value) else f"{value:.6g}"
    return MISSING if value is None else str(value)
