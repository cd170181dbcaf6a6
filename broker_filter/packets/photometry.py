"""Converts magnitudes, fluxes and bands to the units of an AlertBatch, and makes light curves of them.

All functions work on the columns of a whole batch; NaN means that a value is missing. A point that has a time and a
flux must never be dropped. A detection must never be dropped silently: `detections_without_flux` reports every
dropped detection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, LightCurves, Measurement

Values = NDArray[np.float64]
"""A column with one value per alert, or per light-curve point."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""
MAGNITUDES_PER_E = 2.5 / math.log(10)
"""The factor from a relative flux uncertainty to a magnitude uncertainty: 1.0857."""
MJD_EPOCH = 2400000.5
"""The Julian date of MJD 0."""
NO_VALUE = -999.0
"""ZTF's sentinel for a missing measurement, or for a missing source in a catalogue."""
NO_FORCED_FLUX = -99999.0
"""ZTF's sentinel for forced photometry that failed."""
LIMIT_SIGMAS = 5.0
"""The significance of ZTF's limiting magnitudes, in sigma."""

_BAND_OF_LETTER = np.full(256, float(UNKNOWN_BAND))
_BAND_OF_LETTER[[ord(band) for band in BANDS]] = range(len(BANDS))

LAST_FILTER = 3
_TRUE = (1.0, *map(ord, "1tT+"))
_FALSE = (0.0, -1.0, *map(ord, "0fF-"))
_FILTERS = {1.0: tuple(map(ord, "1g")), 2.0: tuple(map(ord, "2r")), 3.0: tuple(map(ord, "3i"))}

NO_ALERT = -1
"""The row number of a rejected alert. Its points are left out of the light curves."""


class Points(NamedTuple):
    """M light-curve points in columns, with the units of `LightCurves`, not yet sorted or checked."""

    alert: NDArray[np.int64]  # row of the alert to which a point belongs
    mjd: Values
    band: Values
    flux: Values
    flux_err: Values
    kind: Values


class DetectionsSoFar(NamedTuple):
    """Summaries of the detections in each of N packets, up to and including the alert itself; float64[N] each.

    Times are Julian dates in days; magnitudes are ZTF's, of any filter.
    """

    first_jd: Values
    peak_jd: Values
    peak_magnitude: Values
    faintest_magnitude: Values


def nanojansky(magnitude: Values) -> Values:
    """Return the flux in nJy of N AB magnitudes, float64[N]."""
    flux: Values = 10 ** (-0.4 * (magnitude - AB_ZERO_POINT))
    return flux


def ab_magnitude(flux: Values) -> Values:
    """Return the AB magnitude of N fluxes in nJy, float64[N]; infinite for a flux of 0, NaN for a negative one."""
    return AB_ZERO_POINT - 2.5 * np.log10(flux)


def flag(values: Values) -> Values:
    """Return N booleans as numbers, float64[N]: 1 for true, 0 for false, NaN for any other value.

    Redistributors write booleans, and ZTF's `isdiffpos`, as numbers or as text: true, True, t, 1, 1.0, +1; false,
    False, f, 0, 0.0, -1. For text, `values` holds the code of its first character.
    """
    return np.where(_is_one_of(values, _TRUE), 1.0, np.where(_is_one_of(values, _FALSE), 0.0, np.nan))


def sign(isdiffpos: Values) -> Values:
    """Return signs of N difference fluxes, float64[N]: +1 if `isdiffpos` is true, -1 if false, or NaN (see `flag`)."""
    return 2 * flag(isdiffpos) - 1


def ztf_filter(fid: Values) -> Values:
    """Return N filter ids of ZTF, float64[N]: 1 is g, 2 is r, 3 is i.

    Some redistributors write the id, or the letter of the filter, as text. `fid` then holds the code of that character.
    """
    if np.any(fid > LAST_FILTER):  # a character code, not an id
        for number, spellings in _FILTERS.items():
            fid = np.where(_is_one_of(fid, spellings), number, fid)
    return fid


def ztf_band(fid: Values) -> Values:
    """Return the indices into BANDS of N filter ids of ZTF, [N], or UNKNOWN_BAND. `fid`: as for `ztf_filter`."""
    fid = ztf_filter(fid)
    return np.where((fid == 1) | (fid == 2) | (fid == 3), fid, float(UNKNOWN_BAND))


def _is_one_of(values: Values, spellings: Sequence[float]) -> NDArray[np.bool_]:
    found = np.zeros(values.shape, np.bool_)
    for spelling in spellings:
        found |= values == spelling
    return found


