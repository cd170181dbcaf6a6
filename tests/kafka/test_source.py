"""The topics of each day, and the position at which reading starts, tested on a real broker."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from broker_filter.config import Input
from broker_filter.kafka import days as kafka_days
from broker_filter.kafka import source as kafka_source
from broker_filter.kafka.checkpoint import (
    Checkpoint,
    GroupCheckpoint,
    PositionsCheckpoint,
    PositionsTopic,
    claim_offset,
)
from broker_filter.kafka.client import Cluster, RecordLimits, ThrottledErrorLog, client_properties
from broker_filter.kafka.source import KafkaSource, group_observer
from broker_filter.kafka.transactions import Store, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.local_kafka import KafkaCluster
from broker_filter.metrics import LossReason, Metrics
from tests.toxiproxy import toxiproxy

pytestmark = pytest.mark.kafka

MIDNIGHT = datetime(2026, 2, 26, tzinfo=UTC)
PATIENCE_S = 120.0
"""Seconds to wait for expected messages, on a busy machine."""
QUIET_S = 1.5
"""Seconds to wait for messages that must not arrive."""


QUICK = {"topic.metadata.refresh.interval.ms": 500, "reconnect.backoff.max.ms": 500, "session.timeout.ms": 6000}
"""With the defaults, each of these takes up to ten seconds after a restart of the brokers or for a new topic."""


class Reader:
    """A source whose clock the test sets, and the messages that it has read."""

    def __init__(
        self,
        bootstrap: str,
        name: str,
        template: str,
        now: datetime,
        positions_bootstrap: str | None = None,
        **options: object,
    ) -> None:
        """`name`: the consumer group. `positions_bootstrap`: the cluster of the positions, if it is another one."""
        section = Input(
            bootstrap_servers=bootstrap,
            group_id=name,
            topics=[template],
            kafka=QUICK,
            **options,  # type: ignore[arg-type]
        )
        self.now = now
        properties, error_log, metrics = client_properties(section), ThrottledErrorLog("test brokers"), Metrics()
        self.metrics = metrics
        cluster = AdminClient(properties).list_topics(timeout=10)
        existing = {name: len(topic.partitions) for name, topic in cluster.topics.items()}
        outputs = properties | {"bootstrap.servers": positions_bootstrap or bootstrap}
        admin = AdminClient(outputs)
        if name not in admin.list_topics(timeout=10).topics:
            admin.create_topics([NewTopic(name, 1, -1, config={"cleanup.policy": "compact"})])[name].result()
        limits = RecordLimits(admin, [name], dead_letter=name)
        self._writers: list[Writer] = []

        def open_writer(transactional_id: str, store: Store) -> Writer:
            stage = Stage("commit", metrics)
            self._writers.append(Writer(outputs, limits, metrics, error_log, stage, transactional_id, store))
            return self._writers[-1]

        self.source = KafkaSource(
            section, properties, Cluster("cluster", existing), error_log, lambda _: None, metrics, lambda: self.now
        )
        checkpoint: Checkpoint
        if positions_bootstrap:
            positions = PositionsTopic(name, outputs, admin, error_log)
            checkpoint = PositionsCheckpoint(positions, open_writer, name, name, "cluster")
        else:
            checkpoint = GroupCheckpoint(self.source.consumer, open_writer, name, group_observer(properties, name))
        self.source.subscribe(checkpoint)
        self.values: list[bytes] = []

    def close(self) -> None:
        """Leave the group and end the producers. Closing twice does no harm."""
        self.source.close()
        for writer in self._writers:
            writer.close()

    def lost(self, topic: str, reason: LossReason) -> float:
        """Return the number of messages of a topic that are counted as lost."""
        name = f'broker_filter_lost_messages_total{{reason="{reason}",topic="{topic}"}} '
        lines = self.metrics.exposition().decode().splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    def commit(self) -> None:
        """Commit the positions of all messages that were read, as a transaction would."""
        ends = [claim_offset(claim, claim.enqueued) for claim in self.source.claims]
        self.source.consumer.commit(offsets=ends, asynchronous=False)
        for claim in self.source.claims:
            claim.committed = claim.enqueued

    def wait_claimed(self) -> None:
        """Read until a partition is claimed."""
        while not self.source.claims:
            self.source.take(1, 0.1)

    def read(self, expected: int, patience_s: float = PATIENCE_S) -> list[bytes]:
        """Read until the total number of messages is reached."""
        deadline = time.monotonic() + patience_s
        while len(self.values) < expected and time.monotonic() < deadline:
            if delivery := self.source.take(100, 0.1):
                self.values += [packet.data for packet in delivery.packets]
                delivery.set_out()
        return sorted(self.values)


@pytest.fixture(autouse=True)
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sources search for new topics every second: by default, a test would wait ten seconds for a new topic."""
    monkeypatch.setattr(kafka_days, "LOOK_INTERVAL_S", 1.0)


