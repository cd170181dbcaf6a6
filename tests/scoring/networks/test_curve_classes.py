"""CurveClasses: what it sees of a light curve, and what has no influence on it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from broker_filter.packets.batch import BANDS, LightCurves, Measurement
from broker_filter.scoring.bundle import LightCurveInput
from broker_filter.scoring.networks.curve_classes import COLOURS, STATISTICS, CurveClasses
from broker_filter.scoring.preprocess import prepare_light_curves

NOW = 60000.0
WANTED = LightCurveInput(points=12, flux_scale=100.0, time_scale=1.0)
COUNT, LEVEL, SLOPE, CURVATURE, SCATTER, PEAK, PEAK_AGE, FIRST_AGE, LATEST_AGE = range(9)


def network() -> CurveClasses:
    torch.manual_seed(3)
    return CurveClasses(time_scale=1.0, classes=4, hidden=8).eval()


def see(
    days: list[float], bands: str, log_flux: list[float], kind: Measurement | NDArray[np.uint8] = Measurement.DETECTION
) -> tuple[Tensor, Tensor]:
    """Return the network's inputs for one alert; `log_flux`: ln of the flux in units of flux_scale / 2."""
    m = len(days)
    curves = LightCurves(
        offsets=np.array([0, m]),
        mjd=NOW - np.array(days),
        band=np.array([BANDS.index(name) for name in bands], np.uint8),
        flux=(WANTED.flux_scale / 2 * np.exp(log_flux)).astype(np.float32),
        flux_err=np.ones(m, np.float32),
        kind=np.broadcast_to(np.asarray(kind, np.uint8), m).copy(),
    )
    points, mask = prepare_light_curves(curves, np.array([NOW]), WANTED)
    return torch.from_numpy(points), torch.from_numpy(mask)


def test_statistics_are_those_of_a_parabola_in_time() -> None:
    days = [16.0, 12.0, 8.0, 4.0, 0.0]
    time = (np.mean(days) - np.array(days)) / 10
    bent = time**2 - np.mean(time**2)
    seen = network().statistics(*see(days, "ggggg", (7 + 0.5 * time - 0.8 * bent).tolist()))[0]
    assert seen[COUNT] == np.float32(np.log1p(5))
    np.testing.assert_allclose(seen[LEVEL], 7, atol=1e-4)
    np.testing.assert_allclose(seen[SLOPE], 0.5, rtol=0.02)  # LEAST_SPREAD makes it a little smaller
    np.testing.assert_allclose(seen[CURVATURE], -0.8, rtol=0.05)
    np.testing.assert_allclose(seen[[PEAK_AGE, FIRST_AGE, LATEST_AGE]].expm1(), [4, 16, 0], atol=1e-4)
    assert seen[STATISTICS + LEVEL] == 0  # of r
    assert seen[2 * STATISTICS + LEVEL] == seen[LEVEL]  # of all bands


def test_colours_are_g_minus_r_where_both_are_seen() -> None:
    both = network().statistics(*see([2.0, 1.0, 0.0], "grg", [6.0, 5.5, 6.4]))[0, -COLOURS:]
    assert both[0] == 1
    np.testing.assert_allclose(both[[1, 2, 3, 5]], [0.7, 0.9, 0.5, 0.9], atol=1e-4)  # mean, latest, first, peak
    assert not network().statistics(*see([2.0, 0.0], "gg", [6.0, 6.4]))[0, -COLOURS:].any()


def test_points_that_are_no_detections_have_no_influence() -> None:
    kinds = np.array([Measurement.DETECTION] * 4, np.uint8)
    kinds[1], kinds[2] = Measurement.UPPER_LIMIT, Measurement.FORCED
    with_others = see([9.0, 5.0, 3.0, 0.0], "grrg", [6.0, 9.0, 2.0, 6.5], kinds)
    alone = see([9.0, 0.0], "gg", [6.0, 6.5])
    image = torch.zeros(1, 1, 1, 1)
    for found, expected in zip(network()(image, *with_others), network()(image, *alone), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_light_curve_without_detections_gives_finite_numbers() -> None:
    logits, unit = network()(torch.zeros(1, 1, 1, 1), *see([], "", []))
    assert logits.isfinite().all()
    assert unit.isfinite().all()
