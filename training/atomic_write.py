"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Writes bytes, or lets `content` write to the path that it is given; then moves the file to `path`."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    if isinstance(content, bytes):
        unfinished.write_bytes(content)
    else:
        content(unfinished)
    unfinished.replace(path)
