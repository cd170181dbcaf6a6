"""Atomic writes: a file is complete or absent, even if the process is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write `path` atomically: `content` is bytes, or a function that writes to the temporary path that it is given."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    if isinstance(content, bytes):
        unfinished.write_bytes(content)
    else:
        content(unfinished)
    unfinished.replace(path)
