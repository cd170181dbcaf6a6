"""Alerts for the explorer's page: light curves as columns, and the points that a network takes."""

from __future__ import annotations

from broker_filter.packets.batch import BANDS, LightCurves, Measurement
from training.interpretability.explorer.data import TOKEN, Curve

KINDS = tuple(kind.name.lower().replace("_", " ") for kind in sorted(Measurement))
"""Names of the kinds of light-curve points, by code."""


def curve_of(curves: LightCurves, mjd: float, i: int) -> Curve:
    """Return the light curve of alert `i`, which was observed at `mjd`."""
    mine = _points(curves, i)
    return Curve(
        days=(mjd - curves.mjd[mine]).tolist(),
        flux=curves.flux[mine].tolist(),
        error=curves.flux_err[mine].tolist(),
        band=curves.band[mine].tolist(),
        kind=curves.kind[mine].tolist(),
    )


def source_points(curves: LightCurves, mjd: float, i: int, most: int) -> list[int]:
    """Return what the sources of a light-curve site are for alert `i`: TOKEN, then the points that the network takes.

    A point is its index in the alert's light curve. The network takes the latest `most` points that are not later than
    the alert, at `mjd`, in the order of time (`prepare_light_curves`).
    """
    seen = [point for point, time in enumerate(curves.mjd[_points(curves, i)].tolist()) if time <= mjd]
    return [TOKEN, *seen[-most:]]


def source_name(curve: Curve, point: int) -> str:
    """Return a name of a source of a light-curve site: TOKEN, or a point of the curve."""
    if point == TOKEN:
        return "token"
    band = BANDS[curve.band[point]] if curve.band[point] < len(BANDS) else "?"
    return f"{band} {KINDS[curve.kind[point]]}, {curve.days[point]:.3g} d before"


def _points(curves: LightCurves, i: int) -> slice:
    return slice(int(curves.offsets[i]), int(curves.offsets[i + 1]))
