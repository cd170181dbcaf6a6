"""Keeps freed memory in the process instead of returning it to the kernel.

Packets and output records have 100 kB and more. By default, glibc returns such blocks to the kernel when they are
freed, and the next alerts pay for new pages: 30 page faults per LSST alert, a fifth of the CPU time without networks.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3), as in glibc's malloc.h."""
_LARGEST_THRESHOLD = 32 * 2**20
"""The largest block in bytes that glibc can be told to take from its heap."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Make malloc keep all memory that is freed, for the next alerts. Call it before threads start.

    All threads share one heap, because glibc unmaps heaps of other threads when they are empty. The peak memory does
    not grow, but the process keeps it. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    mallopt(_M_ARENA_MAX, 1)
