"""A client of the service's output topics with confluent-kafka and fastavro only, as a user would write one."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fastavro
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from broker_filter.demo.error import DemoError

LARGEST_ANSWER = 512 * 2**20
"""Bytes: the embedded broker answers with all messages of a partition and ignores the client's limit."""
SILENCE_S = 20.0
"""If the broker sends neither a message nor the end of a partition for so long, it no longer works."""

Alert = dict[str, Any]


@dataclass(slots=True)
class Results:
    """All published results. An alert is the survey's record with the field `broker_filter` added."""

    scored: list[Alert] = field(default_factory=list)
    filtered: dict[str, list[int]] = field(default_factory=dict)  # alert ids by filter
    anomalies: list[Alert] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    inputs: Counter[bytes] = field(default_factory=Counter)  # number of results for each input position


def read_results(bootstrap: str, prefix: str, filters: list[str]) -> Results:
    """Read the committed records of all output topics.

    Raises DemoError if the broker does not answer or reports an error.
    """
    results = Results(filtered={name: [] for name in filters})
    for message in _read_topic(bootstrap, f"{prefix}.scored"):
        results.inputs[_headers(message)["input"]] += 1
        results.scored.extend(_alerts(message))
    for message in _read_topic(bootstrap, f"{prefix}.dead-letter"):
        headers = _headers(message)
        results.inputs[headers["input"]] += 1
        results.rejected[headers["reason"].decode()] += 1
    for name, alert_ids in results.filtered.items():
        for message in _read_topic(bootstrap, f"{prefix}.{name}"):
            alert_ids.extend(alert["candid"] for alert in _alerts(message))
    for message in _read_topic(bootstrap, f"{prefix}.anomalies"):
        results.anomalies.extend(_alerts(message))
    return results


def real(alert: Alert) -> float:
    """Return the probability that an alert is real, by the default model."""
    return float(alert["broker_filter"]["models"][0]["outputs"]["real"])


def _alerts(message: Message) -> Iterator[Alert]:
    yield from fastavro.reader(io.BytesIO(message.value()))  # type: ignore[misc]


def _headers(message: Message) -> dict[str, bytes]:
    return dict(message.headers() or [])


def _read_topic(bootstrap: str, topic: str) -> Iterator[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "demo-client",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "receive.message.max.bytes": LARGEST_ANSWER,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=SILENCE_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        unread = set(partitions)
        while unread:
            message = consumer.poll(SILENCE_S)
            if message is None:
                raise DemoError(f"{topic}: the broker at {bootstrap} has sent nothing for {SILENCE_S:.0f} s")
            if (error := message.error()) is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                unread.discard(message.partition())
            else:
                raise KafkaException(error)
    except KafkaException as error:
        raise DemoError(
            f"{topic}: the broker at {bootstrap} cannot be read: {error.args[0].str()}; run the demonstration again"
        ) from None
    finally:
        consumer.close()
