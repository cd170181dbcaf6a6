"""Physical quantities of alerts, as yes-or-no properties that a feature of a network can be compared with.

Every property is computed from the decoded alert alone, never from a network. Points of a light curve that are later
than the alert are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, LightCurves, Measurement, Survey
from broker_filter.packets.light_curve_summary import NONDETECTION_SIGMAS, RATE_BASELINE_DAYS
from broker_filter.scoring.alerts import RawAlerts

Property = NDArray[np.float64]
"""A property of N alerts, [N]: 1 if an alert has it, 0 if not, NaN if that is unknown."""

COLUMNS = ("sso", "sgscore1", "distpsnr1", "distnr", "templateFlux", "templateFluxErr")
"""Metadata columns that the properties are computed from; where a column is absent, its properties are unknown."""

LARGE_AMPLITUDE = 0.6
"""Peak-to-peak flux over the largest absolute flux in a band: a factor of 2.5 in flux (1 mag), or a change of sign."""
SAME_EPOCH_DAYS = 1.0
"""Longest time between the two measurements of a colour."""
CHANGE_SIGMAS = 3.0
"""Least significance of a rise or a decline."""
MANY_DETECTIONS = 10
"""Least number of detections, the alert included, of a long history."""
JUST_BEFORE_DAYS = 5.0
"""Longest time between an upper limit and the alert that it shortly precedes; ZTF visits a field every 2 to 3 days."""
GALAXY_SCORE, STAR_SCORE = 0.3, 0.7
"""Star (1) or galaxy (0) scores of Pan-STARRS sources: below is a galaxy, above is a star."""
HOST_ARCSEC = 5.0
"""Greatest distance of an alert from its host galaxy."""
BELOW_ARCSEC = 1.5
"""Greatest distance of an alert from the source that it lies on: one and a half ZTF pixels."""
TEMPLATE_SIGMAS = 5.0
"""Least significance of LSST's template flux of an alert that lies on a source."""

DESCRIPTIONS = {
    "large_amplitude": "The detections of one band differ by a factor of 2.5 in flux, or in sign.",
    "red": "The difference flux in r exceeds the flux in g within a day, for the latest pair of detections.",
    "rising": "The flux exceeds an earlier measurement in the band of the alert by more than 3 sigma.",
    "declining": "The flux is more than 3 sigma below an earlier measurement in the band of the alert.",
    "single_detection": "The packet has no earlier detection.",
    "many_detections": "The packet has at least 10 detections, the alert included.",
    "negative": "The alert is fainter than the template.",
    "negative_detections": "An earlier detection is fainter than the template.",
    "limit_just_before": "The point before the alert is a non-detection at most 5 days older.",
    "forced_photometry": "The packet has forced photometry.",
    "edge_stamp": "A stamp is smaller than 63 x 63 pixels, because it lies at the edge of a chip (ZTF only).",
    "nan_pixels": "A stamp has NaN pixels.",
    "host_galaxy": "A galaxy of Pan-STARRS lies within 5 arcsec (ZTF only).",
    "star_below": "A star of Pan-STARRS lies within 1.5 arcsec (ZTF only).",
    "source_below": "The template has a source at the position of the alert.",
    "moving_object": "The survey names a known solar-system object for the alert.",
}
"""The properties and their meaning, in the order of tables."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """The M points of a light curve up to the time of its alert, in order of time; the last point is the alert."""

    mjd: NDArray[np.float64]
    band: NDArray[np.uint8]
    flux: NDArray[np.float64]
    error: NDArray[np.float64]
    kind: NDArray[np.uint8]

    @property
    def detected(self) -> NDArray[np.bool_]:
        return np.equal(self.kind, Measurement.DETECTION)


def quantities(alerts: RawAlerts) -> dict[str, Property]:
    """Return each property of DESCRIPTIONS of N alerts, float64[N]: 1, 0, or NaN where it is unknown.

    Raises ValueError if the alerts have no light curves, times or surveys.
    """
    if alerts.mjd is None or alerts.light_curves is None or alerts.survey is None:
        raise ValueError("the alerts have no light curves: build the data set from packets that have them")
    curves = _curves(alerts.light_curves, alerts.mjd)
    ztf = alerts.survey == Survey.ZTF
    found = {name: np.array([of_curve(curve) for curve in curves], np.float64) for name, of_curve in _OF_CURVES.items()}
    slot = alerts.cutouts.shape[-1]
    found["edge_stamp"] = np.where(ztf, (alerts.cutout_box[:, :, 2:] < slot).any(axis=(1, 2)), np.nan)
    found["nan_pixels"] = np.asarray(np.isnan(alerts.cutouts).any(axis=(1, 2, 3)), np.float64)
    score, distance = _column(alerts, "sgscore1"), _column(alerts, "distpsnr1")
    catalogued = ztf & _present(alerts, "sgscore1", "distpsnr1")
    found["host_galaxy"] = np.where(catalogued, (score < GALAXY_SCORE) & (distance < HOST_ARCSEC), np.nan)
    found["star_below"] = np.where(catalogued, (score > STAR_SCORE) & (distance < BELOW_ARCSEC), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        template = _column(alerts, "templateFlux") / _column(alerts, "templateFluxErr")
    found["source_below"] = np.full(len(alerts), np.nan)
    of_ztf, of_lsst = ztf & _present(alerts, "distnr"), ~ztf & ~np.isnan(template)
    found["source_below"][of_ztf] = _column(alerts, "distnr")[of_ztf] < BELOW_ARCSEC
    found["source_below"][of_lsst] = template[of_lsst] > TEMPLATE_SIGMAS
    found["moving_object"] = _column(alerts, "sso")
    return {name: found[name] for name in DESCRIPTIONS}


def _column(alerts: RawAlerts, name: str) -> Property:
    if name not in alerts.columns:
        return np.full(len(alerts), np.nan)
    return alerts.metadata[:, alerts.columns.index(name)]


def _present(alerts: RawAlerts, *names: str) -> NDArray[np.bool_]:
    """Return whether the survey's catalogue was read, bool[N]: a NaN in a column that exists means "no such source"."""
    return np.full(len(alerts), all(name in alerts.columns for name in names))


