"""Preprocessing of AstroM3's inputs from raw observations, for training and serving.

Rizhko & Bloom 2024 (arXiv:2411.08842). Computed in float64 and returned as float32. Observations that cannot be
normalised are refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_filter.errors import BrokerFilterError

DAYS_PER_YEAR = 365.0
"""Length of a year in the published code."""
WAVELENGTHS: NDArray[np.float64] = np.arange(3850.0, 9000.0, 2.0)
"""Wavelengths in angstrom, float64[2575], in the range that LAMOST's low-resolution spectra cover well."""

PHOTOMETRY_FEATURES = ("amplitude", "period", "lksl_statistic", "rfr_score")
"""Catalogue values, in order, that are appended to every observation. They are standardised like METADATA_COLUMNS."""
METADATA_COLUMNS = (
    "mean_vmag",
    *("phot_g_mean_mag", "e_phot_g_mean_mag", "phot_bp_mean_mag", "e_phot_bp_mean_mag"),
    *("phot_rp_mean_mag", "e_phot_rp_mean_mag", "bp_rp"),
    *("parallax", "parallax_error", "parallax_over_error", "pmra", "pmra_error", "pmdec", "pmdec_error"),
    *("j_mag", "e_j_mag", "h_mag", "e_h_mag", "k_mag", "e_k_mag"),
    *("w1_mag", "e_w1_mag", "w2_mag", "e_w2_mag", "w3_mag", "w4_mag"),
    *("j_k", "w1_w2", "w3_w4", "pm", "ruwe", "l", "b"),
)
"""The 34 inputs of the metadata encoder, in order, from ASAS-SN, Gaia, 2MASS and WISE. They are standardised over the
training set, as in the published `AstroM3Dataset`."""
CHANNELS = 3 + len(PHOTOMETRY_FEATURES) + 2
"""Number of values per observation: time, flux, error; the catalogue values; log10 of the flux scale; time span in
years."""

Padding = Literal["repeated", "zero"]
"""Values of the last six channels, which are constant within a light curve, in the padding. The code for raw light
curves repeats them; the code for `AstroM3Processed`, on which the published checkpoints were trained, sets them to
zero. This matters because the attention includes the padding."""


class ObservationsError(BrokerFilterError, ValueError):
    """A light curve, a spectrum or metadata cannot be normalised; the message says why."""


def prepare_light_curve(observations: NDArray[np.float64], features: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a star's light curve as AstroM3's input, float32[n, 9], in time order, without cutting it.

    `observations` float64[m, 3]: time in days, flux, flux error, in any order and flux unit; identical rows count once.
    `features` float64[4]: see PHOTOMETRY_FEATURES. Raises ObservationsError if there are fewer than two distinct times,
    if a value is not finite, or if the flux has no spread.
    """
    _check("a light curve", observations, 3)
    rows = np.unique(observations, axis=0)  # sorted: by time first
    time, flux, error = rows.T
    span = time[-1] - time[0] if len(rows) else 0.0
    if not span:
        raise ObservationsError("a light curve must have observations at two or more times")
    scale = _median_absolute_deviation(flux, "a light curve's flux")
    constant = np.concatenate([features, [np.log10(scale), span / DAYS_PER_YEAR]])
    if constant.shape != (CHANNELS - 3,) or not np.isfinite(constant).all():
        raise ObservationsError(f"a light curve needs finite {', '.join(PHOTOMETRY_FEATURES)}, not {features}")
    varying = np.stack([(time - time[0]) / span, (flux - flux.mean()) / scale, error / scale], axis=1)
    return np.hstack([varying, np.tile(constant, (len(rows), 1))]).astype(np.float32)


def to_length(
    light_curve: NDArray[np.float32], length: int, rng: np.random.Generator | None = None, padding: Padding = "repeated"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a light curve [n, 9] cut or padded to [length, 9], and its mask [length], 1 where observed.

    A longer light curve is cut at a random place if `rng` is given (training), else about its middle observation.
    """
    excess = len(light_curve) - length
    if excess > 0:
        start = excess // 2 if rng is None else int(rng.integers(excess + 1))
        return light_curve[start : start + length], np.ones(length, np.float32)
    padded = np.zeros((length, light_curve.shape[1]), np.float32)
    padded[: len(light_curve)] = light_curve
    if padding == "repeated":
        padded[len(light_curve) :, 3:] = light_curve[0, 3:]
    return padded, (np.arange(length) < len(light_curve)).astype(np.float32)


def prepare_spectrum(spectrum: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a star's spectrum as AstroM3's input, float32[3, 2575]: flux, error, log10 of the flux scale.

    `spectrum` float64[m, 3]: increasing wavelength in angstrom; flux; flux error, in the same unit. `AstroM3Dataset`
    has LAMOST's inverse variance in place of the error, and the published weights were trained with it: see
    `lamost.py`. Beyond its ends, a spectrum is extended with its last value. Raises ObservationsError if a value is not
    finite, wavelengths do not increase, or the flux has no spread.
    """
    _check("a spectrum", spectrum, 3)
    wavelength, flux, error = spectrum.T
    if len(spectrum) < 2 or not (np.diff(wavelength) > 0).all():
        raise ObservationsError("a spectrum must have two or more wavelengths, in increasing order")
    flux, error = np.interp(WAVELENGTHS, wavelength, flux), np.interp(WAVELENGTHS, wavelength, error)
    scale = _median_absolute_deviation(flux[flux != 0], "a spectrum's flux")  # 0 marks unobserved wavelengths
    return np.stack([(flux - flux.mean()) / scale, error / scale, np.full_like(flux, np.log10(scale))]).astype(
        np.float32
    )


def prepare_metadata(metadata: Mapping[str, float]) -> NDArray[np.float32]:
    """Return the metadata encoder's input, float32[34]: the values of METADATA_COLUMNS, in order.

    `metadata`: standardised catalogue values by name; other names are ignored. Raises ObservationsError if a column is
    missing or not finite.
    """
    if absent := [name for name in METADATA_COLUMNS if not np.isfinite(metadata.get(name, np.nan))]:
        raise ObservationsError(f"metadata values {', '.join(absent)} are missing or not finite")
    return np.array([metadata[name] for name in METADATA_COLUMNS], np.float32)


def _median_absolute_deviation(values: NDArray[np.float64], what: str) -> float:
    scale = float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
    if not scale:
        raise ObservationsError(f"{what} has a median absolute deviation of 0: at least half of its values are equal")
    return scale


def _check(what: str, rows: NDArray[np.float64], columns: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ObservationsError(f"{what} must have shape [n, {columns}], not {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ObservationsError(f"{what} holds values that are not finite: drop those rows")
