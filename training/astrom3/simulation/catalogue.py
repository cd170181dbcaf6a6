"""The position of a star, and its values in the catalogues of ASAS-SN, Gaia, 2MASS and WISE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from training.astrom3.model.preprocess import METADATA_COLUMNS
from training.astrom3.simulation.variables import TEMPERATURES, Variable

BP_RP = (3.30, 2.20, 1.72, 1.40, 1.12, 0.90, 0.75, 0.58, 0.43, 0.22, 0.00, -0.08)
V_K = (5.60, 4.00, 3.05, 2.60, 2.10, 1.70, 1.35, 1.07, 0.80, 0.45, 0.05, -0.10)
J_K = (0.95, 0.85, 0.80, 0.70, 0.58, 0.44, 0.34, 0.26, 0.19, 0.10, 0.01, -0.04)
"""Colours in magnitudes at `variables.TEMPERATURES`, rounded from Pecaut & Mamajek 2013 (ApJS 208, 9)."""
BANDS = ("g", "bp", "rp", "j", "h", "k", "w1", "w2", "w3", "w4")
EXTINCTION = dict(zip(BANDS, (0.84, 1.06, 0.60, 0.28, 0.18, 0.12, 0.07, 0.05, 0.03, 0.02), strict=True))
"""Extinction in each band, in units of A_V."""
PULSATION = dict(zip(BANDS, (0.9, 1.1, 0.65, 0.4, 0.33, 0.3, 0.28, 0.28, 0.25, 0.25), strict=True))
"""Pulsation amplitude in each band relative to V; it is smaller in the infrared. Eclipses have nearly the same depth in
all bands."""
ECLIPSING = ("EW", "EB", "EA")
DUST = {"k": 0.2, "w1": 1.0, "w2": 1.4, "w3": 2.8, "w4": 3.6}
"""Brightening by circumstellar dust in each band, relative to that at 3.4 micron, in magnitudes."""
INFRARED = (
    {"j": (0.021, 15.8), "h": (0.022, 15.1), "k": (0.021, 14.3)},  # 2MASS, a single exposure
    {"w1": (0.022, 16.0), "w2": (0.020, 15.2), "w3": (0.03, 11.2), "w4": (0.1, 7.9)},  # WISE, a single exposure
)
"""For each band: the magnitude error of a bright star, and the magnitude at which noise gives an error of 0.1."""
SCALE_HEIGHT = {"disc": 15.0, "halo": 45.0}
"""Standard deviation of the galactic latitude in degrees."""
SPEED = {"disc": 45.0, "halo": 170.0}
"""Standard deviation of each velocity component in km/s."""
ARCSEC = 4.74
"""Speed in km/s that corresponds to a proper motion of 1 arcsec/yr at a distance of 1 pc."""
REDDENING_AT_POLE = 0.03
"""E(B - V) in mag through the whole disc, towards the galactic pole."""
DUST_HEIGHT = 120.0
"""Scale height of the dust in pc."""
GAIA_TRANSITS = 250
"""Gaia's number of transits per star. The errors of its mean fluxes reflect the variability."""
FAINTEST_MAGNITUDE, BRIGHTEST_MAGNITUDE, MAGNITUDE_SCALE = 16.2, 11.5, 1.5
"""V magnitude limits of ASAS-SN, and the exponential scale of the counts towards faint magnitudes."""


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a star. Magnitudes are means, and include extinction."""

    magnitude: float  # V
    distance: float  # pc
    longitude: float  # galactic, degrees
    latitude: float
    extinction: float  # A_V
    velocity: float  # of recession, km/s


def put(star: Variable, rng: Generator) -> Place:
    """Place the star at a random position on the sky, at a distance where the survey sees it."""
    magnitude = float(max(FAINTEST_MAGNITUDE - rng.exponential(MAGNITUDE_SCALE), BRIGHTEST_MAGNITUDE))
    latitude = float(np.clip(rng.normal(0, SCALE_HEIGHT[star.population]), -85, 85))
    slant = abs(np.sin(np.radians(latitude))) + 0.03
    column = 3.1 * REDDENING_AT_POLE / slant * rng.lognormal(0, 0.4)
    extinction = 0.0
    for _ in range(4):  # iterate: extinction depends on distance, and distance on extinction
        distance = 10 ** ((magnitude - extinction - star.absolute_magnitude + 5) / 5)
        extinction = min(column, 4.0) * (1 - np.exp(-distance * slant / DUST_HEIGHT))
    velocity = rng.normal(0, SPEED[star.population])
    return Place(magnitude, float(distance), rng.uniform(0, 360), latitude, float(extinction), velocity)


def describe(star: Variable, place: Place, rng: Generator) -> dict[str, float]:
    """Return the 34 values of `preprocess.METADATA_COLUMNS` in catalogue units: mag, mas, mas/yr, degrees."""
    true = _magnitudes(star, place)
    values = {"mean_vmag": place.magnitude + rng.normal(0, 0.03)}
    for band, name in (("g", "phot_g"), ("bp", "phot_bp"), ("rp", "phot_rp")):
        swing = 0.35 * star.amplitude * _share(star, band) / np.sqrt(GAIA_TRANSITS)
        error = float(np.hypot(swing * rng.lognormal(0, 0.25), 0.001 + 0.002 * 10 ** (0.3 * (true[band] - 16))))
        values |= {f"{name}_mean_mag": true[band] + rng.normal(0, error), f"e_{name}_mean_mag": error}
    for survey in INFRARED:
        phase = 0.35 * star.amplitude * rng.normal()  # a mean of few epochs depends on their phases
        for band, (bright, faint) in survey.items():
            error = float(min(np.hypot(bright, 0.1 * 10 ** (0.4 * (true[band] - faint))), 0.5))
            seen = true[band] + phase * _share(star, band) + rng.normal(0, error)
            values |= {f"{band}_mag": seen, f"e_{band}_mag": error}
    error = 0.012 + 0.05 * 10 ** (0.25 * (true["g"] - 17)) * rng.lognormal(0, 0.2)
    parallax = 1000 / place.distance + rng.normal(0, error)
    motion = SPEED[star.population] / ARCSEC / place.distance * 1000 * rng.normal(0, 1, 2)
    motion += rng.normal(0, error, 2)
    values |= {
        "bp_rp": values["phot_bp_mean_mag"] - values["phot_rp_mean_mag"],
        "parallax": parallax,
        "parallax_error": error,
        "parallax_over_error": parallax / error,
        "pmra": float(motion[0]),
        "pmra_error": error * rng.uniform(0.8, 1.2),
        "pmdec": float(motion[1]),
        "pmdec_error": error * rng.uniform(0.8, 1.2),
        "j_k": values["j_mag"] - values["k_mag"],
        "w1_w2": values["w1_mag"] - values["w2_mag"],
        "w3_w4": values["w3_mag"] - values["w4_mag"],
        "pm": float(np.hypot(*motion)),
        "ruwe": rng.lognormal(0.03, 0.08) + (rng.exponential(0.2) if star.kind in ECLIPSING else 0.0),
        "l": place.longitude,
        "b": place.latitude,
    }
    return {name: values[name] for name in METADATA_COLUMNS}


def _share(star: Variable, band: str) -> float:
    return 1.0 if star.kind in ECLIPSING else PULSATION[band]


def _magnitudes(star: Variable, place: Place) -> dict[str, float]:
    """Return the mean observed magnitudes by band."""
    colour, v_k, j_k = (float(np.interp(star.temperature, TEMPERATURES, table)) for table in (BP_RP, V_K, J_K))
    v = place.magnitude - place.extinction
    # G - V is from the documentation of Gaia EDR3, table 5.9. RP is computed from G, and BP is RP plus the colour.
    g = v - 0.027 + 0.014 * colour - 0.216 * colour**2 + 0.0143 * colour**3
    rp = g - 0.62 * colour + 0.065 * colour**2
    k = v - v_k
    bare = {"g": g, "bp": rp + colour, "rp": rp, "j": k + j_k, "h": k + 0.25 * j_k, "k": k}
    bare |= {"w1": k - 0.05, "w2": k - 0.03, "w3": k - 0.08, "w4": k - 0.1}
    return {
        band: value + EXTINCTION[band] * place.extinction - DUST.get(band, 0.0) * star.dust
        for band, value in bare.items()
    }
