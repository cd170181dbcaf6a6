"""Routing: each alert is counted once, and is published to the right topics with headers."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import fastavro
import numpy as np
import pytest

from broker_filter.config import RecordKey, Runtime, Service
from broker_filter.packets.batch import AlertBatch, AlertIdentity
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.account import account_batch, account_packets
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import (
    Body,
    ContainerFraming,
    Encoder,
    Framing,
    OutputRecord,
    OutputSchema,
    RegistryRefusalError,
)
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.filtering import score_alerts, score_packets
from broker_filter.streaming.filters import Filter, Filters, open_filters
from broker_filter.streaming.generation import open_generation
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import MAX_DETAIL_BYTES, Router, open_router
from broker_filter.streaming.scored import Anomalies, ScoredBatch

NAN = float("nan")


def router(*, drop_duplicates: bool = False, framing: Framing | None = None, key: RecordKey = "object") -> Router:
    return Router(
        "me",
        models=[("default", "1"), ("other", "2.0")],
        encoder=Encoder("scores"),
        framing=framing or ContainerFraming(),
        drop_duplicates=drop_duplicates,
        key=key,
        clock=lambda: 1771993800.1239,
    )


def of_topic(records: Sequence[OutputRecord], topic: str) -> list[OutputRecord]:
    return [record for record in records if record.topic == topic]


@pytest.fixture
def scored(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    """Four alerts: the second is a duplicate, and no model takes the last."""
    batch = make_scored(
        make_alerts([1, 2, 3, 4], offset=40, magpsf=[18, 19, NAN, 17]), {"default": [0.9, 0.8, 0.1, NAN]}
    )
    reject = Reject(
        batch.packets[3],
        3,
        RejectReason.NO_MODEL_FOR_SURVEY,
        "no model",
        alert=batch.alerts.identity(3),
        schema=batch.alerts.records[3].schema.fingerprint,
    )
    real = batch.scores.models[0].probabilities[:, 0]
    anomalies = Anomalies("default", real, np.full(4, 0.75, np.float32), real > 0.75)
    return replace(batch, rejects=[reject], duplicate=np.array([False, True, False, False]), anomalies=anomalies)


def test_alerts_go_to_scored_anomalies_and_their_filters(scored: ScoredBatch) -> None:
    filters = [("bright", "magpsf < 18.5"), ("faint", "not magpsf < 18.5")]
    compiled = Filters([Filter(name, compile_filter(where, FIELDS, ["default.real"])) for name, where in filters])
    tried = replace(scored, filters=compiled.outcomes(scored))
    routed = router().route(tried)
    offsets = {
        topic: [dict(record.headers)["input"].decode().rpartition("/")[2] for record in of_topic(routed.records, topic)]
        for topic in routed.published
    }
    assert offsets == {
        "me.scored": ["40", "41", "42"],
        "me.anomalies": ["40", "41"],
        "me.bright": ["40"],
        "me.faint": ["41"],
        "me.dead-letter": ["43"],
    }
    assert routed.published == {topic: len(inputs) for topic, inputs in offsets.items()}
    bright, faint = tried.filters
    paused = router().route(replace(tried, filters=(replace(bright, paused=True), faint)))
    assert paused.published == routed.published - Counter({"me.bright": 1})
    whole, said = (
        [next(iter(fastavro.reader(io.BytesIO(record.value))))["broker_filter"]["filters"] for record in records]
        for records in (of_topic(routed.records, "me.scored"), of_topic(paused.records, "me.scored"))
    )
    of_faint = {"name": "faint", "revision": faint.revision, "paused": False}
    of_bright = {"name": "bright", "revision": bright.revision, "paused": False}
    passed = [(True, False), (False, True), (False, False)]
    assert whole == [[of_bright | {"passed": first}, of_faint | {"passed": second}] for first, second in passed]
    assert said == [[first | {"paused": True}, second] for first, second in whole]


def test_the_key_is_the_designation_of_the_source_where_it_is_known(scored: ScoredBatch) -> None:
    alerts = scored.alerts
    sso = np.array([[1.0], [0.0], [1.0], [1.0]])  # ZTF's name of the second is of an object that passes nearby
    designation = ["2004 JQ12", "43769", None, "43769"]
    known = replace(scored, alerts=replace(alerts, designation=designation, columns=("sso",), metadata=sso))
    by_designation = router(key="designation")
    assert by_designation.columns == ("designation", "sso")
    records = by_designation.route(known).records
    objects = [name.encode() for name in alerts.object_id]
    assert [record.key for record in of_topic(records, "me.scored")] == [b"2004 JQ12", *objects[1:3]]
    assert [record.key for record in of_topic(records, "me.dead-letter")] == [objects[3]]
    assert router().columns == ()
    assert [record.key for record in of_topic(router().route(known).records, "me.scored")] == objects[:3]


@pytest.mark.shared
def test_a_service_keys_moving_objects_by_designation(ztf_packets: list[tuple[int, bytes]]) -> None:
    config = {
        "input": {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]},
        "output": {"prefix": "me", "payload": "scores", "key": "designation"},
    }
    generation = open_generation(resolve(Service.model_validate(config)), open_registry(None))
    packets = [Packet(data, KafkaPosition("c", "ztf", 0, i)) for i, (_, data) in enumerate(ztf_packets[::40])]
    scored = score_packets(packets, generation.decoder, generation.scorer, DuplicateWindow(0))
    routed = generation.router.route(scored)
    keys = [(record.key or b"").decode() for record in of_topic(routed.records, "me.scored")]
    candidates = [next(fastavro.reader(io.BytesIO(packets[i].data))) for i in scored.alerts.packet_index]
    is_source = [0 <= alert["candidate"]["ssdistnr"] <= 5 for alert in candidates]
    assert 0 < sum(is_source) < len(keys) == len(candidates)
    assert keys == [
        alert["candidate"]["ssnamenr"] if named else alert["objectId"]
        for alert, named in zip(candidates, is_source, strict=True)
    ]


def test_every_input_is_counted_once(scored: ScoredBatch) -> None:
    for drop in (False, True):
        routed = router(drop_duplicates=drop).route(scored)
        account = account_batch(scored.less(routed.refused))
        assert (account.consumed, account.scored, account.duplicates) == (4, 2, 1)
        assert account.rejected == {RejectReason.NO_MODEL_FOR_SURVEY: 1}


def test_duplicates_are_published_with_a_mark_or_dropped(scored: ScoredBatch) -> None:
    def marks(routed_records: Sequence[OutputRecord]) -> list[bool]:
        values = [record.value for record in of_topic(routed_records, "me.scored")]
        return [next(iter(fastavro.reader(io.BytesIO(value))))["broker_filter"]["duplicate"] for value in values]

    assert marks(router().route(scored).records) == [False, True, False]
    assert marks(router(drop_duplicates=True).route(scored).records) == [False, False]


def test_headers_of_records_name_the_input_and_the_models(scored: ScoredBatch) -> None:
    routed = router().route(scored)
    first = routed.records[0]
    assert first.key == b"ZTF26a0"
    assert dict(first.headers) == {
        "input": b"cluster/ztf/0/40",
        "models": b"default=1,other=2.0",
        "schema": scored.alerts.records[0].schema.fingerprint.encode(),
        "_format": b"avro",
    }
    for record, index in zip(routed.records, routed.packet_index, strict=True):
        assert dict(record.headers)["input"].decode() == str(scored.packets[index].position)


def test_only_container_files_are_marked_as_such_for_hop(scored: ScoredBatch) -> None:
    """Dead letters hold the input unchanged, and hop-client does not read the wire format."""
    container, wire = router().route(scored), router(framing=Refusing()).route(scored)
    assert {record.topic: dict(record.headers).get("_format") for record in container.records} == {
        "me.scored": b"avro",
        "me.anomalies": b"avro",
        "me.dead-letter": None,
    }
    assert not any("_format" in dict(record.headers) for record in wire.records)


def test_dead_letters_hold_the_original_bytes_and_the_reason(scored: ScoredBatch) -> None:
    [letter] = of_topic(router().route(scored).records, "me.dead-letter")
    assert letter.value is scored.packets[3].data
    assert letter.key == b"ZTF26a3"
    assert dict(letter.headers) == {
        "input": b"cluster/ztf/0/43",
        "models": b"default=1,other=2.0",
        "schema": scored.alerts.records[3].schema.fingerprint.encode(),
        "reason": b"no_model_for_survey",
        "detail": b"no model",
        "scored": b"",
    }


def test_a_dead_letter_of_unreadable_bytes_has_no_key_and_a_bounded_detail(scored: ScoredBatch) -> None:
    nobody = AlertIdentity(None, None, None, None, None, None, None, None)
    for alert in (None, nobody):
        reject = Reject(
            scored.packets[3], 3, RejectReason.NOT_AVRO, "\N{SNOWMAN}" * 10_000 + "\ud800", record=2, alert=alert
        )
        [letter] = of_topic(router().route(replace(scored, rejects=[reject])).records, "me.dead-letter")
        headers = dict(letter.headers)
        assert letter.key is None
        assert len(headers["detail"]) <= MAX_DETAIL_BYTES
        assert headers["detail"].decode().startswith("\N{SNOWMAN}")
        assert headers["schema"] == b""
        assert headers["record"] == b"2"


class Refusing:
    """A framing whose registry refuses the schemas of some topics."""

    headers = ()

    def __init__(self, *topics: str) -> None:
        self._topics = topics

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        if topic in self._topics:
            raise RegistryRefusalError(f"refuses subject '{topic}-value': HTTP 409 incompatible")
        return ContainerFraming().frame(schema, body, topic)


def test_an_alert_whose_schema_is_refused_is_a_dead_letter_and_goes_to_no_other_topic(scored: ScoredBatch) -> None:
    refusing = router(framing=Refusing("me.anomalies"))
    routed = refusing.route(scored)
    letters = of_topic(routed.records, "me.dead-letter")
    assert [(dict(letter.headers)["reason"], letter.key) for letter in letters] == [
        (b"no_model_for_survey", b"ZTF26a3"),
        (b"schema_refused", b"ZTF26a0"),
        (b"schema_refused", b"ZTF26a1"),
    ]
    assert letters[1].value is scored.packets[0].data
    assert dict(letters[1].headers)["detail"] == b"refuses subject 'me.anomalies-value': HTTP 409 incompatible"
    assert [dict(record.headers)["input"] for record in of_topic(routed.records, "me.scored")] == [b"cluster/ztf/0/42"]
    total = account_batch(scored.less(routed.refused))
    assert (total.scored, total.duplicates) == (1, 0)
    assert total.rejected == {RejectReason.NO_MODEL_FOR_SURVEY: 1, RejectReason.SCHEMA_REFUSED: 2}
    for account in account_packets(scored.less(routed.refused)):
        assert account.consumed == account.scored + account.rejected.total() + account.duplicates == 1
    dropping = router(framing=Refusing("me.scored"), drop_duplicates=True).route(scored)
    total = account_batch(scored.less(dropping.refused))
    assert (total.duplicates, total.rejected[RejectReason.SCHEMA_REFUSED]) == (1, 2)


def test_message_with_several_rejected_alerts_is_one_dead_letter(scored: ScoredBatch) -> None:
    def rejected(reason: RejectReason, record: int) -> Reject:
        return Reject(scored.packets[3], 3, reason, f"alert {record}", record=record)

    rejects = [rejected(RejectReason.TRUNCATED, 5000), *(rejected(RejectReason.BAD_CUTOUT, k) for k in range(1, 5000))]
    batch = replace(scored, rejects=rejects)
    routed = router().route(batch)
    [letter] = of_topic(routed.records, "me.dead-letter")
    assert account_batch(batch).rejected.total() == 5000
    assert letter.value is scored.packets[3].data
    headers = dict(letter.headers)
    assert headers["reason"] == b"bad_cutout"
    assert headers["record"] == b"1"
    assert headers["detail"] == b"alert 1"
    assert headers["rejected"] == b"bad_cutout=4999,truncated=1"


def test_a_configuration_routes_real_packets(ztf_packets: list[tuple[int, bytes]]) -> None:
    service = Service.model_validate(
        {
            "input": {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]},
            "output": {"prefix": "me", "payload": "no_cutouts"},
            "filters": [{"name": "red", "where": 'band == "r" and real > 0.5 and magpsf < 99'}],
        }
    )
    scorer = open_scorer(service.models, Runtime())
    resolved = resolve(service)
    router = open_router(resolved)
    data = [*(data for _, data in ztf_packets[:40]), b"", b"nonsense"]
    packets = [Packet(one, KafkaPosition("c", "ztf", 0, i)) for i, one in enumerate(data)]
    filters = open_filters(resolved)
    columns = [*scorer.columns, *filters.columns]
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=columns)
    scored = score_alerts(*decoder.decode(packets), scorer, DuplicateWindow(100), filters=filters)
    routed = router.route(scored)
    account = account_batch(scored)
    assert routed.published["me.scored"] == account.scored == 40
    assert account.rejected == {RejectReason.EMPTY: 1, RejectReason.NOT_AVRO: 1}
    assert 0 < routed.published["me.red"] < 40
    assert set(routed.published) == set(service.output_topics) == {"me.scored", "me.red", "me.dead-letter"}
    for record in of_topic(routed.records, "me.red"):
        [alert] = fastavro.reader(io.BytesIO(record.value))
        assert alert["candidate"]["fid"] == 2
        assert alert["broker_filter"]["anomaly"] is None
        assert alert["broker_filter"]["configuration"] == resolved.revision
        assert record.key == alert["objectId"].encode()


def test_dead_letter_of_a_damaged_alert_names_its_schema(shared_data: Path) -> None:
    archive = shared_data / "ztf" / "archives" / "ZTF18abxhyqv.tar.gz"  # four of its alerts have no cutouts
    scorer = open_scorer(["default"], Runtime())
    scored = score_packets(list(read_packets([archive])), Decoder(open_registry(None)), scorer, DuplicateWindow(100))
    letters = of_topic(router().route(scored).records, "me.dead-letter")
    assert len(letters) == 4
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["reason"] == b"missing_cutout"
        assert len(headers["schema"]) == 16
        assert letter.key == b"ZTF18abxhyqv"
