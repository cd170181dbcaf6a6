"""Timing that survives a noisy machine: contestants take turns, and what counts is the median and its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.median + other.median, self.lowest + other.lowest, self.highest + other.highest)


Contest = dict[str, Spread]
"""A figure of each contestant: `naive` and `service`."""


def interleave(contestants: Mapping[str, Callable[[], float]], repetitions: int) -> Contest:
    """Each contestant's figure, measured in turns: a slow moment of the machine falls on all of them."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, measure in contestants.items():
            figures[name].append(measure())
    return {name: Spread.of(values) for name, values in figures.items()}


def cpu_microseconds(work: Callable[[], object], alerts: int) -> float:
    """CPU time of all this process's threads in `work`, in microseconds an alert."""
    start = time.process_time()
    work()
    return (time.process_time() - start) / alerts * 1e6


def alerts_per_second(work: Callable[[], object], alerts: int) -> float:
    """Throughput of `work` by the clock on the wall."""
    start = time.perf_counter()
    work()
    return alerts / (time.perf_counter() - start)
