"""Regions from maps of probabilities and from plain MOCs, against angular separations; errors of files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from mocpy import MOC

from broker_filter.sky.region import Region, read_region
from broker_filter.sky.tracked import SkyFileError
from tests.sky.conftest import CENTRE, INNER, OUTER, cone, separation, write_map

Positions = tuple[np.ndarray, np.ndarray]
BORDER = 0.25
"""Degrees. The cells of a border have diagonals up to 0.25 degrees; positions that close may be on either side."""


def region(path: Path, level: float | None = None) -> Region:
    return read_region(path, path.read_bytes(), level)


def assert_is_cone(found: Region, ra: float, dec: float, radius: float, positions: Positions) -> None:
    apart = separation(ra, dec, *positions)
    clear = np.abs(apart - radius) > BORDER
    assert (apart < radius)[clear].any()
    np.testing.assert_array_equal(found.contains(*positions)[clear], (apart < radius)[clear])


@pytest.mark.parametrize(("level", "radius"), [(0.5, INNER), (0.9, OUTER)])
def test_region_of_a_map_holds_the_probability(
    merger_map: Path, level: float, radius: float, everywhere: Positions
) -> None:
    assert_is_cone(region(merger_map, level - 1e-6), *CENTRE, radius, everywhere)


def test_region_is_the_smallest_set_of_cells_with_the_probability(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    depth = np.concatenate([np.full(704, 3), np.full(1024, 5)])  # 64 cells of order 3 are divided into cells of order 5
    index = np.concatenate([np.arange(64, 768), np.arange(1024)])
    area = np.pi / 3 / 4.0**depth
    density = rng.exponential(size=len(depth)) ** 2
    density /= (density * area).sum()
    moc = [MOC.from_healpix_cells(index[[i]].astype(np.uint64), depth[[i]].astype(np.uint8), 5) for i in range(1728)]
    file = write_map(tmp_path / "map.fits", list(zip(moc, density * area, strict=True)))
    best_first = np.argsort(-density)
    sums = np.cumsum((density * area)[best_first])
    for level in (0.05, 0.5, 0.9, 0.99, 1.0):
        needed = best_first[: np.searchsorted(sums, level * (1 - 1e-12)) + 1]
        expected = MOC.from_healpix_cells(index[needed].astype(np.uint64), depth[needed].astype(np.uint8), 5)
        assert region(file, level).moc == expected


@pytest.mark.parametrize("form", ["fits", "json", "ascii"])
def test_plain_moc_is_read_in_each_format(form: str, tmp_path: Path, everywhere: Positions) -> None:
    for ra, dec, radius in ((CENTRE[0], CENTRE[1], 7.0), (40.0, 89.0, 3.0), (0.0, -90.0, 4.0)):
        cone(ra, dec, radius).save(tmp_path / "moc", format=form, overwrite=True)
        assert_is_cone(region(tmp_path / "moc"), ra, dec, radius, everywhere)


def nuniq(path: Path) -> None:
    """Write a MOC of version 1, whose cells are listed one by one."""
    cells = cone(10, 20, 3).uniq_hpx.astype(np.int64)
    table = fits.BinTableHDU.from_columns([fits.Column("UNIQ", "K", array=cells)])
    table.header.update(PIXTYPE="HEALPIX", ORDERING="NUNIQ", COORDSYS="C", MOCORDER=9)
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


def test_moc_of_version_1_is_read(tmp_path: Path, everywhere: Positions) -> None:
    nuniq(tmp_path / "moc.fits")
    assert_is_cone(region(tmp_path / "moc.fits"), 10, 20, 3, everywhere)


def flat(path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("PROB", "D", array=np.full(48, 1 / 48))])
    table.header.update(PIXTYPE="HEALPIX", ORDERING="NESTED", NSIDE=2, COORDSYS="C")
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


def columns(path: Path, **values: object) -> None:
    made = [fits.Column(name, "D" if name == "PROBDENSITY" else "K", array=array) for name, array in values.items()]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(made)]).writeto(path)


def enlarged(path: Path) -> None:
    """Write a MOC whose header states a trillion ranges. mocpy would end the process for lack of memory."""
    cone(10, 20, 3).save(path, format="fits")
    data = path.read_bytes()
    card = re.search(rb"NAXIS2  =.{71}", data)
    assert card
    path.write_bytes(data.replace(card[0], b"NAXIS2  =        1000000000000".ljust(80)))


WHOLE = np.arange(4, 16)  # the cells of order 0
UNIFORM = np.full(12, 1 / (4 * np.pi))


@pytest.mark.parametrize(
    ("write", "level", "message"),
    [
        (lambda path: path.write_bytes(b"not a map"), None, "not a MOC"),
        (lambda path: path.write_bytes(b""), None, "not a MOC"),
        (lambda path: path.write_bytes(b"\xff\xfe\0\1"), None, "neither a FITS file nor text"),
        (lambda path: path.write_bytes(b"5/1-99999999999"), None, "not a MOC"),
        (lambda path: path.write_text(json.dumps({"a": [1]})), None, "covers no part of the sky"),
        (lambda path: path.write_text(json.dumps([1])), None, "not a MOC"),
        (lambda path: path.write_text("3/0-5"), 0.9, r"no probabilities \(column PROBDENSITY\)"),
        (nuniq, 0.9, r"no probabilities \(column PROBDENSITY\)"),
        (flat, 0.9, r"HEALPix map of one order; use the multi-order file"),
        (lambda path: fits.PrimaryHDU(np.zeros((3, 3))).writeto(path), None, "without a binary table"),
        (lambda path: path.write_bytes(b"SIMPLE  =" + b"x" * 5000), None, "FITS"),
        (lambda path: columns(path, UNIQ=WHOLE, PROBDENSITY=UNIFORM), None, "needs a level"),
        (lambda path: columns(path, OTHER=WHOLE, PROBDENSITY=UNIFORM), 0.9, "no column UNIQ"),
        (lambda path: columns(path, UNIQ=WHOLE, PROBDENSITY=UNIFORM * 2), 0.9, "have the sum 2, not 1"),
        (lambda path: columns(path, UNIQ=WHOLE, PROBDENSITY=UNIFORM * np.nan), 0.9, "negative, NaN or infinite"),
        (lambda path: columns(path, UNIQ=WHOLE - 1, PROBDENSITY=UNIFORM), 0.9, "does not number separate"),
        (lambda path: columns(path, UNIQ=WHOLE // 2 * 2, PROBDENSITY=UNIFORM / 2), 0.9, "have the sum|separate"),
        (lambda path: columns(path, UNIQ=np.r_[WHOLE, 16], PROBDENSITY=np.r_[UNIFORM, 0]), 0.9, "separate"),
        (lambda path: columns(path, UNIQ=np.full(12, 2**62), PROBDENSITY=UNIFORM), 0.9, "separate"),
        (enlarged, None, "cut off"),
    ],
)
def test_file_that_is_no_region_is_an_error_that_names_it(
    write: Callable[[Path], object], level: float | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "event"
    write(file)
    with pytest.raises(SkyFileError, match=message) as caught:
        region(file, level)
    assert str(file) in str(caught.value)


def test_map_in_galactic_coordinates_is_refused(merger: list[tuple[MOC, float]], tmp_path: Path) -> None:
    with pytest.raises(SkyFileError, match=r"frame 'G' \(COORDSYS\), not in ICRS"):
        region(write_map(tmp_path / "map.fits", merger, COORDSYS="G"), 0.9)


def test_damaged_map_is_an_error_and_never_ends_the_process(merger_map: Path) -> None:
    data = merger_map.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data[: int(rng.integers(1, len(data)))] if rng.random() < 0.3 else data)
        for place in rng.integers(0, min(len(damaged), 6000), 4):
            damaged[place] = rng.integers(0, 256)
        merger_map.write_bytes(damaged)
        for level in (0.9, None):
            try:
                read_region(merger_map, bytes(damaged), level)
            except SkyFileError:
                refused += 1
    assert refused >= 60  # a map without a level is always refused
