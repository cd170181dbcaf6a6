"""Reads a Kafka topic as Packets, from its beginning to its present end: to inspect it, or to send dead letters again.

The reader joins no group and commits nothing.
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
"""If no message arrives for so long before the end of the topic, the brokers are taken as not answering."""

log = logging.getLogger(__name__)


def read_topic(properties: Mapping[str, object], topic: str) -> Iterator[Packet]:
    """Yield the committed messages of every partition, without reading their headers.

    `properties`: librdkafka properties, including `bootstrap.servers`. Raises KafkaSetupError if the brokers do not
    answer or the topic does not exist.
    """
    for packet, _ in _read(properties, topic):
        yield packet


def read_dead_letters(properties: Mapping[str, object], topic: str, reasons: Collection[str]) -> Iterator[Packet]:
    """Yield each input message that a service has rejected for one of the `reasons`, once and unchanged.

    A dead letter that was shortened to fit into the topic is left out; a warning says how many. `topic` must be the
    dead-letter topic of a service, because malformed headers crash the client. Raises the errors of read_topic.
    """
    seen: set[int] = set()
    shortened = 0
    for packet, message in _read(properties, topic):
        headers = dict(message.headers() or ())
        if not _reasons(headers).intersection(reasons):
            continue
        message_id = hash(headers.get("input"))  # a message may have several dead letters
        if TRUNCATED in headers:
            shortened += 1
        elif message_id not in seen:
            seen.add(message_id)
            yield packet
    if shortened:
        log.warning(
            "%s: %d dead letters are left out because they were shortened to fit into the topic", topic, shortened
        )


def _reasons(headers: Mapping[str, bytes | None]) -> set[str]:
    """Return the reasons of a dead letter, from its headers `reason` and `rejected` (`corrupt=3,...`)."""
    counts = (headers.get("rejected") or b"").decode(errors="replace").split(",")
    return {(headers.get("reason") or b"").decode(errors="replace"), *(count.partition("=")[0] for count in counts)}


def _read(properties: Mapping[str, object], topic: str) -> Iterator[tuple[Packet, Message]]:
    error_log = ThrottledErrorLog(f"brokers {properties['bootstrap.servers']}")
    consumer = Consumer(
        {
            "receive.message.max.bytes": MAX_RESPONSE_BYTES,
            **properties,
            "group.id": "broker-filter",  # librdkafka requires a group; no offset is stored in it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",  # if messages expire during the reading, the rest is read
            "error_cb": error_log.note,
        },
        logger=librdkafka_log,
    )
    try:
        try:
            metadata = consumer.list_topics(topic, timeout=REQUEST_TIMEOUT_S)
        except KafkaException as error:
            consumer.poll(0)  # calls error_cb, which gets the reason; the request only reports a timeout
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
                if message.offset() < ends[message.partition()]:  # later messages are not read, or it might never end
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
