"""Real LSST alerts for the embedder: the packets with their cutouts, and earlier detections of their objects.

The earlier detections have metadata and a light curve but no images. They show the embedder more objects than the
packets at hand. Labels and `reliability` are loaded for evaluation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, LightCurves, Measurement, Survey
from broker_filter.scoring.bundle import Inputs
from broker_filter.scoring.labels import UNLABELLED
from broker_filter.scoring.networks.snrnet import METADATA
from broker_filter.streaming.archives import read_packets
from training.bundles.rubin_data import LSSTCAM_VISIT, SIMULATED_DAY
from training.bundles.train_classes import COLUMN
from training.data.detection_tables import integers, numbers
from training.embedding.train_embedder import Named, decode
from training.errors import DatasetError

DETECTIONS_PER_OBJECT = 8
"""Earlier detections that are drawn from one object. Detections of one object are alike, and the contrastive loss
would have to tell them apart."""
LONGEST_HISTORY = 64
"""Number of latest light-curve points of an earlier detection that are kept; the embedder takes fewer."""
CLASSES = ("asteroid", "variable")
VARIABLE: dict[object, int] = {"AGN": 1, "VS": 1}
"""The weak labels of the class `variable`, by position: active nuclei and variable stars, of which there are few."""
OF_EVALUATION = ("visit", "reliability", "sso")
"""Metadata columns that only the evaluation reads."""
EARLIER = ("prvDiaSources", "prvDiaForcedSources")
"""Columns of a table of alerts that list earlier detections and forced photometry."""
TIME, FLUX, FLUX_ERR = "midpointMjdTai", "psfFlux", "psfFluxErr"


@dataclass(frozen=True, slots=True)
class Histories:
    """N detections of LSST objects without images, each with the light curve that was known at its time."""

    metadata: NDArray[np.float64]  # [N, len(METADATA)] NaN where missing
    mjd: NDArray[np.float64]  # [N]
    light_curves: LightCurves  # of the N detections; the last point is the detection itself
    object_id: NDArray[np.str_]  # [N] diaObjectId
    visit: NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.mjd)


@dataclass(frozen=True, slots=True)
class _Points:
    """M measurements of objects: detections, or forced photometry."""

    object_id: NDArray[np.int64]  # [M]
    mjd: NDArray[np.float64]  # [M]
    band: NDArray[np.uint8]  # [M]
    flux: NDArray[np.float32]  # [M]
    flux_err: NDArray[np.float32]  # [M]
    table: pa.Table


@dataclass(frozen=True, slots=True)
class LsstAlerts:
    """N LSST alerts; `alerts[rows]` selects a subset."""

    named: Named  # with the columns of METADATA and OF_EVALUATION
    visit: NDArray[np.int64]  # [N]
    reliability: NDArray[np.float64]  # [N]
    label: NDArray[np.int64]  # [N] index into CLASSES, or UNLABELLED

    def __len__(self) -> int:
        return len(self.visit)

    def __getitem__(self, rows: NDArray[np.bool_]) -> LsstAlerts:
        named = Named(self.named.raw[rows], self.named.alert_id[rows], self.named.object_id[rows])
        return LsstAlerts(named, self.visit[rows], self.reliability[rows], self.label[rows])

    @property
    def of_lsstcam(self) -> NDArray[np.bool_]:
        """Whether an alert is of LSSTCam on the sky, bool[N]."""
        return (self.visit > LSSTCAM_VISIT) & (self.visit < SIMULATED_DAY)


def load_lsst_alerts(
    inputs: Sequence[Path], schemas: str | None, labels: Path, wanted: Inputs, columns: Sequence[str] = METADATA
) -> LsstAlerts:
    """Return all LSST alerts of files, folders and archives, each alert id once.

    An alert is an asteroid if its packet names a known solar-system object; the class `variable` is read from the
    Parquet file `labels`, which has the columns diaSourceId and weak_class. `wanted`: the inputs of the network;
    `columns`: the metadata columns that are decoded, in addition to OF_EVALUATION.

    Raises DatasetError if there is no alert of LSSTCam.
    """
    named = decode(read_packets(inputs), wanted, (*columns, *OF_EVALUATION), schemas)
    assert named.raw.survey is not None
    of_lsst: NDArray[np.bool_] = named.raw.survey == Survey.LSST
    named = Named(named.raw[of_lsst], named.alert_id[of_lsst], named.object_id[of_lsst])
    visit, reliability, sso = (named.raw.metadata[:, named.raw.columns.index(name)] for name in OF_EVALUATION)
    table = parquet.read_table(labels, columns=["diaSourceId", COLUMN]).to_pydict()
    weak = dict(zip(table["diaSourceId"], table[COLUMN], strict=True))
    label = np.array([VARIABLE.get(weak.get(one), UNLABELLED) for one in named.alert_id.tolist()], np.int64)
    label = np.where(sso > 0, CLASSES.index("asteroid"), label)
    alerts = LsstAlerts(named, np.nan_to_num(visit).astype(np.int64), reliability, label)
    if not alerts.of_lsstcam.any():
        raise DatasetError(f"{', '.join(map(str, inputs))}: no alert of LSSTCam could be decoded")
    return alerts


def load_histories(tables: Sequence[Path], seed: int) -> Histories:
    """Return up to DETECTIONS_PER_OBJECT random detections of each object in Parquet files.

    A file holds alerts with the columns EARLIER, or one row for each diaSource, or one row for each forced measurement;
    files of other rows are ignored. Raises DatasetError if there is no detection.
    """
    listed = [part for file in tables for part in _rows(file)]
    detections = [_points(table) for table in listed if "diaSourceId" in table.column_names]
    forced = [_points(table) for table in listed if "diaSourceId" not in table.column_names]
    if not detections:
        raise DatasetError(f"{', '.join(map(str, tables))}: no table has diaSources")
    source, visit = (
        np.concatenate([integers(part.table, name) for part in detections]) for name in ("diaSourceId", "visit")
    )
    metadata = np.concatenate(
        [np.stack([numbers(part.table, name) for name in METADATA], axis=1) for part in detections]
    )
    first = np.unique(source, return_index=True)[1]
    objects, mjd, band, flux, flux_err = (
        np.concatenate([*(getattr(part, name) for part in detections), *(getattr(part, name) for part in forced)])
        for name in ("object_id", "mjd", "band", "flux", "flux_err")
    )
    kind = np.full(len(mjd), Measurement.FORCED, np.uint8)
    kind[: len(source)] = Measurement.DETECTION
    points = np.concatenate([first, _each_once(objects, mjd, band, len(source))])
    points = points[np.isfinite(mjd[points]) & np.isfinite(flux[points]) & (objects[points] != 0)]
    points = points[np.lexsort((mjd[points], objects[points]))]
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    curves: list[NDArray[np.int64]] = []
    ends = np.flatnonzero(np.diff(objects[points])) + 1
    for own in np.split(points, ends):
        found = own[kind[own] == Measurement.DETECTION]
        for one in np.sort(rng.permutation(found)[:DETECTIONS_PER_OBJECT]).tolist():
            before = own[(mjd[own] < mjd[one])]
            chosen.append(one)
            curves.append(np.append(before, one)[-LONGEST_HISTORY:])
    if not chosen:
        raise DatasetError(f"{', '.join(map(str, tables))}: no diaSource has an object, a time and a flux")
    offsets = np.concatenate([[0], np.cumsum([len(curve) for curve in curves])])
    of = np.concatenate(curves)
    rows = np.array(chosen)
    return Histories(
        metadata[rows],
        mjd[rows],
        LightCurves(offsets, mjd[of], band[of], flux[of], flux_err[of], kind[of]),
        objects[rows].astype(np.str_),
        visit[rows],
    )


def _each_once(
    objects: NDArray[np.int64], mjd: NDArray[np.float64], band: NDArray[np.uint8], start: int
) -> NDArray[np.int64]:
    """Return the rows from `start` on, without measurements of the same object, time and band."""
    number = np.unique(objects[start:], return_inverse=True)[1]  # ids have more digits than float64
    keys = np.stack([number, mjd[start:], band[start:]], axis=1)
    return start + np.unique(keys, axis=0, return_index=True)[1]


def _rows(file: Path) -> list[pa.Table]:
    """Return the tables of measurements in a Parquet file: its own rows, or those that its alerts list."""
    names = parquet.read_schema(file).names
    if set(EARLIER) & set(names):
        table = parquet.read_table(file, columns=[name for name in EARLIER if name in names])
        lists = [table[name].combine_chunks() for name in table.column_names]
        return [
            pa.Table.from_struct_array(each.flatten())
            for each in lists
            if pa.types.is_struct(getattr(each.type, "value_type", pa.null())) and len(each.flatten())
        ]
    needed = {"diaObjectId", TIME, FLUX, FLUX_ERR, "band"}
    return [parquet.read_table(file)] if needed <= set(names) else []


def _points(table: pa.Table) -> _Points:
    letters = table["band"].fill_null("").to_pylist()
    band = np.array([BANDS.index(one) if one in BANDS else UNKNOWN_BAND for one in letters], np.uint8)
    flux, flux_err = (numbers(table, name).astype(np.float32) for name in (FLUX, FLUX_ERR))
    return _Points(integers(table, "diaObjectId"), numbers(table, TIME), band, flux, flux_err, table)
