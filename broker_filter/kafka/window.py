"""How much output may be in flight: as much as the output's cluster has shown to take within a transaction's timeout.

A coordinator aborts a transaction that lasts too long. A transaction that is too large for a slow link would fail at
every attempt, so the window shrinks where transactions are slow and grows again where they are fast, as TCP's does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LARGEST_BYTES = 64 * 2**20
"""More gains no speed, and costs memory."""
FIRST_BYTES = 2 * 2**20
"""Passes in time at 200 kB/s. A fast cluster reaches the largest window within a few transactions."""
SMALLEST_BYTES = 2**16
"""About one alert. The output of one packet passes whatever the window is."""
FAST, SLOW = 0.25, 0.5
"""Shares of the timeout: a transaction that is faster lets the window grow, one that is slower makes it shrink."""
AFTER_SLOW, AFTER_FAILURE = 2, 8
"""By how much the window is divided. Few attempts fail even where the link becomes a hundred times as slow."""
SHARES = 8
"""A transaction may have this part of the window where others have taken all of it. So many commit at a time."""


class Window:
    """The bytes of output that all open transactions hold together. May be used from any thread."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s`: how long a commit may take. `clock`: seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = FIRST_BYTES
        self._in_flight = 0
        self._shrunk = 0.0

    @property
    def bytes(self) -> int:
        """The size of the window now."""
        return self._bytes

    def take(self, size: int) -> bool:
        """Counts `size` more bytes in flight; returns False, and counts nothing, where there is no room for them."""
        with self._lock:
            if self._in_flight + size > self._bytes:
                return False
            self._in_flight += size
            return True

    def overdraw(self, size: int) -> None:
        """Counts `size` more bytes in flight whether or not there is room for them."""
        with self._lock:
            self._in_flight += size

    def give_back(self, size: int) -> None:
        """Says that `size` bytes are no longer in flight."""
        with self._lock:
            self._in_flight -= size

    @property
    def room(self) -> int:
        """The bytes that fit into the window now."""
        return max(0, self._bytes - self._in_flight)

    @property
    def share(self) -> int:
        """The bytes that a transaction may hold although there is no room."""
        return self._bytes // SHARES

    def passed(self, size: int, began: float) -> None:
        """Takes note of a commit of `size` bytes that began at `began` by the clock and has just succeeded."""
        took = self._clock() - began
        with self._lock:
            if took < FAST * self._timeout_s and self._in_flight > self._bytes / 2:  # an empty window says nothing
                self._bytes = min(LARGEST_BYTES, self._bytes + size)
            elif took > SLOW * self._timeout_s:
                self._shrink(AFTER_SLOW, began)

    def failed(self, began: float) -> None:
        """Takes note of a transaction that began at `began` and has just failed: for lack of time, if it was slow."""
        with self._lock:
            if self._clock() - began > SLOW * self._timeout_s:
                self._shrink(AFTER_FAILURE, began)

    def _shrink(self, divisor: int, began: float) -> None:
        if began >= self._shrunk:  # an earlier transaction says nothing of the window as it is now
            self._bytes = max(SMALLEST_BYTES, self._bytes // divisor)
            self._shrunk = self._clock()
