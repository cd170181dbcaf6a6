"""Simulates artefacts in a science image, caused by the detector or by bright stars.

Each function returns an image float32[grid, grid] in counts, whose artefact crosses the central pixel. It is added to
the science image after the convolution with the point spread function (PSF), so it does not have the shape of the PSF.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker_filter.simulate.images import Conditions, Image


def cosmic_ray(conditions: Conditions, rng: np.random.Generator) -> Image:
    """Simulate the straight, sharp track of a charged particle: short for a steep impact, long for a grazing impact."""
    image, middle = _blank(conditions)
    length = float(np.clip(rng.exponential(3.0), 0.5, 15.0))
    angle = float(rng.uniform(0, np.pi))
    charge = conditions.noise * float(10 ** rng.uniform(1.2, 2.4))  # per pixel of track
    along = np.arange(-length / 2, length / 2, 0.25)
    rows = np.rint(middle + along * np.sin(angle)).astype(int)
    columns = np.rint(middle + along * np.cos(angle)).astype(int)
    np.add.at(image, (rows, columns), 0.25 * charge * rng.gamma(4.0, 0.25, len(along)))  # energy loss fluctuates
    return image


def bad_pixels(conditions: Conditions, rng: np.random.Generator) -> Image:
    """Simulate a bad column, whose values are too high or too low from some row on, or a few hot pixels."""
    image, middle = _blank(conditions)
    if rng.random() < 0.6:
        level = conditions.noise * float(10 ** rng.uniform(0.6, 1.6)) * rng.choice((1.0, -1.0), p=(0.8, 0.2))
        image[max(0, middle - int(rng.integers(3, middle))) :, middle] = level
    else:
        size = int(rng.integers(1, 3))
        image[middle : middle + size, middle : middle + size] = conditions.noise * 10 ** rng.uniform(
            1.2, 2.2, (size, size)
        )
    return image


def diffraction_spike(conditions: Conditions, rng: np.random.Generator) -> Image:
    """Simulate a diffraction spike of a very bright star outside the stamp.

    The template has no spike at this position.
    """
    image, middle = _blank(conditions)
    up, right = np.mgrid[: len(image), : len(image)] - middle
    angle = float(rng.choice((0.25, 0.75)) * np.pi + rng.normal(0, 0.03))  # the vanes are fixed to the camera
    along, across = right * np.cos(angle) + up * np.sin(angle), up * np.cos(angle) - right * np.sin(angle)
    width = float(rng.uniform(0.8, 1.6))
    falling = np.clip(1 + along / (1.2 * len(image)), 0.1, None)
    return _as_image(conditions.noise * 10 ** rng.uniform(0.6, 1.5) * falling * np.exp(-0.5 * (across / width) ** 2))


def satellite_trail(conditions: Conditions, rng: np.random.Generator) -> Image:
    """Simulate the trail of a satellite: a straight line across the stamp, out of focus because it is near.

    At a distance of some hundred kilometres the pupil of LSST has an angular size of 1 to 3 arcsec (Tyson et al. 2020,
    AJ 160, 226), by which the trail is wider than the PSF.
    """
    image, middle = _blank(conditions)
    up, right = np.mgrid[: len(image), : len(image)] - middle
    angle = float(rng.uniform(0, np.pi))
    across = up * np.cos(angle) - right * np.sin(angle)
    pupil = float(rng.uniform(1.0, 3.0)) / conditions.instrument.pixel_scale / 4  # sigma of a ring of this diameter
    width = float(np.hypot(conditions.fwhm / 2.355, pupil))
    return _as_image(conditions.noise * 10 ** rng.uniform(0.0, 1.3) * np.exp(-0.5 * (across / width) ** 2))


def ghost(conditions: Conditions, rng: np.random.Generator) -> Image:
    """Simulate a part of the reflection of a bright star: a ring, which is the image of the telescope's pupil."""
    image, middle = _blank(conditions)
    up, right = np.mgrid[: len(image), : len(image)] - middle
    radius, angle = float(rng.uniform(6, 18)), float(rng.uniform(0, 2 * np.pi))
    distance = np.hypot(right - radius * np.cos(angle), up - radius * np.sin(angle))
    ring = np.exp(-0.5 * ((distance - radius) / rng.uniform(1.2, 2.5)) ** 2) + 0.5 * (distance < radius)
    return _as_image(conditions.noise * 10 ** rng.uniform(0.4, 1.2) * ring)


def edge_glow(conditions: Conditions, rng: np.random.Generator, distance: int, axis: int, towards: int) -> Image:
    """Return the image of a glow at the edge of the detector, `distance` pixels from the central pixel.

    `axis`: 0 for an edge in y, 1 for x. `towards`: the direction of the edge along that axis, -1 or +1.
    """
    image, middle = _blank(conditions)
    from_edge = distance - towards * (np.mgrid[: len(image), : len(image)][axis] - middle)
    level = conditions.noise * 10 ** rng.uniform(1.0, 2.0)
    uneven = np.repeat(rng.gamma(3.0, 1 / 3, -(-len(image) // 4)), 4)[: len(image)]
    return _as_image(
        level * np.exp(-np.clip(from_edge, 0, None) / rng.uniform(1.0, 3.0)) * np.expand_dims(uneven, axis)
    )


def _blank(conditions: Conditions) -> tuple[Image, int]:
    grid = conditions.instrument.grid
    return np.zeros((grid, grid), np.float32), grid // 2


def _as_image(counts: NDArray[np.float64]) -> Image:
    return counts.astype(np.float32)
