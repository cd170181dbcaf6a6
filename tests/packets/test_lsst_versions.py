"""Alerts of several minor versions of LSST's schema arrive in one topic; each is decoded by its own schema."""

from __future__ import annotations

import io
import json
import logging
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest

from broker_filter.metrics import Metrics
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.registry import FORGET_UNKNOWN_S, HttpRegistry, open_registry
from broker_filter.packets.surveys import rows_of_unknown_version
from broker_filter.scoring.scorer import Scorer
from broker_filter.streaming.account import account_batch
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_packets
from tests.lsst_alerts import Definition, base_schema, extended, simulated_records, wire_packet
from tests.ztf_network import ZTF_NETWORK

UNKNOWN_FIELDS = {"colourOfTheSky": "string", "exposureTime": "double"}


@pytest.fixture(params=["simulated", pytest.param("official", marks=pytest.mark.shared)])
def base(request: pytest.FixtureRequest) -> Definition:
    """The simulator's schema 10.0, and the survey's own schema 11.0."""
    if request.param == "simulated":
        return base_schema()
    return base_schema(request.getfixturevalue("lsst_schemas"), 1100)


def registry_of(folder: Path, schemas: dict[int, Definition]) -> Path:
    """Write the schemas into a directory that stands for a registry, and return the directory."""
    for schema_id, definition in schemas.items():
        (folder / f"{schema_id}.avsc").write_text(json.dumps(definition))
    return folder


def packets(*data: bytes) -> list[Packet]:
    return [Packet(item) for item in data]


