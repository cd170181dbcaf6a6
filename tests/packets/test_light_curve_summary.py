"""The columns made of the light curve equal a plain recomputation, alert by alert, from the values of fastavro."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import fastavro
import numpy as np
import pyarrow.parquet as pq
import pytest

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, AlertBatch, Measurement, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.light_curve_summary import CurveSummary
from broker_filter.packets.packet import Packet
from broker_filter.packets.photometry import Points
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.packets.schemas.writer_schema import WriterSchema
from broker_filter.packets.surveys import CurveColumn
from broker_filter.streaming.archives import read_packets

OF_BOTH = (
    *("peak_flux", "peak_band", "rise_rate", "days_since_nondet", "nondet_maglim", "days_nondet_to_first"),
    *("maglim_before_first", "peakmag_in_band", "amplitude", "nights", "g_r", "r_i"),
    *("rise_mag_rate", "rise_mag_rate_err", "decline_mag_rate", "decline_mag_rate_err"),
)
OF_LSST = (
    *OF_BOTH,
    *("age", "days_since_peak", "days_to_peak", "peakmag_so_far", "maxmag_so_far", "nnotdet", "diffmaglim"),
    *("u_g", "i_z", "z_y"),
)
RARE_IN_LSST = {"days_nondet_to_first": 0, "maglim_before_first": 0, "u_g": 1, "i_z": 1, "z_y": 1}
"""Fewest alerts that must have a column, if fewer than 20. LSST's packets of 2026 have no non-detection before the
first detection."""
COLOURS = (("u", "g"), ("g", "r"), ("r", "i"), ("i", "z"), ("z", "y"))
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


def magnitude(flux: float) -> float:
    return 31.4 - 2.5 * math.log10(abs(flux))


def slope(detections: list[Point]) -> tuple[float, float]:
    """Return slope and uncertainty (mag/d) of the line that numpy fits to the brightest detection of each time."""
    faint_first = sorted(detections, key=lambda point: abs(point.flux))
    once = list({point.mjd: point for point in faint_first if point.error > 0}.values())
    mjd, flux, error = np.array([(point.mjd, abs(point.flux), point.error) for point in once]).reshape(-1, 3).T
    if not len(mjd) or np.ptp(mjd) < 0.5:
        return math.nan, math.nan
    sigma = 2.5 / math.log(10) * error / flux
    design = np.stack([mjd - mjd[0], np.ones(len(mjd))], axis=1) / sigma[:, None]
    fitted, *_ = np.linalg.lstsq(design, (31.4 - 2.5 * np.log10(flux)) / sigma, rcond=None)
    return float(fitted[0]), float(np.sqrt(np.linalg.inv(design.T @ design)[0, 0]))


def colour(detections: list[Point], blue: str, red: str) -> float:
    of_band = {band: [point for point in detections if point.band == band] for band in (blue, red)}
    if not (of_band[blue] and of_band[red]):
        return math.nan
    when = min(max(point.mjd for point in points) for points in of_band.values())
    b, r = (
        min(points, key=lambda point: (abs(point.mjd - when), point.mjd, -abs(point.flux)))
        for points in of_band.values()
    )
    return magnitude(b.flux) - magnitude(r.flux) if abs(b.mjd - r.mjd) <= 1 else math.nan


def of_alike_detections(own: Point, detections: list[Point]) -> dict[str, float]:
    """Return the columns of the detections that have the sign of the alert's flux."""
    alike = [point for point in detections if math.copysign(1, point.flux) == math.copysign(1, own.flux)]
    found = {f"{blue}_{red}": colour(alike, blue, red) for blue, red in COLOURS}
    series = [point for point in alike if point.band == own.band and own.band is not None]
    if series:
        peak = min(series, key=lambda point: (-abs(point.flux), point.mjd))
        magnitudes = [magnitude(point.flux) for point in series]
        rise, rise_err = slope([point for point in series if point.mjd <= peak.mjd])
        decline, decline_err = slope([point for point in series if point.mjd >= peak.mjd])
        found |= {
            "peakmag_in_band": magnitude(peak.flux),
            "amplitude": (max(magnitudes) - min(magnitudes)) / 2,
            "rise_mag_rate": -rise,
            "rise_mag_rate_err": rise_err,
            "decline_mag_rate": decline,
            "decline_mag_rate_err": decline_err,
        }
    return found


