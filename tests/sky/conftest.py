"""Files of regions and targets whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import Latitude, Longitude
from astropy.io import fits
from mocpy import MOC

CENTRE = (359.0, 60.0)
"""Centre of the map of a merger, in degrees. The region crosses right ascension 0."""
INNER, OUTER = 5.0, 12.0
"""Radii in degrees of the cones that hold 50 and 90 % of the probability."""


def cone(ra: float, dec: float, radius: float, order: int = 9) -> MOC:
    return MOC.from_cone(
        lon=Longitude(ra, units.deg), lat=Latitude(dec, units.deg), radius=radius * units.deg, max_depth=order
    )


def write_map(path: Path, parts: list[tuple[MOC, float]], **header: object) -> Path:
    """Write a multi-order map as LIGO, Virgo and KAGRA do. `parts`: regions, and the probability in each."""
    uniq = [part.uniq_hpx.astype(np.int64) for part, _ in parts]
    density = [
        np.full(len(cells), probability / (part.sky_fraction * 4 * np.pi))
        for cells, (part, probability) in zip(uniq, parts, strict=True)
    ]
    order = np.argsort(np.concatenate(uniq))
    cells, values = np.concatenate(uniq)[order], np.concatenate(density)[order]
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("UNIQ", "K", array=cells),
            fits.Column("PROBDENSITY", "D", array=values, unit="sr-1"),
            fits.Column("DISTMU", "D", array=np.full(len(cells), 150.0), unit="Mpc"),
        ]
    )
    table.header.update(
        PIXTYPE="HEALPIX", ORDERING="NUNIQ", COORDSYS="C", MOCORDER=9, INDXSCHM="EXPLICIT", OBJECT="S261128a"
    )
    table.header.update(header)
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path, overwrite=True)
    return path


@pytest.fixture(scope="session")
def merger() -> list[tuple[MOC, float]]:
    """A map with 50 % of the probability within INNER of CENTRE, and 90 % within OUTER."""
    inner, outer = cone(*CENTRE, INNER), cone(*CENTRE, OUTER)
    return [(inner, 0.5), (outer.difference(inner), 0.4), (outer.complement(), 0.1)]


@pytest.fixture
def merger_map(merger: list[tuple[MOC, float]], tmp_path: Path) -> Path:
    return write_map(tmp_path / "event.multiorder.fits", merger)


@pytest.fixture(scope="session")
def everywhere() -> tuple[np.ndarray, np.ndarray]:
    """Positions over the whole sky, some at the poles and near CENTRE: right ascensions and declinations in degrees."""
    rng = np.random.default_rng(11)
    ra = np.concatenate([rng.uniform(0, 360, 20_000), (CENTRE[0] + rng.normal(0, 20, 5000)) % 360, [0, 10, 200, 360]])
    dec = np.concatenate(
        [np.degrees(np.arcsin(rng.uniform(-1, 1, 20_000))), np.clip(CENTRE[1] + rng.normal(0, 10, 5000), -90, 90)]
    )
    return ra, np.concatenate([dec, [90, -90, 90, 0]])


def separation(ra: object, dec: object, ra2: np.ndarray, dec2: np.ndarray) -> np.ndarray:
    """Return the angles between positions in degrees, by the formula of Vincenty (1975)."""
    a, b, c, d = (np.radians(angle) for angle in (ra, dec, ra2, dec2))
    x = np.cos(b) * np.sin(d) - np.sin(b) * np.cos(d) * np.cos(c - a)
    y = np.hypot(np.cos(d) * np.sin(c - a), x)
    return np.asarray(np.degrees(np.arctan2(y, np.sin(b) * np.sin(d) + np.cos(b) * np.cos(d) * np.cos(c - a))))
