"""The compiled parts of decoding, where they were built. Chosen once, when this module is imported, for all of them.

`BROKER_FILTER_PURE_PYTHON=1` in the environment chooses Python. Results are the same to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable

Walk = Callable[..., tuple[int, int, int]]
PlaceImage = Callable[..., tuple[int, int, int, int] | None]

IMPLEMENTATION = "python"
walk: Walk | None = None
"""`walk.walk_python`, compiled."""
place_image: PlaceImage | None = None
"""`stamps.place_image` for the plain images that surveys publish, compiled; None where it must look itself."""

if os.environ.get("BROKER_FILTER_PURE_PYTHON") != "1":
    try:
        from broker_filter.packets import _stamps, _walk  # type: ignore[attr-defined]
    except ImportError:  # installed without a compiler
        pass
    else:
        IMPLEMENTATION, walk, place_image = "c", _walk.walk, _stamps.place_image
