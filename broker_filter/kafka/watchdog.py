"""Records since when each stage has been working, so that the service can end the process if a stage is stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from broker_filter.metrics import Metrics

BEAT_S = 0.5
"""Time between two beats of a waiting thread: far below any sensible `stall_timeout_s`."""


class Stage:
    """A step of the service, run by one or more threads. It records when each thread began its present piece of work.

    A thread that waits for input, or for room in the next queue, is not working: another stage makes it wait.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name = name
        self._metrics = metrics
        self._since: dict[int, float] = {}
        metrics.expect(stages=[name])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Mark the block as one piece of work of the calling thread."""
        thread = threading.get_ident()
        self._since[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._since[thread]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark the block as `watched` does, and observe its time in the metric of the stage."""
        with self.watched(), self._metrics.time_stage(self.name):
            yield

    def beat(self) -> None:
        """Restart the time of the calling thread, because it waits for an external system and is not stuck."""
        thread = threading.get_ident()
        if thread in self._since:
            self._since[thread] = time.monotonic()

    def rest(self, seconds: float, until: threading.Event | None = None) -> None:
        """Wait for some seconds, or until the event `until` is set, without counting as stuck."""
        end, until = time.monotonic() + seconds, until or threading.Event()
        while (left := end - time.monotonic()) > 0 and not until.wait(min(left, BEAT_S)):
            self.beat()

    def busy_s(self) -> float:
        """Return for how many seconds the slowest thread has been at its present piece of work; 0 if none works."""
        now = time.monotonic()
        return now - min(self._since.copy().values(), default=now)
