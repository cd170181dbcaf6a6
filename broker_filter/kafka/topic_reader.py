"""A Kafka topic as Packets, from its start to where it ends now: for looking at it, and for sending dead letters again.

Joins no group and commits nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from broker_filter.kafka.client import (
    MAX_RESPONSE_BYTES,
    REQUEST_TIMEOUT_S,
    KafkaSetupError,
    ThrottledErrorLog,
    explain,
    librdkafka_log,
)
from broker_filter.kafka.transactions import TRUNCATED
from broker_filter.packets.packet import KafkaPosition, Packet

PATIENCE_S = 30.0
"""Without a message for so long, and not at the end: the brokers do not answer any more."""

log = logging.getLogger(__name__)


def read_topic(properties: Mapping[str, object], topic: str) -> Iterator[Packet]:
    """Yields the committed messages of every partition. Never looks at their headers.

    `properties`: librdkafka's, `bootstrap.servers` among them. Raises KafkaSetupError where the brokers do not answer
    or the topic is not there.
    """
    for packet, _ in _read(properties, topic):
        yield packet


def read_dead_letters(properties: Mapping[str, object], topic: str, reasons: Collection[str]) -> Iterator[Packet]:
    """Yields the messages that a service has rejected for one of the `reasons`, as they came in, each once.

    Those that no longer hold all of their bytes are left out, and counted in a warning. `topic`: a service's dead
    letters; headers of a foreign topic must not be read (a malformed one crashes the client). Otherwise as read_topic.
    """
    seen: set[int] = set()
    shortened = 0
    for packet, message in _read(properties, topic):
        headers = dict(message.headers() or ())
        if not _reasons(headers).intersection(reasons):
            continue
        message_id = hash(headers.get("input"))  # several records of one message may have been rejected
        if TRUNCATED in headers:
            shortened += 1
        elif message_id not in seen:
            seen.add(message_id)
            yield packet
    if shortened:
        log.warning("%s: dead letters that were cut short to fit into the topic, are left out: %d", topic, shortened)


def _reasons(headers: Mapping[str, bytes | None]) -> set[str]:
    """Why a dead letter's alerts were rejected: the first one's `reason`, and those in `rejected` (`corrupt=3,...`)."""
    counts = (headers.get("rejected") or b"").decode(errors="replace").split(",")
    return {(headers.get("reason") or b"").decode(errors="replace"), *(count.partition("=")[0] for count in counts)}


def _read(properties: Mapping[str, object], topic: str) -> Iterator[tuple[Packet, Message]]:
    error_log = ThrottledErrorLog(f"brokers {properties['bootstrap.servers']}")
    consumer = Consumer(
        {
            "receive.message.max.bytes": MAX_RESPONSE_BYTES,
            **properties,
            "group.id": "broker-filter",  # librdkafka wants one; nothing is stored under it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",  # where messages expire while they are read, the rest is still shown
            "error_cb": error_log.note,
        },
        logger=librdkafka_log,
    )
    try:
        try:
            metadata = consumer.list_topics(topic, timeout=REQUEST_TIMEOUT_S)
        except KafkaException as error:
            consumer.poll(0)  # serves error_cb, which knows more than the request that timed out
            raise KafkaSetupError(f"{error_log.cluster}: {error_log.latest or explain(error.args[0])}") from None
        if metadata.topics[topic].error is not None:
            raise KafkaSetupError(f"{error_log.cluster}: topic {topic}: {metadata.topics[topic].error.str()}")
        unfinished = set(metadata.topics[topic].partitions)
        ends = {
            partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), REQUEST_TIMEOUT_S)[1]
            for partition in unfinished
        }
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in unfinished])
        cluster = metadata.cluster_id or str(properties["bootstrap.servers"])
        last_answer = time.monotonic()
        while unfinished:
            message = consumer.poll(1.0)
            if message is None:
                if time.monotonic() - last_answer > PATIENCE_S:
                    raise KafkaSetupError(f"{error_log.cluster}: {error_log.latest or 'no answer'}")
                continue
            if message.error() is None:
                if message.offset() < ends[message.partition()]:  # what has come since is not read: it may never end
                    position = KafkaPosition(cluster, topic, message.partition(), message.offset())
                    yield Packet(message.value() or b"", position), message
                if message.offset() + 1 >= ends[message.partition()]:
                    unfinished.discard(message.partition())
            elif message.error().code() == KafkaError._PARTITION_EOF:
                unfinished.discard(message.partition())
            else:
                raise KafkaSetupError(f"{error_log.cluster}: topic {topic}: {message.error().str()}")
            last_answer = time.monotonic()
    finally:
        consumer.close()
