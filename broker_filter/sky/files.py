"""The regions and lists of targets that the filters of one configuration read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from broker_filter.sky.region import Region, read_region
from broker_filter.sky.tracked import TrackedFile
from broker_filter.sky.watchlist import Watchlist, read_watchlist

LOOK_INTERVAL_S = 1.0
"""The least time between two looks at the files on disk."""


class SkyFiles:
    """Files by name, each read once and again when it changes. Not thread-safe."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`folder`: relative names start there. `clock`: returns seconds."""
        self._folder = folder
        self._clock = clock
        self._looked = clock()
        self._regions: dict[tuple[str, float | None], TrackedFile[Region]] = {}
        self._watchlists: dict[str, TrackedFile[Watchlist]] = {}

    def region(self, name: str, level: float | None) -> TrackedFile[Region]:
        """Return the file of a region; see `read_region` for `level`. Raises SkyFileError."""
        if (name, level) not in self._regions:
            self._regions[name, level] = TrackedFile(self._folder / name, partial(read_region, level=level))
        return self._regions[name, level]

    def watchlist(self, name: str) -> TrackedFile[Watchlist]:
        """Return the file of a list of targets. Raises SkyFileError."""
        if name not in self._watchlists:
            self._watchlists[name] = TrackedFile(self._folder / name, read_watchlist)
        return self._watchlists[name]

    def __iter__(self) -> Iterator[TrackedFile[Any]]:
        """Return an iterator over all files that were read."""
        yield from self._regions.values()
        yield from self._watchlists.values()

    @property
    def failed(self) -> dict[str, bool]:
        """Whether each file on disk, by path, could not be taken over, so that earlier content of it is in use."""
        states: dict[str, bool] = {}
        for file in self:  # a map may be read at several levels
            states[str(file.path)] = states.get(str(file.path), False) or file.error is not None
        return states

    def look(self) -> bool:
        """Read changed files again, at most once in LOOK_INTERVAL_S. Call it between batches, never within one.

        Returns whether the files were looked at.
        """
        if self._clock() - self._looked < LOOK_INTERVAL_S:
            return False
        for file in self:
            file.look()
        self._looked = self._clock()
        return True
