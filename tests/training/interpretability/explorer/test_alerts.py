import numpy as np
import pytest

from broker_filter.packets.batch import LightCurves
from broker_filter.scoring.bundle import LightCurveInput
from broker_filter.scoring.preprocess import prepare_light_curves
from training.interpretability.explorer.alerts import curve_of, source_points
from training.interpretability.explorer.data import TOKEN


@pytest.fixture
def curves() -> LightCurves:
    """Two light curves: without points, and with six points, of which the last is later than the alert at 10."""
    mjd = np.array([1.0, 3, 5, 7, 10, 12])
    flux = np.arange(6, dtype=np.float32)
    return LightCurves(np.array([0, 0, 6]), mjd, np.ones(6, np.uint8), flux, flux + 1, np.zeros(6, np.uint8))


def test_sources_are_the_points_that_the_network_takes(curves: LightCurves) -> None:
    wanted = LightCurveInput(points=4, flux_scale=1, time_scale=1)
    features, mask = prepare_light_curves(curves, np.array([10.0, 10.0]), wanted)
    for alert in (0, 1):
        token, *points = source_points(curves, 10.0, alert, wanted.points)
        assert token == TOKEN
        assert len(points) == mask[alert].sum()
        flux = np.sinh(features[alert, : len(points), 1])
        np.testing.assert_allclose(flux, curves.flux[points], rtol=1e-6)


def test_curve_is_in_days_before_the_alert(curves: LightCurves) -> None:
    assert curve_of(curves, 10.0, 1).days == [9, 7, 5, 3, 0, -2]
    assert curve_of(curves, 10.0, 0).days == []
