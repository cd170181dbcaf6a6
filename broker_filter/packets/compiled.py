"""The compiled parts of decoding, where they were built. Chosen once, when this module is imported, for all of them.

`BROKER_FILTER_PURE_PYTHON=1` in the environment chooses Python. Results are the same to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import deflate

Walk = Callable[..., tuple[int, int, int]]
DecodeStamps = Callable[..., None]

IMPLEMENTATION = "python"
walk: Walk | None = None
"""`walk.walk_python`, compiled."""
decode_stamps: DecodeStamps | None = None
"""`stamps.decode_stamps` for the layouts that surveys publish, compiled. Gzip-ed ones are checked with libdeflate's
checksum, out of the package `deflate`, and left to Python where it is not found there."""

if os.environ.get("BROKER_FILTER_PURE_PYTHON") != "1":
    try:
        from broker_filter.packets import _stamps, _walk  # type: ignore[attr-defined]
    except ImportError:  # installed without a compiler
        pass
    else:
        IMPLEMENTATION, walk, decode_stamps = "c", _walk.walk, _stamps.decode_stamps
        _stamps.use_libdeflate(getattr(deflate, "_deflate", deflate).__file__)
