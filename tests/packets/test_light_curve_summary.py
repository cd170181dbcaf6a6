"""The columns made of the light curve equal a plain recomputation, alert by alert, from the values of fastavro."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import numpy as np
import pytest

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, AlertBatch, Measurement, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.light_curve_summary import CurveSummary, summarise
from broker_filter.packets.packet import Packet
from broker_filter.packets.photometry import Points
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.streaming.archives import read_packets

OF_BOTH = ("peak_flux", "peak_band", "rise_rate", "days_since_nondet", "nondet_maglim", "days_nondet_to_first")
OF_LSST = (
    *OF_BOTH,
    *("age", "days_since_peak", "days_to_peak", "peakmag_so_far", "maxmag_so_far", "nnotdet", "diffmaglim"),
)
ORBITS = "4d176528__or4_lsst7.1.parquet"
"""Simulated alerts, most with a rise; reading all files of this folder takes ten times as long."""


class Point(NamedTuple):
    """A measurement: time (d), band, difference flux and its uncertainty (nJy), kind."""

    mjd: float
    band: str | None
    flux: float
    error: float
    kind: str


def lsst_points(record: dict[str, Any]) -> tuple[Point, list[Point]]:
    """Return the measurement of the alert, and all measurements with a flux up to its time."""

    def point(row: dict[str, Any], kind: str) -> Point:
        flux, error = (math.nan if row[name] is None else row[name] for name in ("psfFlux", "psfFluxErr"))
        return Point(row["midpointMjdTai"], row["band"], flux, error, kind)

    own = point(record["diaSource"], "detection")
    history = [point(row, "detection") for row in record["prvDiaSources"] or []]
    history += [point(row, "forced") for row in record["prvDiaForcedSources"] or []]
    return own, [each for each in (own, *history) if each.mjd <= own.mjd and math.isfinite(each.flux)]


def curve_points(alerts: AlertBatch, i: int) -> tuple[Point, list[Point]]:
    """Return the same as `lsst_points` for any survey, from the light curve of the batch.

    The first detection at the time of the alert is the alert itself.
    """
    curve, rows = alerts.light_curves, slice(*alerts.light_curves.offsets[i : i + 2].tolist())
    columns = (curve.mjd[rows], curve.band[rows], curve.flux[rows], curve.flux_err[rows], curve.kind[rows])
    kinds = {int(kind): kind.name.lower() for kind in Measurement}
    points = [
        Point(mjd, None if band == UNKNOWN_BAND else BANDS[band], flux, error, kinds[kind])
        for mjd, band, flux, error, kind in zip(*(column.tolist() for column in columns), strict=True)
        if mjd <= alerts.mjd[i]
    ]
    return next(point for point in points if point.kind == "detection" and point.mjd == alerts.mjd[i]), points


def expected(own: Point, points: list[Point], survey_first: float) -> dict[str, float]:
    """Return the columns of one alert, as defined.

    `survey_first`: the survey's time of the first detection.
    """
    detections = [point for point in points if point.kind == "detection"]
    found = dict.fromkeys(OF_LSST, math.nan) | {"diffmaglim": 31.4 - 2.5 * math.log10(5 * own.error)}
    if not detections:
        return found
    packet_first = min(point.mjd for point in detections)
    first = packet_first if math.isnan(survey_first) else min(packet_first, survey_first)
    peak = min(detections, key=lambda point: (-abs(point.flux), point.mjd))
    found |= {
        "age": own.mjd - first,
        "days_since_peak": own.mjd - peak.mjd,
        "days_to_peak": peak.mjd - first,
        "peakmag_so_far": 31.4 - 2.5 * math.log10(abs(peak.flux)),
        "maxmag_so_far": 31.4 - 2.5 * math.log10(min(abs(point.flux) for point in detections)),
        "peak_flux": peak.flux,
        "peak_band": math.nan if peak.band is None else BANDS.index(peak.band),
    }
    measured = [point for point in points if point.kind != "upper_limit"]
    earlier = [point for point in measured if point.band == own.band and point.mjd <= own.mjd - 0.5]
    if earlier and own.band is not None:
        last = max(earlier, key=lambda point: (point.mjd, point.kind == "detection", -point.flux))
        found["rise_rate"] = (own.flux - last.flux) / (own.mjd - last.mjd)
    limits = [
        point
        for point in points
        if point.mjd < own.mjd
        and (point.kind == "upper_limit" or (point.kind == "forced" and abs(point.flux) < 3 * point.error))
    ]
    found["nnotdet"] = len(limits)
    before = [point.mjd for point in limits if point.mjd < packet_first]
    if before and max(before) < first:
        found["days_nondet_to_first"] = first - max(before)
    if limits:
        when = max(point.mjd for point in limits)
        found["days_since_nondet"] = own.mjd - when
        found["nondet_maglim"] = 31.4 - 2.5 * math.log10(5 * min(point.error for point in limits if point.mjd == when))
    return found


def record_of(alerts: AlertBatch, i: int) -> dict[str, Any]:
    held = alerts.records[i]
    record = fastavro.schemaless_reader(io.BytesIO(held.body), fastavro.parse_schema(held.schema.definition), None)
    assert isinstance(record, dict)
    return record


@pytest.mark.shared
def test_columns_of_real_lsst_alerts_equal_a_plain_recomputation(shared_data: Path, lsst_schemas: Path) -> None:
    lsst = shared_data / "lsst"
    packets = [
        *read_packets(
            [lsst / "ocf", lsst / "more" / "ocf", lsst / "more" / "wire", lsst / "more" / "parquet" / ORBITS]
        ),
        *(Packet(path.read_bytes()) for path in sorted((lsst / "wire").iterdir())),
    ]
    alerts, _ = Decoder(open_registry(str(lsst_schemas)), columns=OF_LSST).decode(packets)
    assert len(alerts) > 400
    wanted = []
    for i in range(len(alerts)):
        record = record_of(alerts, i)
        first = (record.get("diaObject") or {}).get("firstDiaSourceMjdTai")
        wanted.append(expected(*lsst_points(record), math.nan if first is None else first))
    for name in OF_LSST:
        values = alerts.column(name)
        np.testing.assert_allclose(values, [row[name] for row in wanted], rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.isfinite(values).sum() > (-1 if name == "days_nondet_to_first" else 20), name
    assert (alerts.column("age") > 30).any()


@pytest.mark.shared
def test_columns_of_real_ztf_alerts_equal_a_plain_recomputation(ztf_packets: list[tuple[int, bytes]]) -> None:
    columns = (*OF_BOTH, "jdstarthist")
    alerts, _ = Decoder(None, columns=columns).decode([Packet(data) for _, data in ztf_packets[::8]])
    assert set(alerts.survey) == {Survey.ZTF}
    start = alerts.column("jdstarthist") - 2400000.5
    wanted = [expected(*curve_points(alerts, i), start[i]) for i in range(len(alerts))]
    for name in OF_BOTH:
        values = alerts.column(name)
        np.testing.assert_allclose(values, [row[name] for row in wanted], rtol=1e-3, atol=1e-4, err_msg=name)
        assert np.isfinite(values).sum() > 20, name


DETECTION, LIMIT, FORCED = (float(kind) for kind in Measurement)


def summary(own: tuple[float, ...], *others: tuple[float, ...]) -> CurveSummary:
    """Return the summary of one alert; each point is (mjd, band, flux, flux_err, kind)."""

    def points(rows: list[tuple[float, ...]]) -> Points:
        return Points(np.full(len(rows), 7), *np.array(rows, dtype=np.float64).reshape(-1, 5).T)

    return summarise(points([own]), [points(list(others)), points([])], np.array([7]))


def test_points_later_than_the_alert_do_not_count() -> None:
    found = summary((100, 1, 50, 5, DETECTION), (101, 1, 900, 5, DETECTION), (102, 1, 0, 5, FORCED))
    assert (found.peak_flux[0], found.peak_mjd[0], found.nondetections[0]) == (50, 100, 0)


def test_the_peak_is_the_largest_absolute_flux_and_the_earliest_of_equal_ones() -> None:
    found = summary((100, 1, 50, 5, DETECTION), (90, 2, -80, 5, DETECTION), (95, 3, 80, 5, DETECTION))
    assert (found.peak_flux[0], found.peak_band[0], found.peak_mjd[0]) == (-80, 2, 90)
    assert found.faintest_flux[0] == 50
    unknown = summary((100, UNKNOWN_BAND, 50, 5, DETECTION), (99, UNKNOWN_BAND, 40, 5, DETECTION))
    assert np.isnan(unknown.peak_band[0])
    assert np.isnan(unknown.rise_rate[0])


def test_the_rise_is_from_the_last_measurement_of_another_night_in_the_same_band() -> None:
    found = summary(
        (100, 1, 50, 5, DETECTION),
        (99.9, 1, 49, 5, DETECTION),  # the same night
        (99, 2, 10, 5, DETECTION),  # another band
        (98, 1, 30, 5, FORCED),
        (98, 1, 40, 5, DETECTION),
        (96, 1, 20, 5, DETECTION),
        (99, 1, 0, 5, LIMIT),
    )
    assert found.rise_rate[0] == (50 - 40) / 2


def test_non_detections_are_before_the_alert_and_one_is_the_last_before_the_first_detection() -> None:
    found = summary(
        (100, 1, 50, 5, DETECTION),
        (98, 1, 40, 5, DETECTION),
        (99, 2, 1, 5, FORCED),  # after the first detection
        (97, 2, 14, 5, FORCED),
        (96, 2, 16, 5, FORCED),  # above 3 sigma
        (99, 1, 0, 4, LIMIT),  # deeper, at the same time
        (90, 1, 0, 2, LIMIT),
        (100, 1, 2, 5, FORCED),  # at the time of the alert
    )
    assert found.nondetections[0] == 4
    assert found.days_since_nondetection[0] == 1
    assert found.days_since_early_nondetection[0] == 3
    np.testing.assert_allclose(found.nondetection_maglim[0], 31.4 - 2.5 * np.log10(5 * 4))


def test_an_alert_without_a_flux_has_no_peak_and_an_empty_batch_no_rows() -> None:
    found = summary((100, 1, np.nan, 5, DETECTION))
    assert found.nondetections[0] == 0
    assert all(np.isnan(values[0]) for name, values in found._asdict().items() if name != "nondetections")
    nothing = Points(np.empty(0, np.int64), *np.empty((5, 0)))
    assert [len(values) for values in summarise(nothing, [nothing], np.empty(0, np.int64))] == [0] * len(
        CurveSummary._fields
    )