StartReader = Callable[..., Reader]
Send = Callable[..., None]


@pytest.fixture
def start_reader(
    kafka_bootstrap: str, unique_name: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> Iterator[StartReader]:
    caplog.set_level("INFO")  # shows the claims if a test fails
    readers = []

    def start(template: str, now: datetime = MIDNIGHT, group: str = "", **options: object) -> Reader:
        readers.append(Reader(kafka_bootstrap, group or unique_name("group"), template, now, **options))
        return readers[-1]

    yield start
    for reader in readers:
        reader.close()


@pytest.fixture
def topic(unique_name: Callable[[str], str]) -> str:
    """A new topic name, or the beginning of the names of a test's topics of days."""
    return unique_name("ztf")


@pytest.fixture
def send(kafka_bootstrap: str) -> Send:
    """Send values to a topic of one partition, which is created if it does not exist."""
    properties = {"bootstrap.servers": kafka_bootstrap}
    admin = AdminClient(properties)

    def send(topic: str, *values: bytes, timestamp: datetime | None = None) -> None:
        if topic not in admin.list_topics(timeout=10).topics:
            # The timestamps may be old, so that brokers would delete the messages before they are read.
            admin.create_topics([NewTopic(topic, 1, -1, config={"retention.ms": "-1"})])[topic].result()
        producer = Producer(properties)
        for value in values:
            producer.produce(topic, value, timestamp=int((timestamp or MIDNIGHT).timestamp() * 1000))
        assert producer.flush(30) == 0

    return send


def test_topics_change_at_midnight_utc_and_new_topics_are_read_from_their_beginning(
    send: Send, start_reader: StartReader, topic: str
) -> None:
    send(f"{topic}_20260225", b"before the start")
    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT - timedelta(minutes=5), start="latest")
    assert reader.source.take(1, 0.1) is None
    reader.wait_claimed()
    send(f"{topic}_20260225", b"25th")
    assert reader.read(1) == [b"25th"]

    send(f"{topic}_20260226", b"26th, unseen as yet")
    assert reader.read(2, QUIET_S) == [b"25th"]  # it is still the 25th
    reader.now = MIDNIGHT + timedelta(seconds=1)
    assert reader.read(2) == [b"25th", b"26th, unseen as yet"]
    send(f"{topic}_20260225", b"25th, after midnight")
    assert len(reader.read(3)) == 3


def test_size_of_a_batch_is_bounded_in_bytes(
    send: Send, start_reader: StartReader, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(topic, *[bytes([k]) * 100_000 for k in range(60)])
    monkeypatch.setattr(kafka_source, "DELIVERY_BYTES", 1_000_000)
    reader = start_reader(topic, start="earliest")
    sizes, values = [], []
    deadline = time.monotonic() + PATIENCE_S
    while len(values) < 60 and time.monotonic() < deadline:
        if delivery := reader.source.take(1000, 1.0):
            sizes.append(sum(len(packet.data) for packet in delivery.packets))
            values += [packet.data[0] for packet in delivery.packets]
    assert values == list(range(60))
    assert max(sizes) <= 1_000_000 + 100_000 * kafka_source.MESSAGES_AT_A_TIME


def test_topic_of_an_earlier_day_is_read_to_its_end(send: Send, start_reader: StartReader, topic: str) -> None:
    for day in ("25", "26", "27"):
        send(f"{topic}_202602{day}", day.encode())
    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT, start="earliest")
    assert reader.read(2) == [b"25", b"26"]
    for claim in reader.source.claims:
        if claim.topic.endswith("26"):
            claim.committed = claim.read  # the 25th has a lag: none of its messages is committed
    reader.now = MIDNIGHT + timedelta(days=1)

    assert reader.read(3) == [b"25", b"26", b"27"]
    assert {claim.topic[-2:] for claim in reader.source.claims} == {"25", "26", "27"}