def test_schema_11_1_is_decoded_with_its_new_columns(
    base: Definition, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    definition = extended(base, "11_1")
    records = simulated_records()[:3]
    for record, algorithm, failed in zip(records, (1, 2, None), (True, False, None), strict=True):
        record["diaSource"] |= {
            "exposureTime": 30.0 if algorithm else None,
            "trailAlgorithm": algorithm,
            "trail_flag": failed,
            "trail_flag_edge": failed,
            "reliabilityVersion": "tac_cnn-2026-03" if algorithm else None,
            "reliability": 0.75,
        }
    decoder = Decoder(registry_of(tmp_path, {1101: definition}))
    alerts, rejects = decoder.decode(packets(*(wire_packet(record, definition, 1101) for record in records)))
    assert not rejects
    assert alerts.schema_version == ["11.1"] * 3
    np.testing.assert_array_equal(alerts.column("exptime"), [30, 30, np.nan])
    np.testing.assert_array_equal(alerts.column("trailAlgorithm"), [1, 2, np.nan])
    np.testing.assert_array_equal(alerts.column("trail_flag"), [1, 0, np.nan])
    np.testing.assert_array_equal(alerts.column("trail_flag_edge"), [1, 0, np.nan])
    np.testing.assert_array_equal(alerts.column("reliability"), [0.75] * 3)
    assert alerts.reliability_version == ["tac_cnn-2026-03", "tac_cnn-2026-03", None]
    same = compile_filter('reliability_version == "tac_cnn-2026-03"', FIELDS, [])
    assert same.columns == []
    assert same.holds(alerts, {}).tolist() == [True, True, False]
    none = compile_filter("isnull(reliability_version)", FIELDS, [])
    assert none.holds(replace(alerts, reliability_version=None), {}).tolist() == [True] * 3
    assert not caplog.records


def test_an_unknown_minor_is_decoded_by_its_own_schema_logged_once_and_counted(
    base: Definition, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schemas = {1100: base, 1101: extended(base, "11_1"), 1102: extended(base, "11_2", UNKNOWN_FIELDS)}
    record = simulated_records()[0]
    record["diaSource"]["exposureTime"] = 30.0
    data = [wire_packet(record, schemas[schema_id], schema_id) for schema_id in (1102, 1100, 1101, 1102)]
    decoder = Decoder(registry_of(tmp_path, schemas))
    with caplog.at_level(logging.WARNING):
        alerts, rejects = decoder.decode(packets(*data))
        again, _ = decoder.decode(packets(*data[:1]))
    assert not rejects
    assert rows_of_unknown_version(alerts) == [0, 3]
    assert rows_of_unknown_version(again) == [0]
    np.testing.assert_array_equal(alerts.column("exptime"), [30, np.nan, 30, 30])
    for i in range(1, 4):
        assert alerts.cutouts[i].tobytes() == alerts.cutouts[0].tobytes()
    [line] = [entry.getMessage() for entry in caplog.records]
    assert "version 11.2" in line
    assert "id 1102" in line

    scored = score_packets(packets(*data), decoder, Scorer.open([ZTF_NETWORK], also=["lsst"]), DuplicateWindow(10))
    account = account_batch(scored)
    assert account.unknown_version == {Survey.LSST: 2}
    assert account.consumed == account.scored + account.duplicates == 4
    metrics = Metrics()
    metrics.commit([account], Counter(), "me.dead-letter")
    text = metrics.exposition().decode()
    assert 'broker_filter_unknown_version_alerts_total{survey="lsst"} 2.0' in text
    assert 'broker_filter_unknown_version_alerts_total{survey="ztf"} 0.0' in text


@pytest.mark.shared
def test_a_minor_that_the_registry_lacks_rejects_only_its_own_alerts(
    shared_data: Path, lsst_schemas: Path, tmp_path: Path
) -> None:
    real = [path.read_bytes() for path in sorted((shared_data / "lsst" / "more" / "wire").iterdir())]
    lacking = [data[:1] + struct.pack(">I", 1001) + data[5:] for data in real[:2]]
    registry = registry_of(tmp_path, {1000: base_schema(lsst_schemas, 1000)})
    alerts, rejects = Decoder(registry).decode(packets(*lacking, *real))
    assert len(alerts) == len(real)
    assert [reject.reason for reject in rejects] == [RejectReason.UNKNOWN_SCHEMA_ID] * 2
    assert "schema id 1001 (LSST 10.1)" in rejects[0].detail

    registry_of(tmp_path, {1001: base_schema(lsst_schemas, 1000)})
    alerts, rejects = Decoder(open_registry(registry)).decode(packets(*lacking))
    assert len(alerts) == 2
    assert not rejects


class HttpSchemas:
    """A Confluent registry with some schemas, on a real socket. `requests`: the paths that were asked for."""

    def __init__(self) -> None:
        self.schemas: dict[int, Definition] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                schema = outer.schemas.get(int(self.path.rpartition("/")[2]))
                missing = {"error_code": 40403, "message": "Schema not found"}
                body = json.dumps({"schema": json.dumps(schema)} if schema else missing).encode()
                self.send_response(200 if schema else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def http_schemas() -> Iterator[HttpSchemas]:
    schemas = HttpSchemas()
    yield schemas
    schemas.server.shutdown()
    schemas.server.server_close()


def test_each_minor_is_fetched_once_and_one_that_the_registry_lacks_is_asked_for_again_later(
    tmp_path: Path, http_schemas: HttpSchemas
) -> None:
    base, record = extended(base_schema(), "11_0", {}), simulated_records()[0]
    minors = {1100: base, 1101: extended(base, "11_1"), 1102: extended(base, "11_2", UNKNOWN_FIELDS)}
    data = [wire_packet(record, minors[schema_id], schema_id) for schema_id in (1100, 1102, 1101, 1102, 1100)]
    http_schemas.schemas = {schema_id: minors[schema_id] for schema_id in (1100, 1101)}
    now = [0.0]
    url = f"http://127.0.0.1:{http_schemas.server.server_port}"
    decoder = Decoder(HttpRegistry(url, tmp_path, clock=lambda: now[0]))

    for _ in range(2):
        alerts, rejects = decoder.decode(packets(*data))
        assert alerts.schema_version == ["11.0", "11.1", "11.0"]
        assert [reject.reason for reject in rejects] == [RejectReason.UNKNOWN_SCHEMA_ID] * 2
        assert "schema id 1102 (LSST 11.2): the registry at http://127.0.0.1" in rejects[0].detail
    assert sorted(http_schemas.requests) == [f"/schemas/ids/{schema_id}" for schema_id in (1100, 1101, 1102)]

    http_schemas.schemas = minors
    now[0] = FORGET_UNKNOWN_S + 1
    alerts, rejects = decoder.decode(packets(*data))
    assert alerts.schema_version == ["11.0", "11.2", "11.1", "11.2", "11.0"]
    assert not rejects


OBJECT, BODY = 313_897_383_000_000_001, 21_163_611_000_000_002


@pytest.mark.parametrize(
    ("dia_object", "ss_source", "object_id", "sso", "detections"),
    [
        (OBJECT, None, str(OBJECT), 0, 3),
        (None, BODY, str(BODY), 1, np.nan),
        (OBJECT, BODY, str(OBJECT), 1, 3),
        (None, None, "", 0, np.nan),
    ],
    ids=["only diaObject", "only ssSource", "both", "neither"],
)
def test_an_alert_may_have_dia_object_or_ss_source_or_both_or_neither(
    base: Definition,
    tmp_path: Path,
    dia_object: int | None,
    ss_source: int | None,
    object_id: str,
    sso: float,
    detections: float,
) -> None:
    record = simulated_records()[0]
    source = record["diaSource"]
    source |= {"diaObjectId": dia_object, "ssObjectId": ss_source}
    parts: Sequence[tuple[str, dict[str, Any]]] = (
        ("diaObject", {"diaObjectId": dia_object, "nDiaSources": 3, "firstDiaSourceMjdTai": 61000.0}),
        (
            "ssSource",
            {"ssObjectId": ss_source, "diaSourceId": source["diaSourceId"], "ephVmag": 20.5, "ephOffset": 0.2},
        ),
    )
    record |= {
        name: part if any(part.get(key) for key in ("diaObjectId", "ssObjectId")) else None for name, part in parts
    }
    decoder = Decoder(registry_of(tmp_path, {1100: base}))
    alerts, rejects = decoder.decode(packets(wire_packet(record, base, 1100)))
    assert not rejects
    assert alerts.object_id == [object_id]
    assert alerts.column("sso")[0] == sso
    np.testing.assert_array_equal(alerts.column("ndethist"), [detections])


def babamul_packet(*, nested: bool) -> bytes:
    """Return an LSST alert in the layout of Babamul, with other fields than the survey's and without cutouts."""
    source = [("diaSourceId", "long"), ("midpointMjdTai", "double"), ("ra", "double"), ("dec", "double")]
    fields: list[dict[str, Any]] = [{"name": name, "type": type_} for name, type_ in source]
    values: dict[str, Any] = {"diaSourceId": 1, "midpointMjdTai": 61000.0, "ra": 1.0, "dec": 2.0}
    if nested:
        fields = [{"name": "dia_source", "type": {"type": "record", "name": "DiaSource", "fields": fields}}]
        values = {"dia_source": values}
    schema = {
        "type": "record",
        "name": "BabamulLsstAlert",
        "fields": [
            {"name": "candid", "type": "long"},
            {"name": "objectId", "type": "string"},
            {"name": "candidate", "type": {"type": "record", "name": "LsstCandidate", "fields": fields}},
            {"name": "prv_candidates", "type": {"type": "array", "items": "double"}},
            {"name": "properties", "type": {"type": "map", "values": "boolean"}},
        ],
    }
    alert = {"candid": 1, "objectId": "2", "candidate": values, "prv_candidates": [], "properties": {"rock": False}}
    stream = io.BytesIO()
    fastavro.writer(stream, fastavro.parse_schema(schema), [alert])
    return stream.getvalue()


@pytest.mark.parametrize("nested", [False, True])
def test_an_alert_of_babamul_is_rejected_as_an_lsst_alert_without_cutouts(
    nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = Decoder()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            alerts, [reject] = decoder.decode(packets(babamul_packet(nested=nested)))
    assert not len(alerts)
    assert reject.reason is RejectReason.MISSING_CUTOUT
    assert "an alert of LSST without cutouts: Babamul (BOOM)'s stream has none" in reject.detail
    [line] = [entry.getMessage() for entry in caplog.records]
    assert reject.detail in line


@pytest.mark.parametrize("in_schema", [False, True])
def test_an_alert_of_the_surveys_layout_without_cutouts_says_so(
    tmp_path: Path, in_schema: bool, caplog: pytest.LogCaptureFixture
) -> None:
    definition, record = base_schema(), simulated_records()[0]
    for name in ("cutoutScience", "cutoutTemplate", "cutoutDifference"):
        record[name] = None
    if not in_schema:
        definition["fields"] = [entry for entry in definition["fields"] if not entry["name"].startswith("cutout")]
    decoder = Decoder(registry_of(tmp_path, {1000: definition}))
    with caplog.at_level(logging.WARNING):
        alerts, [reject] = decoder.decode(packets(wire_packet(record, definition, 1000)))
    assert not len(alerts)
    assert reject.reason is RejectReason.MISSING_CUTOUT
    assert reject.alert is not None
    assert reject.alert.alert_id == record["diaSourceId"]
    assert "the packet is an alert of LSST without cutouts" in reject.detail
    assert ("its schema has no field for them" in reject.detail) is not in_schema
    assert len(caplog.records) == (not in_schema)
