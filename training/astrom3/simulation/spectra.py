"""Simulated LAMOST spectra: a black body, the lines and bands of its stellar type, extinction and noise.

Lines are Gaussians whose depths vary with temperature as along the MK sequence (Gray & Corbally 2009, "Stellar Spectral
Classification"): qualitatively right, but not in every depth. No synthetic spectra are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.astrom3.simulation.variables import Variable

WAVELENGTHS: NDArray[np.float64] = 10 ** np.arange(np.log10(3700.0), np.log10(9100.0), 1e-4)
"""Vacuum wavelengths in angstrom with LAMOST's logarithmic sampling."""
RESOLUTION = 1800.0
LIGHT = 299_792.458
"""Speed of light in km/s."""
SECOND_RADIATION_CONSTANT = 1.438_777e8
"""h c / k in angstrom kelvin."""
REFERENCE = 5500.0
"""Wavelength in angstrom where the extinction is A_V and the black body is normalised to 1."""
FLUX_AT_MAGNITUDE_15 = 100.0
"""LAMOST counts at the reference wavelength for V = 15."""
DARKEST = 0.02
"""Smallest flux relative to the continuum, where lines overlap."""
FWHM = 2.355
"""Full width at half maximum of a Gaussian, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A family of lines: `depth` is reached at `temperature`, and decreases as a Gaussian in log temperature."""

    wavelengths: tuple[float, ...]
    depth: float
    temperature: float  # K
    spread: float  # standard deviation of the Gaussian in ln(temperature)
    width: float  # angstrom, standard deviation
    metals: bool = True  # weaker in metal-poor stars


BALMER = Lines((6564.6, 4862.7, 4341.7, 4102.9, 3971.2, 3890.2), 0.7, 9500, 0.38, 5.0, metals=False)
CALCIUM_H_K = Lines((3934.8, 3969.6), 0.8, 5200, 0.5, 5.0)
FAMILIES = (
    BALMER,
    CALCIUM_H_K,
    Lines((4305.6,), 0.4, 5500, 0.2, 8.0),  # the G band
    Lines((5168.8, 5174.1, 5185.0), 0.45, 4500, 0.3, 2.5),  # magnesium b
    Lines((5891.6, 5897.6), 0.5, 4000, 0.3, 2.0),  # sodium D
    Lines((4046.9, 4227.9, 4384.8, 4405.9, 4669.0, 5271.0, 5329.5), 0.35, 4700, 0.35, 2.5),  # iron, calcium
)
CALCIUM_TRIPLET = Lines((8500.4, 8544.4, 8664.5), 0.4, 5000, 0.6, 3.0)
TITANIUM_OXIDE = (4762.0, 4956.0, 5168.0, 5450.0, 5862.0, 6160.0, 6653.0, 7056.0, 7591.0, 8434.0)
"""Band heads in angstrom; the absorption decreases towards the red."""
BAND_LENGTH = 110.0
"""Length in angstrom over which a band decreases by a factor e."""
BANDS_BEGIN = 4000.0
"""Temperature in K below which the bands appear."""


def observe_spectrum(
    star: Variable, magnitude: float, extinction: float, velocity: float, rng: Generator
) -> NDArray[np.float64]:
    """Return vacuum wavelength in angstrom, flux and inverse variance of the flux, float64[m, 3].

    `magnitude`: observed V; `extinction`: A_V; `velocity`: radial velocity in km/s.
    """
    rest = WAVELENGTHS / (1 + velocity / LIGHT)
    flux = _black_body(rest, star.temperature) * _lines(star, rest)
    flux *= 10 ** (-0.4 * extinction * (REFERENCE / WAVELENGTHS) ** 1.3)  # about Cardelli, Clayton & Mathis 1989
    flux *= FLUX_AT_MAGNITUDE_15 * 10 ** (-0.4 * (magnitude - 15)) / np.interp(REFERENCE, WAVELENGTHS, flux)
    slope, curvature = rng.normal(0, 0.1, 2)  # LAMOST's relative flux calibration is good to 10 %
    place = np.log(WAVELENGTHS / REFERENCE) / np.log(WAVELENGTHS[-1] / REFERENCE)
    flux *= np.exp(slope * place + curvature * place**2)
    ratio = 20 * 10 ** (-0.2 * (magnitude - 15)) * rng.lognormal(0, 0.4)  # signal to noise at the reference
    efficiency = np.exp(-0.5 * ((WAVELENGTHS - 6800) / 1600) ** 2) + 0.08
    middle = np.median(flux)
    noise = middle / ratio * np.sqrt((flux / middle + 0.5) / efficiency)
    return np.stack([WAVELENGTHS, flux + rng.normal(0, noise), noise**-2], axis=1)


def _black_body(wavelength: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return Planck's law, normalised to 1 at the reference wavelength, float64[m]. `wavelength`: angstrom, [m]."""

    def planck(angstrom: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(angstrom**-5 / np.expm1(SECOND_RADIATION_CONSTANT / (angstrom * temperature)))

    return planck(wavelength) / planck(np.array(REFERENCE))


def _lines(star: Variable, rest: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the flux relative to the continuum, float64[m], at rest wavelengths `rest` [m] in angstrom."""
    left = np.ones_like(rest)
    for family in FAMILIES:
        # Balmer lines are narrower in giants, which are less dense.
        width = family.width * (np.clip(star.gravity / 4.2, 0.4, 1.1) if family is BALMER else 1)
        left *= np.clip(1 - _profile(star, rest, family, _depth(star, family), width), DARKEST, None)
    triplet = _depth(star, CALCIUM_TRIPLET) * np.clip(1.9 - 0.25 * star.gravity, 0.7, 1.7)  # strong in giants
    left *= 1 - _profile(star, rest, CALCIUM_TRIPLET, float(triplet), CALCIUM_TRIPLET.width)
    cool = np.clip((BANDS_BEGIN - star.temperature) / 1000, 0, 1)
    for head in TITANIUM_OXIDE:
        beyond = rest - head
        left *= 1 - 0.75 * cool * np.where(beyond > 0, np.exp(-np.clip(beyond, 0, None) / BAND_LENGTH), 0)
    left += _profile(star, rest, CALCIUM_H_K, star.activity, 1.5)
    return left + _profile(star, rest, BALMER, star.shocks + 0.4 * star.activity, 2.0)


def _depth(star: Variable, lines: Lines) -> float:
    depth = lines.depth * np.exp(-0.5 * (np.log(star.temperature / lines.temperature) / lines.spread) ** 2)
    return float(depth * min(10 ** (0.35 * star.metallicity), 1.15)) if lines.metals else float(depth)


def _profile(
    star: Variable, rest: NDArray[np.float64], lines: Lines, depth: float, width: float
) -> NDArray[np.float64]:
    """Return the sum of the lines of a family, float64[m].

    Rotation and the spectrograph broaden lines at constant area. `width`: standard deviation of a line in angstrom
    before the broadening.
    """
    profile = np.zeros_like(rest)
    for centre in lines.wavelengths:
        spread = np.hypot(width, centre * np.hypot(star.rotation / 2 / LIGHT, 1 / RESOLUTION / FWHM))
        near = slice(*np.searchsorted(rest, (centre - 5 * spread, centre + 5 * spread)))
        profile[near] += depth * width / spread * np.exp(-0.5 * ((rest[near] - centre) / spread) ** 2)
    return profile
