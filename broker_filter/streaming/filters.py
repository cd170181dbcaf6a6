"""The filters of a service file: each is tried once on every batch, and the share of alerts that passes it is watched.

A filter with a `max_rate` is over its rate while more than this share of the latest scored alerts passed it. Then it
warns, or pauses its own topic, as `over_rate` says; other topics and the stream go on. Paused alerts are counted too,
so a topic is published to again as soon as the share has fallen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from broker_filter.sky.watchlist import NO_TARGET, Nearest
from broker_filter.streaming.expressions import NOTHING_FOUND, Expression, Near
from broker_filter.streaming.resolved import ResolvedService
from broker_filter.streaming.scored import FilterOutcome, Match, ScoredBatch

SLICES = 60
"""Parts of a window that are forgotten one by one: the window is exact to a sixtieth, and its memory is bounded."""
FEWEST_PASSED = 10
"""Alerts that must have passed within the window before a filter can be over its rate, so that chance among few alerts
does not pause a topic."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Slice:
    """The counts of one part of a window. `number`: the time in units of the length of a part."""

    number: int
    scored: int = 0
    passed: int = 0


class PassRate:
    """Counts how many of the scored alerts of the last minutes passed a filter. Several threads may use it."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with an empty window of some `minutes`. `clock`: returns seconds."""
        self.minutes = minutes
        self._clock = clock
        self._slices: deque[_Slice] = deque([_Slice(self._now())], maxlen=SLICES)
        self._lock = threading.Lock()

    def add(self, scored: int, passed: int) -> None:
        """Count alerts of this moment."""
        with self._lock:
            now = self._now()
            if self._slices[-1].number != now:
                self._slices.append(_Slice(now))
            self._slices[-1].scored += scored
            self._slices[-1].passed += passed

    def counts(self) -> tuple[int, int]:
        """Return how many alerts were scored within the window, and how many of them passed."""
        with self._lock:
            first = self._now() - SLICES
            within = [one for one in self._slices if one.number > first]
        return sum(one.scored for one in within), sum(one.passed for one in within)

    def _now(self) -> int:
        return int(self._clock() * SLICES / (60 * self.minutes))


@dataclass(frozen=True, slots=True)
class FilterState:
    """How much a filter passes at present."""

    name: str
    rate: float
    """Fraction of the scored alerts within the filter's window that passed; 0 if none was scored."""
    over: bool
    """Whether this is more than the filter may pass."""
    paused: bool
    """Whether the filter's topic is paused for this reason."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled filter with its limit. `max_rate`: None without a limit."""

    name: str
    expression: Expression
    max_rate: float | None = None
    pauses: bool = False
    rate: PassRate = field(default_factory=lambda: PassRate(1))

    def state(self) -> FilterState:
        """Return how much the filter passes at present."""
        scored, passed = self.rate.counts()
        over = self.max_rate is not None and passed >= FEWEST_PASSED and passed > self.max_rate * scored
        return FilterState(self.name, passed / scored if scored else 0.0, over, over and self.pauses)


class Filters:
    """The filters of a configuration. Only the counts of their rates change."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        """Hold the filters, in the configured order."""
        self._filters = tuple(filters)
        self._over: set[str] = set()
        self._nears = tuple(dict.fromkeys(near for one in filters for near in one.expression.nears))

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that the filters read, and that must be decoded."""
        return tuple(dict.fromkeys(column for one in self._filters for column in one.expression.columns))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the filters, in the configured order."""
        return tuple(one.name for one in self._filters)

    def apply(self, scored: ScoredBatch) -> ScoredBatch:
        """Return a batch with the outcomes of the filters, and the targets near its alerts."""
        found = {near: near.find(scored.alerts.ra, scored.alerts.dec) for near in self._nears}
        return replace(scored, filters=self.outcomes(scored, found), matches=_matches(found))

    def outcomes(self, scored: ScoredBatch, found: Mapping[Near, Nearest] = NOTHING_FOUND) -> tuple[FilterOutcome, ...]:
        """Return for each filter which alerts of a batch pass it, in the configured order, and count them.

        Call this once for each batch. Duplicates are not counted. `found`: results of `Near.find` for this batch that
        are known already.
        """
        counted = scored.scores.taken & ~scored.duplicate
        n = int(counted.sum())
        outcomes = []
        for one in self._filters:
            passed = one.expression.evaluate(scored, found)
            one.rate.add(n, int((passed & counted).sum()))
            state = one.state()
            self._report(one, state)
            outcomes.append(FilterOutcome(one.name, one.expression.revision, passed, state.paused))
        return tuple(outcomes)

    def states(self) -> list[FilterState]:
        """Return how much each filter passes at present."""
        return [one.state() for one in self._filters]

    def rate_of(self, name: str, revision: str, minutes: float) -> PassRate | None:
        """Return the counts of the filter of this name, if its revision and the length of its window are these."""
        return next(
            (
                one.rate
                for one in self._filters
                if (one.name, one.expression.revision, one.rate.minutes) == (name, revision, minutes)
            ),
            None,
        )

    def _report(self, one: Filter, state: FilterState) -> None:
        """Log that a filter went over its rate, or below it again."""
        if state.over and one.name not in self._over:
            self._over.add(one.name)
            log.warning(
                "filter %s passed %.1f %% of the alerts of the last %g minutes, more than its max_rate of %g %%%s",
                *(one.name, 100 * state.rate, one.rate.minutes, 100 * (one.max_rate or 0)),
                ": its topic is paused" if state.paused else "",
            )
        elif not state.over and one.name in self._over:
            self._over.remove(one.name)
            log.info("filter %s passes no more than its max_rate again%s", one.name, ": its topic goes on" * one.pauses)


def _matches(found: Mapping[Near, Nearest]) -> dict[int, tuple[Match, ...]]:
    """Return the targets near each alert, by row. A list that is searched with several radii gives one target."""
    of_rows: dict[int, dict[str, Match]] = {}
    for near, nearest in found.items():
        for i in np.flatnonzero(nearest.row != NO_TARGET).tolist():
            name = near.file.content.name(int(nearest.row[i]))
            of_rows.setdefault(i, {})[near.list] = Match(near.list, name, float(nearest.separation[i]))
    return {i: tuple(of_lists.values()) for i, of_lists in of_rows.items()}


def open_filters(service: ResolvedService, before: Filters | None = None) -> Filters:
    """Return the filters of a configuration.

    `before`: the filters of the configuration that was in use so far. A filter whose name, revision and window are the
    same goes on with its counts, so that a reload neither forgets nor resumes a paused topic.
    """
    filters = []
    for config, (name, expression) in zip(service.config.filters, service.filters, strict=True):
        minutes = config.max_rate_minutes
        rate = before.rate_of(name, expression.revision, minutes) if before else None
        pauses = config.over_rate == "pause"
        filters.append(Filter(name, expression, config.max_rate, pauses, rate or PassRate(minutes)))
    return Filters(filters)
