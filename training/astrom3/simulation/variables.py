"""Variable stars of AstroM3's ten classes: random properties, and light curves.

Periods, amplitudes, luminosities and temperatures are typical of each class (Catelan & Smith 2015, "Pulsating Stars";
ASAS-SN's catalogue, Jayasinghe et al. 2019, MNRAS 486, 1907) and correlated as in nature: contact binaries with longer
periods are hotter (Rucinski 1997), pulsating stars with longer periods are brighter, fast-rotating spotted stars are
more active. This module does not simulate observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Days = NDArray[np.float64]  # [n]
Magnitudes = NDArray[np.float64]  # [n] V relative to the mean; larger is fainter
Phases = NDArray[np.float64]  # [n] from 0 to 1
Curve = Callable[[Days], Magnitudes]
Shape = Callable[[Phases], NDArray[np.float64]]

TEMPERATURES = (3000.0, 3500.0, 4000.0, 4500.0, 5000.0, 5500.0, 6000.0, 6500.0, 7000.0, 8000.0, 10000.0, 12000.0)
"""Temperatures in K of the tables here and in `catalogue`, rounded from Pecaut & Mamajek 2013 (ApJS 208, 9)."""
MAIN_SEQUENCE = (13.0, 11.0, 8.7, 7.2, 6.2, 5.3, 4.3, 3.6, 3.0, 2.1, 0.9, 0.0)
"""Absolute V magnitude of a dwarf of each temperature."""
BOLOMETRIC_CORRECTION = (-3.6, -2.0, -1.0, -0.6, -0.3, -0.15, -0.06, 0.0, 0.02, 0.0, -0.25, -0.6)
SUN_BOLOMETRIC, SUN_TEMPERATURE, SUN_GRAVITY = 4.74, 5772.0, 4.44
SYNCHRONOUS = 50.6
"""Equatorial velocity in km/s of a star with the Sun's radius and a rotation period of one day."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A star. Its population determines its velocity, and its distance from the galactic plane."""

    kind: str  # a key of KINDS
    temperature: float  # K
    absolute_magnitude: float  # mean V
    metallicity: float  # [Fe/H]
    period: float  # days
    amplitude: float  # V, peak to peak
    curve: Curve
    population: str = "disc"  # or "halo"
    activity: float = 0.0  # emission in the cores of Ca H and K, relative to the continuum
    rotation: float = 15.0  # v sin i in km/s
    shocks: float = 0.0  # Balmer emission relative to the continuum
    dust: float = 0.0  # brightening by circumstellar dust at 3.4 micron, mag

    @property
    def gravity(self) -> float:
        """Surface gravity, log g (cgs), for one solar mass."""
        return SUN_GRAVITY - 2 * float(np.log10(radius(self.temperature, self.absolute_magnitude)))


def radius(temperature: float, absolute_magnitude: float) -> float:
    """Return the radius in solar radii for an effective temperature (K) and an absolute V magnitude."""
    bolometric = absolute_magnitude + np.interp(temperature, TEMPERATURES, BOLOMETRIC_CORRECTION)
    return float(10 ** (-0.2 * (bolometric - SUN_BOLOMETRIC)) * (SUN_TEMPERATURE / temperature) ** 2)


def main_sequence(temperature: float) -> float:
    """Return the absolute V magnitude of a dwarf with this temperature (K)."""
    return float(np.interp(temperature, TEMPERATURES, MAIN_SEQUENCE))


def draw(kind: str, rng: Generator) -> Variable:
    """Return a random star of a class. Raises KeyError for an unknown class."""
    return KINDS[kind](rng)


