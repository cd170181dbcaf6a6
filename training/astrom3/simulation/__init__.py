"""Simulated variable stars of AstroM3's ten classes, as ASAS-SN, LAMOST and the catalogues would see them.

`variables.py` says what a star is, `photometry.py`, `spectra.py` and `catalogue.py` observe it; the three agree because
they look at the same star. For tests, and to compare ways to train; must never be mistaken for data.
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
"""With fewer, a star would be in no catalogue of variables."""


@dataclass(frozen=True, slots=True)
class SimulatedStar:
    """What is known of a star, in the units of `preprocess`, and what it truly is."""

    truth: Variable
    photometry: NDArray[np.float64]  # [n, 3] days, mJy, mJy
    spectrum: NDArray[np.float64]  # [m, 3] angstrom, counts, inverse variance of the counts
    metadata: dict[str, float]  # 34, as catalogues print them
    features: dict[str, float]  # 4, likewise; the period in days


def simulate_star(kind: str, rng: Generator) -> SimulatedStar:
    """A star of a class that the survey sees often enough. Raises KeyError for an unknown class."""
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
