"""What a person sees while a command works: progress, log lines. All of it goes to stderr; stdout is for results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOG_INTERVAL_S = 10.0
"""Between progress lines where there is no terminal: often enough to see life, rarely enough to keep a log short."""

log = logging.getLogger(__name__)


def set_up_logging(*, verbose: bool = False) -> None:
    """Sends the log to stderr: with rich on a terminal (above a progress bar), plain lines with UTC times elsewhere."""
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
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "alerts") -> Iterator[Callable[[int], None]]:
    """Shows how far work has come: `with progress("Scoring", n) as advance: ... advance(64)`.

    A bar on a terminal, a log line every ten seconds elsewhere. `total`: how many units there will be, None where
    nobody knows.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit) as advance:
            yield advance
    else:
        yield _lines(description, total, unit)


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=_terminal()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(description: str, total: int | None, unit: str) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_S:
            last = now
            of = f" of {total:,}" if total is not None else ""
            log.info("%s: %s%s %s, %.0f/s", description, f"{done:,}", of, unit, done / (now - started))

    return advance


@cache
def _terminal() -> Console:
    """The one console on stderr, so that log lines and a progress bar do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def printable(text: str) -> str:
    """`text` without what would command a terminal: packets are anybody's."""
    return "".join(character if character.isprintable() else "?" for character in text)
