"""Reads Kafka topics as Packets: from the beginning to the present end, or the newest messages and those that follow.

The reader joins no group and commits nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import ClusterMetadata

from broker_filter.kafka.client import (
    MAX_RESPONSE_BYTES,
    REQUEST_TIMEOUT_S,
    KafkaSetupError,
    ThrottledErrorLog,
    explain,
    librdkafka_log,
)
from broker_filter.kafka.rights import REFUSED, ClusterAccount, Right
from broker_filter.kafka.transactions import TRUNCATED
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.streaming.dead_letters import INPUT, LetterError, read_letter

PATIENCE_S = 30.0
"""If no message arrives for so long before the end of the topic, the brokers are taken as not answering."""

FOLLOWED = 128
"""The most messages that `follow_topics` yields at once."""
LOOK_S = 0.5
"""How long `follow_topics` waits for messages before it looks whether it shall stop."""

log = logging.getLogger(__name__)


def read_topic(properties: Mapping[str, object], topic: str, since_ms: int | None = None) -> Iterator[Packet]:
    """Yield the committed messages of every partition, without reading their headers.

    `properties`: librdkafka properties, including `bootstrap.servers`. `since_ms`: Unix milliseconds; only messages
    that are not older are read. Raises KafkaSetupError if the brokers do not answer or the topic does not exist.
    """
    for packet, _ in _read(properties, topic, since_ms):
        yield packet


def read_dead_letters(properties: Mapping[str, object], topic: str, reasons: Collection[str]) -> Iterator[Packet]:
    """Yield each input message that a service has rejected for one of the `reasons`, once and unchanged.

    Messages without the headers of a dead letter are left out. So is a dead letter that was shortened to fit into the
    topic; a warning says how many of these there are. `topic` must be the
    dead-letter topic of a service, because malformed headers crash the client. Raises the errors of read_topic.
    """
    seen: set[int] = set()
    shortened = 0
    for packet, headers, _ in read_with_headers(properties, topic):
        try:
            letter = read_letter(packet, headers)
        except LetterError:
            continue
        if letter.reasons.isdisjoint(reasons):
            continue
        message_id = hash(headers[INPUT])  # a message may have several dead letters
        if TRUNCATED in headers:
            shortened += 1
        elif message_id not in seen:
            seen.add(message_id)
            yield packet
    if shortened:
        log.warning(
            "%s: %d dead letters are left out because they were shortened to fit into the topic", topic, shortened
        )


def read_with_headers(
    properties: Mapping[str, object], topic: str, account: ClusterAccount | None = None
) -> Iterator[tuple[Packet, dict[str, bytes | None], int]]:
    """Yield the committed messages of every partition with their headers and Kafka timestamps in Unix milliseconds.

    Only a topic that a service has written may be read, because malformed headers crash the client. `account`: the
    account of the client, which the message about a missing right names. Raises the errors of read_topic.
    """
    for packet, message in _read(properties, topic, account=account):
        yield packet, dict(message.headers() or ()), int(message.timestamp()[1])


def follow_topics(
    properties: Mapping[str, object],
    topics: Sequence[str],
    stop: threading.Event,
    *,
    newest: int,
    since_ms: int | None,
    report: Callable[[str], object] = lambda _: None,
) -> Iterator[list[Packet]]:
    """Yield the committed messages of topics, and then new ones until `stop` is set, at most FOLLOWED at a time.

    It begins with about the `newest` messages of each topic, or with the first message that is not older than
    `since_ms` (Unix milliseconds). An empty list says that every message so far was read. `properties`: librdkafka
    properties, including `bootstrap.servers`. Brokers that stop answering are waited for, and the log says so.
    `report`: is called with the latest error of the brokers, and with an empty text when messages arrive again.

    Raises KafkaSetupError if the brokers do not answer at the start or a topic does not exist.
    """
    error_log = ThrottledErrorLog(f"brokers {properties['bootstrap.servers']}")

    def note(error: KafkaError) -> None:
        error_log(error)
        report(error_log.latest)

    consumer = _consumer(properties, note)
    try:
        starts: list[TopicPartition] = []
        for topic in topics:
            metadata = _metadata(consumer, topic, error_log)
            cluster = metadata.cluster_id or str(properties["bootstrap.servers"])
            starts += _starts(consumer, topic, list(metadata.topics[topic].partitions), newest, since_ms)
        consumer.assign(starts)
        unread = {(place.topic, place.partition) for place in starts}
        while not stop.is_set():
            packets = []
            for message in consumer.consume(FOLLOWED, LOOK_S):
                if (error := message.error()) is None:
                    position = KafkaPosition(cluster, message.topic(), message.partition(), message.offset())
                    kind, timestamp_ms = message.timestamp()
                    time_ms = None if kind == TIMESTAMP_NOT_AVAILABLE else timestamp_ms
                    packets.append(Packet(message.value() or b"", position, time_ms))
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard((message.topic(), message.partition()))
                else:
                    note(error)
            if packets and error_log.latest:
                error_log.latest = ""
                report("")
            if packets or not unread:
                yield packets
    finally:
        consumer.close()


def _starts(
    consumer: Consumer, topic: str, partitions: Sequence[int], newest: int, since_ms: int | None
) -> list[TopicPartition]:
    """Return where to begin in each partition of a topic; see `follow_topics`."""
    if since_ms is not None:
        asked = [TopicPartition(topic, partition, since_ms) for partition in partitions]
        return list(consumer.offsets_for_times(asked, timeout=REQUEST_TIMEOUT_S))
    bounds = {
        partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), REQUEST_TIMEOUT_S)
        for partition in partitions
    }
    left, starts = newest, []
    smallest_first = sorted(bounds.items(), key=lambda one: one[1][1] - one[1][0])
    for done, (partition, (low, high)) in enumerate(smallest_first):
        share = min(high - low, -(-left // (len(bounds) - done)))  # rounded up
        left -= share
        starts.append(TopicPartition(topic, partition, high - share))
    return starts


def _consumer(properties: Mapping[str, object], on_error: Callable[[KafkaError], object]) -> Consumer:
    return Consumer(
        {
            "receive.message.max.bytes": MAX_RESPONSE_BYTES,
            **properties,
            "group.id": "broker-filter",  # librdkafka requires a group; no offset is stored in it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",  # if messages expire during the reading, the rest is read
            "error_cb": on_error,
        },
        logger=librdkafka_log,
    )


def _metadata(consumer: Consumer, topic: str, error_log: ThrottledErrorLog) -> ClusterMetadata:
    """Return the metadata of a topic. Raises KafkaSetupError if the brokers do not answer or it does not exist."""
    try:
        metadata = consumer.list_topics(topic, timeout=REQUEST_TIMEOUT_S)
    except KafkaException as error:
        consumer.poll(0)  # calls error_cb, which gets the reason; the request only reports a timeout
        raise KafkaSetupError(f"{error_log.cluster}: {error_log.latest or explain(error.args[0])}") from None
    if metadata.topics[topic].error is not None:
        raise KafkaSetupError(f"{error_log.cluster}: topic {topic}: {metadata.topics[topic].error.str()}")
    return metadata


def _read(
    properties: Mapping[str, object], topic: str, since_ms: int | None = None, account: ClusterAccount | None = None
) -> Iterator[tuple[Packet, Message]]:
    error_log = ThrottledErrorLog(f"brokers {properties['bootstrap.servers']}")
    consumer = _consumer(properties, error_log.note)
    try:
        metadata = _metadata(consumer, topic, error_log)
        unfinished = set(metadata.topics[topic].partitions)
        ends = {
            partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), REQUEST_TIMEOUT_S)[1]
            for partition in unfinished
        }
        starts = [TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in unfinished]
        if since_ms is not None:
            starts = _starts(consumer, topic, list(unfinished), 0, since_ms)
        consumer.assign(starts)
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
            elif message.error().code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                continue  # librdkafka looks up the coordinator of the group, which is not used here
            elif account and message.error().code() in REFUSED:
                raise KafkaSetupError(f"{error_log.cluster}: {account.lacks(Right(('Read',), 'topic', topic))}")
            else:
                raise KafkaSetupError(f"{error_log.cluster}: topic {topic}: {message.error().str()}")
            last_answer = time.monotonic()
    finally:
        consumer.close()
