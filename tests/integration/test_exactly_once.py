"""Exactly-once delivery with real brokers: kills, fenced producers and rebalances, on one cluster and across two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from broker_filter.kafka.checkpoint import position_key
from broker_filter.kafka.client import RecordLimits, ThrottledErrorLog
from broker_filter.kafka.transactions import Claim, FencedError, PositionError, Work, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.streaming.account import Account
from broker_filter.streaming.encoding import OutputRecord

from .conftest import MakePipeline, MakeTopic, Packets, ReadCommitted, headers, inputs

pytestmark = pytest.mark.kafka

CHAOS = Path(__file__).resolve().parents[1] / "chaos.py"
REGISTRATION = "AddPartitionsToTxn"
"""The request that a producer sends to the coordinator before its first record to a partition in a transaction."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("clusters", ["one", "two"])
def test_kills_and_reloads_at_random_moments_neither_lose_repeat_nor_mix_up_alerts(
    kafka_bootstrap: str, second_kafka_bootstrap: str, clusters: str
) -> None:
    reloads = "1" if clusters == "two" else "0"  # test_reload.py reloads with one cluster
    command = [sys.executable, str(CHAOS), "--alerts", "600", "--kills", "2", "--reloads", reloads]
    command += ["--clusters", clusters]
    running = ["--bootstrap-servers", kafka_bootstrap, "--output-bootstrap-servers", second_kafka_bootstrap]
    done = subprocess.run([*command, *running], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 sent" in done.stdout
    assert "0 missing, 0 repeated" in done.stdout
    assert "0 records that do not fit theirs, 0 missing or wrong in the topics of filters" in done.stdout


def test_instance_that_was_suspended_beyond_its_session_repeats_no_alert(
    make_pipeline: MakePipeline, output_bootstrap: str, packets: Packets
) -> None:
    sent = packets[:300]
    pipeline = make_pipeline(sent, target=output_bootstrap)
    pipeline.config["input"]["kafka"] = {"session.timeout.ms": 6000}
    away = pipeline.start(transaction={"linger_ms": 10_000, "max_alerts": 100_000, "max_ms": 10_000})
    away.wait_until(lambda: away.metric("batch_alerts_sum") >= 100)
    assert away.metric("consumed_alerts_total") == 0
    away.process.send_signal(signal.SIGSTOP)  # within a transaction

    other = pipeline.start()
    other.wait_consumed(len(sent))
    away.process.send_signal(signal.SIGCONT)
    away.wait_for_log("lost")
    pipeline.send(sent[:50])

    records = pipeline.read("scored", "dead-letter", expected=len(sent) + 50)
    assert set(inputs(records).values()) == {1}
    assert len(records) == len(sent) + 50
    assert away.end() == 0
    assert other.end() == 0


def test_rebalance_between_instances_repeats_no_alert(
    make_pipeline: MakePipeline, output_bootstrap: str, packets: Packets
) -> None:
    batch = packets[:200]
    pipeline = make_pipeline(batch, partitions=4, target=output_bootstrap)
    first = pipeline.start()
    first.wait_until(lambda: first.metric("assigned_partitions") == 4)
    second = pipeline.start()
    pipeline.send(batch)
    second.wait_until(lambda: second.metric("assigned_partitions") == 2)
    pipeline.send(batch)
    assert first.end() == 0
    second.wait_until(lambda: second.metric("assigned_partitions") == 4)
    pipeline.send(batch)

    records = pipeline.read("scored", "dead-letter", expected=800)

    assert len(inputs(records)) == len(records) == 800
    assert "were revoked before all messages" not in first.log + second.log
    assert "repeated" not in first.log + second.log
    assert second.end() == 0


def test_across_clusters_reading_continues_from_the_positions_topic(
    make_pipeline: MakePipeline, kafka_bootstrap: str, second_kafka_bootstrap: str, packets: Packets
) -> None:
    sent = packets[:40]
    pipeline = make_pipeline(sent, target=second_kafka_bootstrap)
    first = pipeline.start()
    first.wait_consumed(len(sent))
    assert first.end() == 0

    positions = pipeline.read("positions", expected=2)
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    cluster = admin.list_topics(timeout=10).cluster_id
    latest = {record.key(): json.loads(record.value()) for record in positions}
    topic, prefix = pipeline.topic, pipeline.prefix
    topic_id = admin.describe_topics(TopicCollection([topic]))[topic].result().topic_id
    position = {"next_offset": len(sent) // 2, "topic_id": str(topic_id), "leader_epoch": 0}
    assert latest == {position_key(cluster, prefix, topic, p): position for p in (0, 1)}

    member = Consumer({"bootstrap.servers": kafka_bootstrap, "group.id": prefix})
    shown = member.committed([TopicPartition(topic, p) for p in (0, 1)], timeout=10)
    assert [partition.offset for partition in shown] == [len(sent) // 2] * 2
    member.commit(
        offsets=[TopicPartition(topic, p, 0) for p in (0, 1)], asynchronous=False
    )  # a wrong position, to be ignored
    member.close()

    second = pipeline.start()
    second.wait_for_log(f"reading {topic}/1 from offset {len(sent) // 2}")
    pipeline.send(sent)
    records = pipeline.read("scored", expected=2 * len(sent))
    assert len(inputs(records)) == len(records) == 2 * len(sent)
    assert second.end() == 0


def test_partition_fenced_by_another_producer_is_claimed_again(
    make_pipeline: MakePipeline, kafka_bootstrap: str, output_bootstrap: str, packets: Packets
) -> None:
    sent = packets[:40]
    pipeline = make_pipeline(sent, partitions=1, target=output_bootstrap)
    pipeline.config["input"]["kafka"] = {"group.instance.id": "one"}
    service = pipeline.start()
    service.wait_consumed(len(sent))

    cluster = AdminClient({"bootstrap.servers": kafka_bootstrap}).list_topics(timeout=10).cluster_id
    own = "one" if output_bootstrap == kafka_bootstrap else f"{cluster}/{pipeline.topic}/0"
    name = f"{pipeline.prefix}/{pipeline.prefix}/{own}"
    stranger = Producer({"bootstrap.servers": output_bootstrap, "transactional.id": name})
    stranger.init_transactions(30)
    pipeline.send(sent)

    records = pipeline.read("scored", expected=2 * len(sent))
    assert len(inputs(records)) == len(records) == 2 * len(sent)
    assert "fenced" in service.log
    assert service.end() == 0


class Harness:
    """Writers on one topic, opened as the service opens its writers."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        properties = {
            "bootstrap.servers": bootstrap,
            "transaction.timeout.ms": 10_000,
            "statistics.interval.ms": 100,
            "stats_cb": self._note_requests,
        }
        self.metrics, error_log = Metrics(), ThrottledErrorLog("test brokers")
        limits = RecordLimits(AdminClient(properties), [topic], dead_letter=topic)
        self.topic = topic
        self.registrations = 0
        self.stored: list[int] = []
        self.writers: list[Writer] = []
        self.open = partial(Writer, properties, limits, self.metrics, error_log, Stage("commit", self.metrics))

    def _note_requests(self, statistics: str) -> None:
        brokers = json.loads(statistics)["brokers"].values()
        self.registrations = sum(broker["req"].get(REGISTRATION, 0) for broker in brokers)

    @property
    def aborted(self) -> float:
        """Number of transactions that the metrics count as aborted."""
        lines = self.metrics.exposition().decode().splitlines()
        name = 'broker_filter_transactions_total{outcome="aborted"} '
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    def claim(self, transactional_id: str) -> Claim:
        self.writers.append(self.open(transactional_id, lambda _, ends: self.stored.extend(ends.values())))
        return Claim("input", 0, self.writers[-1], 0)

    def work(self, claim: Claim, start: int, value: bytes, n: int = 1, key: bytes | None = None) -> Work:
        packets = [Packet(value, KafkaPosition("cluster", "input", 0, start + i)) for i in range(n)]
        records = [(i, OutputRecord(self.topic, key, value, [])) for i in range(n)]
        return Work(claim, start, start + n, packets, [Account(consumed=1, scored=1) for _ in packets], records)


@pytest.fixture
def harness(kafka_bootstrap: str, make_topic: MakeTopic) -> Iterator[Harness]:
    harness = Harness(kafka_bootstrap, make_topic(kafka_bootstrap, partitions=1))
    yield harness
    for writer in harness.writers:
        writer.close()


def test_fenced_owner_cannot_commit(
    kafka_bootstrap: str, read_committed: ReadCommitted, unique_name: Callable[[str], str], harness: Harness
) -> None:
    name = unique_name("writer")
    old = harness.claim(name)
    old.writer.add(harness.work(old, 0, b"old"))
    new = harness.claim(name)

    with pytest.raises(FencedError):
        old.writer.commit()
    assert not old.alive
    assert old.committed == 0
    assert harness.aborted == 1

    new.writer.add(harness.work(new, 0, b"new"))
    new.writer.commit()
    assert [record.value() for record in read_committed(kafka_bootstrap, [harness.topic], 1)] == [b"new"]


def test_transaction_unknown_to_the_coordinator_is_treated_as_fenced(
    kafka_bootstrap: str, unique_name: Callable[[str], str], harness: Harness
) -> None:
    name = unique_name("writer")
    claim = harness.claim(name)
    claim.writer.add(harness.work(claim, 0, b"committed"))
    claim.writer.commit()

    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.delete_topics([harness.topic])[
        harness.topic
    ].result()  # the coordinator refuses its partitions, and librdkafka retries
    for position in count(1):
        claim.writer.add(harness.work(claim, position, b"in vain"))
        if harness.registrations > 1:
            break
        time.sleep(0.05)
    claim.ended = True
    with pytest.raises(FencedError, match=r"test brokers: .* invalid state"):
        claim.writer.commit()

    assert claim.writer.fenced
    assert claim.committed == 1
    assert harness.aborted == 1
    assert harness.claim(name).alive


def test_work_whose_claim_has_ended_is_dropped_and_the_rest_committed(
    kafka_bootstrap: str, read_committed: ReadCommitted, unique_name: Callable[[str], str], harness: Harness
) -> None:
    kept = harness.claim(unique_name("writer"))
    revoked = Claim("input", 1, kept.writer, 0)
    for claim, value in ((kept, b"kept"), (revoked, b"revoked")):
        kept.writer.add(harness.work(claim, 0, value))
    revoked.ended = True

    (committed,) = kept.writer.commit()

    assert committed.claim is kept
    assert harness.stored == [1]
    assert [record.value() for record in read_committed(kafka_bootstrap, [harness.topic], 1)] == [b"kept"]


def test_position_that_decreases_is_an_error(unique_name: Callable[[str], str], harness: Harness) -> None:
    claim = harness.claim(unique_name("writer"))
    claim.writer.add(harness.work(claim, 0, b"x", n=5))
    with pytest.raises(PositionError, match="input/0: packets 4 to 4 do not follow position 5"):
        claim.writer.add(harness.work(claim, 4, b"x"))


def test_all_records_of_an_aborted_transaction_are_produced_again(
    kafka_bootstrap: str, read_committed: ReadCommitted, unique_name: Callable[[str], str], harness: Harness
) -> None:
    claim = harness.claim(unique_name("writer"))
    claim.writer.add(harness.work(claim, 0, b"small"))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    set_max_message_bytes(admin, harness.topic, 5_000)  # without the writer's knowledge
    claim.writer.add(harness.work(claim, 1, bytes(20_000)))

    assert len(claim.writer.commit()) == 2

    small, large = read_committed(kafka_bootstrap, [harness.topic], 2)
    assert small.value() == b"small"
    assert len(large.value()) < 5_000
    assert headers(large)["truncated"] == "20000"
    assert claim.committed == 2


def test_records_within_a_lowered_limit_are_committed_although_their_batches_exceed_it(
    kafka_bootstrap: str, read_committed: ReadCommitted, unique_name: Callable[[str], str], harness: Harness
) -> None:
    name, value = unique_name("writer"), os.urandom(8_000)
    old = harness.claim(name)
    set_max_message_bytes(AdminClient({"bootstrap.servers": kafka_bootstrap}), harness.topic, 20_000)
    old.writer.add(harness.work(old, 0, value, n=40))
    assert len(old.writer.commit()) == 1
    assert old.committed == 40
    assert not old.alive  # a new producer with smaller batches replaces it

    new = harness.claim(name)
    new.writer.add(harness.work(new, 40, value, n=40))
    new.writer.commit()
    assert new.alive
    records = read_committed(kafka_bootstrap, [harness.topic], 80)
    assert [record.value() for record in records] == [value] * 80


def test_key_larger_than_a_record_is_removed(
    kafka_bootstrap: str, read_committed: ReadCommitted, unique_name: Callable[[str], str], harness: Harness
) -> None:
    claim = harness.claim(unique_name("writer"))
    set_max_message_bytes(AdminClient({"bootstrap.servers": kafka_bootstrap}), harness.topic, 5_000)
    claim.writer.add(harness.work(claim, 0, b"small", key=bytes(20_000)))

    assert len(claim.writer.commit()) == 1

    (record,) = read_committed(kafka_bootstrap, [harness.topic], 1)
    assert (record.key(), record.value()) == (None, b"small")


def set_max_message_bytes(admin: AdminClient, topic: str, size: int) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result()
