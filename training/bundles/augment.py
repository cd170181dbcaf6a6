"""Augmentation: makes new images from real alerts, for a teacher to label. It may change the correct label of an image.

It works on the raw cutouts of one alert at a time, before normalisation: float32[3, S, S] in the order science,
template, difference.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Cutouts = NDArray[np.float32]

MIX = 0.5
"""Fraction of images that combine two alerts, or an image and its own shifted copy."""
SHIFT = 0.3
"""Fraction of images that are shifted by up to MAX_SHIFT pixels; detections are centred to about one pixel."""
MAX_SHIFT = 2
LEAST_SHIFT = 1
"""Largest shift, in pixels, of an image that keeps its label."""
MAX_HOST_SHIFT = 3
NOISE = 0.3
"""Fraction of images with added noise, of up to twice the standard deviation of the difference image."""
MAD_TO_SIGMA = 1.4826


def augment(cutouts: Cutouts, other: Cutouts, rng: Generator) -> Cutouts:
    """Return an image float32[3, S, S] made from an alert's cutouts and, for some images, those of another alert."""
    image = _orient(cutouts, rng)
    if rng.random() < MIX:
        image = _mix(image, _orient(other, rng), rng)
    if rng.random() < SHIFT:
        image = _shift(image, MAX_SHIFT, rng)
    if rng.random() < NOISE:
        image = _add_noise(image, rng)
    return image


def move(cutouts: Cutouts, rng: Generator) -> Cutouts:
    """Return an alert's cutouts float32[3, S, S] in a random orientation, shifted by at most LEAST_SHIFT pixels.

    The correct label stays the same.
    """
    return _shift(_orient(cutouts, rng), LEAST_SHIFT, rng)


def _orient(cutouts: Cutouts, rng: Generator) -> Cutouts:
    """Return the cutouts [3, S, S] after a random symmetry of the square, the same for all three."""
    flipped: Cutouts = cutouts[..., ::-1] if rng.random() < 0.5 else cutouts
    return np.rot90(flipped, int(rng.integers(4)), axes=(-2, -1))


def _shift(cutouts: Cutouts, most: int, rng: Generator) -> Cutouts:
    return np.roll(cutouts, rng.integers(-most, most + 1, 2), axis=(-2, -1))


def _mix(cutouts: Cutouts, other: Cutouts, rng: Generator) -> Cutouts:
    """Return cutouts [3, S, S] that combine those of two alerts, or simulate a bad subtraction.

    The scaled difference of `cutouts` replaces the difference of `other`, or is added to it, on the template of
    `other`. In one case of five, a part of the change of the science image under a shift is added to `cutouts` instead.
    """
    kind = rng.random()
    if kind < 0.2:
        science, template, difference = cutouts
        residual = (_shift(science, MAX_SHIFT, rng) - science) * np.float32(rng.uniform(0.1, 1))
        return np.stack([science + residual, template, difference + residual])
    science, template, difference = _shift(other, MAX_HOST_SHIFT, rng) if rng.random() < 0.5 else other
    new = cutouts[2] * np.float32(np.exp(rng.uniform(-1.5, 1)))
    if kind < 0.7:
        return np.stack([science - difference + new, template, new])
    return np.stack([science + new, template, difference + new])


def _add_noise(cutouts: Cutouts, rng: Generator) -> Cutouts:
    science, template, difference = cutouts
    pixels = difference[np.isfinite(difference)]
    sigma = MAD_TO_SIGMA * np.median(np.abs(pixels)) if len(pixels) else 0.0
    noise = rng.standard_normal(difference.shape, np.float32) * np.float32(sigma * rng.uniform(0, 2))
    return np.stack([science + noise, template, difference + noise])
