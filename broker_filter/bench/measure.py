"""Timing that survives a noisy machine: competitors take turns, and what counts is the median and its spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAIVE, SERVICE, SERVICE_2_THREADS = "naive", "service", "service, 2 threads"
"""Competitors: an alert broker as it is usually written, and ours; on one thread where nothing else is said."""
INFLATE, FLOPS, NO_WORK, RUNTIME = "inflate", "FLOPs", "no work", "runtime alone"
"""Floors, which do a part of the work and nothing else; see `floors`."""
_SCHEDULED = 2
LEAST_S = 0.25
"""Shorter work is done over and over: clocks and the scheduler's slices would show."""


class BenchmarkError(RuntimeError):
    """What would make figures meaningless: a competitor that lost or repeated an alert, or nothing to measure."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run was measured at. CPU time hardly depends on what else the machine does; throughput does."""

    alerts_per_second: float
    cpu_microseconds: float
    """An alert, of all threads."""
    broker_microseconds: float | None = None
    """CPU time of the Kafka brokers, an alert, where they are ours to look at."""
    peak_megabytes: float | None = None
    """The most memory that was resident, where the competitor is a process of its own."""


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
    """A competitor's runs."""

    alerts_per_second: Spread
    cpu_microseconds: Spread
    broker_microseconds: Spread | None
    peak_megabytes: Spread | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Figures:
        """Of at least one run."""
        return cls(
            Spread.of([run.alerts_per_second for run in runs]),
            Spread.of([run.cpu_microseconds for run in runs]),
            _spread_of_known(run.broker_microseconds for run in runs),
            _spread_of_known(run.peak_megabytes for run in runs),
        )

    @property
    def wall_microseconds(self) -> Spread:
        """An alert: what counts where a GPU does the work."""
        rate = self.alerts_per_second
        return Spread(1e6 / rate.median, 1e6 / rate.highest, 1e6 / rate.lowest)


Contest = Mapping[str, Figures]
"""The same alerts by competitors of these names."""


def compete(competitors: Mapping[str, Callable[[], Run]], repetitions: int) -> Contest:
    """Measures all in turns: a slow moment of the machine falls on all."""
    runs: dict[str, list[Run]] = {name: [] for name in competitors}
    gc.freeze()  # as in `run` and `score`; what was made ready for the competitors, too, is none of their work
    for _ in range(repetitions):
        for name, competitor in competitors.items():
            runs[name].append(competitor())
    return {name: Figures.of(own) for name, own in runs.items()}


class Stopwatch:
    """Wall and CPU time of this process from here on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Of wall time, so far."""
        return time.perf_counter() - self._wall

    def run(self, alerts: int) -> Run:
        """So many alerts in the time so far."""
        cpu = time.process_time() - self._cpu
        return Run(alerts / self.seconds, cpu / alerts * 1e6)


def timed(work: Callable[[], object], alerts: int) -> Run:
    """Measures work of this process on so many alerts, done as often as it takes to be measured."""
    watch, done = Stopwatch(), 0
    while not done or watch.seconds < LEAST_S:
        work()
        done += alerts
    return watch.run(done)


def cpu_seconds(processes: Iterable[int]) -> float:
    """CPU time of all threads of some processes so far (Linux)."""
    # clock_getcpuclockid(3), which Python does not offer: the inverted id above three bits that choose the clock.
    # /proc has ticks of 10 ms, in which a short run is lost.
    return sum(time.clock_gettime(~process << 3 | _SCHEDULED) for process in processes)


def memory_megabytes(process: int, *, peak: bool = False) -> float:
    """Resident memory of a process, now or at its peak (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    with Path(f"/proc/{process}/status").open() as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def _spread_of_known(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
