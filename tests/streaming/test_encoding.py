"""Output records hold the survey's fields unchanged, and one more field."""

from __future__ import annotations

import copy
import io
import json
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fastavro
import numpy as np
import pytest

from broker_filter import __version__, config
from broker_filter.anomalies.score import Neighbour, Reason
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.ocf import container_header, encode_block
from broker_filter.packets.framing.wire import unframe
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import RegistryUnavailable, open_registry
from broker_filter.packets.schemas.writer_schema import WriterSchema, parse_schema, self_contained
from broker_filter.scoring.explanation import Explanation, Feature, Source, Verdict
from broker_filter.scoring.scores import ModelScores, Scores
from broker_filter.streaming.encoding import (
    CUTOUT_FIELDS,
    FORGET_REFUSAL_S,
    ContainerFraming,
    Encoder,
    Payload,
    RegistryRefusalError,
    SubjectStrategy,
    WireFraming,
    annotated_schema,
    encode_annotations,
    name_of_its_own,
    scored_alert_schema,
)
from broker_filter.streaming.scored import Anomalies, FilterOutcome, ScoredBatch

SCORED_AT = datetime(2026, 2, 25, 4, 30, 0, 123000, tzinfo=UTC)
SCORED_AT_MS = 1771993800123
ADDED: dict[str, Any] = {"filters": [], "configuration": "", "matches": [], "redriven": 0}
"""The fields that the second revision of the output schema added to the annotation, and their defaults."""


def decode(data: list[bytes], schemas: Path | None = None) -> AlertBatch:
    packets = [Packet(one, FilePosition(f"{i}.avro")) for i, one in enumerate(data)]
    alerts, _ = Decoder(open_registry(str(schemas) if schemas else None)).decode(packets)
    return alerts


def score(alerts: AlertBatch) -> ScoredBatch:
    """Return the scores of two models: one with an embedding, and one that takes every second alert only."""
    n = len(alerts)
    rng = np.random.default_rng(3)
    some = np.arange(n) % 2 == 0
    everything = np.ones(n, dtype=np.bool_)
    real = rng.random((n, 1), dtype=np.float32)
    classes = np.where(some[:, None], rng.random((n, 3), dtype=np.float32), np.float32(np.nan))
    models = (
        ModelScores("default", "1.2", ("real",), real, rng.random((n, 8), dtype=np.float32), everything),
        ModelScores("classes", "7", ("SN", "AGN", "variable_star"), classes, None, some),
    )
    return ScoredBatch(alerts.packets, alerts, Scores(models, everything), some, [])


def values(scored: ScoredBatch, payload: Payload, configuration: str = "") -> list[bytes]:
    framing = ContainerFraming()
    encoded = Encoder(payload, configuration).encode(scored, SCORED_AT_MS)
    return [framing.frame(schema, body, "me.scored") for schema, body in encoded]


