"""A page follows topics: it begins near their ends, or at a time, and gets what is published later."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kafka.client import KafkaSetupError
from broker_filter.kafka.topic_reader import follow_topics
from broker_filter.local_kafka import embedded_broker

from ..conftest import destroy_unused_clients

PARTITIONS = 3


def publish(bootstrap: str, topic: str, values: range, timestamp_ms: int = 0) -> None:
    """Publish numbers; most of them go to the first partition."""
    producer = Producer({"bootstrap.servers": bootstrap})
    for value in values:
        partition = 0 if value % 5 else value // 5 % PARTITIONS
        producer.produce(topic, str(value).encode(), partition=partition, timestamp=timestamp_ms)
    producer.flush()


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    """The address of an embedded broker: it starts faster than Apache Kafka."""
    with tempfile.TemporaryDirectory(prefix="broker-") as directory, embedded_broker(Path(directory)) as address:
        yield address
    destroy_unused_clients()


@pytest.fixture
def topic(bootstrap: str, unique_name: Callable[[str], str]) -> str:
    name = unique_name("followed")
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, PARTITIONS, 1)])[name].result()
    return name


def test_a_topic_is_followed_from_its_newest_messages(bootstrap: str, topic: str) -> None:
    publish(bootstrap, topic, range(60))
    stop = threading.Event()
    followed = follow_topics({"bootstrap.servers": bootstrap}, [topic], stop, newest=30, since_ms=None)
    first = [packet for packets in takewhile(len, followed) for packet in packets]
    assert len(first) == 30
    assert {int(packet.data) for packet in first} >= {value for value in range(60) if value % 15 in (5, 10)}
    assert all(packet.timestamp_ms for packet in first)
    publish(bootstrap, topic, range(60, 65))
    later: list[int] = []
    deadline = time.monotonic() + 30
    while len(later) < 5 and time.monotonic() < deadline:
        later += [int(packet.data) for packet in next(followed)]
    assert sorted(later) == list(range(60, 65))
    stop.set()
    assert list(takewhile(len, followed)) == []
    groups = AdminClient({"bootstrap.servers": bootstrap}).list_consumer_groups().result()
    assert "broker-filter" not in {group.group_id for group in groups.valid}


def test_a_topic_is_followed_since_a_time(bootstrap: str, topic: str) -> None:
    now_ms = round(1000 * time.time())
    publish(bootstrap, topic, range(10), now_ms - 7_200_000)
    publish(bootstrap, topic, range(10, 20), now_ms)
    stop = threading.Event()
    followed = follow_topics({"bootstrap.servers": bootstrap}, [topic], stop, newest=1, since_ms=now_ms - 3_600_000)
    found = [int(packet.data) for packets in takewhile(len, followed) for packet in packets]
    assert sorted(found) == list(range(10, 20))
    stop.set()
    followed.close()


def test_a_topic_that_does_not_exist_is_named(bootstrap: str) -> None:
    followed = follow_topics(
        {"bootstrap.servers": bootstrap, "allow.auto.create.topics": False},
        ["no-such-topic"],
        threading.Event(),
        newest=1,
        since_ms=None,
    )
    with pytest.raises(KafkaSetupError, match="no-such-topic"):
        next(followed)