@pytest.mark.parametrize("start", ["stored", "latest"])
def test_topic_created_while_the_group_was_away_is_read_from_its_beginning(
    start: str, send: Send, start_reader: StartReader, unique_name: Callable[[str], str], topic: str
) -> None:
    group = unique_name("group")
    send(f"{topic}_20260225")
    before = start_reader(f"{topic}_%Y%m%d", MIDNIGHT - timedelta(minutes=5), group, start="earliest")
    before.wait_claimed()
    before.close()
    send(f"{topic}_20260226", b"26th")

    assert start_reader(f"{topic}_%Y%m%d", MIDNIGHT, group, start=start).read(1) == [b"26th"]


def test_topics_of_days_while_the_group_was_away_are_read(
    send: Send, start_reader: StartReader, unique_name: Callable[[str], str], topic: str
) -> None:
    group = unique_name("group")
    for day, begin in ((20, "latest"), (21, "earliest")):  # the 20th is read to its end, the 21st is not
        send(f"{topic}_202602{day}", str(day).encode())
        before = start_reader(f"{topic}_%Y%m%d", datetime(2026, 2, day, 0, 5, tzinfo=UTC), group, start=begin)
        before.wait_claimed()
        before.close()
    for day in ("18", "23", "24", "25", "26"):  # the topic of the 18th existed before the group
        send(f"{topic}_202602{day}", day.encode())

    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT, group, start="latest")

    assert reader.read(5) == [b"21", b"23", b"24", b"25", b"26"]
    assert {claim.topic[-2:] for claim in reader.source.claims} == {"21", "23", "24", "25", "26"}


def test_partition_that_is_added_later_is_read_from_its_beginning(
    kafka_bootstrap: str, send: Send, start_reader: StartReader, topic: str
) -> None:
    send(topic, b"before the start")
    reader = start_reader(topic, start="latest")
    reader.wait_claimed()

    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    producer.produce(topic, b"in the new one", partition=1)
    assert producer.flush(PATIENCE_S) == 0

    assert reader.read(1) == [b"in the new one"]


def test_transaction_marker_after_the_last_message_is_no_lag(
    kafka_bootstrap: str, send: Send, start_reader: StartReader, topic: str
) -> None:
    send(topic)
    producer = Producer({"bootstrap.servers": kafka_bootstrap, "transactional.id": topic})
    producer.init_transactions(PATIENCE_S)
    producer.begin_transaction()
    producer.produce(topic, b"the last one")
    producer.commit_transaction(PATIENCE_S)
    reader = start_reader(topic, start="earliest")
    assert reader.read(1) == [b"the last one"]
    (claim,) = reader.source.claims
    while reader.source.lags() != {(topic, 0): 2}:  # the message and the transaction marker
        reader.source.take(1, 0.1)

    claim.committed = claim.read

    while reader.source.lags() != {(topic, 0): 0}:
        reader.source.take(1, 0.1)


def test_reading_starts_from_a_time(send: Send, start_reader: StartReader, topic: str) -> None:
    for hour in range(6):
        send(topic, str(hour).encode(), timestamp=MIDNIGHT + timedelta(hours=hour))

    assert start_reader(topic, start="2026-02-26T02:30:00").read(3) == [b"3", b"4", b"5"]


