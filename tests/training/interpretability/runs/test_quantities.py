"""The physical quantities of alerts, on light curves and stamps whose properties are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from broker_filter.packets.batch import BANDS, LightCurves, Measurement, Survey
from broker_filter.scoring.alerts import RawAlerts
from training.interpretability.runs.quantities import COLUMNS, DESCRIPTIONS, quantities

DETECTION, LIMIT, FORCED = Measurement.DETECTION, Measurement.UPPER_LIMIT, Measurement.FORCED
NOW = 60000.0
SIDE = 63
Point = tuple[float, str, float, Measurement]
"""Time in days after the alert, band, flux in nJy and kind; every uncertainty is 100 nJy."""


def one_alert(
    points: Sequence[Point] = ((0.0, "g", 1000.0, DETECTION),), survey: Survey = Survey.ZTF, **metadata: float
) -> RawAlerts:
    n = len(points)
    curves = LightCurves(
        np.array([0, n]),
        np.array([NOW + days for days, *_ in points]),
        np.array([BANDS.index(band) for _, band, *_ in points], np.uint8),
        np.array([flux for _, _, flux, _ in points], np.float32),
        np.full(n, 100.0, np.float32),
        np.array([kind for *_, kind in points], np.uint8),
    )
    return RawAlerts(
        np.zeros((1, 3, SIDE, SIDE), np.float32),
        np.array([[[0, 0, SIDE, SIDE]] * 3], np.int16),
        np.array([[metadata.get(name, np.nan) for name in COLUMNS]]),
        COLUMNS,
        np.array([NOW]),
        curves,
        survey=np.array([survey], np.uint8),
    )


def of_curve(name: str, *points: Point) -> float:
    return float(quantities(one_alert(points))[name][0])


def test_all_described_properties_are_returned_in_order() -> None:
    assert list(quantities(one_alert())) == list(DESCRIPTIONS)


def test_amplitude_is_large_from_one_magnitude_in_one_band() -> None:
    earlier = (-3.0, "g", 1000.0, DETECTION)
    assert of_curve("large_amplitude", earlier, (0.0, "g", 2600.0, DETECTION)) == 1
    assert of_curve("large_amplitude", earlier, (0.0, "g", 2400.0, DETECTION)) == 0
    assert np.isnan(of_curve("large_amplitude", earlier, (0.0, "r", 9000.0, DETECTION)))


def test_colour_needs_two_bands_within_a_day() -> None:
    assert of_curve("red", (-0.5, "g", 500.0, DETECTION), (0.0, "r", 900.0, DETECTION)) == 1
    assert of_curve("red", (-0.5, "r", 500.0, DETECTION), (0.0, "g", 900.0, DETECTION)) == 0
    assert np.isnan(of_curve("red", (-2.0, "g", 500.0, DETECTION), (0.0, "r", 900.0, DETECTION)))


def test_colour_is_that_of_the_latest_pair() -> None:
    blue_then_red = [
        (-10.0, "g", 900.0, DETECTION),
        (-10.0, "r", 100.0, DETECTION),
        (-0.2, "g", 500.0, DETECTION),
        (0.0, "r", 900.0, DETECTION),
    ]
    assert of_curve("red", *blue_then_red) == 1


@pytest.mark.parametrize(("earlier", "rises", "declines"), [(300.0, 1, 0), (950.0, 0, 0), (1700.0, 0, 1)])
def test_rise_and_decline_exceed_three_sigma(earlier: float, rises: float, declines: float) -> None:
    points = ((-2.0, "g", earlier, FORCED), (0.0, "g", 1000.0, DETECTION))
    assert of_curve("rising", *points) == rises
    assert of_curve("declining", *points) == declines


def test_rise_is_unknown_without_an_earlier_night() -> None:
    assert np.isnan(of_curve("rising", (-0.1, "g", 300.0, DETECTION), (0.0, "g", 1000.0, DETECTION)))


def test_detections_are_counted_without_limits_and_later_points() -> None:
    lone = [(-3.0, "g", 0.0, LIMIT), (0.0, "g", 1000.0, DETECTION), (1.0, "g", 1000.0, DETECTION)]
    assert of_curve("single_detection", *lone) == 1
    ten = [(float(-day), "g", 1000.0, DETECTION) for day in range(9, -1, -1)]
    assert of_curve("many_detections", *ten) == 1
    assert of_curve("many_detections", *ten[1:]) == 0


def test_sign_of_the_alert_and_of_earlier_detections() -> None:
    faded = ((-3.0, "g", 1000.0, DETECTION), (0.0, "g", -1000.0, DETECTION))
    assert of_curve("negative", *faded) == 1
    assert of_curve("negative_detections", *faded) == 0
    recovered = ((-3.0, "g", -1000.0, DETECTION), (0.0, "g", 1000.0, DETECTION))
    assert of_curve("negative", *recovered) == 0
    assert of_curve("negative_detections", *recovered) == 1


def test_limit_just_before_is_the_point_before_the_alert() -> None:
    alert = (0.0, "g", 1000.0, DETECTION)
    assert of_curve("limit_just_before", (-3.0, "r", 0.0, LIMIT), alert) == 1
    assert of_curve("limit_just_before", (-3.0, "g", 150.0, FORCED), alert) == 1
    assert of_curve("limit_just_before", (-3.0, "g", 900.0, FORCED), alert) == 0
    assert of_curve("limit_just_before", (-30.0, "g", 0.0, LIMIT), alert) == 0
    assert of_curve("limit_just_before", (-3.0, "r", 0.0, LIMIT), (-2.0, "g", 900.0, DETECTION), alert) == 0
    assert of_curve("limit_just_before", alert) == 0


def test_stamps_at_the_edge_and_with_nan_pixels() -> None:
    alert = one_alert()
    assert quantities(alert)["edge_stamp"][0] == 0
    alert.cutout_box[0, 1] = (0, 0, SIDE, 40)
    alert.cutouts[0, 2, 5, 5] = np.nan
    assert quantities(alert)["edge_stamp"][0] == 1
    assert quantities(alert)["nan_pixels"][0] == 1
    assert np.isnan(quantities(one_alert(survey=Survey.LSST))["edge_stamp"][0])


@pytest.mark.parametrize(
    ("score", "distance", "host", "star"),
    [(0.1, 3.0, 1, 0), (0.9, 1.0, 0, 1), (0.9, 3.0, 0, 0), (np.nan, np.nan, 0, 0)],
)
def test_catalogue_tells_host_galaxies_and_stars(score: float, distance: float, host: float, star: float) -> None:
    found = quantities(one_alert(sgscore1=score, distpsnr1=distance))
    assert found["host_galaxy"][0] == host
    assert found["star_below"][0] == star


def test_source_below_of_both_surveys() -> None:
    assert quantities(one_alert(distnr=0.5))["source_below"][0] == 1
    assert quantities(one_alert(distnr=9.0))["source_below"][0] == 0
    of_lsst = {"survey": Survey.LSST, "templateFluxErr": 100.0}
    assert quantities(one_alert(templateFlux=600.0, **of_lsst))["source_below"][0] == 1  # type: ignore[arg-type]
    assert quantities(one_alert(templateFlux=300.0, **of_lsst))["source_below"][0] == 0  # type: ignore[arg-type]
    assert np.isnan(quantities(one_alert(survey=Survey.LSST))["source_below"][0])


def test_moving_object_is_what_the_survey_names() -> None:
    assert quantities(one_alert(sso=1.0))["moving_object"][0] == 1
    assert np.isnan(quantities(one_alert())["moving_object"][0])


def test_properties_of_catalogues_are_unknown_without_their_columns() -> None:
    alert = one_alert(sgscore1=0.1, distpsnr1=1.0)
    bare = RawAlerts(
        alert.cutouts,
        alert.cutout_box,
        np.empty((1, 0)),
        (),
        alert.mjd,
        alert.light_curves,
        survey=alert.survey,
    )
    assert np.isnan(quantities(bare)["host_galaxy"][0])


def test_alerts_without_light_curves_are_refused() -> None:
    alert = one_alert()
    bare = RawAlerts(alert.cutouts, alert.cutout_box, alert.metadata, alert.columns)
    with pytest.raises(ValueError, match="no light curves"):
        quantities(bare)
