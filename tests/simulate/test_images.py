"""The image subtraction has the properties that its equations imply."""

from __future__ import annotations

import numpy as np
import pytest

from broker_filter.simulate.images import (
    Conditions,
    Galaxy,
    Point,
    Scene,
    draw_conditions,
    draw_galaxies,
    expose,
    measure,
)
from broker_filter.simulate.instruments import LSST, ZTF, Instrument


@pytest.fixture(params=[ZTF, LSST], ids=["ztf", "lsst"])
def conditions(request: pytest.FixtureRequest) -> Conditions:
    instrument: Instrument = request.param
    return draw_conditions(instrument, np.random.default_rng(5))


def test_constant_sky_leaves_white_noise(conditions: Conditions) -> None:
    rng = np.random.default_rng(1)
    difference = expose(Scene([]), conditions, [], rng).difference
    expected = np.hypot(conditions.noise, conditions.template_noise)
    # The taper of the PSFs removes the finest detail, including its noise.
    assert 0.7 * expected < difference.std() < 1.05 * expected
    assert abs(difference.mean()) < 5 * expected / difference.shape[0]


def test_noise_of_an_lsst_difference_is_white_and_as_large_as_published() -> None:
    rng = np.random.default_rng(8)
    for _ in range(6):
        weather = draw_conditions(LSST, rng)
        difference = expose(Scene([]), weather, [], rng).difference / np.hypot(weather.noise, weather.template_noise)
        assert difference.std() == pytest.approx(1, abs=0.03)
        for axis in (0, 1):
            assert abs((difference * np.roll(difference, 1, axis)).mean()) < 0.05


def test_noise_of_a_template_is_correlated_as_in_resampled_exposures() -> None:
    conditions = draw_conditions(LSST, np.random.default_rng(9))
    template = expose(Scene([]), conditions, [], np.random.default_rng(1)).template / conditions.template_noise
    assert template.std() == pytest.approx(1, abs=0.05)
    # Public templates of LSSTCam have 0.25 between neighbours, apart from their sources.
    assert (template * np.roll(template, 1, 0)).mean() == pytest.approx(0.25, abs=0.04)


def test_bands_of_lsst_have_their_own_noise() -> None:
    rng = np.random.default_rng(10)
    drawn = [draw_conditions(LSST, rng) for _ in range(60)]
    noise = {band: np.median([c.noise for c in drawn if c.band == band]) for band in "griz"}
    assert noise["g"] < noise["i"] < noise["z"]


def test_constant_galaxy_is_subtracted(conditions: Conditions) -> None:
    rng = np.random.default_rng(2)
    galaxies = draw_galaxies(conditions.instrument, 3, rng)
    counts = 100 * conditions.flux_error
    scene = Scene([], [Galaxy(i, 0.3, -0.2, counts) for i in range(3)])
    stamps = expose(scene, conditions, galaxies, rng)
    assert (
        measure(
            stamps._replace(difference=stamps.science - np.median(stamps.science)), conditions, 0, 0
        ).wide_aperture_flux
        > counts
    )
    assert measure(stamps, conditions, 0, 0).snr < 5


def test_flux_of_a_transient_is_recovered_within_its_error(conditions: Conditions) -> None:
    rng = np.random.default_rng(3)
    pulls = []
    for _ in range(80):
        x, y = rng.uniform(-0.5, 0.5, 2)
        flux = 12 * conditions.flux_error
        stamps = expose(Scene([Point(x, y, flux, 0.0)]), conditions, [], rng)
        pulls.append((measure(stamps, conditions, x, y).flux - flux) / conditions.flux_error)
    assert abs(np.mean(pulls)) < 0.35
    quoted = conditions.instrument.quoted_error
    assert 0.6 / quoted < np.std(pulls) < 1.5 / quoted


def test_sources_are_at_their_given_positions(conditions: Conditions) -> None:
    rng = np.random.default_rng(4)
    middle = conditions.instrument.grid // 2
    stamps = expose(Scene([Point(7.0, -4.0, 1000 * conditions.flux_error, 0.0)]), conditions, [], rng)
    assert np.unravel_index(stamps.difference.argmax(), stamps.difference.shape) == (middle - 4, middle + 7)


def test_misaligned_star_leaves_a_dipole() -> None:
    rng = np.random.default_rng(5)
    conditions = draw_conditions(ZTF, rng)
    star = Point(0.0, 0.0, 20_000.0, 20_000.0)
    difference = expose(Scene([star]), conditions, [], rng, misalignment=(0.8, 0.0)).difference
    middle = ZTF.grid // 2
    row = difference[middle - 1 : middle + 2].sum(axis=0)
    assert row[middle - 3 : middle].sum() > 20 * conditions.noise
    assert row[middle + 1 : middle + 4].sum() < -20 * conditions.noise


def test_moving_source_is_trailed_along_its_motion() -> None:
    rng = np.random.default_rng(6)
    conditions = draw_conditions(ZTF, rng)
    stamps = expose(Scene([Point(0.0, 0.0, 30_000.0, 0.0)], trail=(6.0, 0.0)), conditions, [], rng)
    middle = ZTF.grid // 2
    box = stamps.difference[middle - 8 : middle + 9, middle - 8 : middle + 9].clip(min=0)
    up, right = np.mgrid[-8:9, -8:9]
    assert (box * right**2).sum() > 2 * (box * up**2).sum()
