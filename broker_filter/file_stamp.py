"""What changes of a file when it is written or replaced, to see without reading it whether the file has changed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """The state of a file."""

    mtime_ns: int
    """Time of the last modification in Unix nanoseconds."""
    size: int
    """Size in bytes."""
    inode: int


def stamp(path: Path) -> Stamp | None:
    """Return the stamp of the file that a path or symbolic link leads to; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None
    return Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
