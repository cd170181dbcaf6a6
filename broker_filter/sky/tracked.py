"""A file that is read at the start, and again when it changes on disk. A broken new file keeps the old content."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.file_stamp import stamp

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 256 << 20
"""The largest file that is read: a list of a million targets has about 50 MB, a map of a merger some MB."""

SETTLED_S = 2.0
"""A file that was not written for this long is taken as complete."""

Content = TypeVar("Content")


class SkyFileError(BrokerFilterError, ValueError):
    """A file with a region or with targets cannot be used. The message names the file and says what is wrong."""

    exit_status = USAGE


class TrackedFile(Generic[Content]):
    """A file and its content. The content is immutable; `look` replaces it by another. Not thread-safe."""

    def __init__(self, path: Path, read: Callable[[Path, bytes], Content]) -> None:
        """Read the file. `read`: makes the content from the path and the bytes. Raises SkyFileError."""
        self.path = path
        self._read = read
        self._seen = self._current = stamp(path)
        self.content, self.sha256 = self._load()
        self.error: SkyFileError | None = None
        """Why the file on disk was not taken over; None if `content` is what the file holds."""

    def look(self) -> None:
        """Read the file again if it has changed.

        So that no half-written file is taken over, a file that was written less than SETTLED_S ago is read only if two
        looks in succession find it the same. If the file cannot be used, the content stays, and the error is logged
        once.
        """
        before, self._seen = self._seen, stamp(self.path)
        if self._seen == self._current:
            return
        settled = self._seen is not None and time.time() - self._seen.mtime_ns / 1e9 > SETTLED_S
        if self._seen != before and not settled:
            return
        self._current = self._seen
        try:
            self.content, self.sha256 = self._load()
        except SkyFileError as error:
            self.error = error
            log.error("%s; the filters keep its earlier content", error)
        else:
            self.error = None
            log.info("%s has changed and was read again: %s", self.path, self.content)

    def _load(self) -> tuple[Content, str]:
        data = _read_bounded(self.path)
        return self._read(self.path, data), hashlib.sha256(data).hexdigest()


def _read_bounded(path: Path) -> bytes:
    """Return the bytes of a regular file of at most MAX_FILE_BYTES. Raises SkyFileError."""
    try:
        if not path.is_file():
            raise SkyFileError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SkyFileError):
            raise
        raise SkyFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SkyFileError(
            f"{path}: more than {MAX_FILE_BYTES >> 20} MiB; keep only the rows and columns that you need"
        )
    return data