def _contact_binary(rng: Generator) -> Variable:
    period = _log_normal(rng, 0.37, 0.08, 0.23, 0.8)
    temperature = float(np.clip(5900 + 6000 * (period - 0.38) + rng.normal(0, 200), 4300, 7500))
    luminosity = 4.2 - 8 * np.log10(period / 0.38) + rng.normal(0, 0.3)
    shape = partial(_eclipses, width=0.11, ratio=rng.uniform(0.85, 1.0), ellipsoidal=rng.uniform(0.3, 0.6))
    return _binary("EW", temperature, luminosity, period, rng.uniform(0.15, 0.8), shape, rng)


def _semi_detached_binary(rng: Generator) -> Variable:
    period = _log_normal(rng, 0.75, 0.22, 0.35, 6)
    temperature = float(np.clip(rng.normal(6900, 1000), 4800, 11500))
    luminosity = main_sequence(temperature) - rng.uniform(0.2, 1.2)
    shape = partial(
        _eclipses, width=rng.uniform(0.06, 0.1), ratio=rng.uniform(0.25, 0.85), ellipsoidal=rng.uniform(0.1, 0.35)
    )
    return _binary("EB", temperature, luminosity, period, rng.uniform(0.2, 1.0), shape, rng)


def _detached_binary(rng: Generator) -> Variable:
    period = _log_normal(rng, 2.2, 0.3, 0.5, 30)
    temperature = float(np.clip(rng.normal(6600, 1100), 4300, 11500))
    luminosity = main_sequence(temperature) - rng.uniform(0.0, 1.0)
    shape = partial(
        _eclipses, width=rng.uniform(0.02, 0.05), ratio=rng.uniform(0.05, 0.95), ellipsoidal=rng.uniform(0.0, 0.05)
    )
    return _binary("EA", temperature, luminosity, period, rng.uniform(0.2, 1.2), shape, rng)


def _spotted_star(rng: Generator) -> Variable:
    if rng.random() < 0.65:  # a dwarf
        temperature = float(np.clip(rng.normal(4900, 500), 3700, 5900))
        luminosity, period = main_sequence(temperature) + rng.normal(0, 0.3), _log_normal(rng, 5, 0.4, 0.3, 40)
    else:  # an evolved binary of the type RS Canum Venaticorum
        temperature = float(np.clip(rng.normal(4800, 200), 4200, 5400))
        luminosity, period = rng.uniform(0.8, 3.2), _log_normal(rng, 15, 0.3, 2, 80)
    spread, cycle, begin = rng.uniform(0, 1, 3)
    amplitude = _log_normal(rng, 0.14, 0.18, 0.05, 0.4)

    def curve(days: Days) -> Magnitudes:
        phase = 2 * np.pi * (days / period + begin)
        strength = 1 + 0.4 * np.sin(2 * np.pi * (days / (400 + 1200 * cycle) + spread))  # spots come and go
        wave = np.sin(phase) + 0.4 * spread * np.sin(2 * phase + 6 * cycle)
        return np.asarray(amplitude / 2 * strength * wave / 1.2)

    fast = SYNCHRONOUS * radius(temperature, luminosity) / period
    return Variable(
        "ROT",
        temperature,
        luminosity,
        rng.normal(-0.1, 0.2),
        period,
        amplitude,
        curve,
        activity=float(np.clip(0.5 * (period / 3) ** -0.3 * rng.lognormal(0, 0.3), 0, 1)),
        rotation=_along_the_line_of_sight(fast, rng),
    )


def _rr_lyrae_fundamental(rng: Generator) -> Variable:
    period = float(np.clip(rng.normal(0.56, 0.07), 0.38, 0.85))
    amplitude = float(np.clip(1.0 - 2.4 * (period - 0.55) + rng.normal(0, 0.15), 0.25, 1.5))
    temperature = 6450 - 1500 * (period - 0.55) + rng.normal(0, 120)
    return _rr_lyrae("RRAB", temperature, period, amplitude, rng.uniform(0.7, 0.95), rng)