def expected(own: Point, points: list[Point], survey_first: float, night_start: float) -> dict[str, float]:
    """Return the columns of one alert, as defined.

    `survey_first`: the survey's time of the first detection. `night_start`: when a night begins, as a part of a day.
    """
    detections = [point for point in points if point.kind == "detection"]
    found = dict.fromkeys(OF_LSST, math.nan) | {"diffmaglim": 31.4 - 2.5 * math.log10(5 * own.error)}
    found["nights"] = len({math.floor(point.mjd - night_start) for point in detections})
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
    found |= of_alike_detections(own, detections)
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
    before = max((point.mjd for point in limits if point.mjd < packet_first), default=math.inf)
    if before < first:
        found["days_nondet_to_first"] = first - before
        deepest = min(point.error for point in limits if point.mjd == before)
        found["maglim_before_first"] = magnitude(5 * deepest)
    if limits:
        when = max(point.mjd for point in limits)
        found["days_since_nondet"] = own.mjd - when
        found["nondet_maglim"] = 31.4 - 2.5 * math.log10(5 * min(point.error for point in limits if point.mjd == when))
    return found


@cache
def parsed(schema: WriterSchema) -> Any:
    return fastavro.parse_schema(schema.definition)


def record_of(alerts: AlertBatch, i: int) -> dict[str, Any]:
    """Return the record of an alert, as fastavro reads it."""
    held = alerts.records[i]
    record = fastavro.schemaless_reader(io.BytesIO(held.body), parsed(held.schema), None)
    assert isinstance(record, dict)
    return record


def lsst_batches(lsst: Path, decoder: Decoder) -> Iterator[tuple[AlertBatch, list[dict[str, Any]]]]:
    """Yield batches of real LSST alerts with their records."""
    packets = [
        *read_packets([lsst / "ocf", lsst / "more" / "ocf", lsst / "more" / "wire"]),
        *(Packet(path.read_bytes()) for path in sorted((lsst / "wire").iterdir())),
    ]
    alerts, _ = decoder.decode(packets)
    yield alerts, [record_of(alerts, i) for i in range(len(alerts))]
    table = lsst / "more" / "parquet" / ORBITS
    rows = pq.read_table(table).to_pylist()
    first = 0
    for alerts, _ in decoder.decode_batches(read_packets(table).batches(64)):
        yield alerts, [rows[first + i] for i in alerts.packet_index.tolist()]
        first += len(alerts.packets)


