"""Draws a cutout, and defines the colours that all pictures share."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display

import numpy as np
from astropy.stats import mad_std
from astropy.visualization import AsinhStretch, ImageNormalize
from matplotlib.axes import Axes
from numpy.typing import NDArray

BACKGROUND, PANEL, TEXT, FAINT = "#0d1117", "#161b22", "#e6edf3", "#7d8590"
NOTHING = "#30363d"
"""The colour of NaN pixels, and of axes."""


def draw_cutout(axes: Axes, pixels: NDArray[np.float32]) -> None:
    """Draw the pixels of a cutout, float32[H, W], with the first row at the bottom, as in FITS."""
    axes.imshow(pixels, origin="lower", cmap="magma", norm=stretch(pixels), interpolation="nearest")
    axes.set_facecolor(NOTHING)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def printable(text: str) -> str:
    """Return text with "?" for non-printable characters: packet text is untrusted. Draw it with `parse_math=False`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def stretch(pixels: NDArray[np.float32]) -> ImageNormalize:
    """Return an asinh stretch in which faint sources are visible.

    It goes from one sigma below the median to the 99.8th percentile.
    """
    finite = pixels[np.isfinite(pixels)]
    if not len(finite):
        return ImageNormalize(vmin=0, vmax=1)
    sky = float(np.median(finite))
    noise = float(mad_std(finite)) or 1.0
    brightest = max(float(np.percentile(finite, 99.8)), sky + 10 * noise)
    return ImageNormalize(vmin=sky - noise, vmax=brightest, stretch=AsinhStretch(0.2))
