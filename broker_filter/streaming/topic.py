"""A Kafka topic as Packets, from its start to where it ends now: for looking at it. Joins no group, commits nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.streaming.kafka_client import (
    MAX_RESPONSE_BYTES,
    REQUEST_TIMEOUT_S,
    Complaints,
    KafkaSetupError,
    explain,
    librdkafka_log,
)

PATIENCE_S = 30.0
"""Without a message for so long, and not at the end: the brokers do not answer any more."""


def read_topic(properties: Mapping[str, object], topic: str) -> Iterator[Packet]:
    """Yields the committed messages of every partition.

    `properties`: librdkafka's, `bootstrap.servers` among them. Raises KafkaSetupError where the brokers do not answer
    or the topic is not there.
    """
    complaints = Complaints(f"brokers {properties['bootstrap.servers']}")
    consumer = Consumer(
        {
            "receive.message.max.bytes": MAX_RESPONSE_BYTES,
            **properties,
            "group.id": "broker-filter",  # librdkafka wants one; nothing is stored under it
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "error_cb": complaints.note,
        },
        logger=librdkafka_log,
    )
    try:
        try:
            metadata = consumer.list_topics(topic, timeout=REQUEST_TIMEOUT_S)
        except KafkaException as error:
            consumer.poll(0)  # serves error_cb, which knows more than the request that timed out
            raise KafkaSetupError(f"{complaints.cluster}: {complaints.latest or explain(error.args[0])}") from None
        if metadata.topics[topic].error is not None:
            raise KafkaSetupError(f"{complaints.cluster}: topic {topic}: {metadata.topics[topic].error.str()}")
        unfinished = set(metadata.topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in unfinished])
        cluster = metadata.cluster_id or str(properties["bootstrap.servers"])
        last_answer = time.monotonic()
        while unfinished:
            message = consumer.poll(1.0)
            if message is None:
                if time.monotonic() - last_answer > PATIENCE_S:
                    raise KafkaSetupError(f"{complaints.cluster}: {complaints.latest or 'no answer'}")
                continue
            if message.error() is None:
                position = KafkaPosition(cluster, topic, message.partition(), message.offset())
                yield Packet(message.value() or b"", position)
            elif message.error().code() == KafkaError._PARTITION_EOF:
                unfinished.discard(message.partition())
            else:
                raise KafkaSetupError(f"{complaints.cluster}: topic {topic}: {message.error().str()}")
            last_answer = time.monotonic()
    finally:
        consumer.close()
