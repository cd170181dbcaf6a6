"""Simulated V light curves of ASAS-SN, and the values that its catalogue derives from them.

Cadence, seasons and noise follow Kochanek et al. 2017 (PASP 129, 104502); the statistics follow Jayasinghe et al. 2018
(MNRAS 477, 3145).
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.astrom3.simulation.variables import Variable

SURVEY_DAYS = 1600.0
SEASON_DAYS = 250.0
"""Days of each year in which a star is observable; on the other days it is too close to the Sun."""
YEAR = 365.25
OBSERVATIONS = (80, 350)
FAINTEST = 17.3
"""V magnitude limit of a detection."""
BACKGROUND_ERROR = 0.26
"""Typical background error relative to the flux at the limit; it varies from night to night."""
SYSTEMATIC_ERROR = 0.015
"""Systematic error of the flux, relative to the flux."""
SIDEREAL_FREQUENCY = 1.0027
"""Sidereal rotations per day; aliases of periods are at this frequency."""
ZERO_POINT = 3.64e6
"""Flux in mJy of a star with V = 0."""
ERROR_IN_MAGNITUDES = 1.0857
"""2.5 / ln 10: magnitude error per relative flux error."""
FOLDED_BINS = 15
RIGHT, HALF_OR_TWICE = 0.75, 0.15
"""Fractions of correct, and of halved or doubled catalogue periods; the other periods are one-day aliases."""
IRREGULAR = {"SR": 0.12, "ROT": 0.05, "M": 0.02}
"""Scatter in dex of the catalogue periods of classes without a strict period."""


def observe_light_curve(star: Variable, magnitude: float, rng: Generator) -> NDArray[np.float64]:
    """Return time in days, flux in mJy and flux error, float64[n, 3], in time order. `magnitude`: mean V."""
    begin = rng.uniform(0, YEAR)
    nights = np.sort(rng.uniform(0, SURVEY_DAYS, int(rng.uniform(*OBSERVATIONS) * YEAR / SEASON_DAYS)))
    days = nights[(nights + begin) % YEAR < SEASON_DAYS] + 2_456_500.0
    brightness = magnitude + star.curve(days)
    days, brightness = days[brightness < FAINTEST], brightness[brightness < FAINTEST]
    flux = ZERO_POINT * 10 ** (-0.4 * brightness)
    background = ZERO_POINT * 10 ** (-0.4 * FAINTEST) * BACKGROUND_ERROR * rng.lognormal(0, 0.3, len(days))
    error = np.hypot(SYSTEMATIC_ERROR * flux, background)
    return np.stack([days, flux + rng.normal(0, error), error], axis=1)


def catalogue_period(star: Variable, rng: Generator) -> float:
    """Return the period in days that a search finds; it is not always the true one."""
    period = star.period * 10 ** rng.normal(0, IRREGULAR.get(star.kind, 0.0))
    luck = rng.random()
    if luck < RIGHT or period > 20:
        return float(period)
    if luck < RIGHT + HALF_OR_TWICE:
        return float(period * rng.choice((0.5, 2.0)))
    return float(1 / abs(1 / period + rng.choice((-1.0, 1.0)) * SIDEREAL_FREQUENCY))


def features(observations: NDArray[np.float64], period: float) -> dict[str, float]:
    """Return `amplitude` (mag), `period` (days), `lksl_statistic` and `rfr_score` of observations [n, 3] with n >= 20.

    `lksl_statistic` is the Lafler-Kinman string length T of the folded light curve (Clarke 2002, A&A 386, 763).
    ASAS-SN's `rfr_score` is that of a random forest regressor fitted to the folded light curve; here it is replaced by
    the fraction of the variance that phase-binned means explain.
    """
    days, flux, _ = observations.T
    magnitude = -2.5 * np.log10(np.clip(flux, 1e-3, None))
    low, high = np.percentile(magnitude, (2.5, 97.5))
    phase = days / period % 1
    folded = magnitude[np.argsort(phase)]
    variance = ((magnitude - magnitude.mean()) ** 2).sum()
    n = len(folded)
    string = ((folded - np.roll(folded, 1)) ** 2).sum() / variance * (n - 1) / (2 * n)
    place = (phase * FOLDED_BINS).astype(np.int64)
    count = np.bincount(place, minlength=FOLDED_BINS)
    mean = np.bincount(place, magnitude, FOLDED_BINS) / np.clip(count, 1, None)
    explained = 1 - ((magnitude - mean[place]) ** 2).sum() / variance
    return {
        "amplitude": float(high - low),
        "period": period,
        "lksl_statistic": float(string),
        "rfr_score": float(explained),
    }
