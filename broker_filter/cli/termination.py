"""The orderly end of a command after SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALLED = 128
"""The exit status after a signal is this number plus the number of the signal."""
REPEAT_S = 1.0


class Terminated(SystemExit):
    """The exception that ends a command after SIGTERM. Its code is the exit status, 143."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise Terminated in the main thread, so that a command closes its files and ends its child processes.

    Compiled code and callbacks of the garbage collector can swallow an exception that is raised in them. So the
    exception is raised again every second, until one is on its way out. A second SIGTERM does not interrupt the end.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        error = sys.exception()
        while error is not None and not isinstance(error, Terminated):
            error = error.__context__
        if error is None:
            signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, REPEAT_S, REPEAT_S)
            raise Terminated(SIGNALLED + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is end:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
