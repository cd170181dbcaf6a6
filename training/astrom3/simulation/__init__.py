"""Simulates variable stars of AstroM3's ten classes, as observed by ASAS-SN, LAMOST and the catalogues.

`variables.py` defines a star; `photometry.py`, `spectra.py` and `catalogue.py` observe the same star, so their results
are consistent. The stars are for tests and for comparisons of training methods; they must never be mistaken for real
data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.astrom3.simulation.catalogue import describe, put
from training.astrom3.simulation.photometry import catalogue_period, features, observe_light_curve
from training.astrom3.simulation.spectra import observe_spectrum
from training.astrom3.simulation.variables import Variable, draw

FEWEST_OBSERVATIONS = 30
"""Smallest number of observations: with fewer, a star would not be in a catalogue of variables."""


@dataclass(frozen=True, slots=True)
class SimulatedStar:
    """The observations of a star, in the units of `preprocess`, and its true properties."""

    truth: Variable
    photometry: NDArray[np.float64]  # [n, 3] days, mJy, mJy
    spectrum: NDArray[np.float64]  # [m, 3] angstrom, counts, inverse variance of the counts
    metadata: dict[str, float]  # 34 catalogue values
    features: dict[str, float]  # 4 catalogue values; the period in days


def simulate_star(kind: str, rng: Generator) -> SimulatedStar:
    """Return a star of a class with enough observations. Raises KeyError for an unknown class."""
    while True:
        star = draw(kind, rng)
        place = put(star, rng)
        photometry = observe_light_curve(star, place.magnitude, rng)
        if len(photometry) >= FEWEST_OBSERVATIONS:
            break
    return SimulatedStar(
        star,
        photometry,
        observe_spectrum(star, place.magnitude, place.extinction, place.velocity, rng),
        describe(star, place, rng),
        features(photometry, catalogue_period(star, rng)),
    )
