"""Baseline loops from topic to topic with exactly-once delivery, run in their own processes.

One is a naive loop. The other copies messages without other work.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, Producer

from broker_filter.bench.naive import NaiveBroker
from broker_filter.kafka.client import MAX_RECORD_BYTES, MAX_RESPONSE_BYTES
from broker_filter.kafka.source import FETCH_PARTITION_BYTES, PREFETCH_KBYTES, QUEUE_FULL_BACKOFF_MS
from broker_filter.kafka.transactions import BATCH_BYTES, LINGER_MS
from broker_filter.scoring.bundle import open_bundle

NAIVE_TRANSACTION = 64
"""Alerts per transaction of the naive loop. With one alert per transaction, mostly the broker's round trips would be
measured."""
NO_WORK_TRANSACTION = 512
"""Messages per transaction of the copying loop, as in the service; larger transactions are no faster."""
LEAST_COMMITS = 8
"""Commits in one run, at least: short runs have smaller transactions, since speed is measured between two commits."""
SILENT = {"log_level": 0}
"""Switches off librdkafka's log of events that it recovers from: a loading coordinator, a stopped broker."""
WAIT_S = 1.0

Loop = Callable[[str, str, str, int], None]
"""A loop's arguments: bootstrap servers, input topic, name of the output topic and of the group, number of alerts."""


def naive_consumer(bootstrap_servers: str, topic: str, group: str) -> Any:
    """Return a consumer set up as in usual examples, except that positions are committed with the output."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            **SILENT,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    return consumer


def naive_producer(bootstrap_servers: str, name: str) -> Any:
    """Return a transactional producer with default settings, ready to begin a transaction."""
    producer = Producer(
        {"bootstrap.servers": bootstrap_servers, **SILENT, "transactional.id": name, "message.max.bytes": 2**24}
    )
    producer.init_transactions()
    return producer


def naive_loop(bootstrap_servers: str, topic: str, name: str, alerts: int, model: str) -> None:
    """Consume, score and produce one alert after another, with NAIVE_TRANSACTION alerts per transaction."""
    broker = NaiveBroker(open_bundle(model).part("ztf"))
    consumer, producer = naive_consumer(bootstrap_servers, topic, name), naive_producer(bootstrap_servers, name)
    done = 0
    while done < alerts:
        producer.begin_transaction()
        pending = min(NAIVE_TRANSACTION, alerts - done)
        while pending:
            message = consumer.poll(WAIT_S)
            if message is not None and message.error() is None:
                producer.produce(name, broker.process(message.value()))
                pending -= 1
                done += 1
        commit(consumer, producer)
    wait_to_be_killed(consumer)


def no_work_loop(bootstrap_servers: str, topic: str, name: str, alerts: int) -> None:
    """Copy messages unchanged, with the service's Kafka settings: the floor of any loop through these brokers.

    Uses librdkafka directly, without the service's claims of partitions and its counting of alerts.
    """
    client = {"bootstrap.servers": bootstrap_servers, **SILENT, "receive.message.max.bytes": MAX_RESPONSE_BYTES}
    consumer = Consumer(
        {
            **client,
            "group.id": name,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "queued.max.messages.kbytes": PREFETCH_KBYTES,
            "max.partition.fetch.bytes": FETCH_PARTITION_BYTES,
            "fetch.queue.backoff.ms": QUEUE_FULL_BACKOFF_MS,
        }
    )
    consumer.subscribe([topic])
    producer = Producer(
        {
            **client,
            "transactional.id": name,
            "batch.size": BATCH_BYTES,
            "linger.ms": LINGER_MS,
            "message.max.bytes": MAX_RECORD_BYTES,
        }
    )
    producer.init_transactions()
    done, transaction = 0, min(NO_WORK_TRANSACTION, alerts // LEAST_COMMITS)
    while done < alerts:
        producer.begin_transaction()
        pending = min(transaction, alerts - done)
        while pending:
            for message in consumer.consume(pending, WAIT_S):
                if message.error() is None:
                    producer.produce(name, message.value())
                    pending -= 1
                    done += 1
            producer.poll(0)
        commit(consumer, producer)
    wait_to_be_killed(consumer)


def commit(consumer: Any, producer: Any) -> None:
    """Add the consumer's positions to the transaction and commit it."""
    positions = consumer.position(consumer.assignment())
    producer.send_offsets_to_transaction(positions, consumer.consumer_group_metadata())
    producer.commit_transaction()


def wait_to_be_killed(consumer: Any) -> None:
    """Close the consumer, and keep the process alive: the CPU time of a process that has ended cannot be read."""
    consumer.close()
    signal.pause()
