"""What AstroM3's networks see of a star: the one preprocessing, of raw observations, for training and for serving.

Rizhko & Bloom 2025 (arXiv:2411.08842). Computes in float64 and gives float32. Observations that cannot be
normalised are refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DAYS_PER_YEAR = 365.0
"""As published."""
WAVELENGTHS: NDArray[np.float64] = np.arange(3850.0, 9000.0, 2.0)
"""[2575] angstrom: what LAMOST's low-resolution spectra cover well."""

PHOTOMETRY_FEATURES = ("amplitude", "period", "lksl_statistic", "rfr_score")
"""Catalogue values that the photometry encoder is given with every observation, in order; standardised, see below."""
METADATA_COLUMNS = (
    "mean_vmag",
    *("phot_g_mean_mag", "e_phot_g_mean_mag", "phot_bp_mean_mag", "e_phot_bp_mean_mag"),
    *("phot_rp_mean_mag", "e_phot_rp_mean_mag", "bp_rp"),
    *("parallax", "parallax_error", "parallax_over_error", "pmra", "pmra_error", "pmdec", "pmdec_error"),
    *("j_mag", "e_j_mag", "h_mag", "e_h_mag", "k_mag", "e_k_mag"),
    *("w1_mag", "e_w1_mag", "w2_mag", "e_w2_mag", "w3_mag", "w4_mag"),
    *("j_k", "w1_w2", "w3_w4", "pm", "ruwe", "l", "b"),
)
"""The metadata encoder's 34 columns, in order: ASAS-SN, Gaia, 2MASS, WISE. Standardised over the training set, as
`AstroM3Dataset` ships them."""
CHANNELS = 3 + len(PHOTOMETRY_FEATURES) + 2
"""Of an observation: time, flux, error; the catalogue's values; log10 of the flux's scale, span in years."""

Padding = Literal["repeated", "zero"]
"""What stands in an observation's last six channels, the same in all of a light curve, where it is padded. The code for
raw light curves repeats them; the code for `AstroM3Processed`, on which the published checkpoints were trained, does
not. The attention sees the padding, so that it matters which."""


class ObservationsError(ValueError):
    """A light curve, a spectrum or metadata that cannot be normalised: what is wrong with it."""


def prepare_light_curve(observations: NDArray[np.float64], features: NDArray[np.float64]) -> NDArray[np.float32]:
    """A star's whole light curve as AstroM3 reads it, float32 [n, 9], in order of time.

    `observations` [m, 3]: time in days, flux, its error, in any order and unit; identical rows count once. `features`
    [4]: see `PHOTOMETRY_FEATURES`. Raises ObservationsError where less than two times are left, anything is not
    finite, or the flux has no spread.
    """
    _check("a light curve", observations, 3)
    rows = np.unique(observations, axis=0)  # sorted: by time first
    time, flux, error = rows.T
    span = time[-1] - time[0] if len(rows) else 0.0
    if not span:
        raise ObservationsError("a light curve must have observations at two times or more")
    scale = _median_absolute_deviation(flux, "a light curve's flux")
    constant = np.concatenate([features, [np.log10(scale), span / DAYS_PER_YEAR]])
    if constant.shape != (CHANNELS - 3,) or not np.isfinite(constant).all():
        raise ObservationsError(f"a light curve needs finite {', '.join(PHOTOMETRY_FEATURES)}, not {features}")
    varying = np.stack([(time - time[0]) / span, (flux - flux.mean()) / scale, error / scale], axis=1)
    return np.hstack([varying, np.tile(constant, (len(rows), 1))]).astype(np.float32)


def to_length(
    light_curve: NDArray[np.float32], length: int, rng: np.random.Generator | None = None, padding: Padding = "repeated"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A light curve [n, 9] as [length, 9] and its mask [length], 1 where observed.

    A longer one is cut at a place that `rng` draws, as in training, or without it about its middle observation.
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
    """A star's spectrum as AstroM3 reads it, float32 [3, 2575]: flux, error, log10 of the flux's scale.

    `spectrum` [m, 3]: wavelength in angstrom, increasing; flux; its error, in the same unit. What `AstroM3Dataset` has
    for the error is LAMOST's inverse variance, and published weights know no other: see `lamost.py`. Beyond its ends a
    spectrum goes on with its last value. Raises ObservationsError where anything is not finite, wavelengths do not
    increase, or the flux has no spread.
    """
    _check("a spectrum", spectrum, 3)
    wavelength, flux, error = spectrum.T
    if len(spectrum) < 2 or not (np.diff(wavelength) > 0).all():
        raise ObservationsError("a spectrum needs two wavelengths or more, increasing")
    flux, error = np.interp(WAVELENGTHS, wavelength, flux), np.interp(WAVELENGTHS, wavelength, error)
    scale = _median_absolute_deviation(flux[flux != 0], "a spectrum's flux")  # 0 is what was not observed
    return np.stack([(flux - flux.mean()) / scale, error / scale, np.full_like(flux, np.log10(scale))]).astype(
        np.float32
    )


def prepare_metadata(metadata: Mapping[str, float]) -> NDArray[np.float32]:
    """Standardised metadata by name as AstroM3 reads them, float32 [34]; names that it does not know are left out.

    Raises ObservationsError where a column is absent or not finite.
    """
    if absent := [name for name in METADATA_COLUMNS if not np.isfinite(metadata.get(name, np.nan))]:
        raise ObservationsError(f"metadata lack {', '.join(absent)}")
    return np.array([metadata[name] for name in METADATA_COLUMNS], np.float32)


def _median_absolute_deviation(values: NDArray[np.float64], what: str) -> float:
    scale = float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
    if not scale:
        raise ObservationsError(f"{what} has no spread to be measured in: half of it or more is one value")
    return scale


def _check(what: str, rows: NDArray[np.float64], columns: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ObservationsError(f"{what} has {columns} columns, not shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ObservationsError(f"{what} holds values that are not finite: leave those rows out")
