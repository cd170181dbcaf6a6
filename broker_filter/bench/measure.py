"""Timing that survives a noisy machine: contestants take turns, and what counts is the median and its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """What one run was measured at. CPU time hardly depends on what else the machine does; throughput does."""

    alerts_per_second: float
    cpu_microseconds: float
    """An alert, of all threads."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Figures:
    """A contestant's runs."""

    alerts_per_second: Spread
    cpu_microseconds: Spread

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Figures:
        """Of at least one run."""
        return cls(
            Spread.of([run.alerts_per_second for run in runs]), Spread.of([run.cpu_microseconds for run in runs])
        )


@dataclass(frozen=True, slots=True)
class Contest:
    """The same work by both."""

    naive: Figures
    service: Figures

    @property
    def throughput_ratio(self) -> float:
        """How many times more alerts the service does in a second."""
        return self.service.alerts_per_second.median / self.naive.alerts_per_second.median

    @property
    def cpu_ratio(self) -> float:
        """How many times less CPU time the service takes."""
        return self.naive.cpu_microseconds.median / self.service.cpu_microseconds.median


def compete(naive: Callable[[], Run], service: Callable[[], Run], repetitions: int) -> Contest:
    """Measures both in turns: a slow moment of the machine falls on both."""
    runs = [(naive(), service()) for _ in range(repetitions)]
    return Contest(Figures.of([first for first, _ in runs]), Figures.of([second for _, second in runs]))


def timed(work: Callable[[], object], alerts: int) -> Run:
    """Measures work of this process on so many alerts."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(alerts / wall, cpu / alerts * 1e6)
