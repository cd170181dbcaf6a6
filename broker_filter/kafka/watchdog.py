"""Who works, and since when: so that a stage which is stuck ends the process instead of holding the alerts for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from broker_filter.metrics import Metrics

BEAT_S = 0.5
"""Between signs of life: far below any sensible limit for a standstill."""


class Stage:
    """A step of the service, in however many threads: since when each has been at what it is doing now.

    A thread that waits for work, or for room behind it, is not at work: what it waits for is.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name = name
        self._metrics = metrics
        self._since: dict[int, float] = {}
        metrics.expect(stages=[name])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """One piece of work of the calling thread."""
        thread = threading.get_ident()
        self._since[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._since[thread]

    @contextmanager
    def working(self) -> Iterator[None]:
        """One piece of work of the calling thread, its time measured."""
        with self.watched(), self._metrics.time_stage(self.name):
            yield

    def beat(self) -> None:
        """Says that the calling thread is waiting for somebody outside, and not stuck."""
        thread = threading.get_ident()
        if thread in self._since:
            self._since[thread] = time.monotonic()

    def rest(self, seconds: float, until: threading.Event | None = None) -> None:
        """Waits for somebody outside: so many seconds, or until the event is set."""
        end, until = time.monotonic() + seconds, until or threading.Event()
        while (left := end - time.monotonic()) > 0 and not until.wait(min(left, BEAT_S)):
            self.beat()

    def busy_s(self) -> float:
        """How long the slowest thread has been at its present piece of work, in seconds; 0 where none is at work."""
        now = time.monotonic()
        return now - min(self._since.copy().values(), default=now)
