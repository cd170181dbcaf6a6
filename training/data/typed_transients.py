"""Light curves of typed transients, and the alert histories that they came with.

The tables are those of the Bright Transient Survey: the detections of ZTF's alerts of each object, and its
spectroscopic type. They say nothing on upper limits, forced photometry and negative differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, LightCurves, Measurement
from broker_filter.packets.photometry import MAGNITUDES_PER_E, nanojansky
from training.data.detection_tables import numbers
from training.errors import DatasetError

HISTORY_DAYS = 30.0
"""Length of the history in ZTF's packets (prv_candidates)."""
OBJECT, TYPE = "ZTFID", "type"
CURVE_COLUMNS = (OBJECT, "mjd", "band", "mag", "magerr")
BAND_NAMES = {"g": "g", "R": "r", "r": "r", "i": "i"}
"""Names of ZTF's filters in the table of light curves, and their names in BANDS."""


@dataclass(frozen=True, slots=True)
class Transients:
    """The detections of O objects, and the alerts at which they came: one alert at each detection."""

    object_id: NDArray[np.str_]  # [O]
    label: NDArray[np.int64]  # [O] index of the class
    points: LightCurves  # of the O objects
    owner: NDArray[np.int64]  # [M] object of each point, and so of the alert at this point
    begin: NDArray[np.int64]  # [M] first point in the history of the alert at each point

    @property
    def detections(self) -> NDArray[np.int64]:
        """The number of detections in the history of each alert, the alert itself included, int64[M]."""
        return np.arange(len(self.begin)) - self.begin + 1

    def alerts(self, rows: NDArray[np.int64]) -> tuple[LightCurves, NDArray[np.float64]]:
        """Return the light curves that the packets of the alerts `rows` [N] hold, and the alerts' times float64[N]."""
        counts = self.detections[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        chosen = np.repeat(self.begin[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
        all_ = self.points
        curves = LightCurves(
            offsets, all_.mjd[chosen], all_.band[chosen], all_.flux[chosen], all_.flux_err[chosen], all_.kind[chosen]
        )
        return curves, all_.mjd[rows]


def read_transients(curves: Path, objects: Path, classes: Mapping[str, Sequence[str]]) -> Transients:
    """Return the objects whose type belongs to one of the `classes`, which name their types.

    Raises DatasetError if a table cannot be read, if it lacks a column, or if no object is of a class.
    """
    known = _read(objects, (OBJECT, TYPE))
    class_of = {name: c for c, types in enumerate(classes.values()) for name in types}
    label_of = {
        name: class_of[kind]
        for name, kind in zip(known[OBJECT].to_pylist(), known[TYPE].to_pylist(), strict=True)
        if kind in class_of
    }
    table = _read(curves, CURVE_COLUMNS)
    owner, mjd, magnitude, error = (
        np.array(table[OBJECT].to_pylist()),
        *(numbers(table, c) for c in ("mjd", "mag", "magerr")),
    )
    band = np.array([BANDS.index(BAND_NAMES[name]) if name in BAND_NAMES else -1 for name in table["band"].to_pylist()])
    usable = np.isin(owner, list(label_of)) & np.isfinite(mjd + magnitude + error) & (band >= 0)
    if not usable.any():
        raise DatasetError(
            f"{curves}: no detection of an object that has one of the types {', '.join(class_of)} in {objects}"
        )
    order = np.flatnonzero(usable)[np.lexsort((mjd[usable], owner[usable]))]
    object_id, index, counts = np.unique(owner[order], return_inverse=True, return_counts=True)
    flux = nanojansky(magnitude[order])
    points = LightCurves(
        np.concatenate([[0], np.cumsum(counts)]),
        mjd[order],
        band[order].astype(np.uint8),
        flux.astype(np.float32),
        (flux * error[order] / MAGNITUDES_PER_E).astype(np.float32),
        np.full(len(order), Measurement.DETECTION, np.uint8),
    )
    label = np.array([label_of[name] for name in object_id.tolist()], np.int64)
    return Transients(object_id, label, points, index.astype(np.int64), _begin(points))


def _begin(points: LightCurves) -> NDArray[np.int64]:
    """Return the first point of the history of the alert at each point, int64[M]."""
    begin = [
        start + np.searchsorted(points.mjd[start:end], points.mjd[start:end] - HISTORY_DAYS)
        for start, end in zip(points.offsets[:-1].tolist(), points.offsets[1:].tolist(), strict=True)
    ]
    return np.concatenate(begin).astype(np.int64)


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path}: cannot be read as a Parquet table with the columns {', '.join(columns)}: {error}"
        ) from error