def _rr_lyrae_overtone(rng: Generator) -> Variable:
    period = float(np.clip(rng.normal(0.32, 0.035), 0.22, 0.45))
    amplitude = float(np.clip(rng.normal(0.42, 0.08), 0.15, 0.6))
    temperature = 7050 - 1800 * (period - 0.32) + rng.normal(0, 120)
    return _rr_lyrae("RRC", temperature, period, amplitude, rng.uniform(0.0, 0.3), rng)


def _rr_lyrae(kind: str, temperature: float, period: float, amplitude: float, skew: float, rng: Generator) -> Variable:
    metallicity = float(np.clip(rng.normal(-1.4, 0.5), -2.6, 0.0))
    luminosity = 0.65 + 0.23 * (metallicity + 1.5) + rng.normal(0, 0.08)  # Catelan & Smith 2015
    curve = _periodic(period, amplitude, partial(_pulsation, skew=skew), rng)
    population = "halo" if metallicity < -0.8 else "disc"
    return Variable(kind, temperature, luminosity, metallicity, period, amplitude, curve, population)


def _high_amplitude_delta_scuti(rng: Generator) -> Variable:
    amplitude = rng.uniform(0.25, 0.75)
    return _delta_scuti("HADS", _log_normal(rng, 0.09, 0.13, 0.045, 0.22), amplitude, rng.uniform(0.3, 0.8), 0.05, rng)


def _low_amplitude_delta_scuti(rng: Generator) -> Variable:
    amplitude = _log_normal(rng, 0.12, 0.2, 0.04, 0.3)
    return _delta_scuti("DSCT", _log_normal(rng, 0.09, 0.16, 0.03, 0.25), amplitude, rng.uniform(0.0, 0.2), 0.6, rng)


def _delta_scuti(
    kind: str, period: float, amplitude: float, skew: float, second_mode: float, rng: Generator
) -> Variable:
    luminosity = -2.94 * np.log10(period) - 1.34 + rng.normal(0, 0.25)  # Ziaali et al. 2019
    temperature = float(np.clip(7500 - 4000 * (period - 0.09) + rng.normal(0, 250), 6500, 8600))
    first = _periodic(period, amplitude / (1 + second_mode / 2), partial(_pulsation, skew=skew), rng)
    # Period ratio of first overtone and fundamental mode: Petersen & Christensen-Dalsgaard 1996.
    second = _periodic(0.77 * period, second_mode * rng.uniform(0.3, 1) * amplitude, _sine, rng)
    rotation = _along_the_line_of_sight(30 if kind == "HADS" else 140, rng)  # Breger 2000
    return Variable(
        kind,
        temperature,
        luminosity,
        rng.normal(-0.1, 0.25),
        period,
        amplitude,
        lambda days: first(days) + second(days),
        rotation=rotation,
    )


def _semi_regular(rng: Generator) -> Variable:
    period = _log_normal(rng, 70, 0.28, 15, 500)
    temperature = float(np.clip(3600 - 350 * np.log10(period / 70) + rng.normal(0, 130), 2900, 4100))
    amplitude = float(np.clip(0.35 * (period / 70) ** 0.6 * rng.lognormal(0, 0.4), 0.08, 2.2))
    modes = [
        _periodic(period * factor, amplitude * share, _sine, rng)
        for factor, share in ((1.0, 0.6), (rng.uniform(0.7, 1.4), 0.4), (rng.uniform(5, 10), 0.25))  # Kiss et al. 1999
    ]
    return Variable(
        "SR",
        temperature,
        -0.3 - 0.8 * np.log10(period / 70) + rng.normal(0, 0.5),
        rng.normal(-0.3, 0.3),
        period,
        amplitude,
        lambda days: np.sum([mode(days) for mode in modes], axis=0),
        dust=rng.uniform(0.0, 0.2),
    )


