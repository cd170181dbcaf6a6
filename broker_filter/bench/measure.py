"""Timing that is robust on a noisy machine: competitors take turns, and the median over repetitions is reported."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker_filter.errors import BrokerFilterError

NAIVE, SERVICE, SERVICE_2_THREADS = "naive", "service", "service, 2 threads"
"""Competitors: an alert broker as it is usually written, and this service; on one thread unless stated otherwise."""
INFLATE, PARSE, FLOPS, NO_WORK, RUNTIME = "inflate", "parse", "FLOPs", "no work", "runtime alone"
"""Floors: each does only a part of the necessary work; see `floors`."""
_SCHEDULED = 2
LEAST_S = 0.25
"""Seconds for which shorter work is repeated, to average over the clock's resolution and the scheduler's slices."""


class BenchmarkError(BrokerFilterError, RuntimeError):
    """The figures would be meaningless: a competitor lost or repeated an alert, or there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of one run. CPU time hardly depends on other load of the machine; throughput does."""

    alerts_per_second: float
    cpu_microseconds: float
    """CPU time per alert, of all threads."""
    broker_microseconds: float | None = None
    """CPU time of the Kafka brokers per alert; None if their processes are not accessible."""
    peak_megabytes: float | None = None
    """Peak resident memory; None if the competitor runs in this process."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the range of a figure over the repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a competitor over its runs."""

    alerts_per_second: Spread
    cpu_microseconds: Spread
    broker_microseconds: Spread | None
    peak_megabytes: Spread | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Figures:
        """Return the figures of at least one run."""
        return cls(
            Spread.of([run.alerts_per_second for run in runs]),
            Spread.of([run.cpu_microseconds for run in runs]),
            _spread_of_known(run.broker_microseconds for run in runs),
            _spread_of_known(run.peak_megabytes for run in runs),
        )

    @property
    def wall_microseconds(self) -> Spread:
        """Wall time per alert, which is the relevant time if a GPU does the work."""
        rate = self.alerts_per_second
        return Spread(1e6 / rate.median, 1e6 / rate.highest, 1e6 / rate.lowest)


Contest = Mapping[str, Figures]
"""The figures of each competitor, by name, on the same alerts."""


def compete(competitors: Mapping[str, Callable[[], Run]], repetitions: int) -> Contest:
    """Measure the competitors in turns, so that a slow moment of the machine affects all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in competitors}
    gc.freeze()  # as in `run` and `score`; the competitors' inputs must not slow their garbage collection down
    for _ in range(repetitions):
        for name, competitor in competitors.items():
            runs[name].append(competitor())
    return {name: Figures.of(own) for name, own in runs.items()}


class Stopwatch:
    """Wall time and CPU time of this process since the stopwatch was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._wall

    def run(self, alerts: int) -> Run:
        """Return the run of `alerts` alerts in the time so far."""
        cpu = time.process_time() - self._cpu
        return Run(alerts / self.seconds, cpu / alerts * 1e6)


def timed(work: Callable[[], object], alerts: int) -> Run:
    """Measure `work`, which processes `alerts` alerts in this process; repeats it for at least LEAST_S."""
    watch, done = Stopwatch(), 0
    while not done or watch.seconds < LEAST_S:
        work()
        done += alerts
    return watch.run(done)


def cpu_seconds(processes: Iterable[int]) -> float:
    """Return the CPU time in seconds that all threads of the processes have used, summed (Linux only)."""
    # This is clock_getcpuclockid(3), which Python lacks: the inverted process id, above three bits that choose the
    # clock. The ticks of /proc, 10 ms, are too coarse for a short run.
    return sum(time.clock_gettime(~process << 3 | _SCHEDULED) for process in processes)


def memory_megabytes(process: int, *, peak: bool = False) -> float:
    """Return the resident memory of a process in megabytes, now or at its peak (Linux only)."""
    key = "VmHWM:" if peak else "VmRSS:"
    with Path(f"/proc/{process}/status").open() as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def _spread_of_known(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
