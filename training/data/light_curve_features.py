"""Light-curve features: simple statistics, as brokers compute them for classifiers and isolation forests.

They are computed per band from detections and forced measurements in nJy. Of the features in light-curve packages
(Malanchev et al. 2021, MNRAS 502, 5147, appendix), these are the ones that are meaningful for a handful of points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker_filter.packets.batch import BANDS, LightCurves, Measurement

NAMES = (
    "points",
    "weighted_mean",
    "deviation",
    "amplitude",
    "beyond_one_deviation",
    "median_absolute_deviation",
    "duration",
    "reduced_chi2",
    "skew",
    "kurtosis",
    "slope",
)
OF_BANDS = ("g", "r")
"""The bands of ZTF's public survey."""
LEAST_ERROR = 1e-3
"""Smallest flux error in nJy, so that a point with error 0 does not get infinite weight."""


def light_curve_features(curves: LightCurves) -> NDArray[np.float64]:
    """Return features float64[N, len(OF_BANDS) * len(NAMES)] of N alerts; NaN where a band has too few points."""
    measured = curves.kind != Measurement.UPPER_LIMIT
    n = len(curves.offsets) - 1
    features = np.full((n, len(OF_BANDS), len(NAMES)), np.nan)
    for i in range(n):
        mine = slice(int(curves.offsets[i]), int(curves.offsets[i + 1]))
        for b, name in enumerate(OF_BANDS):
            chosen = measured[mine] & (curves.band[mine] == BANDS.index(name))
            points = (column[mine][chosen].astype(np.float64) for column in (curves.mjd, curves.flux, curves.flux_err))
            features[i, b] = _of_band(*points)
    return features.reshape(n, -1)


def _of_band(mjd: NDArray[np.float64], flux: NDArray[np.float64], error: NDArray[np.float64]) -> list[float]:
    n = len(flux)
    if n == 0:
        return [0.0, *[np.nan] * (len(NAMES) - 1)]
    error = np.maximum(error, LEAST_ERROR)
    mean = float(np.average(flux, weights=error**-2))
    away, deviation = flux - flux.mean(), float(flux.std())
    varies = n > 2 and deviation > 0
    lasts = np.ptp(mjd) > 0
    return [
        float(n),
        mean,
        deviation,
        float(np.ptp(flux)) / 2,
        float((np.abs(away) > deviation).mean()),
        float(np.median(np.abs(flux - np.median(flux)))),
        float(np.ptp(mjd)),
        float((((flux - mean) / error) ** 2).sum()) / (n - 1) if n > 1 else np.nan,
        float((away**3).mean()) / deviation**3 if varies else np.nan,
        float((away**4).mean()) / deviation**4 if varies else np.nan,
        float(np.polyfit(mjd - mjd.mean(), flux, 1)[0]) if n > 2 and lasts else np.nan,
    ]