@pytest.mark.parametrize("start", ["earliest", "2026-02-22T12:00:00"])
def test_all_days_since_the_start_are_read(start: str, send: Send, start_reader: StartReader, topic: str) -> None:
    for day in (20, 22, 23, 24, 25, 26):  # the 21st has no topic
        at = datetime(2026, 2, day, 6, tzinfo=UTC)
        send(f"{topic}_202602{day}", f"{day} morning".encode(), timestamp=at)
        send(f"{topic}_202602{day}", f"{day} evening".encode(), timestamp=at + timedelta(hours=12))

    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT, start=start)

    days = (20, 22, 23, 24, 25, 26) if start == "earliest" else (22, 23, 24, 25, 26)
    expected = {f"{day} {part}".encode() for day in days for part in ("morning", "evening")}
    if start != "earliest":
        expected.remove(b"22 morning")
    assert set(reader.read(len(expected))) == expected
    assert len(reader.read(len(expected) + 1, QUIET_S)) == len(expected)


@pytest.mark.parametrize("start", ["earliest", "latest", "2026-02-25T00:00:00"])
def test_topic_that_is_created_days_late_is_found(
    start: str, send: Send, start_reader: StartReader, topic: str
) -> None:
    for day in (23, 25, 26):
        send(f"{topic}_202602{day}", str(day).encode())
    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT, start=start)
    before = {"earliest": 3, "latest": 0}.get(start, 2)
    assert len(reader.read(before)) == before
    reader.wait_claimed()

    send(f"{topic}_20260224", b"24, late")

    assert b"24, late" in reader.read(before + 1)


def test_topic_read_to_its_end_is_read_on_when_more_messages_arrive(
    send: Send, start_reader: StartReader, topic: str
) -> None:
    for day in ("24", "25"):
        send(f"{topic}_202602{day}", day.encode())
    reader = start_reader(f"{topic}_%Y%m%d", MIDNIGHT - timedelta(days=1), start="earliest")
    assert reader.read(2) == [b"24", b"25"]
    reader.commit()
    reader.now = MIDNIGHT + timedelta(hours=1)
    while any(claim.topic.endswith("24") for claim in reader.source.claims):
        reader.source.take(1, 0.1)

    send(f"{topic}_20260224", b"24, more")

    assert reader.read(3) == [b"24", b"24, more", b"25"]


def test_gaps_from_transactions_and_compaction_are_not_losses(
    kafka_bootstrap: str, send: Send, start_reader: StartReader, topic: str
) -> None:
    compacted = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.01"}
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(topic, 1, -1, config=compacted | {"max.compaction.lag.ms": "100"})])[topic].result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap, "transactional.id": topic})
    producer.init_transactions(PATIENCE_S)
    for i in range(10):
        producer.begin_transaction()
        producer.produce(topic, str(i).encode(), b"the same key")
        if i % 2:
            producer.flush(PATIENCE_S)
            producer.abort_transaction(PATIENCE_S)
        else:
            producer.commit_transaction(PATIENCE_S)
    reader = start_reader(topic, start="earliest")

    read = reader.read(5, 5.0)  # those that compaction has kept

    assert read[-1] == b"8"
    assert set(read) <= {b"0", b"2", b"4", b"6", b"8"}
    assert [reader.lost(topic, reason) for reason in LossReason] == [0, 0]