@pytest.mark.shared
def test_columns_of_real_lsst_alerts_equal_a_plain_recomputation(shared_data: Path, lsst_schemas: Path) -> None:
    decoder = Decoder(open_registry(str(lsst_schemas)), columns=OF_LSST)
    found, wanted = [], []
    for alerts, records in lsst_batches(shared_data / "lsst", decoder):
        found.append(alerts.metadata)
        for record in records:
            first = (record.get("diaObject") or {}).get("firstDiaSourceMjdTai")
            wanted.append(expected(*lsst_points(record), math.nan if first is None else first, night_start=0.5))
    assert len(wanted) > 400
    columns = dict(zip(OF_LSST, np.concatenate(found).T, strict=True))
    for name, values in columns.items():
        np.testing.assert_allclose(values, [row[name] for row in wanted], rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.isfinite(values).sum() >= RARE_IN_LSST.get(name, 20), name
    assert (columns["age"] > 30).any()


@pytest.mark.shared
def test_columns_of_real_ztf_alerts_equal_a_plain_recomputation(ztf_packets: list[tuple[int, bytes]]) -> None:
    columns = (*OF_BOTH, "jdstarthist")
    alerts, _ = Decoder(None, columns=columns).decode([Packet(data) for _, data in ztf_packets[::8]])
    assert set(alerts.survey) == {Survey.ZTF}
    start = alerts.column("jdstarthist") - 2400000.5
    wanted = [expected(*curve_points(alerts, i), start[i], night_start=0.0) for i in range(len(alerts))]
    for name in OF_BOTH:
        values = alerts.column(name)
        np.testing.assert_allclose(values, [row[name] for row in wanted], rtol=1e-3, atol=1e-4, err_msg=name)
        assert np.isfinite(values).sum() >= (1 if name == "r_i" else 20), name


DETECTION, LIMIT, FORCED = (float(kind) for kind in Measurement)


def summary(own: tuple[float, ...], *others: tuple[float, ...]) -> CurveSummary:
    """Return the summary of one alert; each point is (mjd, band, flux, flux_err, kind)."""

    def points(rows: list[tuple[float, ...]]) -> Points:
        return Points(np.full(len(rows), 7), *np.array(rows, dtype=np.float64).reshape(-1, 5).T)

    return CurveSummary(points([own]), [points(list(others)), points([])], np.array([7]))


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
    nothing = Points(np.empty(0, np.int64), *np.empty((5, 0)))
    empty = CurveSummary(nothing, [nothing], np.empty(0, np.int64))
    for name in get_args(CurveColumn):
        value = getattr(found, name)[0]
        assert value == 0 if name in ("nights", "nondetections") else np.isnan(value), name
        assert len(getattr(empty, name)) == 0, name


def test_rates_are_lines_through_the_detections_before_and_after_the_peak_in_the_band_of_the_alert() -> None:
    def flux(mag: float) -> float:
        return 10 ** (-0.4 * (mag - 31.4))

    days = ((0, 20), (2, 19.5), (4, 19), (4, 19), (5, 19.1), (8, 19.4))  # a rise by 0.25 mag/d, a decline by 0.1
    points = [(50 + day, 2, flux(mag), 0.01 * flux(mag), DETECTION) for day, mag in days]
    others = [
        (53, 1, flux(15), 1, DETECTION),  # another band
        (53, 2, -flux(15), 1, DETECTION),  # fainter than in the template
        (53, 2, flux(15), 1, FORCED),
        (53, 2, flux(19.2), np.nan, DETECTION),  # without an uncertainty it has no weight
    ]
    found = summary(points[-1], *points[:-1], *others)
    np.testing.assert_allclose([found.rise_mag_rate[0], found.decline_mag_rate[0]], [0.25, 0.1])
    np.testing.assert_allclose(found.rise_mag_rate_err[0], 2.5 / np.log(10) * 0.01 / np.sqrt(8))
    np.testing.assert_allclose(found.amplitude[0], 0.5)
    at_peak = summary(points[2], *points[:2])
    np.testing.assert_allclose(at_peak.rise_mag_rate[0], 0.25)
    assert np.isnan(at_peak.decline_mag_rate[0])
    one_night = summary((50.4, 2, 9, 1, DETECTION), (50, 2, 4, 1, DETECTION))
    assert np.isnan([one_night.rise_mag_rate[0], one_night.rise_mag_rate_err[0]]).all()


def test_a_colour_is_of_the_nearest_detections_of_one_night() -> None:
    found = summary(
        (60, 2, 100, 5, DETECTION),  # later than any detection in g
        (50.1, 1, 40, 5, DETECTION),
        (50.2, 2, 10, 5, DETECTION),  # nearest to the latest detection in g
        (49.8, 2, 30, 5, DETECTION),
        (50.1, 2, -40, 5, DETECTION),
        (58.9, 3, 20, 5, DETECTION),
    )
    np.testing.assert_allclose(found.g_r[0], 2.5 * np.log10(10 / 40))
    assert np.isnan(found.r_i[0])  # 1.1 days apart
    assert np.isnan(found.i_z[0])


def test_nights_are_counted_from_the_start_of_a_night() -> None:
    own, others = (10.7, 1, 5, 1, DETECTION), [(10.3, 1, 5, 1, DETECTION), (9.6, 2, -5, 1, DETECTION)]
    rows = np.array([own, *others]).T
    for start, nights in ((0.0, 2), (0.5, 2), (0.65, 3)):
        points = Points(np.full(3, 7), *rows)
        own_points = Points(*(column[:1] for column in points))
        found = CurveSummary(own_points, [Points(*(column[1:] for column in points))], np.array([7]), start)
        assert found.nights[0] == nights


@pytest.mark.shared
def test_amplitude_and_rates_equal_those_of_the_package_light_curve(ztf_packets: list[tuple[int, bytes]]) -> None:
    light_curve = pytest.importorskip("light_curve", reason="light-curve is not installed")
    names = ("rise_mag_rate", "rise_mag_rate_err", "decline_mag_rate", "decline_mag_rate_err", "amplitude")
    alerts, _ = Decoder(None, columns=names).decode([Packet(data) for _, data in ztf_packets[::4]])
    amplitude, line = light_curve.Amplitude(), light_curve.LinearFit()
    compared = 0
    for i in range(len(alerts)):
        own, points = curve_points(alerts, i)
        series = [
            point
            for point in points
            if point.kind == "detection" and point.band == own.band and point.flux * own.flux > 0
        ]
        days, flux, error = np.array(sorted((point.mjd - own.mjd, abs(point.flux), point.error) for point in series)).T
        mag, sigma = 31.4 - 2.5 * np.log10(flux), 2.5 / np.log(10) * error / flux
        np.testing.assert_allclose(alerts.column("amplitude")[i], amplitude(days, mag)[0], atol=1e-6)
        brightest = np.diff(days, append=np.inf) > 0
        days, mag, sigma = days[brightest], mag[brightest], sigma[brightest]
        peak = int(np.argmin(mag))
        for part, sign, name in ((slice(peak + 1), -1, "rise_mag_rate"), (slice(peak, None), 1, "decline_mag_rate")):
            if len(days[part]) < 3 or np.ptp(days[part]) < 0.5:  # the package fits no line to two points
                continue
            fitted, uncertainty, _ = line(days[part], mag[part], sigma[part])
            np.testing.assert_allclose(alerts.column(name)[i], sign * fitted, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(alerts.column(f"{name}_err")[i], uncertainty, rtol=1e-5)
            compared += 1
    assert compared > 100