def _curves(curves: LightCurves, mjd: NDArray[np.float64]) -> list[_Curve]:
    """Return the light curve of each alert up to its time `mjd` [N], so that its last point is the alert itself."""
    found = []
    for i, now in enumerate(mjd.tolist()):
        points = np.arange(curves.offsets[i], curves.offsets[i + 1])
        points = points[curves.mjd[points] <= now]
        points = points[np.lexsort((curves.kind[points] == Measurement.DETECTION, curves.mjd[points]))]
        found.append(
            _Curve(
                curves.mjd[points],
                curves.band[points],
                curves.flux[points].astype(np.float64),
                curves.flux_err[points].astype(np.float64),
                curves.kind[points],
            )
        )
    return found


def _large_amplitude(curve: _Curve) -> float:
    known, large = False, False
    for band in np.unique(curve.band[curve.detected]).tolist():
        flux = curve.flux[curve.detected & (curve.band == band)]
        if len(flux) > 1:
            known = True
            large |= bool(np.ptp(flux) >= LARGE_AMPLITUDE * np.abs(flux).max())
    return float(large) if known else np.nan


def _red(curve: _Curve) -> float:
    g, r = (np.flatnonzero(curve.detected & (curve.band == BANDS.index(name))) for name in ("g", "r"))
    apart = np.abs(curve.mjd[g, None] - curve.mjd[r])
    same_sign = curve.flux[g, None] * curve.flux[r] > 0
    pairs = np.argwhere((apart <= SAME_EPOCH_DAYS) & same_sign)
    if not len(pairs):
        return np.nan
    latest = pairs[np.argmax(curve.mjd[g[pairs[:, 0]]] + curve.mjd[r[pairs[:, 1]]])]
    return float(abs(curve.flux[r[latest[1]]]) > abs(curve.flux[g[latest[0]]]))


def _change(curve: _Curve) -> float:
    """Return the change of flux since the latest measurement that is RATE_BASELINE_DAYS older, in sigma."""
    if not len(curve.mjd):
        return np.nan
    earlier = np.flatnonzero(
        (curve.mjd <= curve.mjd[-1] - RATE_BASELINE_DAYS)
        & (curve.band == curve.band[-1])
        & (curve.kind != Measurement.UPPER_LIMIT)
    )
    if not len(earlier):
        return np.nan
    return float((curve.flux[-1] - curve.flux[earlier[-1]]) / np.hypot(curve.error[-1], curve.error[earlier[-1]]))


def _beyond(change: float, sign: int) -> float:
    return np.nan if np.isnan(change) else float(sign * change > CHANGE_SIGMAS)


def _limit_just_before(curve: _Curve) -> float:
    earlier = np.flatnonzero(curve.mjd < curve.mjd[-1:])
    if not len(earlier):
        return 0.0
    last = earlier[-1]
    forced_limit = curve.kind[last] == Measurement.FORCED and (
        abs(curve.flux[last]) < NONDETECTION_SIGMAS * curve.error[last]
    )
    limit = forced_limit or curve.kind[last] == Measurement.UPPER_LIMIT
    return float(limit and curve.mjd[-1] - curve.mjd[last] <= JUST_BEFORE_DAYS)


_OF_CURVES: dict[str, Callable[[_Curve], float]] = {
    "large_amplitude": _large_amplitude,
    "red": _red,
    "rising": lambda curve: _beyond(_change(curve), 1),
    "declining": lambda curve: _beyond(_change(curve), -1),
    "single_detection": lambda curve: float(curve.detected.sum() == 1),
    "many_detections": lambda curve: float(curve.detected.sum() >= MANY_DETECTIONS),
    "negative": lambda curve: float(curve.flux[-1] < 0) if len(curve.flux) else np.nan,
    "negative_detections": lambda curve: float((curve.flux[:-1][curve.detected[:-1]] < 0).any()),
    "limit_just_before": _limit_just_before,
    "forced_photometry": lambda curve: float((curve.kind == Measurement.FORCED).any()),
}
"""The properties of a light curve."""