def _mira(rng: Generator) -> Variable:
    period = float(np.clip(rng.normal(270, 75), 110, 520))
    amplitude = rng.uniform(2.2, 5.0)
    curve = _periodic(period, amplitude, partial(_pulsation, skew=rng.uniform(0.0, 0.3)), rng)
    wander, begin = rng.uniform(0.1, 0.4), rng.uniform(0, 2 * np.pi)
    return Variable(
        "M",
        float(np.clip(3050 - 1.2 * (period - 270) + rng.normal(0, 120), 2600, 3400)),
        -0.6 + 0.004 * (period - 270) + rng.normal(0, 0.6),
        rng.normal(-0.3, 0.3),
        period,
        amplitude,
        lambda days: curve(days) + wander * np.sin(2 * np.pi * days / 1500 + begin),  # cycles differ
        shocks=rng.choice((0.0, rng.uniform(0.3, 2.0)), p=(0.4, 0.6)),  # emission appears around maximum light
        dust=float(np.clip(rng.normal(0.3 + 0.002 * (period - 270), 0.15), 0, 1.5)),
    )


KINDS: Mapping[str, Callable[[Generator], Variable]] = {
    "EW": _contact_binary,
    "SR": _semi_regular,
    "EA": _detached_binary,
    "RRAB": _rr_lyrae_fundamental,
    "EB": _semi_detached_binary,
    "ROT": _spotted_star,
    "RRC": _rr_lyrae_overtone,
    "HADS": _high_amplitude_delta_scuti,
    "M": _mira,
    "DSCT": _low_amplitude_delta_scuti,
}


def _binary(
    kind: str, temperature: float, luminosity: float, period: float, amplitude: float, shape: Shape, rng: Generator
) -> Variable:
    fast = SYNCHRONOUS * radius(temperature, luminosity) / period
    return Variable(
        kind,
        temperature,
        luminosity,
        rng.normal(-0.15, 0.25),
        period,
        amplitude,
        _periodic(period, amplitude, shape, rng),
        activity=0.15 * rng.random() if temperature < 6200 else 0.0,
        rotation=min(fast, 300.0),  # eclipsing, so the inclination is about 90 degrees
    )


def _periodic(period: float, amplitude: float, shape: Shape, rng: Generator) -> Curve:
    """Return a periodic curve with the given shape, a peak-to-peak `amplitude` in mag and a random phase."""
    whole = shape(np.linspace(0, 1, 400, endpoint=False))
    scale, middle, begin = amplitude / np.ptp(whole), whole.mean(), rng.random()
    return lambda days: scale * (shape((days / period + begin) % 1) - middle)


def _sine(phase: Phases) -> NDArray[np.float64]:
    return np.asarray(np.sin(2 * np.pi * phase))


def _pulsation(phase: Phases, skew: float) -> NDArray[np.float64]:
    """Return a pulsation curve at phases [n], from a sine (skew 0) to a sawtooth with a fast rise (skew 1)."""
    return np.asarray(-sum(skew ** (k - 1) * np.sin(2 * np.pi * k * phase) / k for k in range(1, 8)))


def _eclipses(phase: Phases, width: float, ratio: float, ellipsoidal: float) -> NDArray[np.float64]:
    """Return a curve at phases [n] with two eclipses and ellipsoidal variation.

    The second eclipse has `ratio` times the depth of the first.
    """
    primary = np.exp(-0.5 * (((phase + 0.5) % 1 - 0.5) / width) ** 2)
    secondary = ratio * np.exp(-0.5 * ((phase - 0.5) / width) ** 2)
    return np.asarray(primary + secondary + ellipsoidal * (1 + np.cos(4 * np.pi * phase)) / 2)


def _along_the_line_of_sight(velocity: float, rng: Generator) -> float:
    """Return v sin i in km/s for a random orientation of the axis."""
    return float(min(velocity, 300.0) * np.sqrt(1 - rng.uniform(0, 1) ** 2))


def _log_normal(rng: Generator, median: float, dex: float, least: float, most: float) -> float:
    return float(np.clip(median * 10 ** rng.normal(0, dex), least, most))
