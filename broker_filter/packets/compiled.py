"""The compiled parts of decoding, where they were built. Chosen once, when this module is imported, for all of them.

`BROKER_FILTER_PURE_PYTHON=1` in the environment chooses Python. Results are the same to the bit. With
`BROKER_FILTER_REQUIRE_COMPILED=1` in the environment, importing this module without them raises CompiledPartsMissing;
setup.py honours the same variable, and then does not build without a C compiler.
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


class CompiledPartsMissing(Exception):  # noqa: N818 -- it is a state of the installation
    """The environment requires the compiled parts, and packets would be decoded in Python."""

    exit_status = 2


why_python: str | None = None
"""Why packets are decoded in Python, and what to do about it; None where the compiled parts decode them."""

if os.environ.get("BROKER_FILTER_PURE_PYTHON") == "1":
    why_python = "BROKER_FILTER_PURE_PYTHON=1 is set in the environment; unset it"
else:
    try:
        from broker_filter.packets import _stamps, _walk  # type: ignore[attr-defined]
    except ImportError as error:
        why_python = (
            f"the compiled parts are not installed ({error}); install broker-filter again where there are a C compiler "
            "and Python's headers (Debian: gcc, libc6-dev, python3-dev)"
        )
    else:
        IMPLEMENTATION, walk, decode_stamps = "c", _walk.walk, _stamps.decode_stamps
        _stamps.use_libdeflate(getattr(deflate, "_deflate", deflate).__file__)

if why_python:
    why_python = f"packets are decoded in Python, at less than half the speed of compiled code: {why_python}"
    if os.environ.get("BROKER_FILTER_REQUIRE_COMPILED") == "1":
        raise CompiledPartsMissing(f"BROKER_FILTER_REQUIRE_COMPILED=1 is set, but {why_python}")