def read(value: bytes) -> dict[str, Any]:
    [record] = fastavro.reader(io.BytesIO(value))
    assert isinstance(record, dict)
    return record


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal; NaN equals NaN."""
    if a == b or (a != a and b != b):
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))


def chunks(data: list[bytes], size: int = 64) -> Iterator[list[bytes]]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def test_output_of_every_ztf_packet_has_its_fields_and_one_more(ztf_packets: list[tuple[int, bytes]]) -> None:
    for some in chunks([data for _, data in ztf_packets]):
        alerts = decode(some)
        assert len(alerts) == len(some)
        for sent, value in zip(some, values(score(alerts), "full"), strict=True):
            original, record = read(sent), read(value)
            assert list(record) == [*original, "broker_filter"]
            del record["broker_filter"]
            assert same(record, original)  # also NaN and the bytes of the cutouts


def test_payload_no_cutouts_keeps_all_other_fields(ztf_packets: list[tuple[int, bytes]]) -> None:
    some = [packet.data for packet in alerts_of_many_schemas(ztf_packets).packets]
    assert len(some) > 20
    for sent, value in zip(some, values(score(decode(some)), "no_cutouts"), strict=True):
        original, record = read(sent), read(value)
        kept = {name: content for name, content in original.items() if name not in CUTOUT_FIELDS}
        assert len(original) - len(kept) == 3
        del record["broker_filter"]
        assert same(record, kept)
        assert len(value) < len(sent)


@pytest.mark.parametrize("payload", ["full", "no_cutouts"])
def test_output_of_every_lsst_container_has_its_fields(shared_data: Path, payload: Payload) -> None:
    some = [path.read_bytes() for path in sorted((shared_data / "lsst" / "ocf").rglob("*.avro"))]
    alerts = decode(some)
    assert len(alerts) > 30
    for i, value in enumerate(values(score(alerts), payload)):
        record = read(value)
        original = list(fastavro.reader(io.BytesIO(some[alerts.packet_index[i]])))[alerts.record_index[i]]
        assert isinstance(original, dict)
        del record["broker_filter"]
        dropped = CUTOUT_FIELDS if payload == "no_cutouts" else ()
        assert same(record, {name: content for name, content in original.items() if name not in dropped})


@pytest.mark.parametrize("payload", ["full", "no_cutouts"])
def test_lsst_wire_packets_become_containers(
    lsst_packets: list[tuple[str, bytes]], lsst_schemas: Path, payload: Payload
) -> None:
    some = [data for _, data in lsst_packets]
    alerts = decode(some, lsst_schemas)
    assert len(alerts) > 0
    for i, value in enumerate(values(score(alerts), payload)):
        sent = some[alerts.packet_index[i]]
        schema = alerts.records[i].schema
        original = fastavro.schemaless_reader(io.BytesIO(unframe(sent).body), schema.definition, None)
        record = read(value)
        del record["broker_filter"]
        assert isinstance(original, dict)
        dropped = CUTOUT_FIELDS if payload == "no_cutouts" else ()
        assert same(record, {name: content for name, content in original.items() if name not in dropped})


def test_annotation_holds_models_scores_and_time(make_alerts: Callable[..., AlertBatch]) -> None:
    scored = score(make_alerts([1, 2]))
    first, second = (read(value)["broker_filter"] for value in values(scored, "full"))
    default, classes = scored.scores.models
    assert default.embedding is not None
    assert first == {
        "service_version": __version__,
        "scored_at": SCORED_AT,
        "duplicate": True,
        "anomaly": None,
        "models": [
            {
                "model": "default",
                "version": "1.2",
                "outputs": {"real": float(default.probabilities[0, 0])},
                "embedding": default.embedding[0].tolist(),
                "shadow": False,
            },
            {
                "model": "classes",
                "version": "7",
                "outputs": dict(zip(classes.labels, classes.probabilities[0].tolist(), strict=True)),
                "embedding": None,
                "shadow": False,
            },
        ],
        **ADDED,
    }
    assert [model["model"] for model in second["models"]] == ["default"]


def anomalies_of(n: int) -> Anomalies:
    """Return anomalies of n alerts: every third is flagged, every fifth not judged, and every sixth has modalities."""
    rows = np.arange(n)
    score = np.where(rows % 5 == 4, np.nan, rows / 64).astype(np.float32)
    flag = (rows % 3 == 0) & (rows % 5 != 4)
    seen = {0: ({"image": 0.5, "light_curve": 1.25}, "light_curve"), 3: ({}, None)}
    near = (Neighbour(3224182880115015010, "ZTF26aaé", 0.25), Neighbour(-5, "7", 0.5))
    reasons = {i: Reason(near, *seen[i % 6]) for i in np.flatnonzero(flag).tolist()}
    return Anomalies("default", score, np.full(n, 0.125, np.float32), flag, reasons)


def test_anomaly_holds_its_nearest_reference_alerts_and_distances_by_modality(
    make_alerts: Callable[..., AlertBatch],
) -> None:
    scored = replace(score(make_alerts(list(range(5)))), anomalies=anomalies_of(5))
    flagged, plain, _, alone, unjudged = (read(value)["broker_filter"]["anomaly"] for value in values(scored, "scores"))
    assert flagged == {
        "score": 0,
        "flag": True,
        "model": "default",
        "threshold": 0.125,
        "reason": {
            "neighbours": [
                {"alert_id": 3224182880115015010, "object_id": "ZTF26aaé", "distance": 0.25},
                {"alert_id": -5, "object_id": "7", "distance": 0.5},
            ],
            "modalities": {"image": 0.5, "light_curve": 1.25},
            "most_unlike": "light_curve",
            "features": [],
            "lenses": [],
        },
    }
    assert plain == {"score": 0.015625, "flag": False, "model": "default", "threshold": 0.125, "reason": None}
    assert (alone["reason"]["modalities"], alone["reason"]["most_unlike"]) == ({}, None)
    assert unjudged is None


def explained() -> Anomalies:
    """Return one flagged alert that three lenses looked at: the first explains it by four features, as the last."""
    light_curve = [Source(0.5, 61000.25, "r"), Source(-0.25, 60999.5), Source(0.25)]
    features = [
        Feature(i, None if i else "rise", not i, i / 4, 1.5, 0.5, tuple(light_curve), (0.75, -0.25)) for i in range(4)
    ]
    cells = [
        replace(features[1], id=9, effect=None, sources=tuple(Source(0.125, box=(0, 8, 16, 16)) for _ in range(7)))
    ] * 4
    explanations = (
        Explanation(
            "points", "1", "light_curve.1", "anomaly_score", Verdict.EXPLAINED, tuple(features), 0.25, 50.0, 0.0
        ),
        Explanation(
            "other", "2", "light_curve.0", "anomaly_score", Verdict.UNEXPLAINED, tuple(features), 0.75, 99.5, 0.0
        ),
        Explanation("cells", "3", "stages.4.1.transformer.0", "real", Verdict.EXPLAINED, tuple(cells), 0.5, 25.0, 0.0),
    )
    return Anomalies(
        "default",
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
        np.ones(1, np.bool_),
        {0: Reason((), {}, None, explanations)},
    )


def test_reason_holds_at_most_five_features_of_the_lenses_that_explain_the_alert(
    make_alerts: Callable[..., AlertBatch],
) -> None:
    [value] = values(replace(score(make_alerts([1])), anomalies=explained()), "scores")
    reason = read(value)["broker_filter"]["anomaly"]["reason"]
    assert [(one["lens"], one["id"]) for one in reason["features"]] == [("points", i) for i in range(4)] + [
        ("cells", 9)
    ]
    assert reason["features"][0] == {
        "lens": "points",
        "id": 0,
        "name": "rise",
        "stable": True,
        "activation": 0.0,
        "rarity": 1.5,
        "effect": 0.5,
        "sources": [
            {"mjd": 61000.25, "band": "r", "box": [], "share": 0.5},
            {"mjd": 60999.5, "band": None, "box": [], "share": -0.25},
            {"mjd": None, "band": None, "box": [], "share": 0.25},
        ],
        "heads": [0.75, -0.25],
    }
    assert reason["features"][4]["sources"] == [{"mjd": None, "band": None, "box": [0, 8, 16, 16], "share": 0.125}] * 5
    assert [(one["lens"], one["says"]) for one in reason["lenses"]] == [
        ("points", "these features explain this alert in part"),
        ("other", "these features do not explain this alert"),
        ("cells", "these features explain this alert in part"),
    ]
    assert reason["lenses"][1]["unexplained"] == 0.75


def test_readers_without_features_can_read_new_records_and_new_readers_old_ones(
    make_alerts: Callable[..., AlertBatch],
) -> None:
    schema = json.loads(scored_alert_schema().text)
    old = json.loads(scored_alert_schema().text)
    anomaly = next(field for field in old["fields"][-1]["type"]["fields"] if field["name"] == "anomaly")["type"][1]
    reason = next(field for field in anomaly["fields"] if field["name"] == "reason")["type"][1]
    assert [field["name"] for field in reason["fields"][-2:]] == ["features", "lenses"]
    del reason["fields"][-2:]
    [value] = values(replace(score(make_alerts([1])), anomalies=explained()), "scores")
    [seen] = fastavro.reader(io.BytesIO(value), old)
    assert isinstance(seen, dict)
    assert set(seen["broker_filter"]["anomaly"]["reason"]) == {"neighbours", "modalities", "most_unlike"}
    written = io.BytesIO()
    fastavro.writer(written, old, [seen])
    written.seek(0)
    [again] = fastavro.reader(written, schema)
    assert isinstance(again, dict)
    assert again["broker_filter"]["anomaly"]["reason"]["features"] == []
    assert again["broker_filter"]["anomaly"]["reason"]["lenses"] == []


def test_readers_with_the_first_schema_of_anomalies_can_read_new_records(
    make_alerts: Callable[..., AlertBatch],
) -> None:
    scored = replace(score(make_alerts([1, 2])), anomalies=anomalies_of(2))
    first = json.loads(scored_alert_schema().text)
    anomaly = next(field for field in first["fields"][-1]["type"]["fields"] if field["name"] == "anomaly")["type"][1]
    added = [field for field in anomaly["fields"] if field["name"] not in ("score", "flag")]
    assert all(field["default"] is None for field in added)  # so readers with the new schema can read old records
    anomaly["fields"] = [field for field in anomaly["fields"] if field not in added]
    for value in values(scored, "scores"):
        [record] = fastavro.reader(io.BytesIO(value), first)
        assert isinstance(record, dict)
        assert set(record["broker_filter"]["anomaly"]) == {"score", "flag"}


def filters_of(n: int) -> tuple[FilterOutcome, ...]:
    passed = np.arange(n)
    return (
        FilterOutcome("jeune-étoile", "0123456789ab", passed % 3 == 0),
        FilterOutcome("bright", "ba9876543210", passed % 2 == 0, paused=True),
    )


def first_revision() -> dict[str, Any]:
    """Return the schema of `payload: scores` before the fields of ADDED and the mark of shadow models."""
    schema: dict[str, Any] = json.loads(scored_alert_schema().text)
    annotation = schema["fields"][-1]["type"]
    kept = [field for field in annotation["fields"] if field["name"] not in ADDED]
    assert annotation["fields"][: len(kept)] == kept
    annotation["fields"] = kept
    models = kept[-1]["type"]["items"]
    assert models["fields"].pop()["name"] == "shadow"
    return schema


def test_records_before_and_after_the_second_revision_can_be_read_with_both_schemas(
    make_alerts: Callable[..., AlertBatch],
) -> None:
    scored = replace(score(make_alerts([1, 2, 3])), anomalies=anomalies_of(3), filters=filters_of(3))
    new, old = json.loads(scored_alert_schema().text), first_revision()
    for value in values(scored, "scores", "0123456789ab"):
        written = read(value)
        [seen] = fastavro.reader(io.BytesIO(value), old)
        assert isinstance(seen, dict)
        expected = copy.deepcopy(written)
        for name in ADDED:
            del expected["broker_filter"][name]
        assert all(model.pop("shadow") is False for model in expected["broker_filter"]["models"])
        assert seen == expected
        earlier = io.BytesIO()
        fastavro.writer(earlier, old, [seen])
        [again] = fastavro.reader(io.BytesIO(earlier.getvalue()), new)
        written["broker_filter"] |= ADDED
        assert again == written


def test_records_say_which_filters_were_tried_and_passed(make_alerts: Callable[..., AlertBatch]) -> None:
    scored = replace(score(make_alerts([1, 2, 3])), filters=filters_of(3))
    said = [read(value)["broker_filter"] for value in values(scored, "scores", "0123456789ab")]
    assert {annotation["configuration"] for annotation in said} == {"0123456789ab"}
    young, bright = {"name": "jeune-étoile", "revision": "0123456789ab"}, {"name": "bright", "revision": "ba9876543210"}
    assert [annotation["filters"] for annotation in said] == [
        [young | {"passed": first, "paused": False}, bright | {"passed": second, "paused": True}]
        for first, second in [(True, True), (False, False), (False, True)]
    ]
    assert read(values(score(make_alerts([1])), "scores")[0])["broker_filter"]["filters"] == []


@pytest.mark.parametrize("anomalous", [True, False])
def test_annotation_is_encoded_as_by_fastavro(make_alerts: Callable[..., AlertBatch], anomalous: bool) -> None:
    alerts = make_alerts(list(range(40)))
    scored = replace(score(alerts), anomalies=anomalies_of(40) if anomalous else None, filters=filters_of(40))
    schema = fastavro.parse_schema(json.loads(scored_alert_schema().text)["fields"][-1]["type"])
    for encoded in encode_annotations(scored, SCORED_AT_MS, "0123456789ab"):
        record = fastavro.schemaless_reader(io.BytesIO(encoded), schema, None)
        again = io.BytesIO()
        fastavro.schemaless_writer(again, schema, record)
        assert again.getvalue() == encoded


def test_payload_scores_identifies_the_alert(make_alerts: Callable[..., AlertBatch]) -> None:
    alerts = make_alerts([3224182880115015010, -5], object_id=["ZTF26aaé", "ZTF26b"], band=[2, 255], ra=[359.75, 0.5])
    first, second = (read(value) for value in values(score(alerts), "scores"))
    assert first["broker_filter"]["models"][0]["model"] == "default"
    del first["broker_filter"], second["broker_filter"]
    assert first == {
        "alert_id": 3224182880115015010,
        "object_id": "ZTF26aaé",
        "survey": "ztf",
        "schema_version": "4.02",
        "mjd": 61096.25,
        "ra": 359.75,
        "dec": -5.5,
        "band": "r",
    }
    assert (second["alert_id"], second["band"]) == (-5, None)


def test_schema_of_payload_scores_has_no_documentation(make_alerts: Callable[..., AlertBatch]) -> None:
    documented = json.loads(files("broker_filter.schemas").joinpath("scored_alert.avsc").read_bytes())
    assert b'"doc"' not in scored_alert_schema().text
    canonical = fastavro.schema.to_parsing_canonical_form
    assert canonical(json.loads(scored_alert_schema().text)) == canonical(documented)
    [value] = values(score(make_alerts([1])), "scores")
    [record] = fastavro.reader(io.BytesIO(value), documented)
    assert record == read(value)


def test_scores_of_real_packets_fit_in_a_kilobyte_of_body(ztf_packets: list[tuple[int, bytes]]) -> None:
    scored = score(decode([ztf_packets[0][1]]))
    [(_, body)] = Encoder("scores").encode(scored, SCORED_AT_MS)
    assert sum(map(len, body)) < 1000


def test_an_output_scored_again_keeps_the_earlier_annotation(ztf_packets: list[tuple[int, bytes]]) -> None:
    sent = [ztf_packets[0][1]]
    once = values(score(decode(sent)), "full")
    twice = values(score(decode(once)), "full")
    thrice = values(score(decode(twice)), "no_cutouts")
    [record] = map(read, thrice)
    assert [name for name in record if name.startswith("broker_filter")] == [
        "broker_filter",
        "broker_filter_2",
        "broker_filter_3",
    ]
    assert record["broker_filter"] == read(once[0])["broker_filter"]
    assert record["broker_filter_2"] == record["broker_filter_3"] == record["broker_filter"]


def test_equal_alerts_give_equal_bytes(ztf_packets: list[tuple[int, bytes]]) -> None:
    scored = score(decode([ztf_packets[0][1]]))
    assert values(scored, "full") == values(scored, "full")


CUTOUT = {
    "type": "record",
    "name": "cutout",
    "namespace": "odd.types",
    "fields": [
        {"name": "stampData", "type": "bytes"},
        {"name": "kind", "type": {"type": "enum", "name": "kind", "symbols": ["a", "b"]}},
        {"name": "digest", "type": {"type": "fixed", "name": "digest", "namespace": "", "size": 2}},
    ],
}


@pytest.mark.parametrize(
    ("later_type", "later"),
    [
        ("odd.types.kind", "b"),
        ({"type": "array", "items": "odd.types.cutout"}, [{"stampData": b"x", "kind": "a", "digest": b"12"}]),
        ({"type": "map", "values": ["null", "odd.types.cutout"]}, {"k": None}),
        (["null", {"type": "array", "items": "odd.types.kind"}], ["a", "b"]),
        (
            {
                "type": "record",
                "name": "both",
                "namespace": "elsewhere",
                "fields": [{"name": "k", "type": "odd.types.kind"}, {"name": "c", "type": "odd.types.cutout"}],
            },
            {"k": "b", "c": {"stampData": b"x", "kind": "a", "digest": b"12"}},
        ),
        ("digest", b"12"),
    ],
)
def test_types_defined_in_removed_cutouts_are_defined_at_their_next_use(later_type: Any, later: Any) -> None:
    definition = {
        "type": "record",
        "name": "alert",
        "fields": [
            {"name": "candid", "type": "long"},
            {"name": "cutoutScience", "type": ["null", CUTOUT]},
            {"name": "cutoutTemplate", "type": ["null", "odd.types.cutout"]},
            {"name": "later", "type": later_type},
            {"name": "cutoutDifference", "type": "odd.types.cutout"},
        ],
    }
    schema = annotated_schema(parse_schema(json.dumps(definition)), False)
    output = json.loads(schema.text)
    assert [field["name"] for field in output["fields"]] == ["candid", "later", "broker_filter"]
    annotation = {"service_version": "1", "scored_at": 0, "duplicate": False, "models": []}
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, output, {"candid": 1, "later": later, "broker_filter": annotation})
    assert (
        read(container_header(schema.text, schema.sync) + encode_block(1, stream.getvalue(), schema.sync))["later"]
        == later
    )


def test_added_field_does_not_use_names_of_the_survey() -> None:
    """The packet's schema already has a type `broker_filter.Annotation`."""
    other = {"type": "fixed", "name": "broker_filter.Annotation", "size": 1}
    definition = {"type": "record", "name": "alert", "fields": [{"name": "x", "type": other}]}
    output = json.loads(annotated_schema(parse_schema(json.dumps(definition)), True).text)
    assert output["fields"][-1]["name"] == "broker_filter_2"
    fastavro.parse_schema(output)


