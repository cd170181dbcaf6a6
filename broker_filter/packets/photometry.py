"""Magnitudes, fluxes and bands in the units of an AlertBatch, and the light curves made of them.

Works on the columns of a whole batch; NaN stands for no value. Must never drop a point that has a time and a flux, nor
a detection in silence: `detections_without_flux` names those that cannot be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, LightCurves, Measurement

Values = NDArray[np.float64]
"""One value an alert, or a point of a light curve."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""
MAGNITUDES_PER_E = 2.5 / math.log(10)
"""A relative flux error of 1 in magnitudes: 1.0857."""
MJD_EPOCH = 2400000.5
"""Julian date of MJD 0."""
NO_VALUE = -999.0
"""What ZTF writes where there is no measurement, or no source in a catalogue."""
NO_FORCED_FLUX = -99999.0
"""What ZTF writes where forced photometry failed."""
LIMIT_SIGMAS = 5.0
"""ZTF's limiting magnitudes are 5-sigma."""

_BAND_OF_LETTER = np.full(256, float(UNKNOWN_BAND))
_BAND_OF_LETTER[[ord(band) for band in BANDS]] = range(len(BANDS))

LAST_FILTER = 3
_TRUE = (1.0, *map(ord, "1tT+"))
_FALSE = (0.0, -1.0, *map(ord, "0fF-"))
_FILTERS = {1.0: tuple(map(ord, "1g")), 2.0: tuple(map(ord, "2r")), 3.0: tuple(map(ord, "3i"))}

NO_ALERT = -1
"""The row of an alert that did not come to be: its points are left out."""


class Points(NamedTuple):
    """Points of light curves in columns, as in LightCurves before they are sorted and checked."""

    alert: NDArray[np.int64]  # the row of the alert that a point belongs to
    mjd: Values
    band: Values
    flux: Values
    flux_err: Values
    kind: Values


class DetectionsSoFar(NamedTuple):
    """What the detections in each of N packets come to, the alert's own among them and any later one not; [N] each."""

    first_jd: Values
    peak_jd: Values
    peak_magnitude: Values
    faintest_magnitude: Values


def nanojansky(magnitude: Values) -> Values:
    """The flux of an AB magnitude, nJy."""
    flux: Values = 10 ** (-0.4 * (magnitude - AB_ZERO_POINT))
    return flux


def flag(values: Values) -> Values:
    """1 where a boolean says true, 0 where it says false, NaN where it says neither.

    Redistributors write booleans, and ZTF's `isdiffpos`, as numbers or as text, of which `values` has the first
    letter's code: true, True, t, 1, 1.0, +1; false, False, f, 0, 0.0, -1.
    """
    return np.where(_is_one_of(values, _TRUE), 1.0, np.where(_is_one_of(values, _FALSE), 0.0, np.nan))


def sign(isdiffpos: Values) -> Values:
    """+1 where ZTF's `isdiffpos` says positive, -1 where negative; see `flag` for how it is spelled."""
    return 2 * flag(isdiffpos) - 1


def ztf_filter(fid: Values) -> Values:
    """ZTF's filter id (1 g, 2 r, 3 i), also of text that gives the number or the filter's letter."""
    if np.any(fid > LAST_FILTER):  # which no number is
        for number, spellings in _FILTERS.items():
            fid = np.where(_is_one_of(fid, spellings), number, fid)
    return fid


def ztf_band(fid: Values) -> Values:
    """ZTF's filter id, as `ztf_filter` takes it, as an index into BANDS, where it begins with u."""
    fid = ztf_filter(fid)
    return np.where((fid == 1) | (fid == 2) | (fid == 3), fid, float(UNKNOWN_BAND))


def _is_one_of(values: Values, spellings: Sequence[float]) -> NDArray[np.bool_]:
    found = np.zeros(values.shape, np.bool_)
    for spelling in spellings:
        found |= values == spelling
    return found


def letter_band(letter: Values) -> Values:
    """A filter's letter, given as its character's code, as an index into BANDS."""
    return _BAND_OF_LETTER[np.nan_to_num(letter, nan=0.0).astype(np.uint8)]