def letter_band(letter: Values) -> Values:
    """Return the index into BANDS of filters that are given as the code of a letter.

    The index is UNKNOWN_BAND for any other character and for NaN.
    """
    return _BAND_OF_LETTER[np.nan_to_num(letter, nan=0.0).astype(np.uint8)]


def ztf_detections(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Return the points of ZTF's candidate and prv_candidates. `alert`: the row of each point's alert, int64[M].

    `values`: jd (d), fid, magpsf (mag), sigmapsf (mag), isdiffpos and diffmaglim (mag), float64[M] each. An item
    without a magnitude is a non-detection, which becomes an upper limit.
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
    """Summarise the detections of ZTF's candidate and prv_candidates that are not later than the candidate.

    `own`: columns of the candidates, [N] each; `history`: columns of prv_candidates, [M] each; both in the order that
    `ztf_detections` documents. `alert`: the row of the alert to which each history item belongs, int64[M]. If several
    detections are equally bright, the earliest is the peak.
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
    """Return the points of ZTF's fp_hists. `alert`: the row of each point's alert, int64[M].

    `values`: jd (d), fid, forcediffimflux (DN), forcediffimfluxunc (DN) and magzpsci (mag, the zero point of the
    fluxes), float64[M] each.
    """
    jd, fid, flux, error, zero_point = (np.where(column == NO_FORCED_FLUX, np.nan, column) for column in values)
    scale = nanojansky(zero_point)
    kind = np.full(len(alert), float(Measurement.FORCED))
    return Points(alert, jd - MJD_EPOCH, ztf_band(fid), flux * scale, error * scale, kind)


def lsst_detections(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Return the points of LSST's diaSource and prvDiaSources. `alert`: the row of each point's alert, int64[M].

    `values`: midpointMjdTai (d), band (letter code), psfFlux (nJy) and psfFluxErr (nJy), float64[M] each.
    """
    mjd, band, flux, error = values
    return Points(alert, mjd, letter_band(band), flux, error, np.full(len(alert), float(Measurement.DETECTION)))


def lsst_forced(alert: NDArray[np.int64], values: Sequence[Values]) -> Points:
    """Return the points of LSST's prvDiaForcedSources; for the arguments see `lsst_detections`."""
    return lsst_detections(alert, values)._replace(kind=np.full(len(alert), float(Measurement.FORCED)))


def detections_without_flux(pieces: Sequence[Points]) -> NDArray[np.int64]:
    """Return the alert row, int64, of each detection that has a time but no finite flux.

    Light curves leave such points out. A ZTF detection has no flux if the value of `isdiffpos` is unknown; an LSST
    detection has none if `psfFlux` is missing.
    """
    lost = []
    for points in pieces:
        rows = np.flatnonzero(~np.isfinite(points.flux))  # few rows, so the further tests are cheap
        alert = points.alert[rows]
        kept = (points.kind[rows] == Measurement.DETECTION) & (alert != NO_ALERT) & np.isfinite(points.mjd[rows])
        lost.append(alert[kept])
    return np.concatenate(lost) if lost else np.empty(0, np.int64)


def light_curves(n_alerts: int, pieces: Sequence[Points]) -> LightCurves:
    """Return the light curves of `n_alerts` alerts from their points, in any order.

    Points without a finite time and flux, and points of rejected alerts (NO_ALERT), are left out.
    """
    columns = [np.concatenate(column) for column in zip(*pieces, strict=True)] if pieces else [np.empty(0)] * 6
    alert, mjd, band, flux, flux_err, kind = columns
    with np.errstate(over="ignore"):  # a flux beyond the range of float32 counts as missing
        narrow, narrow_err = flux.astype(np.float32), flux_err.astype(np.float32)
    order = np.lexsort((mjd, alert))
    order = order[((alert != NO_ALERT) & np.isfinite(mjd) & np.isfinite(narrow))[order]]
    offsets = np.zeros(n_alerts + 1, dtype=np.int64)
    np.cumsum(np.bincount(alert[order].astype(np.int64), minlength=n_alerts), out=offsets[1:])
    narrow_err[np.isinf(narrow_err)] = np.nan  # an infinite uncertainty counts as missing, too
    return LightCurves(
        offsets=offsets,
        mjd=mjd[order],
        band=band[order].astype(np.uint8),
        flux=narrow[order],
        flux_err=narrow_err[order],
        kind=kind[order].astype(np.uint8),
    )
