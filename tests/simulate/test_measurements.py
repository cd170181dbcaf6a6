"""The measurements on LSST images give the values that their definitions imply."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from broker_filter.simulate.images import Conditions, Image, draw_conditions
from broker_filter.simulate.instruments import LSST
from broker_filter.simulate.measurements import (
    PSF_SIZE,
    Moments,
    adaptive_moments,
    aperture_flux,
    extendedness,
    find_footprint,
    fit_dipole,
    fit_psf,
    trail_length,
)

MIDDLE = LSST.grid // 2
VARIANCE = np.full((LSST.grid, LSST.grid), 4.0, np.float32)


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return draw_conditions(LSST, np.random.default_rng(12))


def gaussian(covariance: Moments, x: float = 0.0, y: float = 0.0) -> Image:
    up, right = np.mgrid[: LSST.grid, : LSST.grid] - MIDDLE
    inverse = np.linalg.inv([[covariance.xx, covariance.xy], [covariance.xy, covariance.yy]])
    dx, dy = right - x, up - y
    exponent = inverse[0, 0] * dx * dx + 2 * inverse[0, 1] * dx * dy + inverse[1, 1] * dy * dy
    return np.exp(-0.5 * exponent).astype(np.float32)


def test_psf_fit_recovers_the_flux_and_counts_the_pixels(conditions: Conditions) -> None:
    profile = conditions.profile(conditions.psf_science, 0.3, -0.2)
    fit = fit_psf(1000 * profile, VARIANCE, profile)
    assert fit.flux == pytest.approx(1000, rel=1e-5)
    assert fit.flux_error == pytest.approx(2 / np.linalg.norm(profile), rel=1e-3)
    assert fit.chi2 < 1e-3
    assert fit.n_data == PSF_SIZE**2


def test_psf_fit_leaves_out_unusable_pixels(conditions: Conditions) -> None:
    profile = conditions.profile(conditions.psf_science, 0.0, 0.0)
    image, variance = 1000 * profile, VARIANCE.copy()
    image[:, : MIDDLE - 14], variance[:, : MIDDLE - 14] = np.nan, np.inf
    fit = fit_psf(image, variance, profile)
    assert fit.flux == pytest.approx(1000, rel=1e-5)
    assert fit.n_data == PSF_SIZE * (PSF_SIZE - 6)


def test_aperture_sums_the_pixels_within_twelve_pixels() -> None:
    flux, error, truncated = aperture_flux(np.ones_like(VARIANCE), VARIANCE, 0.0, 0.0)
    assert flux == pytest.approx(math.pi * 12**2, rel=0.04)
    assert error == pytest.approx(2 * math.sqrt(flux))
    assert not truncated


def test_adaptive_moments_of_a_gaussian_are_its_covariance() -> None:
    covariance = Moments(9.0, 5.0, 2.0)
    measured = adaptive_moments(100 * gaussian(covariance, 0.4, -0.7), 0.0, 0.0, 3.0)
    assert measured is not None
    np.testing.assert_allclose(measured, covariance, rtol=2e-3)


def test_noise_has_no_moments() -> None:
    assert adaptive_moments(-gaussian(Moments(9.0, 9.0, 0.0)), 0.0, 0.0, 3.0) is None


def test_extendedness_is_zero_for_the_psf_and_one_for_a_large_source() -> None:
    psf = Moments(5.0, 5.0, 0.0)
    assert extendedness(psf, psf) == 0
    assert extendedness(Moments(20.0, 20.0, 0.0), psf) > 0.99


@pytest.mark.parametrize("length", [8.0, 16.0])
def test_length_of_a_trail_is_recovered(conditions: Conditions, length: float) -> None:
    angle = 0.6
    trail = length * math.cos(angle), length * math.sin(angle)
    shape = adaptive_moments(conditions.profile(conditions.psf_science, 0.0, 0.0, trail), 0.0, 0.0, 3.0)
    assert shape is not None
    measured, direction = trail_length(shape)
    # The definition takes the source as a line without width, so it is too long by some of the PSF.
    assert length < measured < length + 2.355 * conditions.fwhm
    assert direction == pytest.approx(angle, abs=0.15)


def test_dipole_fit_recovers_the_displacement(conditions: Conditions) -> None:
    psf, flux = conditions.psf_science, 50_000.0
    science = flux * conditions.profile(psf, 2.15, 0.9)
    difference = science - flux * conditions.profile(psf, 1.85, 1.1)
    footprint = find_footprint(difference, VARIANCE, psf, 3.0)
    assert footprint.has_both_signs
    dipole = fit_dipole(500 + science, difference, VARIANCE, partial(conditions.profile, psf), footprint)
    assert dipole is not None
    assert (dipole.dx, dipole.dy) == (pytest.approx(0.3, rel=0.02), pytest.approx(-0.2, rel=0.02))
    assert (dipole.x, dipole.y) == (pytest.approx(2, abs=0.01), pytest.approx(1, abs=0.01))
    assert dipole.flux == pytest.approx(flux, rel=0.01)


def test_lobes_without_a_star_are_no_dipole(conditions: Conditions) -> None:
    psf = conditions.psf_science
    difference = 5_000 * (conditions.profile(psf, 3.0, 0.0) - conditions.profile(psf, -3.0, 0.0))
    footprint = find_footprint(difference, VARIANCE, psf, 3.0)
    assert footprint.has_both_signs
    constant_hole = 500 - 9_000 * conditions.profile(psf, 0.0, 0.0) + difference
    assert fit_dipole(constant_hole, difference, VARIANCE, partial(conditions.profile, psf), footprint) is None


def test_footprint_of_a_faint_source_is_its_core_grown_by_the_psf(conditions: Conditions) -> None:
    profile = conditions.profile(conditions.psf_science, 0.0, 0.0)
    error = 2 / float(np.linalg.norm(profile))
    footprint = find_footprint(5.2 * error * profile, VARIANCE, conditions.psf_science, 3.0)
    assert footprint.snr == pytest.approx(5.2, rel=0.01)
    assert 2 * round(2.4 * 3.0) + 1 <= footprint.size <= 2 * round(2.4 * 3.0) + 5
    assert not footprint.has_both_signs
    assert find_footprint(100 * error * profile, VARIANCE, conditions.psf_science, 3.0).size > footprint.size + 6
