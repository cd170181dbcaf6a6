"""Regions of the sky: a MOC (multi-order coverage), or the credible region of a multi-order map of probabilities.

Sources: MOC 2.0 (IVOA recommendation, https://www.ivoa.net/documents/MOC/); the multi-order maps of LIGO, Virgo and
KAGRA (https://emfollow.docs.ligo.org/userguide/tutorial/multiorder_skymaps.html). `mocpy` reads and searches MOCs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from broker_filter.sky.fits_table import FITS_MAGIC, open_table
from broker_filter.sky.tracked import SkyFileError

if TYPE_CHECKING:
    from astropy.io import fits

MAX_CELLS = 4_000_000
"""The most cells of a map. Maps of mergers have some ten thousand; a full sky in cells of 7 arcmin has 3.1 million."""
MAX_ORDER = 29
"""The order of the smallest HEALPix cells that a 64-bit integer can name."""
BASE_CELLS = 12
"""The number of HEALPix cells of order 0."""
FIRST_CELLS = 4 ** np.arange(1, MAX_ORDER + 3)
"""UNIQ of the first cell of each order, up to MAX_ORDER + 1."""
FULL_SKY = 4 * np.pi
"""The solid angle of the sky in steradians."""
TOTAL_TOLERANCE = 0.01
"""How far the total probability of a map may be from 1. Published maps are within 1e-4."""
MOST_MESSAGE_CHARACTERS = 200
"""The maximum length of mocpy's message in an error; it may quote the file."""
ICRS = ("C", "ICRS", "EQUATORIAL", "CELESTIAL")
"""The values of the FITS keyword COORDSYS that stand for ICRS."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the sky."""

    moc: Any
    """A mocpy.MOC in ICRS."""

    def __str__(self) -> str:
        return f"{self.moc.sky_fraction:.3%} of the sky"

    def contains(self, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which of N positions are in the region, bool[N]. `ra`, `dec`: degrees; none may be missing."""
        from astropy import units

        inside = self.moc.contains_lonlat(lon=ra * units.deg, lat=dec * units.deg)
        return np.asarray(inside, dtype=np.bool_)


def read_region(path: Path, data: bytes, level: float | None) -> Region:
    """Return the region in a file.

    `data`: the bytes of the file `path`. `level`: for a multi-order map, the probability that the region holds: the
    region is the smallest set of cells with at least this probability. None for a plain MOC, as FITS, JSON or text.

    Raises SkyFileError if the file is none of these, if a map has no level, or if a plain MOC has one.
    """
    if data.startswith(FITS_MAGIC):
        with open_table(path, data) as table:
            names = {name.upper(): name for name in table.columns.names}
            _check_frame(path, table.header)
            if "PROBDENSITY" in names:
                if level is None:
                    raise SkyFileError(f"{path}: a map of probabilities needs a level: in_moc(file, 0.9)")
                if "UNIQ" not in names:
                    raise SkyFileError(f"{path}: no column UNIQ: not a multi-order map")
                return _credible_region(path, table.data[names["UNIQ"]], table.data[names["PROBDENSITY"]], level)
            if str(table.header.get("ORDERING")).upper() in ("NESTED", "RING"):
                raise SkyFileError(
                    f"{path}: a HEALPix map of one order; use the multi-order file (*.multiorder.fits), or convert "
                    "this one with ligo-skymap-unflatten"
                )
    if level is not None:
        raise SkyFileError(f"{path}: no probabilities (column PROBDENSITY) for a level; a plain MOC has no level")
    return _plain(path, data)


def _check_frame(path: Path, header: fits.Header) -> None:
    frame = str(header.get("COORDSYS", ICRS[0])).strip().upper()
    if frame not in ICRS:
        raise SkyFileError(f"{path}: coordinates in the frame {frame!r} (COORDSYS), not in ICRS")


def _credible_region(path: Path, uniq: NDArray[Any], density: NDArray[Any], level: float) -> Region:
    """Return the smallest set of cells that together hold the probability `level`.

    `uniq` [N]: cells as 4 * 4**order + index. `density` [N]: probability per steradian.
    """
    from mocpy import MOC

    if not len(uniq) or len(uniq) > MAX_CELLS:
        raise SkyFileError(f"{path}: {len(uniq):,} cells; a map has 1 to {MAX_CELLS:,}")
    if uniq.ndim != 1 or density.ndim != 1 or uniq.dtype.kind not in "iu" or density.dtype.kind not in "fiu":
        raise SkyFileError(f"{path}: UNIQ or PROBDENSITY does not hold one number in each row")
    cells, density = uniq.astype(np.int64), density.astype(np.float64)
    order = np.searchsorted(FIRST_CELLS[1:], cells, side="right")
    area = FULL_SKY / BASE_CELLS / 4.0**order
    if cells.min() < FIRST_CELLS[0] or order.max() > MAX_ORDER or area.sum() > FULL_SKY * (1 + TOTAL_TOLERANCE):
        raise SkyFileError(f"{path}: UNIQ does not number separate HEALPix cells")
    if not np.isfinite(density).all() or (density < 0).any():
        raise SkyFileError(f"{path}: PROBDENSITY has values that are negative, NaN or infinite")
    total = (density * area).sum()
    if abs(total - 1) > TOTAL_TOLERANCE:
        raise SkyFileError(f"{path}: the probabilities have the sum {total:.3g}, not 1")
    with _mocpy_errors(path):
        moc = MOC.from_valued_healpix_cells(
            cells.astype(np.uint64),
            density / total,
            max_depth=int(order.max()),
            values_are_densities=True,
            cumul_to=level,
            strict=False,  # the cell in which the sum reaches the level belongs to the region
        )
    return Region(moc)


def _plain(path: Path, data: bytes) -> Region:
    """Return the region of a MOC without probabilities."""
    from mocpy import MOC

    with _mocpy_errors(path):
        if data.startswith(FITS_MAGIC):
            moc = MOC.load(path, format="fits")
        else:
            text = data.decode()
            moc = MOC.from_string(text, format="json" if text.lstrip().startswith("{") else "ascii")
    if moc.empty():
        raise SkyFileError(f"{path}: a MOC that covers no part of the sky")
    return Region(moc)


@contextmanager
def _mocpy_errors(path: Path) -> Iterator[None]:
    """Turn an error of mocpy within the block into a SkyFileError."""
    try:
        yield
    except UnicodeDecodeError:
        raise SkyFileError(f"{path}: neither a FITS file nor text: not a MOC") from None
    except BaseException as error:  # a panic of mocpy's compiled code is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        message = " ".join(str(error).split())[:MOST_MESSAGE_CHARACTERS]
        raise SkyFileError(f"{path}: not a MOC: {message}") from None
