"""Summarises the light curve of each alert up to the time of the alert: detections, peak, rates, colours, limits.

All functions work on the points of a whole batch, and need a fixed number of passes over them. A column is computed
when it is first read. A point later than its alert must never be used: some redistributed packets hold such points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, Measurement
from broker_filter.packets.photometry import LIMIT_SIGMAS, MAGNITUDES_PER_E, Points, Values, ab_magnitude

RATE_BASELINE_DAYS = 0.5
"""The least time that the measurements of a rate span. Two visits of one night are minutes apart: a difference of their
noise, divided by minutes, would be taken for a fast rise."""
COLOUR_DAYS = 1.0
"""The greatest time between the two detections of a colour: that of one night, as in Fink's `g-r`. A young supernova
changes by some tenths of a magnitude in a day."""
NONDETECTION_SIGMAS = 3.0
"""Forced photometry whose absolute flux is below this multiple of its uncertainty is a non-detection."""


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

    def total(self, values: Values, where: NDArray[np.bool_]) -> Values:
        """Return the sum of the values [M] of each alert, float64[N]; 0 if there is none."""
        total: Values = np.add.reduceat(np.where(where, values, 0.0), self._starts)
        return total

    def count(self, where: NDArray[np.bool_]) -> Values:
        """Return the number of points of each alert for which `where` [M] holds, float64[N]."""
        return self.total(np.ones(len(where)), where)


def _column(compute: Callable[[CurveSummary], Values]) -> cached_property[Values]:
    """Make a column of a method: it is computed when it is first read, and a value that is not finite becomes NaN."""

    def finite(summary: CurveSummary) -> Values:
        with np.errstate(all="ignore"):  # infinity stands for a number that no point gives
            values = compute(summary)
        return np.where(np.isfinite(values), values, np.nan)

    finite.__doc__ = compute.__doc__
    return cached_property(finite)


def _colour(blue: str, red: str) -> cached_property[Values]:
    """Make a column of the colour in two of BANDS; see `CurveSummary.colour`."""
    return _column(lambda summary: summary.colour(BANDS.index(blue), BANDS.index(red)))


class CurveSummary:
    """What the light curves of N alerts show up to the time of each alert, in columns float64[N]; NaN where unknown.

    `own`: the measurements of the alerts themselves, N points in the order of the alerts. `others`: the further points.
    `rows` int64[N]: the values of `Points.alert` of the alerts, ascending. `night_start`: the time of day at which a
    night begins, as a fraction of a day in the time scale of the survey.

    Magnitudes are of absolute difference fluxes. Rates, colours, amplitude and `band_peak_flux` use only detections
    with the sign of the alert's flux: a variable star that is now fainter than in the template is not compared with
    the time when it was brighter.
    """

    def __init__(
        self, own: Points, others: Sequence[Points], rows: NDArray[np.int64], night_start: float = 0.0
    ) -> None:
        self._own = own
        self._night_start = night_start
        self._points = points = _sorted_by_alert([own, *others])
        self._owner = np.searchsorted(rows, points.alert)
        self._segments = _Segments(self._owner, len(rows))
        self._size = np.abs(points.flux)
        self._past = np.isfinite(points.flux) & (points.mjd <= own.mjd[self._owner])
        self._detected = self._past & (points.kind == Measurement.DETECTION)

    # Detections, and the peak.

    @cached_property
    def _first(self) -> Values:
        return self._segments.least(self._points.mjd, self._detected)

    @cached_property
    def _brightest(self) -> NDArray[np.bool_]:
        """The detection of each alert with the largest absolute flux; the earliest of several equal ones."""
        return self._brightest_of(self._detected)

    def _brightest_of(self, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
        brightest: NDArray[np.bool_] = where & (self._size == self._segments.greatest(self._size, where)[self._owner])
        brightest &= self._points.mjd == self._segments.least(self._points.mjd, brightest)[self._owner]
        return brightest

    @_column
    def first_mjd(self) -> Values:
        """Return the time of the first detection, in the time scale of the survey."""
        return self._first

    @_column
    def peak_mjd(self) -> Values:
        """Return the time of the detection with the largest absolute flux, in the time scale of the survey."""
        return self._segments.least(self._points.mjd, self._brightest)

    @_column
    def peak_flux(self) -> Values:
        """Return the flux of the detection with the largest absolute flux, in nJy."""
        return self._segments.greatest(self._points.flux, self._brightest)

    @_column
    def peak_band(self) -> Values:
        """Return the index into BANDS of the detection with the largest absolute flux."""
        return self._segments.least(self._points.band, self._brightest & (self._points.band < len(BANDS)))

    @_column
    def faintest_flux(self) -> Values:
        """Return the smallest absolute flux of a detection, in nJy."""
        return self._segments.least(self._size, self._detected)

    @_column
    def nights(self) -> Values:
        """Return the number of nights with a detection."""
        rows = np.flatnonzero(self._detected)
        owner, night = self._owner[rows], np.floor(self._points.mjd[rows] - self._night_start)
        order = np.lexsort((night, owner))
        owner, night = owner[order], night[order]
        new = np.ones(len(rows), np.bool_)
        new[1:] = (np.diff(owner) != 0) | (np.diff(night) != 0)
        return np.bincount(owner[new], minlength=len(self._own.mjd)).astype(np.float64)

    # The light curve in the band of the alert, and colours.

    @cached_property
    def _in_band(self) -> NDArray[np.bool_]:
        """Whether each point is one in the band of the alert, if that is one of BANDS."""
        in_band: NDArray[np.bool_] = self._points.band == self._own.band[self._owner]
        return in_band & (self._points.band < len(BANDS))

    @cached_property
    def _alike(self) -> NDArray[np.bool_]:
        """Whether each point is a detection with the sign of the alert's flux."""
        alike: NDArray[np.bool_] = np.sign(self._points.flux) == np.sign(self._own.flux)[self._owner]
        alike &= self._detected
        return alike

    @cached_property
    def _series(self) -> NDArray[np.bool_]:
        """Whether each point is a detection in the band of the alert and with the sign of its flux."""
        return self._alike & self._in_band

    @cached_property
    def _magnitude(self) -> Values:
        return ab_magnitude(self._size)

    @_column
    def band_peak_flux(self) -> Values:
        """Return the largest absolute flux of a detection in the band of the alert, in nJy."""
        return self._segments.greatest(self._size, self._series)

    @_column
    def amplitude(self) -> Values:
        """Return half the range of the magnitudes in the band of the alert, in mag; 0 for a single detection.

        It is the feature Amplitude of the package light-curve (Malanchev et al. 2021, MNRAS 502, 5147).
        """
        faintest = self._segments.greatest(self._magnitude, self._series)
        return (faintest - self._segments.least(self._magnitude, self._series)) / 2

    @cached_property
    def _band_peak_mjd(self) -> Values:
        return self._segments.least(self._points.mjd, self._brightest_of(self._series))

    @cached_property
    def _rise(self) -> tuple[Values, Values]:
        return self._slope(self._points.mjd <= self._band_peak_mjd[self._owner])

    @cached_property
    def _decline(self) -> tuple[Values, Values]:
        return self._slope(self._points.mjd >= self._band_peak_mjd[self._owner])

    @_column
    def rise_mag_rate(self) -> Values:
        """Return how fast the magnitude decreases up to the peak in the band of the alert, in mag/d; see `_slope`."""
        return -self._rise[0]

    @_column
    def rise_mag_rate_err(self) -> Values:
        """Return the 1-sigma uncertainty of `rise_mag_rate`, in mag/d."""
        return self._rise[1]

    @_column
    def decline_mag_rate(self) -> Values:
        """Return how fast the magnitude increases from the peak on in the band of the alert, in mag/d; see `_slope`."""
        return self._decline[0]

    @_column
    def decline_mag_rate_err(self) -> Values:
        """Return the 1-sigma uncertainty of `decline_mag_rate`, in mag/d."""
        return self._decline[1]

    def _slope(self, where: NDArray[np.bool_]) -> tuple[Values, Values]:
        """Return the slopes of magnitude against time and their 1-sigma uncertainties, in mag/d, float64[N] each.

        A line is fitted by least squares, weighted by the inverse variances, to the detections in the band of the alert
        for which `where` [M] holds, as BOOM's `analyze_photometry` does (https://github.com/boom-astro/boom). Both
        results are NaN if the detections span less than RATE_BASELINE_DAYS. Of detections at the same time, the
        brightest one counts.
        """
        points, segments, owner = self._points, self._segments, self._owner
        usable = where & self._series & (points.flux_err > 0) & np.isfinite(points.flux_err)
        usable = self._without_repeats(usable)
        weight = np.where(usable, (self._size / (MAGNITUDES_PER_E * points.flux_err)) ** 2, 0.0)
        weights = segments.total(weight, usable)

        def centred(values: Values) -> Values:
            mean = segments.total(weight * values, usable) / weights
            difference: Values = values - mean[owner]
            return difference

        days = points.mjd - self._own.mjd[owner]  # of small numbers, the rounding is small too
        x, y = centred(days), centred(self._magnitude)
        spread = segments.total(weight * x**2, usable)
        span = segments.greatest(days, usable) - segments.least(days, usable)
        spread[~(span >= RATE_BASELINE_DAYS)] = np.nan
        return segments.total(weight * x * y, usable) / spread, 1 / np.sqrt(spread)

    def _without_repeats(self, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return `where` [M] with only the brightest point of each alert and time.

        Some packets list a detection twice, or two detections in one image.
        """
        rows = np.flatnonzero(where)
        order = rows[np.lexsort((-self._size[rows], self._points.mjd[rows], self._owner[rows]))]
        repeats = (np.diff(self._owner[order]) == 0) & (np.diff(self._points.mjd[order]) == 0)
        once = where.copy()
        once[order[1:][repeats]] = False
        return once

    u_g = _colour("u", "g")
    g_r = _colour("g", "r")
    r_i = _colour("r", "i")
    i_z = _colour("i", "z")
    z_y = _colour("z", "y")

    def colour(self, blue: int, red: int) -> Values:
        """Return the latest colour: the magnitude in the band `blue` of BANDS minus that in `red`, float64[N].

        Of the latest detection in each band, the earlier one is taken, and the nearest one in time in the other band.
        The colour is unknown if they are more than COLOUR_DAYS apart.
        """
        bands = [self._alike & (self._points.band == band) for band in (blue, red)]
        earlier = np.minimum(*(self._segments.greatest(self._points.mjd, band) for band in bands))
        (blue_mjd, blue_mag), (red_mjd, red_mag) = (self._nearest(band, earlier) for band in bands)
        return np.where(np.abs(blue_mjd - red_mjd) <= COLOUR_DAYS, blue_mag - red_mag, np.nan)

    def _nearest(self, where: NDArray[np.bool_], mjd: Values) -> tuple[Values, Values]:
        """Return time and magnitude of the point for which `where` [M] holds that is nearest to `mjd` float64[N].

        The earlier of two points at the same distance is taken, and the brightest of several at the same time.
        """
        gap = np.abs(self._points.mjd - mjd[self._owner])
        where = where & (gap == self._segments.least(gap, where)[self._owner])
        when = self._segments.least(self._points.mjd, where)
        where = where & (self._points.mjd == when[self._owner])
        return when, ab_magnitude(self._segments.greatest(self._size, where))

    @_column
    def rise_rate(self) -> Values:
        """Return the change of flux from an earlier measurement to the alert, over the time between, in nJy/d.

        The earlier measurement is the latest one in the band of the alert that is at least RATE_BASELINE_DAYS older: a
        detection, or else forced photometry; the faintest of several at the same time.
        """
        points, own, segments, owner = self._points, self._own, self._segments, self._owner
        earlier = self._past & self._in_band & (points.kind != Measurement.UPPER_LIMIT)
        earlier &= points.mjd <= own.mjd[owner] - RATE_BASELINE_DAYS
        when = segments.greatest(points.mjd, earlier)
        earlier &= points.mjd == when[owner]
        earlier &= points.kind == segments.least(points.kind, earlier)[owner]
        return (own.flux - segments.least(points.flux, earlier)) / (own.mjd - when)

    # Non-detections before the alert.

    @cached_property
    def _limits(self) -> NDArray[np.bool_]:
        points = self._points
        limits: NDArray[np.bool_] = self._past & (points.mjd < self._own.mjd[self._owner])
        faint = (points.kind == Measurement.FORCED) & (self._size < NONDETECTION_SIGMAS * points.flux_err)
        limits &= (points.kind == Measurement.UPPER_LIMIT) | faint
        return limits

    @cached_property
    def _last_limit(self) -> Values:
        return self._segments.greatest(self._points.mjd, self._limits)

    @cached_property
    def _early_limit(self) -> Values:
        """The time of the last non-detection before the first detection."""
        early = self._limits & (self._points.mjd < self._first[self._owner])
        return self._segments.greatest(self._points.mjd, early)

    def _depth(self, mjd: Values) -> Values:
        """Return the LIMIT_SIGMAS limiting magnitude of the deepest non-detection at the times `mjd` float64[N]."""
        at_time = self._limits & (self._points.mjd == mjd[self._owner])
        return ab_magnitude(LIMIT_SIGMAS * self._segments.least(self._points.flux_err, at_time))

    @_column
    def nondetections(self) -> Values:
        """Return the number of non-detections before the alert."""
        return self._segments.count(self._limits)

    @_column
    def days_since_nondetection(self) -> Values:
        """Return the time from the last non-detection to the alert, in days."""
        return self._own.mjd - self._last_limit

    @_column
    def nondetection_maglim(self) -> Values:
        """Return the limiting magnitude of the last non-detection."""
        return self._depth(self._last_limit)

    @_column
    def days_since_early_nondetection(self) -> Values:
        """Return the time from the last non-detection before the first detection to the alert, in days."""
        return self._own.mjd - self._early_limit

    @_column
    def early_nondetection_maglim(self) -> Values:
        """Return the limiting magnitude of the last non-detection before the first detection."""
        return self._depth(self._early_limit)


def _sorted_by_alert(pieces: Sequence[Points]) -> Points:
    """Return the points of all pieces, sorted by alert; those of one alert in the order of the pieces."""
    alert = np.concatenate([piece.alert for piece in pieces])
    order = np.argsort(alert, kind="stable")

    def column(name: str) -> Values:
        return np.concatenate([getattr(piece, name) for piece in pieces])[order]

    return Points(alert[order], column("mjd"), column("band"), column("flux"), column("flux_err"), column("kind"))
