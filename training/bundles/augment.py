"""New images out of real ones, for a teacher to label: no label is assumed to survive what is done here.

Works on raw cutouts, before the normalisation that serving applies, and on one alert at a time: float32[3, S, S] in the
order science, template, difference.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Cutouts = NDArray[np.float32]

MIX = 0.5
"""Share of images made from two alerts, or from one and its own shifted image."""
SHIFT = 0.3
"""Share of images moved by up to MAX_SHIFT pixels: detections are centred to about one."""
MAX_SHIFT = 2
MAX_HOST_SHIFT = 3
NOISE = 0.3
"""Share of images with noise added, of up to twice what the difference image has."""
MAD_TO_SIGMA = 1.4826


def augment(cutouts: Cutouts, other: Cutouts, rng: Generator) -> Cutouts:
    """An image made from an alert's cutouts [3, S, S] and, for some, another alert's."""
    image = _orient(cutouts, rng)
    if rng.random() < MIX:
        image = _mix(image, _orient(other, rng), rng)
    if rng.random() < SHIFT:
        image = _shift(image, MAX_SHIFT, rng)
    if rng.random() < NOISE:
        image = _add_noise(image, rng)
    return image


def _orient(cutouts: Cutouts, rng: Generator) -> Cutouts:
    """One of the eight symmetries of the square."""
    flipped: Cutouts = cutouts[..., ::-1] if rng.random() < 0.5 else cutouts
    return np.rot90(flipped, int(rng.integers(4)), axes=(-2, -1))


def _shift(cutouts: Cutouts, most: int, rng: Generator) -> Cutouts:
    return np.roll(cutouts, rng.integers(-most, most + 1, 2), axis=(-2, -1))


def _mix(cutouts: Cutouts, other: Cutouts, rng: Generator) -> Cutouts:
    """The alert's difference on another's sky: in the place of the other's, or on top of it; or a bad subtraction."""
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
