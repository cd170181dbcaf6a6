"""Galactic and ecliptic coordinates against astropy, and the number of nights since the first detection."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import BarycentricMeanEcliptic, Galactic, SkyCoord

from broker_filter.packets.batch import Survey
from broker_filter.packets.sky_coordinates import ECLIPTIC, GALACTIC, latitude, longitude
from broker_filter.packets.surveys import Derived, select_columns

RNG = np.random.default_rng(5)
RA = np.concatenate([RNG.uniform(0, 360, 2000), [0.0, 360.0, 192.85948, 12.85948, 0.0, 266.405, 270.0]])
DEC = np.concatenate(
    [np.degrees(np.arcsin(RNG.uniform(-1, 1, 2000))), [90.0, -90.0, 27.12825, -27.12825, 0.0, -28.936, 66.5607]]
)
"""Random positions, the celestial poles, and positions near the poles and origins of the two frames."""
MICROARCSECOND = 1e-6 / 3600
NAN = float("nan")


@pytest.mark.parametrize(("frame", "named"), [(GALACTIC, Galactic()), (ECLIPTIC, BarycentricMeanEcliptic())])
def test_coordinates_are_those_of_astropy_within_a_microarcsecond(frame: np.ndarray, named: object) -> None:
    expected = SkyCoord(RA, DEC, unit="deg").transform_to(named).spherical
    l, b = longitude(frame, RA, DEC), latitude(frame, RA, DEC)  # noqa: E741
    assert ((l >= 0) & (l <= 360) & (np.abs(b) <= 90)).all()
    apart = SkyCoord(l, b, unit="deg").separation(SkyCoord(expected.lon, expected.lat))
    assert apart.to_value(units.deg).max() < MICROARCSECOND
    np.testing.assert_allclose(b, expected.lat.deg, atol=MICROARCSECOND, rtol=0)


def test_coordinates_of_a_missing_position_are_missing() -> None:
    ra, dec = np.array([NAN, 10.0, 10.0]), np.array([10.0, NAN, 10.0])
    for frame in (GALACTIC, ECLIPTIC):
        assert np.isnan(longitude(frame, ra, dec)).tolist() == [True, True, False]
        assert np.isnan(latitude(frame, ra, dec)).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("survey", "first", "time", "nights"),
    [
        (Survey.ZTF, 60000.2, 60000.5, 0),  # 4:48 and 12:00 UTC: the evening and the morning of one night in California
        (Survey.ZTF, 60000.5, 60001.15, 1),
        (Survey.LSST, 59999.98, 60000.4, 0),  # 23:31 and 9:36 UTC: the evening and the morning of one night in Chile
        (Survey.LSST, 60000.4, 60000.98, 1),
        (Survey.LSST, 60000.4, 60030.1, 30),
        (Survey.LSST, NAN, 60030.1, NAN),
    ],
)
def test_nights_since_first_counts_nights_of_the_observatory(
    survey: Survey, first: float, time: float, nights: float
) -> None:
    source = select_columns(["nights_since_first"])[0].source(survey)
    assert isinstance(source, Derived)
    epoch = 2400000.5 if survey is Survey.ZTF else 0.0
    counted = source.formula(np.array([time + epoch]), np.array([NAN]), np.array([first + epoch]))
    np.testing.assert_array_equal(counted, [nights])
