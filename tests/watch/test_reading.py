"""Records of every payload, raw packets and hostile records are read into facts."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import fastavro
import numpy as np
import pytest

from broker_filter.kafka.client import KafkaSetupError
from broker_filter.packets.alert_rows import in_batches
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry import SchemaRegistry, open_registry
from broker_filter.packets.schemas.registry_client import RegistryUnavailable
from broker_filter.packets.schemas.writer_schema import WriterSchema
from broker_filter.scoring.scorer import Scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.watch.detail import STRIP_SIZE, Details, strip
from broker_filter.watch.feed import Feed
from broker_filter.watch.reading import AlertReader, Scoring
from broker_filter.watch.store import AlertStore, Content, Facts

from .conftest import Fill
from .made_night import FIRST_ID, annotation, records


def read(packets: list[bytes], scoring: Scoring | None = None) -> list[tuple[Facts, Content] | Reject]:
    return list(AlertReader(open_registry(SCHEMAS), scoring).read([Packet(data) for data in packets]))


@pytest.mark.parametrize("payload", ["full", "no_cutouts", "scores"])
def test_facts_are_the_same_with_every_payload(payload: Any) -> None:
    for k, found in enumerate(read(list(records(8, payload=payload, distinct=2)))):
        assert not isinstance(found, Reject)
        facts, expected = found[0], annotation(k)
        assert facts.alert_id == FIRST_ID + k
        assert facts.survey == ("ztf", "lsst")[k % 2]
        assert facts.scores["classes.SN"] == pytest.approx(k * 29 % 100 / 100)
        assert facts.anomaly == pytest.approx(expected["anomaly"]["score"])
        assert facts.flagged == (k % 7 == 0)
        assert facts.passed == tuple(one["name"] for one in expected["filters"] if one["passed"])
        assert facts.reason == ("unlike in light_curve" if k % 7 == 0 else "")
        assert (facts.magnitude is None) == (payload == "scores")
        assert facts.has_cutouts == (payload == "full")


def test_light_curves_are_shown_without_cutouts(fill: Fill) -> None:
    store, _ = fill(list(records(2, payload="no_cutouts", distinct=2)))
    for alert in store.alerts():
        described = Details(store).describe(alert.facts.alert_id)
        assert described
        assert described["cutouts"] == []
        assert described["light_curve"][-1]["kind"] == "detection"
        assert {column["name"] for column in described["columns"]} > {"magpsf", "psfFlux"}
        assert Details(store).strip(alert.facts.alert_id) is None


def test_a_raw_packet_has_no_scores_and_is_scored_by_a_model() -> None:
    packets = [alert.packet for alert in simulate_night(2, seed=1)] + [next(simulate_night(1, 1, "lsst")).packet]
    packets.append(next(records(1, payload="no_cutouts", distinct=2)))  # cannot be scored; is shown all the same
    plain = [one[0] for one in read(packets) if not isinstance(one, Reject)]
    assert [dict(facts.scores) for facts in plain[:3]] == [{}, {}, {}]
    scored = [one[0] for one in read(packets, Scoring(Scorer.open("default"))) if not isinstance(one, Reject)]
    by_id = {facts.alert_id: facts.scores for facts in scored}
    assert set(by_id) == {facts.alert_id for facts in plain}
    assert all("default.real" in by_id[facts.alert_id] for facts in plain)


def test_a_packet_that_is_none_is_a_reject() -> None:
    [found] = read([b"no alert"])
    assert isinstance(found, Reject)
    assert found.reason == RejectReason.NOT_AVRO


def test_records_before_filters_were_named_still_open() -> None:
    record = next(records(1, distinct=2))
    reader = fastavro.reader(io.BytesIO(record))
    definition, old = reader.writer_schema, next(reader)
    (field,) = [field for field in definition["fields"] if field["name"] == "broker_filter"]
    kept = ("service_version", "scored_at", "duplicate", "anomaly", "models")
    field["type"]["fields"] = [one for one in field["type"]["fields"] if one["name"] in kept]
    file = io.BytesIO()
    fastavro.writer(file, definition, [old])
    [found] = read([file.getvalue()])
    assert not isinstance(found, Reject)
    assert found[0].passed == ()
    assert "default.real" in found[0].scores


def test_cutouts_of_every_size_fill_the_squares_of_a_strip() -> None:
    rng = np.random.default_rng(0)
    stamps = [rng.normal(size=size).astype(np.float32) for size in ((101, 101), (63, 30), (30, 30))]
    shades = strip([*stamps, np.empty((0, 0), np.float32)])
    assert shades.shape[0] == STRIP_SIZE
    masked = shades == 255
    squares = [masked[:, k * (STRIP_SIZE + 2) :][:, :STRIP_SIZE] for k in range(4)]
    assert [square.mean() for square in squares] == pytest.approx([0, 33 / 63, 0, 1])


def test_the_store_keeps_the_newest_and_counts_what_it_dropped(fill: Fill) -> None:
    store, feed = fill([*records(30, distinct=2), b"no alert"], keep=20)
    assert [alert.facts.alert_id - FIRST_ID for alert in store.alerts()] == list(range(10, 30))
    assert (len(store), store.dropped, store.newest, feed.packets) == (20, 10, 30, 31)
    assert dict(feed.unreadable) == {"not_avro": 1}
    assert store.get(FIRST_ID) is None


def test_an_alert_that_arrives_again_replaces_the_earlier_one(fill: Fill) -> None:
    store, _ = fill([*records(2, distinct=2), *records(1, distinct=2)])
    assert [(alert.facts.alert_id - FIRST_ID, alert.number) for alert in store.alerts()] == [(1, 2), (0, 3)]


def test_temporary_files_are_closed_when_their_alerts_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_filter.watch.store.SEGMENT_ALERTS", 2)
    store = AlertStore(keep=3)
    segments = []
    for k in range(9):
        store.add(Facts(k, "o", "ztf", "", 0.0, 0.0, 0.0, None), Content(b"%d" % k, None))
        segments.append(store.alerts()[-1].segment)
    assert [segment.file.closed for segment in segments] == [True] * 6 + [False] * 3
    found = store.get(6)
    assert found
    assert found[1].body == b"6"
    store.close()
    assert all(segment.file.closed for segment in segments)


def test_only_alerts_of_a_list_are_kept(fill: Fill) -> None:
    store, _ = fill(list(records(6, distinct=2)), only=[FIRST_ID + 4, FIRST_ID + 1])
    assert {alert.facts.alert_id - FIRST_ID for alert in store.alerts()} == {1, 4}


def failing(error: Exception) -> Iterator[list[Packet]]:
    yield [Packet(data) for data in records(1, distinct=2)]
    raise error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KafkaSetupError("brokers x:9092: topic y: unknown"), "brokers x:9092: topic y: unknown"),
        (ZeroDivisionError(), "a fault of the program stopped the reading; the log has the details"),
    ],
)
def test_what_stops_the_reading_is_shown(error: Exception, shown: str) -> None:
    with closing(AlertStore(10)) as store:
        feed = Feed([failing(error)], AlertReader(open_registry(None)), store, stop=threading.Event())
        feed.start()
        feed.join(60)
        assert (feed.problem, feed.is_reading, len(store)) == (shown, False, 1)


class LateRegistry:
    """A schema registry that does not answer the first request."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self.requests = 0

    def get(self, schema_id: int, doubted: WriterSchema | None = None) -> WriterSchema:
        self.requests += 1
        if self.requests == 1:
            raise RegistryUnavailable("the registry does not answer")
        return self._registry.get(schema_id, doubted)


def test_a_registry_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_filter.watch.feed.RETRY_S", 0.01)
    registry = LateRegistry(open_registry(SCHEMAS))
    packets = [Packet(alert.packet) for alert in simulate_night(2, 1, "lsst")]
    with closing(AlertStore(10)) as store:
        feed = Feed([in_batches(packets, 10)], AlertReader(registry), store, stop=threading.Event())
        feed.start()
        feed.join(60)
        assert (feed.problem, len(store)) == ("", 2)
    assert registry.requests > 1
