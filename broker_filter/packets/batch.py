"""Alerts in columns: the output of decoding, and the input of all later stages. This module only holds data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.writer_schema import WriterSchema

BANDS = ("u", "g", "r", "i", "z", "y")
"""Filter passbands. The code of a band is its index in this tuple."""
UNKNOWN_BAND = 255
"""The code of a band that is not one of `BANDS`, or is missing."""
CUTOUTS = ("science", "template", "difference")
"""The order of the cutouts along axis 1 of `AlertBatch.cutouts`."""
Plane = Literal["variance", "psf"]
"""An image that a survey publishes with each cutout: the variance of its pixels, or the point spread function."""
PLANES: tuple[Plane, ...] = get_args(Plane)
"""The order of the planes along the last axis of `AlertBatch.usable_planes`."""
PSF_SIZE = 31
"""The side P of PSF images, in pixels. LSST's have 33 to 55; their central 31 hold 99.0 to 100 % of the flux."""


class Survey(IntEnum):
    """The surveys whose alerts can be decoded; the codes in `AlertBatch.survey`."""

    ZTF = 0
    LSST = 1

    def __str__(self) -> str:
        return self.name.lower()


SURVEYS_WITH_PLANES = (Survey.LSST,)
"""The surveys that publish PLANES with their cutouts."""


class Measurement(IntEnum):
    """The kind of a light-curve point; the codes in `LightCurves.kind`."""

    DETECTION = 0
    """A difference-image detection (ZTF candidate and prv_candidates; LSST diaSource and prvDiaSources)."""
    UPPER_LIMIT = 1
    """A non-detection: the flux is 0, and its uncertainty is one fifth of the 5-sigma limiting flux."""
    FORCED = 2
    """Forced photometry at the object's position (ZTF fp_hists; LSST prvDiaForcedSources)."""


@dataclass(frozen=True, slots=True)
class AlertIdentity:
    """The ids, time, position and band of an alert; None for each value that could not be read.

    `mjd` is the time that the survey publishes: the start of the exposure (UTC) for ZTF, its midpoint (TAI) for LSST.
    `ra` and `dec` are in degrees (ICRS).
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
    """The undecoded Avro body of an alert, from which output records are spliced.

    `body`: a zero-copy view of the packet's bytes, or of a decompressed block. `cutout_spans`: the byte ranges
    [start, end) of the encoded cutout fields within `body`, including the index of the union branch, in the order of
    the writer's schema. `payload: no_cutouts` leaves these ranges out. An alert from a row of a table (`AlertRows`) has
    no body.
    """

    body: memoryview
    schema: WriterSchema
    cutout_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LightCurves:
    """The light curves of N alerts, M points in all, as ragged columns.

    Alert i owns the points `offsets[i]:offsets[i + 1]`, in order of time. `flux` is the difference flux in nanojansky
    for every survey, negative if the source is fainter than in the template; `flux_err` is the 1-sigma uncertainty.
    """

    offsets: NDArray[np.int64]  # [N + 1]
    mjd: NDArray[np.float64]  # [M] days, in the time scale of the survey (see AlertIdentity)
    band: NDArray[np.uint8]  # [M] index into BANDS, or UNKNOWN_BAND
    flux: NDArray[np.float32]  # [M] nJy
    flux_err: NDArray[np.float32]  # [M] nJy
    kind: NDArray[np.uint8]  # [M] Measurement

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice | NDArray[np.bool_] | NDArray[np.int64]) -> LightCurves:
        """Return the light curves of the alerts in `rows`; a zero-copy view if these rows are consecutive."""
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
        """Return the light curves of all `parts`, concatenated. Raises ValueError if `parts` is empty."""
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

    `cutouts` holds the pixels of each stamp bit for bit as published, including NaN and 3.4e38. `cutout_box` is the
    rectangle (y0, x0, height, width) of these pixels; the pixels outside it are zero. A ZTF stamp smaller than S is
    placed at pixel (0, 0), an LSST stamp is centred, and a stamp larger than S is cropped around its centre. `metadata`
    is float64 because times and positions need this precision. A missing value (null, infinite, or the sentinel of the
    survey) is NaN.

    `variance` and `psf` are None unless the decoder was asked for them. Their values are as published: the variance in
    nJy^2, placed as the cutouts are; the PSF image centred and cropped to PSF_SIZE pixels, or zero around smaller ones.
    A plane that is absent or cannot be used is NaN, as always for ZTF, which publishes none. If no survey of the batch
    publishes planes, `variance` and `psf` are read-only.

    >>> from broker_filter import Decoder, Packet
    >>> from broker_filter.simulate import simulate_night
    >>> alerts, _ = Decoder().decode([Packet(alert.packet) for alert in simulate_night(2, seed=1)])
    >>> len(alerts), alerts.cutouts.shape, alerts.identity(0).survey.name
    (2, (2, 3, 63, 63), 'ZTF')
    """

    packets: Sequence[Packet]
    packet_index: NDArray[np.int32]  # [N] index of the alert's packet in `packets`
    record_index: NDArray[np.int32]  # [N] index of the alert's record within the packet
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
    columns: tuple[str, ...]  # names of the F metadata columns
    metadata: NDArray[np.float64]  # [N, F]
    light_curves: LightCurves
    variance: NDArray[np.float32] | None = None  # [N, 3, S, S]
    psf: NDArray[np.float32] | None = None  # [N, 3, PSF_SIZE, PSF_SIZE]
    reliability_version: Sequence[str | None] | None = None  # N, of LSST's `reliability`; None if no alert has it
    designation: Sequence[str | None] | None = None  # N, of a known solar-system object; None if it was not decoded
    usable_planes: NDArray[np.bool_] | None = None  # [N, 3, len(PLANES)]; False for planes that were not decoded

    def __len__(self) -> int:
        return len(self.alert_id)

    def lost_planes(self, plane: Plane) -> NDArray[np.bool_]:
        """Return whether each alert lacks this plane in at least one cutout although its survey publishes it, bool[N].

        It is False for all alerts if the plane was not decoded.
        """
        if getattr(self, plane) is None or self.usable_planes is None:
            return np.zeros(len(self), np.bool_)
        usable = self.usable_planes[:, :, PLANES.index(plane)].all(axis=1)
        return np.isin(self.survey, SURVEYS_WITH_PLANES) & ~usable

    def column(self, name: str) -> NDArray[np.float64]:
        """Return the metadata column `name`, float64[N]. Raises KeyError if the batch has no such column."""
        if name not in self.columns:
            raise KeyError(name)
        return self.metadata[:, self.columns.index(name)]

    def stamps(self, i: int) -> tuple[NDArray[np.float32], ...]:
        """Return the pixels of the stamps of alert `i` in the order of CUTOUTS, each float32[H, W], as views.

        A stamp that is larger than the cutout is cut at its edges. A stamp that could not be used has no pixels.
        """
        boxes = self.cutout_box[i].tolist()
        return tuple(self.cutouts[i, k, y0 : y0 + h, x0 : x0 + w] for k, (y0, x0, h, w) in enumerate(boxes))

    def identity(self, i: int) -> AlertIdentity:
        """Return the ids, time, position and band of alert `i` as plain Python values."""
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
