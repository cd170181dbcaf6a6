"""Topics by the calendar, and where reading starts, on a real broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from broker_filter.config import Input
from broker_filter.metrics import Metrics
from broker_filter.streaming import kafka_source
from broker_filter.streaming.checkpoint import GroupCheckpoint
from broker_filter.streaming.kafka_client import Cluster, Complaints, RecordLimits, client_properties
from broker_filter.streaming.kafka_source import KafkaSource
from broker_filter.streaming.transactions import Writer
from broker_filter.streaming.watchdog import Stage

pytestmark = pytest.mark.kafka

MIDNIGHT = datetime(2026, 2, 26, tzinfo=UTC)
PATIENCE_S = 120.0
"""For messages to come, on a busy machine."""
QUIET_S = 1.5
"""For messages that must not come."""


class Reader:
    """A source whose clock is set by hand, and what it has read."""

    def __init__(self, bootstrap: str, name: str, template: str, now: datetime, **options: object) -> None:
        """`name`: of the group."""
        section = Input(
            bootstrap_servers=bootstrap,
            group_id=name,
            topics=[template],
            kafka={"topic.metadata.refresh.interval.ms": 500},
            **options,  # type: ignore[arg-type]
        )
        self.now = now
        properties, complaints, metrics = client_properties(section), Complaints("test brokers"), Metrics()
        admin = AdminClient({"bootstrap.servers": bootstrap})
        existing = {name: len(topic.partitions) for name, topic in admin.list_topics(timeout=10).topics.items()}
        if name not in existing:
            admin.create_topics([NewTopic(name, 1, -1)])[name].result()
        limits = RecordLimits(admin, [name], dead_letter=name)
        open_writer = partial(Writer, properties, limits, metrics, complaints, Stage("commit", metrics))
        self.source = KafkaSource(
            section, properties, Cluster("cluster", existing), complaints, lambda _: None, lambda: self.now
        )
        self.source.subscribe(GroupCheckpoint(self.source.consumer, open_writer, name))
        self.values: list[bytes] = []

    def read(self, expected: int, patience_s: float = PATIENCE_S) -> list[bytes]:
        """Reads until so many messages have come in all."""
        deadline = time.monotonic() + patience_s
        while len(self.values) < expected and time.monotonic() < deadline:
            if delivery := self.source.take(100, 0.1):
                self.values += [packet.data for packet in delivery.packets]
        return sorted(self.values)


@pytest.fixture
def start_reader(
    kafka_bootstrap: str, unique_name: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., Reader]]:
    caplog.set_level("INFO")  # what was claimed when, if a test fails
    readers = []

    def start(template: str, now: datetime = MIDNIGHT, group: str = "", **options: object) -> Reader:
        readers.append(Reader(kafka_bootstrap, group or unique_name("group"), template, now, **options))
        return readers[-1]

    yield start
    for reader in readers:
        reader.source.close()  # closing twice does no harm


@pytest.fixture
def send(kafka_bootstrap: str) -> Callable[..., None]:
    """Sends values to a topic of one partition, which is made if it is not there."""
    properties = {"bootstrap.servers": kafka_bootstrap}
    admin = AdminClient(properties)

    def send(topic: str, *values: bytes, timestamp: datetime | None = None) -> None:
        if topic not in admin.list_topics(timeout=10).topics:
            # The night of these alerts may be long ago: brokers would delete them before they are read.
            admin.create_topics([NewTopic(topic, 1, -1, config={"retention.ms": "-1"})])[topic].result()
        producer = Producer(properties)
        for value in values:
            producer.produce(topic, value, timestamp=int((timestamp or MIDNIGHT).timestamp() * 1000))
        assert producer.flush(30) == 0

    return send


def test_topics_roll_over_at_midnight_utc_and_new_ones_are_read_from_their_beginning(
    send: Callable[..., None], start_reader: Callable[..., Reader], unique_name: Callable[[str], str]
) -> None:
    night = unique_name("ztf")
    send(f"{night}_20260225", b"before the start")
    reader = start_reader(f"{night}_%Y%m%d", MIDNIGHT - timedelta(minutes=5), start="latest")
    assert reader.source.take(1, 0.1) is None
    while not reader.source.claims:
        reader.source.take(1, 0.1)
    send(f"{night}_20260225", b"25th")
    assert reader.read(1) == [b"25th"]

    send(f"{night}_20260226", b"26th, unseen as yet")
    assert reader.read(2, QUIET_S) == [b"25th"]  # it is still the 25th
    reader.now = MIDNIGHT + timedelta(seconds=1)
    assert reader.read(2) == [b"25th", b"26th, unseen as yet"]
    send(f"{night}_20260225", b"25th, after midnight")
    assert len(reader.read(3)) == 3


def test_no_more_is_taken_at_a_time_than_memory_is_for(
    send: Callable[..., None],
    start_reader: Callable[..., Reader],
    unique_name: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = unique_name("ztf")
    send(topic, *[bytes([k]) * 100_000 for k in range(60)])
    monkeypatch.setattr(kafka_source, "DELIVERY_BYTES", 1_000_000)
    reader = start_reader(topic, start="earliest")
    sizes, values = [], []
    deadline = time.monotonic() + PATIENCE_S
    while len(values) < 60 and time.monotonic() < deadline:
        if delivery := reader.source.take(1000, 5.0):
            sizes.append(sum(len(packet.data) for packet in delivery.packets))
            values += [packet.data[0] for packet in delivery.packets]
    assert values == list(range(60))
    assert max(sizes) <= 1_000_000 + 100_000 * kafka_source.MESSAGES_AT_A_TIME


def test_day_that_is_still_being_read_is_kept(
    send: Callable[..., None], start_reader: Callable[..., Reader], unique_name: Callable[[str], str]
) -> None:
    night = unique_name("ztf")
    for day in ("25", "26", "27"):
        send(f"{night}_202602{day}", day.encode())
    reader = start_reader(f"{night}_%Y%m%d", MIDNIGHT, start="earliest")
    assert reader.read(2) == [b"25", b"26"]
    for claim in reader.source.claims:
        if claim.topic.endswith("26"):
            claim.committed = claim.read  # the 25th lags: nothing of it is committed
    reader.now = MIDNIGHT + timedelta(days=1)

    assert reader.read(3) == [b"25", b"26", b"27"]
    assert {claim.topic[-2:] for claim in reader.source.claims} == {"25", "26", "27"}


@pytest.mark.parametrize("start", ["stored", "latest"])
def test_day_that_began_while_the_group_was_away_is_read_from_its_beginning(
    start: str, send: Callable[..., None], start_reader: Callable[..., Reader], unique_name: Callable[[str], str]
) -> None:
    night, group = unique_name("ztf"), unique_name("group")
    send(f"{night}_20260225")
    before = start_reader(f"{night}_%Y%m%d", MIDNIGHT - timedelta(minutes=5), group, start="earliest")
    while not before.source.claims:
        before.source.take(1, 0.1)
    before.source.close()
    send(f"{night}_20260226", b"26th")

    assert start_reader(f"{night}_%Y%m%d", MIDNIGHT, group, start=start).read(1) == [b"26th"]


def test_days_that_passed_while_the_group_was_away_are_read(
    send: Callable[..., None], start_reader: Callable[..., Reader], unique_name: Callable[[str], str]
) -> None:
    night, group = unique_name("ztf"), unique_name("group")
    for day, begin in ((20, "latest"), (21, "earliest")):  # the 20th is read to its end, the 21st is not
        send(f"{night}_202602{day}", str(day).encode())
        before = start_reader(f"{night}_%Y%m%d", datetime(2026, 2, day, 0, 5, tzinfo=UTC), group, start=begin)
        while not before.source.claims:
            before.source.take(1, 0.1)
        before.source.close()
    for day in ("18", "23", "24", "25", "26"):  # the 18th was there before the group
        send(f"{night}_202602{day}", day.encode())

    reader = start_reader(f"{night}_%Y%m%d", MIDNIGHT, group, start="latest")

    assert reader.read(5) == [b"21", b"23", b"24", b"25", b"26"]
    assert {claim.topic[-2:] for claim in reader.source.claims} == {"21", "23", "24", "25", "26"}


def test_partition_that_is_added_later_is_read_from_its_beginning(
    kafka_bootstrap: str,
    send: Callable[..., None],
    start_reader: Callable[..., Reader],
    unique_name: Callable[[str], str],
) -> None:
    topic = unique_name("ztf")
    send(topic, b"before the start")
    reader = start_reader(topic, start="latest")
    while not reader.source.claims:
        reader.source.take(1, 0.1)

    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    producer.produce(topic, b"in the new one", partition=1)
    assert producer.flush(PATIENCE_S) == 0

    assert reader.read(1) == [b"in the new one"]


def test_nothing_lags_behind_the_last_message_of_a_transaction(
    kafka_bootstrap: str,
    send: Callable[..., None],
    start_reader: Callable[..., Reader],
    unique_name: Callable[[str], str],
) -> None:
    topic = unique_name("ztf")
    send(topic)
    producer = Producer({"bootstrap.servers": kafka_bootstrap, "transactional.id": topic})
    producer.init_transactions(PATIENCE_S)
    producer.begin_transaction()
    producer.produce(topic, b"the last one")
    producer.commit_transaction(PATIENCE_S)
    reader = start_reader(topic, start="earliest")
    assert reader.read(1) == [b"the last one"]
    (claim,) = reader.source.claims
    while reader.source.lags() != {(topic, 0): 2}:  # and the mark behind it
        reader.source.take(1, 0.1)

    claim.committed = claim.read

    while reader.source.lags() != {(topic, 0): 0}:
        reader.source.take(1, 0.1)


def test_starts_from_a_time(
    send: Callable[..., None], start_reader: Callable[..., Reader], unique_name: Callable[[str], str]
) -> None:
    topic = unique_name("ztf")
    for hour in range(6):
        send(topic, str(hour).encode(), timestamp=MIDNIGHT + timedelta(hours=hour))

    assert start_reader(topic, start="2026-02-26T02:30:00").read(3) == [b"3", b"4", b"5"]
