"""Summarises the light curve of each alert up to the time of the alert: first detection, peak, rise, non-detections.

All functions work on the points of a whole batch, and need a fixed number of passes over them. A point later than its
alert must never be used: some redistributed packets hold such points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, Measurement
from broker_filter.packets.photometry import LIMIT_SIGMAS, Points, Values, ab_magnitude

RISE_BASELINE_DAYS = 0.5
"""The least time between the two measurements of a rise. Two visits of one night are minutes apart: a difference of
their noise, divided by minutes, would be taken for a fast rise."""
NONDETECTION_SIGMAS = 3.0
"""Forced photometry whose absolute flux is below this multiple of its uncertainty is a non-detection."""


class CurveSummary(NamedTuple):
    """What the light curves of N alerts show up to the time of each alert; float64[N] each, NaN where unknown.

    `first_mjd`, `peak_mjd`: times of the first and of the brightest detection, in the time scale of the survey.
    `peak_flux`, `peak_band`: difference flux (nJy) and index into BANDS of the detection with the largest absolute
    flux; the earliest of several equal ones. `faintest_flux`: the smallest absolute flux of a detection, in nJy.
    `rise_rate`: how fast the flux changes in the band of the alert, in nJy per day; see `_rise_rate`. `nondetections`:
    the number of non-detections before the alert. `days_since_nondetection`, `nondetection_maglim`: time (d) from the
    last of them to the alert, and its LIMIT_SIGMAS limiting magnitude. `days_since_early_nondetection`: time (d) from
    the last non-detection before the first detection to the alert.
    """

    first_mjd: Values
    peak_mjd: Values
    peak_flux: Values
    peak_band: Values
    faintest_flux: Values
    rise_rate: Values
    nondetections: Values
    days_since_nondetection: Values
    nondetection_maglim: Values
    days_since_early_nondetection: Values


class _Segments:
    """Points sorted by alert. `least` and `greatest` reduce the points of each alert for which a condition holds."""

    def __init__(self, owner: NDArray[np.int64], n_alerts: int) -> None:
        """`owner` int64[M]: the alert of each point, ascending; each of the alerts 0 to N - 1 has a point."""
        self._starts = np.searchsorted(owner, np.arange(n_alerts))

    def least(self, values: Values, where: NDArray[np.bool_]) -> Values:
        """Return the least of the values [M] of each alert, float64[N]; infinity if there is none."""
        least: Values = np.minimum.reduceat(np.where(where, values, np.inf), self._starts)
        return least

    def greatest(self, values: Values, where: NDArray[np.bool_]) -> Values:
        """Return the greatest of the values [M] of each alert, float64[N]; minus infinity if there is none."""
        return -self.least(-values, where)

    def count(self, where: NDArray[np.bool_]) -> Values:
        """Return the number of points of each alert for which `where` [M] holds, float64[N]."""
        return np.add.reduceat(where.astype(np.float64), self._starts)


@np.errstate(all="ignore")  # infinity stands for a number that no point gives
def summarise(own: Points, others: Sequence[Points], rows: NDArray[np.int64]) -> CurveSummary:
    """Summarise the light curves of N alerts.

    `own`: the measurements of the alerts themselves, N points in the order of the alerts. `others`: the further points.
    `rows` int64[N]: the values of `Points.alert` of the alerts, ascending.
    """
    n = len(rows)
    if not n:
        return CurveSummary(*np.empty((len(CurveSummary._fields), 0)))
    points = _sorted_by_alert([own, *others])
    owner = np.searchsorted(rows, points.alert)
    segments = _Segments(owner, n)
    past = np.isfinite(points.flux) & (points.mjd <= own.mjd[owner])

    size = np.abs(points.flux)
    detected = past & (points.kind == Measurement.DETECTION)
    first = segments.least(points.mjd, detected)
    brightest = detected & (size == segments.greatest(size, detected)[owner])
    peak = segments.least(points.mjd, brightest)
    brightest &= points.mjd == peak[owner]

    limit = (points.kind == Measurement.UPPER_LIMIT) | (
        (points.kind == Measurement.FORCED) & (size < NONDETECTION_SIGMAS * points.flux_err)
    )
    limit &= past & (points.mjd < own.mjd[owner])
    last = segments.greatest(points.mjd, limit)
    depth = LIMIT_SIGMAS * segments.least(points.flux_err, limit & (points.mjd == last[owner]))
    summary = CurveSummary(
        first_mjd=first,
        peak_mjd=peak,
        peak_flux=segments.greatest(points.flux, brightest),
        peak_band=segments.least(points.band, brightest & (points.band < len(BANDS))),
        faintest_flux=segments.least(size, detected),
        rise_rate=_rise_rate(own, points, owner, past, segments),
        nondetections=segments.count(limit),
        days_since_nondetection=own.mjd - last,
        nondetection_maglim=ab_magnitude(depth),
        days_since_early_nondetection=own.mjd - segments.greatest(points.mjd, limit & (points.mjd < first[owner])),
    )
    return CurveSummary(*(np.where(np.isfinite(values), values, np.nan) for values in summary))


def _sorted_by_alert(pieces: Sequence[Points]) -> Points:
    """Return the points of all pieces, sorted by alert; those of one alert in the order of the pieces."""
    alert = np.concatenate([piece.alert for piece in pieces])
    order = np.argsort(alert, kind="stable")

    def column(name: str) -> Values:
        return np.concatenate([getattr(piece, name) for piece in pieces])[order]

    return Points(alert[order], column("mjd"), column("band"), column("flux"), column("flux_err"), column("kind"))


def _rise_rate(
    own: Points, points: Points, owner: NDArray[np.int64], past: NDArray[np.bool_], segments: _Segments
) -> Values:
    """Return the change of flux from an earlier measurement to the alert, over the time between, nJy/d float64[N].

    The earlier measurement is the latest one in the band of the alert that is at least RISE_BASELINE_DAYS older: a
    detection, or else forced photometry; the faintest of several at the same time. `owner` int64[M]: the alert of each
    of the points.
    """
    earlier = (
        past
        & (points.band == own.band[owner])
        & (points.band < len(BANDS))
        & (points.kind != Measurement.UPPER_LIMIT)
        & (points.mjd <= own.mjd[owner] - RISE_BASELINE_DAYS)
    )
    when = segments.greatest(points.mjd, earlier)
    earlier &= points.mjd == when[owner]
    earlier &= points.kind == segments.least(points.kind, earlier)[owner]
    return (own.flux - segments.least(points.flux, earlier)) / (own.mjd - when)
