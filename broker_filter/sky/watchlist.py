"""Lists of targets with positions, and the nearest target of a position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.sky_coordinates import unit_vectors
from broker_filter.sky.tracked import SkyFileError

if TYPE_CHECKING:
    import pyarrow as pa
    from threadpoolctl import ThreadpoolController

MAX_NAME_CHARACTERS = 200
"""The longest name of a target; names are written into output records."""
NO_TARGET = -1
"""The row of a position without a target within the radius."""
CHORD_MARGIN = 1 + 1e-9
"""The tree is searched a little farther than the radius, so that rounding loses no target."""


class Nearest(NamedTuple):
    """The nearest target of each of N positions within a radius."""

    row: NDArray[np.int64]  # [N] row of the target in the list, or NO_TARGET
    separation: NDArray[np.float64]  # [N] arcsec; NaN without a target


@dataclass(frozen=True, slots=True)
class Watchlist:
    """M targets, in the order of the file."""

    names: pa.StringArray  # M
    tree: Any
    """A pykdtree.kdtree.KDTree of the unit vectors of the targets, float64[M, 3]."""
    openmp: ThreadpoolController
    """The copies of OpenMP in the process; pykdtree uses its own, or that of torch if it was imported before."""

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return f"{len(self):,} target{'s' * (len(self) != 1)}"

    def name(self, row: int) -> str:
        """Return the name of the target in a row."""
        return str(self.names[row].as_py())

    def nearest(self, ra: NDArray[np.float64], dec: NDArray[np.float64], radius: float) -> Nearest:
        """Return the nearest target of each position. `ra`, `dec`: degrees [N]; none missing. `radius`: arcsec.

        The search uses one thread. For a batch, more threads would take many times more CPU time by waiting for each
        other than by searching, and decoding needs the other cores.
        """
        chord = 2 * np.sin(np.radians(radius / 3600) / 2) * CHORD_MARGIN
        with self.openmp.limit(limits=1):
            distance, row = self.tree.query(unit_vectors(ra, dec), k=1, distance_upper_bound=chord)
        with np.errstate(invalid="ignore"):  # the distance is infinite where there is no target
            separation = np.degrees(2 * np.arcsin(distance / 2)) * 3600
        within = separation <= radius
        return Nearest(np.where(within, row.astype(np.int64), NO_TARGET), np.where(within, separation, np.nan))


def read_watchlist(path: Path, data: bytes) -> Watchlist:
    """Return the targets in a file. `data`: the bytes of the file `path`; `read_targets` describes the formats.

    Raises SkyFileError if the file is no table of targets, or if a target has no position or too long a name.
    """
    from pykdtree import kdtree
    from threadpoolctl import ThreadpoolController

    from broker_filter.sky.target_tables import read_targets  # imports pyarrow, which takes 0.2 s

    names, ra, dec = read_targets(path, data)
    _check_positions(path, ra, dec)
    _check_names(path, names)
    tree = kdtree.KDTree(np.ascontiguousarray(unit_vectors(ra % 360, dec)))
    return Watchlist(names, tree, ThreadpoolController().select(user_api="openmp"))


def _check_positions(path: Path, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> None:
    if not len(ra):
        raise SkyFileError(f"{path}: no targets")
    good = (np.abs(ra) <= 360) & (np.abs(dec) <= 90)  # False for NaN
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise SkyFileError(f"{path}: row {row + 1}: ({ra[row]}, {dec[row]}) is no position in degrees")


def _check_names(path: Path, names: pa.StringArray) -> None:
    import pyarrow.compute as pc

    too_long = pc.greater(pc.utf8_length(names), MAX_NAME_CHARACTERS)
    if pc.any(too_long).as_py():
        row = pc.index(too_long, True).as_py()
        raise SkyFileError(f"{path}: row {row + 1}: a name of more than {MAX_NAME_CHARACTERS} characters")