def test_expired_messages_are_counted_as_lost_and_messages_in_flight_are_kept(
    kafka_bootstrap: str, send: Send, start_reader: StartReader, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    send(topic, *(str(i).encode() for i in range(5)))
    reader = start_reader(topic, start="earliest")
    assert len(reader.read(5)) == 5
    (old,) = reader.source.claims
    reader.source.pause()
    send(topic, *(str(i).encode() for i in range(5, 30)))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    for deleted in admin.delete_records([TopicPartition(topic, 0, 20)]).values():
        deleted.result()

    reader.read(6, 2 * QUIET_S)
    assert old.alive  # its messages in flight can still be committed
    reader.commit()

    values = reader.read(15)
    assert {b"20", b"29"} <= set(values)
    lost = 30 - len(values)
    assert reader.lost(topic, LossReason.EXPIRED) == lost
    if lost:
        assert f"{topic}/0: offsets {20 - lost} to 19 expired before they were read" in caplog.text


def cut_log(file: Path, offset: int) -> None:
    """Truncate a segment of Kafka's log (format v2) before the batch that begins with `offset`."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        first, length = struct.unpack_from(">qi", content, at)
        if first >= offset:
            file.write_bytes(content[:at])
            return
        at += 12 + length
    raise AssertionError(f"no batch begins at {offset}")


@pytest.mark.parametrize("more", [2, 10], ids=["it ends before the position", "it has grown past the position"])
def test_truncated_log_is_read_from_the_offset_of_the_truncation(
    more: int,
    mortal_cluster: KafkaCluster,
    topic: str,
    unique_name: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    properties = {"bootstrap.servers": mortal_cluster.bootstrap_servers}
    admin = AdminClient(properties)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Producer(properties)

    def send(*values: int) -> None:
        for value in values:
            producer.produce(topic, str(value).encode())
            assert producer.flush(PATIENCE_S) == 0  # each message is a batch

    send(*range(10))
    reader = Reader(mortal_cluster.bootstrap_servers, unique_name("group"), topic, MIDNIGHT, start="earliest")
    assert len(reader.read(10)) == 10
    reader.commit()
    reader.source.pause()

    mortal_cluster.kill(1)
    cut_log(mortal_cluster.directory / "node-1" / f"{topic}-0" / f"{0:020}.log", 6)
    mortal_cluster.start(1)
    send(*range(100, 100 + more))

    reader.read(10 + more, 40)
    assert {str(value).encode() for value in range(100, 100 + more)} < set(reader.values)
    assert f"{topic}/0: the log was truncated to offset 6" in caplog.text
    assert reader.lost(topic, LossReason.TRUNCATED) == 0  # the truncated messages had been read
    reader.close()


def test_reading_continues_at_midnight_while_positions_cannot_be_read(
    kafka_bootstrap: str, mortal_cluster: KafkaCluster, send: Send, unique_name: Callable[[str], str], topic: str
) -> None:
    for day in ("25", "26"):
        send(f"{topic}_202602{day}", day.encode())
    before = MIDNIGHT - timedelta(minutes=5)
    reader = Reader(
        kafka_bootstrap,
        unique_name("group"),
        f"{topic}_%Y%m%d",
        before,
        mortal_cluster.bootstrap_servers,
        start="earliest",
    )
    assert reader.read(1) == [b"25"]

    mortal_cluster.kill(1)
    reader.now = MIDNIGHT + timedelta(seconds=1)
    reader.read(2, 3 * QUIET_S)
    send(f"{topic}_20260225", b"25, after midnight")
    assert reader.read(2) == [b"25", b"25, after midnight"]
    assert not any(claim.topic.endswith("26") for claim in reader.source.claims)

    mortal_cluster.start(1)
    assert reader.read(3) == [b"25", b"25, after midnight", b"26"]
    reader.close()


@pytest.mark.shared
def test_midnight_causes_no_pause_even_with_slow_brokers(
    proxied_cluster: KafkaCluster, unique_name: Callable[[str], str], topic: str
) -> None:
    bootstrap = proxied_cluster.bootstrap_servers
    with toxiproxy(proxied_cluster) as fault:
        admin = AdminClient({"bootstrap.servers": bootstrap})
        topics = [f"{topic}_202602{day}" for day in range(18, 27)]
        for created in admin.create_topics([NewTopic(topic, 16, 1) for topic in topics]).values():
            created.result()
        fault("/toxics", {"type": "latency", "attributes": {"latency": 150}})
        before = MIDNIGHT - timedelta(minutes=5)
        reader = Reader(bootstrap, unique_name("group"), f"{topic}_%Y%m%d", before, start="latest")
        while len(reader.source.claims) < 32:
            reader.source.take(1, 0.1)

        reader.now = MIDNIGHT + timedelta(seconds=1)
        longest = 0.0
        while not any(claim.topic == topics[-1] for claim in reader.source.claims):
            began = time.monotonic()
            reader.source.take(1, 0.1)
            longest = max(longest, time.monotonic() - began)

        logging.getLogger(__name__).info("the longest pause was %.1f s", longest)
        assert longest < 15  # 33 s with one request after another
        reader.close()
