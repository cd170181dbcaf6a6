"""Light curves as ASAS-SN takes them in V, and what its catalogue says of them, measured on what was observed.

Cadence, seasons and noise after Kochanek et al. 2017 (PASP 129, 104502); the statistics after Jayasinghe et al. 2018
(MNRAS 477, 3145).
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.astrom3.simulation.variables import Variable

SURVEY_DAYS = 1600.0
SEASON_DAYS = 250.0
"""Of every year; then the Sun is too near."""
YEAR = 365.25
OBSERVATIONS = (80, 350)
FAINTEST = 17.3
"""V; fainter, there is no detection."""
BACKGROUND_ERROR = 0.26
"""Of the flux of the faintest star that is detected; typical, it changes from night to night."""
SYSTEMATIC_ERROR = 0.015
"""Of the flux."""
SIDEREAL_FREQUENCY = 1.0027
"""Turns of the sky a day, with which periods are confused."""
ZERO_POINT = 3.64e6
"""mJy of a star of magnitude 0 in V."""
ERROR_IN_MAGNITUDES = 1.0857
"""2.5 / ln 10: of a relative error of the flux."""
FOLDED_BINS = 15
RIGHT, HALF_OR_TWICE = 0.75, 0.15
"""Shares of catalogue periods; the others are a day's alias."""
IRREGULAR = {"SR": 0.12, "ROT": 0.05, "M": 0.02}
"""Classes without a clock: the scatter of their periods in the catalogue, dex."""


def observe_light_curve(star: Variable, magnitude: float, rng: Generator) -> NDArray[np.float64]:
    """Time in days, flux in mJy and its error, float64 [n, 3], in order of time. `magnitude`: V in the mean."""
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
    """The period that a search finds, days: not always the star's own."""
    period = star.period * 10 ** rng.normal(0, IRREGULAR.get(star.kind, 0.0))
    luck = rng.random()
    if luck < RIGHT or period > 20:
        return float(period)
    if luck < RIGHT + HALF_OR_TWICE:
        return float(period * rng.choice((0.5, 2.0)))
    return float(1 / abs(1 / period + rng.choice((-1.0, 1.0)) * SIDEREAL_FREQUENCY))


def features(observations: NDArray[np.float64], period: float) -> dict[str, float]:
    """`amplitude` (mag), `period` (days), `lksl_statistic` and `rfr_score` of observations [n, 3], n 20 at least.

    The Lafler-Kinman string length T of the light curve folded with the period (Clarke 2002, A&A 386, 763); and in the
    place of the score of ASAS-SN's random forest regressor, which fits the folded light curve, the share of the
    variance that the means of bins of phase explain.
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
