"""Chooses between the compiled (C) and the Python implementation of decoding, once, when this module is imported.

The C extensions are used if they are installed; both implementations give bit-identical results. Environment variables:
`BROKER_FILTER_PURE_PYTHON=1` chooses Python. With `BROKER_FILTER_REQUIRE_COMPILED=1`, importing this module raises
CompiledPartsMissing if the extensions are not used; setup.py reads the same variable and then fails to build without a
C compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import deflate

from broker_filter.errors import USAGE, BrokerFilterError

Walk = Callable[..., tuple[int, int, int]]
DecodeStamps = Callable[..., None]

IMPLEMENTATION = "python"
"""The implementation in use: "c" or "python"."""
walk: Walk | None = None
"""The compiled form of `walk.walk_python`; None if Python is used."""
decode_stamps: DecodeStamps | None = None
"""The compiled form of `stamps.decode_stamps` for the FITS layouts that surveys publish; None if Python is used.

It verifies gzip-compressed stamps with the CRC-32 function of libdeflate, which the package `deflate` contains. If that
function is not found, it leaves gzip-compressed stamps to Python."""


class CompiledPartsMissing(BrokerFilterError):  # noqa: N818 -- it is a state of the installation
    """BROKER_FILTER_REQUIRE_COMPILED=1 is set, but packets would be decoded in Python."""

    exit_status = USAGE


why_python: str | None = None
"""The reason why packets are decoded in Python, and how to change it; None if the compiled code decodes them."""

if os.environ.get("BROKER_FILTER_PURE_PYTHON") == "1":
    why_python = "BROKER_FILTER_PURE_PYTHON=1 is set in the environment; unset it"
else:
    try:
        from broker_filter.packets import _stamps, _walk  # type: ignore[attr-defined]
    except ImportError as error:
        why_python = (
            f"the compiled parts are not installed ({error}); install a C compiler and the Python headers (Debian: "
            "gcc, libc6-dev, python3-dev), then install broker-filter again"
        )
    else:
        IMPLEMENTATION, walk, decode_stamps = "c", _walk.walk, _stamps.decode_stamps
        _stamps.use_libdeflate(getattr(deflate, "_deflate", deflate).__file__)

if why_python:
    why_python = f"packets are decoded in Python, at less than half the speed of the compiled code: {why_python}"
    if os.environ.get("BROKER_FILTER_REQUIRE_COMPILED") == "1":
        raise CompiledPartsMissing(f"BROKER_FILTER_REQUIRE_COMPILED=1 is set, but {why_python}")