def ztf_detections(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Points of ZTF's candidate and prv_candidates, from jd, fid, magpsf, sigmapsf, isdiffpos, diffmaglim.

    One without a magnitude is a non-detection: an upper limit.
    """
    jd, fid, magnitude, error, isdiffpos, limit = (np.where(column == NO_VALUE, np.nan, column) for column in values)
    brightness, limiting = nanojansky(magnitude), nanojansky(limit)
    detected = np.isfinite(magnitude)
    return Points(
        alert,
        jd - MJD_EPOCH,
        ztf_band(fid),
        np.where(detected, sign(isdiffpos) * brightness, 0.0 * limiting),
        np.where(detected, brightness * error / MAGNITUDES_PER_E, limiting / LIMIT_SIGMAS),
        np.where(detected, float(Measurement.DETECTION), float(Measurement.UPPER_LIMIT)),
    )


def ztf_detections_so_far(
    own: Sequence[Values], alert: NDArray[np.int64], history: Sequence[Values]
) -> DetectionsSoFar:
    """Sums up ZTF's candidate, `own` [N], and prv_candidates, `history` [M], whose row k is of alert `alert[k]`.

    Both as `ztf_detections` takes them. Of several equally bright ones the first is the peak.
    """
    jd, magnitude = own[0], np.where(own[2] == NO_VALUE, np.nan, own[2])
    past_jd, past_magnitude = history[0], history[2]
    detected = np.isfinite(past_magnitude) & (past_magnitude != NO_VALUE) & (past_jd <= jd[alert])
    owner = np.concatenate([np.arange(len(jd)), alert[detected]])
    magnitude = np.concatenate([magnitude, past_magnitude[detected]])
    jd = np.where(np.isnan(magnitude), np.nan, np.concatenate([jd, past_jd[detected]]))
    order = np.lexsort((jd, magnitude, owner))
    brightest = np.searchsorted(owner[order], np.arange(len(own[0])))
    jd, magnitude = jd[order], magnitude[order]
    return DetectionsSoFar(
        np.fmin.reduceat(jd, brightest), jd[brightest], magnitude[brightest], np.fmax.reduceat(magnitude, brightest)
    )


def ztf_forced(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Points of ZTF's fp_hists, from jd, fid, forcediffimflux, forcediffimfluxunc (DN), magzpsci (their zero point)."""
    jd, fid, flux, error, zero_point = (np.where(column == NO_FORCED_FLUX, np.nan, column) for column in values)
    scale = nanojansky(zero_point)
    kind = np.full(len(alert), float(Measurement.FORCED))
    return Points(alert, jd - MJD_EPOCH, ztf_band(fid), flux * scale, error * scale, kind)


def lsst_detections(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Points of LSST's diaSource and prvDiaSources, from midpointMjdTai, band, psfFlux, psfFluxErr."""
    mjd, band, flux, error = values
    return Points(alert, mjd, letter_band(band), flux, error, np.full(len(alert), float(Measurement.DETECTION)))


def lsst_forced(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Points of LSST's prvDiaForcedSources, from midpointMjdTai, band, psfFlux, psfFluxErr."""
    return lsst_detections(alert, values)._replace(kind=np.full(len(alert), float(Measurement.FORCED)))


def detections_without_flux(pieces: Sequence[Points]) -> NDArray[np.int64]:
    """The alert of each detection that has a time and no finite flux, and is left out of the light curves for that.

    The sign of a ZTF detection may not be understood (`isdiffpos`), or an LSST one have no `psfFlux`.
    """
    lost = []
    for points in pieces:
        rows = np.flatnonzero(~np.isfinite(points.flux))  # few, so that the rest is not looked at
        alert = points.alert[rows]
        kept = (points.kind[rows] == Measurement.DETECTION) & (alert != NO_ALERT) & np.isfinite(points.mjd[rows])
        lost.append(alert[kept])
    return np.concatenate(lost) if lost else np.empty(0, np.int64)


def light_curves(n_alerts: int, pieces: Sequence[Points]) -> LightCurves:
    """The light curves of `n_alerts` from their points in any order; one without finite time and flux is left out."""
    columns = [np.concatenate(column) for column in zip(*pieces, strict=True)] if pieces else [np.empty(0)] * 6
    alert, mjd, band, flux, flux_err, kind = columns
    with np.errstate(over="ignore"):  # a flux beyond float32 is none
        narrow, narrow_err = flux.astype(np.float32), flux_err.astype(np.float32)
    order = np.lexsort((mjd, alert))
    order = order[((alert != NO_ALERT) & np.isfinite(mjd) & np.isfinite(narrow))[order]]
    offsets = np.zeros(n_alerts + 1, dtype=np.int64)
    np.cumsum(np.bincount(alert[order].astype(np.int64), minlength=n_alerts), out=offsets[1:])
    narrow_err[np.isinf(narrow_err)] = np.nan  # an infinite error is no measurement either
    return LightCurves(
        offsets=offsets,
        mjd=mjd[order],
        band=band[order].astype(np.uint8),
        flux=narrow[order],
        flux_err=narrow_err[order],
        kind=kind[order].astype(np.uint8),
    )
