"""Draws the cutouts of an alert as one small PNG, for pages that hold the pictures of many alerts."""

from __future__ import annotations

import base64
import io

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from broker_filter.pictures.cutouts import NOTHING, stretch

LEVELS = 32
"""Number of colours of a cutout. With 256 a PNG is twice as large, and looks the same."""
GAP = 2
"""Transparent pixels between two cutouts."""
EMPTY, TRANSPARENT = LEVELS, LEVELS + 1
"""Colours of pixels without a value, and of the gap."""


def draw_strip(cutouts: NDArray[np.float32], cutout_box: NDArray[np.int16]) -> tuple[str, tuple[int, int, int, int]]:
    """Return the cutouts of an alert side by side, as a PNG in base64, and the rectangle of the slots that it shows.

    `cutouts`: float32[3, S, S]; `cutout_box`: int16[3, 4], the rectangle (y0, x0, height, width) of the pixels of each
    cutout. The rectangle that is shown, in the same form, is the smallest that holds the pixels of all cutouts. The
    first row is at the bottom, as in FITS. Pixels without a value have the colour NOTHING.
    """
    start = cutout_box[:, :2].astype(int)
    end = start + cutout_box[:, 2:]
    (y0, x0), (y1, x1) = start.min(axis=0).tolist(), end.max(axis=0).tolist()
    gap = np.full((y1 - y0, GAP), TRANSPARENT, np.uint8)
    panels = []
    for pixels, (top, left), (bottom, right) in zip(cutouts, start.tolist(), end.tolist(), strict=True):
        panel = np.full(pixels.shape, EMPTY, np.uint8)
        panel[top:bottom, left:right] = _levels(pixels[top:bottom, left:right])
        panels += [panel[y0:y1, x0:x1], gap]
    strip = np.concatenate(panels[:-1], axis=1)[::-1]
    image = Image.fromarray(strip)  # of mode L; a palette makes it mode P
    image.putpalette(_PALETTE)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True, transparency=TRANSPARENT, bits=8)
    return base64.b64encode(data.getvalue()).decode(), (y0, x0, y1 - y0, x1 - x0)


def _levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the colour of each pixel, 0 to LEVELS - 1, or EMPTY."""
    bright = np.ma.filled(stretch(pixels)(np.ma.masked_invalid(pixels), clip=True), 0.0)
    return np.where(np.isfinite(pixels), np.rint(bright * (LEVELS - 1)), EMPTY).astype(np.uint8)


def _palette() -> list[int]:
    colours = mpl.colormaps["magma"](np.linspace(0, 1, LEVELS), bytes=True)[:, :3].ravel().tolist()
    return [*colours, *bytes.fromhex(NOTHING[1:]), 0, 0, 0]


_PALETTE = _palette()
