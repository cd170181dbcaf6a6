"""Progress and log lines of a command, written to stderr; stdout is for results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LOG_INTERVAL_S = 10.0
"""Seconds between progress lines if stderr is not a terminal, so that a log stays short."""

log = logging.getLogger(__name__)


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the log to stderr: formatted with rich on a terminal, as plain lines with UTC times elsewhere.

    `verbose`: debug messages too. `quiet`: warnings and errors only.
    """
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=_terminal(), show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)


@contextmanager
def progress(
    description: str, total: int | None = None, unit: str = "alerts", share: Callable[[], float | None] | None = None
) -> Iterator[Callable[[int], None]]:
    """Show the progress and the remaining time of work.

    It shows a bar on a terminal, a log line every ten seconds elsewhere, and nothing if the log is quiet. Yields a
    function to call with the number of units that were done since the last call. `total`: the number of units, or None
    if it is unknown. In that case `share` returns the fraction of the work that is done, from 0 to 1, or None.
    """
    if not log.isEnabledFor(logging.INFO):
        yield lambda _: None
        return
    done = 0

    def share_done() -> float | None:
        return done / total if total else share() if share else None

    with _bar(description, unit) if sys.stderr.isatty() else _lines(description, unit) as show:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            show(done, total, share_done)

        yield advance


_Show = Callable[[int, int | None, Callable[[], float | None]], None]
"""Shows progress. Arguments: units done, total units or None, and a function that returns the fraction done or None."""


@contextmanager
def _bar(description: str, unit: str) -> Iterator[_Show]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=_terminal()) as bar:
        task = bar.add_task(description, total=None, count=f"0 {unit}")

        def show(done: int, total: int | None, share: Callable[[], float | None]) -> None:
            known = share()
            count = f"{_count(done, total)} {unit}"
            bar.update(task, completed=known or 0.0, total=None if known is None else 1.0, count=count)

        yield show


@contextmanager
def _lines(description: str, unit: str) -> Iterator[_Show]:
    started = last = time.monotonic()

    def show(done: int, total: int | None, share: Callable[[], float | None]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_INTERVAL_S:
            return
        last = now
        known = share()
        percent = f" ({known:.0%})" if known is not None and total is None else ""
        left = f", {timedelta(seconds=round((now - started) * (1 - known) / known))} left" if known else ""
        speed = done / (now - started)
        log.info("%s: %s %s%s, %.0f/s%s", description, _count(done, total), unit, percent, speed, left)

    yield show


def _count(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"


def stdout_console(**options: Any) -> Console:
    """Return a rich console for results. Like `print`, it raises BrokenPipeError if the reader has closed stdout."""
    from rich.console import Console

    class ResultConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return ResultConsole(**options)


@cache
def _terminal() -> Console:
    """Return the console on stderr that log lines and the progress bar share, so that neither overwrites the other."""
    from rich.console import Console

    return Console(stderr=True)


def printable(text: str) -> str:
    """Return text with `?` for non-printable characters: packet text is untrusted, and could control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
