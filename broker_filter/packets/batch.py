"""Alerts in columns: what decoding writes and everything after it reads. Holds data and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.packet import Packet
from broker_filter.packets.schema import WriterSchema

BANDS = ("u", "g", "r", "i", "z", "y")
"""Filter passbands; a band's code is its index here."""
UNKNOWN_BAND = 255
CUTOUTS = ("science", "template", "difference")
"""The order of the cutouts along axis 1 of `AlertBatch.cutouts`."""


class Survey(IntEnum):
    """The surveys whose alerts are understood; codes of `AlertBatch.survey`."""

    ZTF = 0
    LSST = 1

    def __str__(self) -> str:
        return self.name.lower()


class Measurement(IntEnum):
    """What a light-curve point is; codes of `LightCurves.kind`."""

    DETECTION = 0
    """A difference-image detection (ZTF candidate and prv_candidates; LSST diaSource and prvDiaSources)."""
    UPPER_LIMIT = 1
    """A non-detection: flux 0, error one fifth of the 5-sigma limiting flux."""
    FORCED = 2
    """Forced photometry at the object's position (ZTF fp_hists; LSST prvDiaForcedSources)."""


@dataclass(frozen=True, slots=True)
class AlertIdentity:
    """What an alert is called and where it stands, as far as it could be read.

    `mjd` is as the survey publishes it: ZTF start of exposure (UTC), LSST midpoint (TAI). `ra`, `dec` in degrees
    (ICRS).
    """

    alert_id: int | None
    object_id: str | None
    survey: Survey | None
    schema_version: str | None
    mjd: float | None
    ra: float | None
    dec: float | None
    band: str | None


class Record(NamedTuple):
    """An alert's bytes in its packet: the undecoded Avro body that output records are spliced from.

    `body` is a view into the packet's bytes (or into a decompressed block). `cutout_spans` are the [start, end) ranges
    within `body` of the three encoded cutout fields, union branch included, in the writer schema's order: what to leave
    out for `payload: no_cutouts`.
    """

    body: memoryview
    schema: WriterSchema
    cutout_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LightCurves:
    """Ragged columns over N alerts: alert i owns points `offsets[i]:offsets[i + 1]`, in order of time.

    Difference flux and its error are in nanojansky (AB) for every survey; negative where the source is fainter than in
    the template.
    """

    offsets: NDArray[np.int64]  # [N + 1]
    mjd: NDArray[np.float64]  # [M] days, in the survey's own scale (see AlertIdentity)
    band: NDArray[np.uint8]  # [M] index into BANDS, or UNKNOWN_BAND
    flux: NDArray[np.float32]  # [M] nJy
    flux_err: NDArray[np.float32]  # [M] nJy
    kind: NDArray[np.uint8]  # [M] Measurement

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice | NDArray[np.bool_] | NDArray[np.int64]) -> LightCurves:
        """The light curves of the alerts `rows`; a view where those are consecutive."""
        begin, end = self.offsets[:-1][rows], self.offsets[1:][rows]
        offsets = np.concatenate([[0], np.cumsum(end - begin)])
        points: slice | NDArray[np.int64]
        if np.array_equal(begin[1:], end[:-1]):
            points = slice(int(begin[0]), int(end[-1])) if len(begin) else slice(0)
        else:
            points = np.repeat(begin - offsets[:-1], end - begin) + np.arange(offsets[-1])
        return LightCurves(
            offsets, self.mjd[points], self.band[points], self.flux[points], self.flux_err[points], self.kind[points]
        )

    @classmethod
    def join(cls, parts: Sequence[LightCurves]) -> LightCurves:
        """Those of several batches, of which there is one at least, one after the other."""
        return cls(
            np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))]),
            np.concatenate([part.mjd for part in parts]),
            np.concatenate([part.band for part in parts]),
            np.concatenate([part.flux for part in parts]),
            np.concatenate([part.flux_err for part in parts]),
            np.concatenate([part.kind for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class AlertBatch:
    """N decoded alerts in columns.

    `cutouts` holds each stamp's pixels bit for bit as published (NaN and 3.4e38 included), zero outside `cutout_box`,
    the rectangle (y0, x0, height, width) of real pixels: ZTF's short stamps stand at the top left, LSST's are centred,
    cropped where larger than S. `metadata` is float64 because times and positions need it; a value that is missing
    (null, infinite, or the survey's sentinel) is NaN.
    """

    packets: Sequence[Packet]
    packet_index: NDArray[np.int32]  # [N] which packet an alert came from
    record_index: NDArray[np.int32]  # [N] which record of that packet
    records: Sequence[Record]  # N
    survey: NDArray[np.uint8]  # [N] Survey
    schema_version: Sequence[str]  # N
    alert_id: NDArray[np.int64]  # [N] candid or diaSourceId
    object_id: Sequence[str]  # N
    mjd: NDArray[np.float64]  # [N]
    ra: NDArray[np.float64]  # [N] degrees
    dec: NDArray[np.float64]  # [N] degrees
    band: NDArray[np.uint8]  # [N] index into BANDS, or UNKNOWN_BAND
    cutouts: NDArray[np.float32]  # [N, 3, S, S] science, template, difference
    cutout_box: NDArray[np.int16]  # [N, 3, 4] y0, x0, height, width
    columns: tuple[str, ...]  # F names of the metadata columns
    metadata: NDArray[np.float64]  # [N, F]
    light_curves: LightCurves

    def __len__(self) -> int:
        return len(self.alert_id)

    def column(self, name: str) -> NDArray[np.float64]:
        """The metadata column `name`, float64[N]. Raises KeyError where there is none."""
        if name not in self.columns:
            raise KeyError(name)
        return self.metadata[:, self.columns.index(name)]

    def identity(self, i: int) -> AlertIdentity:
        """Alert i's names and place, as plain Python values."""
        band = int(self.band[i])
        return AlertIdentity(
            alert_id=int(self.alert_id[i]),
            object_id=self.object_id[i],
            survey=Survey(int(self.survey[i])),
            schema_version=self.schema_version[i],
            mjd=float(self.mjd[i]),
            ra=float(self.ra[i]),
            dec=float(self.dec[i]),
            band=None if band == UNKNOWN_BAND else BANDS[band],
        )
