"""Limits the output in flight to what the output's cluster accepts within the timeout of a transaction.

The coordinator aborts a transaction that lasts too long. A transaction that is too large for a slow link would fail at
every attempt. So the window shrinks when transactions are slow and grows when they are fast, like TCP's window.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LARGEST_BYTES = 64 * 2**20
"""A larger window needs more memory and is not faster."""
FIRST_BYTES = 2 * 2**20
"""First size: it is committed in time at 200 kB/s. A fast cluster reaches the largest size in a few transactions."""
SMALLEST_BYTES = 2**16
"""About one alert. The output of one packet is sent even if it is larger than the window."""
FAST, SLOW = 0.25, 0.5
"""Fractions of the timeout: a transaction below FAST lets the window grow, one above SLOW makes it shrink."""
AFTER_SLOW, AFTER_FAILURE = 2, 8
"""Divisors of the window. Only few attempts fail even if the link becomes a hundred times slower."""
SHARES = 8
"""A transaction may hold 1/SHARES of the window even if other transactions fill it. SHARES writers commit in
parallel."""


class Window:
    """Counts the bytes of output in all open transactions. Any thread may use it."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s`: longest allowed time of a commit. `clock`: returns a monotonic time in seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = FIRST_BYTES
        self._in_flight = 0
        self._shrunk = 0.0

    @property
    def bytes(self) -> int:
        """The present size of the window in bytes."""
        return self._bytes

    def take(self, size: int) -> bool:
        """Count `size` more bytes in flight and return True; if there is no room, count nothing and return False."""
        with self._lock:
            if self._in_flight + size > self._bytes:
                return False
            self._in_flight += size
            return True

    def overdraw(self, size: int) -> None:
        """Count `size` more bytes in flight even if there is no room for them."""
        with self._lock:
            self._in_flight += size

    def give_back(self, size: int) -> None:
        """Count `size` bytes as no longer in flight."""
        with self._lock:
            self._in_flight -= size

    @property
    def room(self) -> int:
        """The number of bytes that fit into the window now."""
        return max(0, self._bytes - self._in_flight)

    @property
    def share(self) -> int:
        """The number of bytes that a transaction may hold even if the window has no room."""
        return self._bytes // SHARES

    def passed(self, size: int, began: float) -> None:
        """Adapt the window to a commit of `size` bytes that began at clock time `began` and has just succeeded."""
        took = self._clock() - began
        with self._lock:
            if took < FAST * self._timeout_s and self._in_flight > self._bytes / 2:  # else the commit says little
                self._bytes = min(LARGEST_BYTES, self._bytes + size)
            elif took > SLOW * self._timeout_s:
                self._shrink(AFTER_SLOW, began)

    def failed(self, began: float) -> None:
        """Shrink the window if a transaction that began at clock time `began` has just failed and was slow."""
        with self._lock:
            if self._clock() - began > SLOW * self._timeout_s:
                self._shrink(AFTER_FAILURE, began)

    def _shrink(self, divisor: int, began: float) -> None:
        if began >= self._shrunk:  # an earlier transaction used the window before it shrank
            self._bytes = max(SMALLEST_BYTES, self._bytes // divisor)
            self._shrunk = self._clock()
