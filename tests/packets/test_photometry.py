"""Light curves hold exactly the measurements with a time and a flux, in nJy and in order of time."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import numpy as np
import pytest

from broker_filter.packets.batch import BANDS, UNKNOWN_BAND, AlertBatch, Measurement
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.photometry import Points, letter_band, light_curves, nanojansky, sign, ztf_band
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry import open_registry
from tests.packets.test_stamps import fits_bytes, numbered


class Point(NamedTuple):
    """A light-curve point, computed one at a time with plain formulae."""

    mjd: float
    band: str | None
    flux: float
    flux_err: float
    kind: Measurement


def flux_of(magnitude: float) -> float:
    return 3631e9 * 10 ** (-magnitude / 2.5)  # nJy; AB magnitude 0 is 3631 Jy


def ztf_detection(row: dict[str, Any]) -> Point | None:
    mjd, band = row["jd"] - 2400000.5, {1: "g", 2: "r", 3: "i"}[row["fid"]]
    if row["magpsf"] is None:
        if row["diffmaglim"] is None:
            return None
        return Point(mjd, band, 0.0, flux_of(row["diffmaglim"]) / 5, Measurement.UPPER_LIMIT)
    flux = flux_of(row["magpsf"]) * (1 if row["isdiffpos"] in ("t", "1") else -1)
    return Point(mjd, band, flux, abs(flux) * row["sigmapsf"] * math.log(10) / 2.5, Measurement.DETECTION)


def ztf_forced(row: dict[str, Any]) -> Point | None:
    if row["forcediffimflux"] in (None, -99999.0):
        return None
    scale = flux_of(row["magzpsci"])
    return Point(
        row["jd"] - 2400000.5,
        {1: "g", 2: "r", 3: "i"}[row["fid"]],
        row["forcediffimflux"] * scale,
        row["forcediffimfluxunc"] * scale,
        Measurement.FORCED,
    )


def ztf_points(record: dict[str, Any]) -> list[Point]:
    # One redistributed packet has strings in the columns of its history, which cannot be read.
    previous = record["prv_candidates"] if isinstance(record["prv_candidates"], list) else []
    points = [ztf_detection(row) for row in (record["candidate"], *previous)]
    points += [ztf_forced(row) for row in record.get("fp_hists") or []]
    return [point for point in points if point]


def lsst_points(record: dict[str, Any]) -> list[Point]:
    detections = [record["diaSource"], *(record["prvDiaSources"] or [])]
    return [
        Point(row["midpointMjdTai"], row["band"], row["psfFlux"], number(row["psfFluxErr"]), kind)
        for rows, kind in (
            (detections, Measurement.DETECTION),
            (record["prvDiaForcedSources"] or [], Measurement.FORCED),
        )
        for row in rows
        if row["psfFlux"] is not None and math.isfinite(row["psfFlux"])
    ]


def number(value: float | None) -> float:
    return math.nan if value is None else value


def assert_curve(alerts: AlertBatch, i: int, expected: list[Point]) -> None:
    curves = alerts.light_curves
    own = slice(*curves.offsets[i : i + 2].tolist())
    assert (np.diff(curves.mjd[own]) >= 0).all()
    found = zip(
        curves.mjd[own], curves.kind[own], curves.flux[own], curves.flux_err[own], curves.band[own], strict=True
    )
    # The order of points with equal times is arbitrary.
    found_points = sorted((mjd, kind, BANDS[band], flux, err) for mjd, kind, flux, err, band in found)
    expected_points = sorted((p.mjd, p.kind, p.band, p.flux, p.flux_err) for p in expected)
    assert [point[:3] for point in found_points] == [point[:3] for point in expected_points]
    for k in (3, 4):
        np.testing.assert_allclose(
            [point[k] for point in found_points], [point[k] for point in expected_points], rtol=2e-4, atol=1e-3
        )


def test_ztf_light_curves_match_the_values_of_fastavro(ztf_packets: list[tuple[int, bytes]]) -> None:
    packets = [Packet(data, FilePosition(str(candid))) for candid, data in ztf_packets[::3]]
    alerts, _ = Decoder(open_registry(None)).decode(packets)
    kinds = np.bincount(alerts.light_curves.kind, minlength=3)
    assert (kinds > 20).all()
    for i, packet in enumerate(packets):
        (record,) = fastavro.reader(io.BytesIO(packet.data))
        assert_curve(alerts, i, ztf_points(record))


def test_lsst_light_curves_match_the_values_of_fastavro(shared_data: Path) -> None:
    paths = sorted((shared_data / "lsst" / "ocf").rglob("*.avro"))
    alerts, rejects = Decoder(open_registry(None)).decode([Packet(p.read_bytes(), FilePosition(str(p))) for p in paths])
    assert not rejects
    records = [record for path in paths for record in fastavro.reader(io.BytesIO(path.read_bytes()))]
    for i, record in enumerate(records):
        assert_curve(alerts, i, lsst_points(record))
    assert np.diff(alerts.light_curves.offsets).max() > 700
    assert {Measurement.DETECTION, Measurement.FORCED} <= set(alerts.light_curves.kind.tolist())


def test_the_alert_itself_is_a_detection_in_its_light_curve(ztf_packets: list[tuple[int, bytes]]) -> None:
    alerts, _ = Decoder(open_registry(None)).decode([Packet(data, FilePosition("")) for _, data in ztf_packets[:300]])
    curves = alerts.light_curves
    for i in range(len(alerts)):
        own = slice(*curves.offsets[i : i + 2].tolist())
        now = (curves.mjd[own] == alerts.mjd[i]) & (curves.kind[own] == Measurement.DETECTION)
        assert now.sum() == 1
        assert curves.flux[own][now] == np.float32(alerts.column("psfFlux")[i])
        assert curves.flux_err[own][now] == np.float32(alerts.column("psfFluxErr")[i])


def test_the_zero_point_magnitude_is_one_nanojansky() -> None:
    np.testing.assert_allclose(nanojansky(np.array([31.4, 23.9, 8.9])), [1, 1e3, 1e9])


def test_every_spelling_of_isdiffpos_has_a_sign() -> None:
    spelt = [*map(ord, "tT1+"), 1, *map(ord, "fF0-"), 0, -1, *map(ord, "xn"), math.nan]
    expected = [*[1] * 5, *[-1] * 6, *[math.nan] * 3]
    np.testing.assert_equal(sign(np.array(spelt, dtype=float)), expected)


def ztf_alert(text: Any, points: list[Any], infinite: str | None = None) -> tuple[AlertBatch, list[Reject]]:
    """Return an alert with `isdiffpos` and `fid` of the Avro type `text`, and a history with a detection for each
    value.
    """
    numbers = [{"name": name, "type": "double"} for name in ("jd", "ra", "dec", "magpsf", "sigmapsf", "rb")]
    again = text["name"] if isinstance(text, dict) else text
    texts = [{"name": "fid", "type": ["null", text]}, {"name": "isdiffpos", "type": ["null", again]}]
    candidate = {"type": "record", "name": "c", "fields": [*numbers, *texts, {"name": "rcid", "type": "int"}]}
    cutout = {"type": "record", "name": "cutout", "fields": [{"name": "stampData", "type": "bytes"}]}
    schema = {
        "type": "record",
        "name": "alert",
        "fields": [
            {"name": "objectId", "type": "string"},
            {"name": "candid", "type": "long"},
            {"name": "candidate", "type": candidate},
            {"name": "prv_candidates", "type": {"type": "array", "items": "c"}},
            {"name": "cutoutScience", "type": cutout},
            {"name": "cutoutTemplate", "type": "cutout"},
            {"name": "cutoutDifference", "type": "cutout"},
        ],
    }
    row = {"jd": 2460000.5, "ra": 1.0, "dec": 2.0, "magpsf": 18.0, "sigmapsf": 0.1, "rb": 0.5, "rcid": 1}
    own = row | {"fid": points[0], "isdiffpos": points[0]} | ({infinite: -math.inf} if infinite else {})
    stamp = {"stampData": fits_bytes(numbered(63, 63))}
    alert = {
        "objectId": "ZTF1",
        "candid": 1,
        "candidate": own,
        "prv_candidates": [row | {"jd": 2459000.5 + k, "fid": p, "isdiffpos": p} for k, p in enumerate(points)],
        **dict.fromkeys(("cutoutScience", "cutoutTemplate", "cutoutDifference"), stamp),
    }
    file = io.BytesIO()
    fastavro.writer(file, schema, [alert])
    return Decoder(open_registry(None)).decode([Packet(file.getvalue(), FilePosition("one"))])


@pytest.mark.parametrize(
    ("kind", "positive", "negative"),
    [
        ("string", ["t", "T", "true", "True", "TRUE", "1", "1.0", "+1"], ["f", "False", "0", "0.0", "-1", "-1.0"]),
        ("int", [1], [0, -1]),
        ("double", [1.0], [0.0, -1.0]),
        ("boolean", [True], [False]),
        ({"type": "enum", "name": "sign", "symbols": ["t", "f", "True", "False"]}, ["t", "True"], ["f", "False"]),
    ],
)
def test_isdiffpos_is_read_in_all_spellings_of_pandas_and_csv(
    kind: Any, positive: list[Any], negative: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for spelt, expected in ((positive, 1), (negative, -1)):
        alerts, rejects = ztf_alert(kind, spelt)
        assert not rejects
        assert len(alerts.light_curves.flux) == 1 + len(spelt)
        assert (np.sign(alerts.light_curves.flux) == expected).all()
        assert alerts.column("isdiffpos").tolist() == [max(expected, 0)]
    assert not caplog.records


def test_dropping_a_detection_with_an_unknown_sign_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    alerts, _ = ztf_alert("string", ["t", "perhaps", "1", None])
    assert len(alerts.light_curves.flux) == 3
    assert "isdiffpos" in caplog.text
    alerts, _ = ztf_alert("string", ["t", "perhaps"])
    assert len(caplog.records) == 1


def test_a_filter_id_may_be_a_number_or_text() -> None:
    for kind, spelt in (("string", ["1", "2", "3", "g", "r", "i"]), ("double", [1.0, 2.0, 3.0] * 2)):
        points = [BANDS.index(band) for band in "gri"] * 2
        for value, band in zip(spelt, points, strict=True):
            alerts, _ = ztf_alert(kind, [value])
            assert alerts.band.tolist() == [band]
            assert alerts.column("fid").tolist() == [band]


@pytest.mark.parametrize("name", ["jd", "ra", "dec"])
def test_an_alert_with_an_infinite_position_or_time_is_rejected(name: str) -> None:
    alerts, (reject,) = ztf_alert("int", [1], infinite=name)
    assert len(alerts) == 0
    assert reject.reason is RejectReason.MISSING_FIELD
    assert reject.alert is not None
    assert None in (reject.alert.mjd, reject.alert.ra, reject.alert.dec)
    assert all(value is None or math.isfinite(value) for value in (reject.alert.mjd, reject.alert.ra, reject.alert.dec))


def test_infinite_metadata_count_as_missing() -> None:
    alerts, _ = ztf_alert("int", [1], infinite="rb")
    assert math.isnan(alerts.column("rb")[0])
    alerts, _ = ztf_alert("int", [1], infinite="sigmapsf")
    assert math.isnan(alerts.light_curves.flux_err[-1])
    assert np.isfinite(alerts.light_curves.flux).all()


def test_bands_are_indices_or_unknown() -> None:
    assert letter_band(np.array([*map(ord, "ugrizyY"), math.nan], dtype=float)).tolist() == [
        *range(6),
        *[UNKNOWN_BAND] * 2,
    ]
    assert ztf_band(np.array([1.0, 2.0, 3.0, 4.0, math.nan])).tolist() == [1, 2, 3, UNKNOWN_BAND, UNKNOWN_BAND]


def points(alert: list[int], mjd: list[float], flux: list[float]) -> Points:
    ones = np.ones(len(mjd))
    return Points(np.array(alert), np.array(mjd), ones, np.array(flux), ones, ones)


def test_points_are_gathered_by_alert_and_sorted_by_time() -> None:
    curves = light_curves(
        3, [points([2, 0, 2], [5.0, 1.0, 3.0], [50.0, 10.0, 30.0]), points([2, 0], [4.0, 0.5], [40.0, 5.0])]
    )
    assert curves.offsets.tolist() == [0, 2, 2, 5]
    assert curves.mjd.tolist() == [0.5, 1.0, 3.0, 4.0, 5.0]
    assert curves.flux.tolist() == [5.0, 10.0, 30.0, 40.0, 50.0]


@pytest.mark.parametrize(
    ("mjd", "flux"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf), (1.0, 1e39)]
)
def test_a_point_without_time_or_flux_is_left_out(mjd: float, flux: float) -> None:
    curves = light_curves(1, [points([0, 0, -1], [mjd, 2.0, 2.0], [flux, 7.0, 8.0])])
    assert curves.flux.tolist() == [7.0]
    assert curves.offsets.tolist() == [0, 1]


def test_without_points_the_light_curves_are_empty() -> None:
    curves = light_curves(2, [])
    assert curves.offsets.tolist() == [0, 0, 0]
    assert (curves.band.dtype, curves.flux.dtype, curves.kind.dtype) == (np.uint8, np.float32, np.uint8)