class Registry(BaseHTTPRequestHandler):
    """A minimal schema registry: returns ids by schema, and fails for some subjects.

    With `strict` it takes one schema a subject, as a registry does whose schemas are incompatible.
    """

    schemas: ClassVar[dict[str, int]] = {}
    subjects: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []
    authorization: ClassVar[list[str | None]] = []
    strict: ClassVar[bool] = False

    def do_POST(self) -> None:
        subject = unquote(self.path.split("/")[2])
        assert self.path == f"/subjects/{quote(subject, safe='')}/versions"
        self.asked.append(subject)
        self.authorization.append(self.headers["Authorization"])
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        fastavro.parse_schema(json.loads(schema))
        status, answer = 200, json.dumps({"id": self.schemas.setdefault(schema, 100 + len(self.schemas))})
        if "refuse" in self.path or (self.strict and self.subjects.setdefault(subject, schema) != schema):
            status, answer = 409, '{"error_code": 409, "message": "Schema being registered is incompatible"}'
        elif "invalid" in self.path:
            status, answer = 422, '{"error_code": 42201, "message": "Invalid schema"}'
        elif "readonly" in self.path:
            status, answer = 422, '{"error_code": 42205, "message": "Subject is in read-only mode"}'
        elif "broken" in self.path:
            answer = "<html>"
        elif "outage" in self.path:
            status, answer = 503, "try again"
        elif "flood" in self.path:
            status, answer = 429, "too many requests"
        elif "misrouted" in self.path:
            status, answer = 404, "no such page"
        elif "garbled" in self.path:
            self.wfile.write(b"SMTP at your service\r\n")
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- http.server's name
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Registry, "strict", False)
    for kept in (Registry.schemas, Registry.subjects, Registry.asked, Registry.authorization):
        kept.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def registered(value: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema to which a wire format message refers, and the record in the message."""
    message = unframe(value)
    text = next(text for text, number in Registry.schemas.items() if number == message.schema_id)
    record = fastavro.schemaless_reader(io.BytesIO(message.body), json.loads(text), None)
    assert isinstance(record, dict)
    return json.loads(text), record


def test_wire_format_registers_the_schema_of_each_topic_once(
    registry: str, ztf_packets: list[tuple[int, bytes]]
) -> None:
    scored = score(decode([data for _, data in ztf_packets[:5]]))
    framing = WireFraming(registry, "topic")
    for topic in ("me.scored", "me.anomalies"):
        for i, (schema, body) in enumerate(Encoder("full").encode(scored, SCORED_AT_MS)):
            _, record = registered(framing.frame(schema, body, topic))
            assert record["candidate"]["ra"] == scored.alerts.ra[i]
    assert set(Registry.asked) == {"me.scored-value", "me.anomalies-value"}
    assert len(Registry.asked) == 2 * len(Registry.schemas)


@pytest.mark.parametrize(
    ("strategy", "subject"),
    [("topic", "me.scored-value"), ("record", "ztf.alert"), ("topic-record", "me.scored-ztf.alert")],
)
def test_subjects_follow_the_strategies_of_confluent(
    registry: str, ztf_packets: list[tuple[int, bytes]], strategy: SubjectStrategy, subject: str
) -> None:
    scored = score(decode([ztf_packets[0][1]]))
    [(schema, body)] = Encoder("full").encode(scored, SCORED_AT_MS)
    WireFraming(registry, strategy).frame(schema, body, "me.scored")
    assert Registry.asked == [subject]


def alerts_of_many_schemas(ztf_packets: list[tuple[int, bytes]]) -> AlertBatch:
    by_schema: dict[WriterSchema, bytes] = {}
    for some in chunks([data for _, data in ztf_packets]):
        for record, data in zip(decode(some).records, some, strict=True):
            by_schema.setdefault(record.schema, data)
    return decode(list(by_schema.values()))


@pytest.mark.parametrize("strategy", ["record", "topic-record"])
def test_all_incompatible_schemas_of_one_topic_are_registered(
    registry: str, ztf_packets: list[tuple[int, bytes]], strategy: SubjectStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "strict", True)
    alerts = alerts_of_many_schemas(ztf_packets)
    names = Counter(record.schema.canonical["name"] for record in alerts.records)
    assert len(names) < len(alerts)
    for payload in ("full", "no_cutouts"):
        framing = WireFraming(registry, strategy)
        for i, (schema, body) in enumerate(Encoder(payload).encode(score(alerts), SCORED_AT_MS)):
            definition, record = registered(framing.frame(schema, body, "me.scored"))
            assert record["candidate"]["ra"] == alerts.ra[i]
            # A reader with the schema of a container file can read it: names match by Avro's rules.
            message = framing.frame(schema, body, "me.scored")
            again = fastavro.schemaless_reader(io.BytesIO(unframe(message).body), definition, json.loads(schema.text))
            assert same(again, record)


def test_incompatible_schema_is_refused_with_subject_topic(
    registry: str, ztf_packets: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "strict", True)
    encoded = Encoder("full").encode(score(alerts_of_many_schemas(ztf_packets)), SCORED_AT_MS)
    framing = WireFraming(registry, "topic")
    framing.frame(*encoded[0], "me.scored")
    for schema, body in encoded[1:]:
        with pytest.raises(RegistryRefusalError, match=r"refuses subject 'me.scored-value': HTTP 409 .*incompatible"):
            framing.frame(schema, body, "me.scored")


def test_refused_schema_is_sent_again_after_some_time(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    framing = WireFraming(registry, "topic", clock=lambda: now)
    for _ in range(3):
        with pytest.raises(RegistryRefusalError):
            framing.frame(scored_alert_schema(), [], "refuse")
    assert len(Registry.asked) == 1
    now = FORGET_REFUSAL_S + 1
    with pytest.raises(RegistryRefusalError):
        framing.frame(scored_alert_schema(), [], "refuse")
    assert len(Registry.asked) == 2


@pytest.mark.parametrize(
    ("topic", "error", "message"),
    [
        ("refuse", RegistryRefusalError, "refuses subject 'refuse-value': HTTP 409 .*incompatible"),
        ("invalid", RegistryRefusalError, "refuses subject 'invalid-value': HTTP 422 Invalid schema"),
        ("readonly", RegistryUnavailable, "read-only mode"),
        ("broken", RegistryUnavailable, "gives no id for 'broken-value'"),
        ("outage", RegistryUnavailable, "503"),
        ("flood", RegistryUnavailable, "429"),
        ("misrouted", RegistryUnavailable, "404"),
        ("garbled", RegistryUnavailable, "SMTP at your service"),
    ],
)
def test_refusal_by_a_registry_differs_from_an_outage(
    registry: str, topic: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WireFraming(registry, "topic").frame(scored_alert_schema(), [], topic)


def test_subject_too_long_for_a_url_is_refused() -> None:
    definition = {"type": "record", "name": "a" * 100_000, "fields": [{"name": "x", "type": "long"}]}
    schema = annotated_schema(parse_schema(json.dumps(definition)), True)
    with pytest.raises(RegistryRefusalError, match="100010 characters"):
        WireFraming("http://127.0.0.1:1", "topic-record").frame(schema, [], "me.scored")


@pytest.mark.parametrize("later", ["other.kind", "kind", "digest"])
def test_schema_in_a_unique_namespace_is_equivalent(later: str) -> None:
    definition = {
        "type": "record",
        "name": "alert",
        "namespace": "survey",
        "fields": [
            {"name": "kind", "type": {"type": "enum", "name": "kind", "symbols": ["a", "b"]}},
            {"name": "other", "type": {"type": "enum", "name": "other.kind", "symbols": ["b", "c"]}},
            {"name": "digest", "type": ["null", {"type": "fixed", "name": "digest", "size": 2}]},
            {"name": "later", "type": {"type": "array", "items": later}},
            {"name": "parents", "type": {"type": "map", "values": ["null", "alert"]}},
        ],
    }
    schema = parse_schema(json.dumps(definition))
    moved = name_of_its_own(self_contained(schema.definition, "", {}, set()), bytes(range(16)))
    assert (moved["namespace"], moved["name"]) == ("survey.v0001020304050607", "alert")
    value: Any = {"other.kind": "c", "kind": "a", "digest": b"12"}[later]
    alert = {"kind": "b", "other": "c", "digest": b"xy", "later": [value], "parents": {"none": None}}
    record = alert | {"parents": {"one": alert}}
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, moved, record)
    for reader in (moved, definition):
        assert fastavro.schemaless_reader(io.BytesIO(stream.getvalue()), moved, reader) == record
    assert fastavro.schemaless_reader(io.BytesIO(stream.getvalue()), definition, None) == record


@pytest.mark.parametrize("credentials", ["", "me:secret@"])
def test_missing_registry_is_unavailable_and_its_credentials_are_not_shown(credentials: str) -> None:
    with pytest.raises(RegistryUnavailable, match=r"schema registry http://127\.0\.0\.1:1: ") as raised:
        WireFraming(f"http://{credentials}127.0.0.1:1").frame(scored_alert_schema(), [], "topic")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("given", ["in the URL", "in a section"])
def test_credentials_for_the_registry_are_sent(registry: str, given: str, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("one/two\n")
    location = (
        config.Registry(url=registry, username="me", password=config.SecretFromFile(file=password)).location()
        if given == "in a section"
        else registry.replace("//", "//me:one%2Ftwo@")
    )
    assert unframe(WireFraming(location).frame(scored_alert_schema(), [], "topic")).schema_id == 100
    assert Registry.authorization == ["Basic " + b64encode(b"me:one/two").decode()]


def test_alerts_that_no_model_takes_are_left_out(make_alerts: Callable[..., AlertBatch]) -> None:
    scored = score(make_alerts([1, 2, 3]))
    taken = np.array([True, False, True])
    scored = replace(scored, scores=replace(scored.scores, taken=taken))
    assert [read(value)["alert_id"] for value in values(scored, "scores")] == [1, 3]
