"""Chooses where reading of partitions starts: at the stored position, at the configured start, or after lost messages.

Every offset between the stored and the returned position is accounted for. It is counted as lost, or the topic is
another one of the same name, which is an error unless the operator has decided to read it. Each request to the brokers
is about all partitions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from broker_filter.config import Input
from broker_filter.kafka.checkpoint import Position
from broker_filter.kafka.client import Cluster, KafkaSetupError, list_offsets, topic_ids
from broker_filter.kafka.days import Days
from broker_filter.metrics import LossReason, Metrics

log = logging.getLogger(__name__)

Key = tuple[str, int]


class Placement:
    """Chooses where reading of partitions starts. Only the thread that claims partitions may use it.

    Messages are lost if the log begins after the position or ends before it. A gap between two offsets that are read is
    not a loss, because compaction and transactions leave such gaps.
    """

    def __init__(self, section: Input, admin: AdminClient, cluster: Cluster, days: Days, metrics: Metrics) -> None:
        """`admin`: a client for the input's cluster. `cluster`: its topics before reading began."""
        self._section = section
        self._admin = admin
        self._cluster = cluster
        self._days = days
        self._metrics = metrics
        self._ids: dict[str, str | None] = {}  # ids of the topics at the latest call
        self._cut: dict[Key, int] = {}
        self._reached: dict[Key, int] = {}

    def note_out_of_range(self, key: Key, end: int | None, reached: int) -> None:
        """Store, for the next call, that the brokers no longer hold the next offset of a partition.

        `end`: the offset to which the log was truncated, or None if the brokers did not report it. `reached`: the
        end of the log as it was known before.
        """
        self._reached[key] = reached
        if end is not None:
            self._cut[key] = end

    def __call__(self, partitions: Sequence[TopicPartition], stored: Sequence[Position | None]) -> list[Position]:
        """Return the position at which reading of each partition starts, and count lost messages.

        Raises KafkaSetupError if the operator must decide, and KafkaException if a request fails.
        """
        before = {(p.topic, p.partition): position for p, position in zip(partitions, stored, strict=True)}
        ids = topic_ids(self._admin, {topic for topic, _ in before})
        low = list_offsets(self._admin, before, OffsetSpec.earliest())
        high = list_offsets(self._admin, before, OffsetSpec.latest())
        anew = [key for key, position in before.items() if position is None and not self._made_since(key, ids)]
        starts = low | self._starts(anew)
        placed = []
        for key, position in before.items():
            self._metrics.expect_losses(key[0])
            topic_id = ids[key[0]]
            if position is None:
                placed.append(Position(starts[key], topic_id))
            elif self._is_remade(key, position, topic_id, high[key]):
                placed.append(Position(low[key], topic_id))
            else:
                known = replace(position, topic_id=topic_id or position.topic_id)
                placed.append(self._within_log(key, known, low[key], high[key]))
        self._ids |= ids
        return placed

    def _made_since(self, key: Key, ids: dict[str, str | None]) -> bool:
        """Return whether a partition was created after reading began, so that it is read from its beginning."""
        topic, partition = key
        return (
            partition >= self._cluster.topics.get(topic, 0)
            or self._ids.get(topic, ids[topic]) != ids[topic]
            or self._days.follows(topic)
        )

    def _starts(self, partitions: Sequence[Key]) -> dict[Key, int]:
        """Return the configured start offsets of partitions that have no stored position.

        The result is empty for `start: earliest`. Raises KafkaSetupError for `start: stored`.
        """
        start = self._section.start
        if start == "earliest" or not partitions:
            return {}
        if start == "stored":
            topic, partition = partitions[0]
            raise KafkaSetupError(
                f"{topic}/{partition} has no stored position for group {self._section.group_id}: set input.start to "
                "earliest, latest or a time"
            )
        end = list_offsets(self._admin, partitions, OffsetSpec.latest(), committed=True)
        if start == "latest":
            return end
        found = list_offsets(self._admin, partitions, OffsetSpec.for_timestamp(int(start.timestamp() * 1000)))
        return end | {key: offset for key, offset in found.items() if offset >= 0}

    def _is_remade(self, key: Key, position: Position, topic_id: str | None, high: int) -> bool:
        """Return whether the position belongs to a deleted topic of the same name.

        Raises KafkaSetupError if it does, unless the configuration says to read the new topic.
        """
        topic, partition = key
        if topic_id is not None and position.topic_id is not None:
            if topic_id == position.topic_id:
                return False
            fault = f"topic {topic} was deleted and created again"
        elif position.offset > high:  # without topic ids there is no other sign
            fault = (
                f"topic {topic} was deleted and created again, or has lost its end: partition {partition} ends at "
                f"offset {high}"
            )
        else:
            return False
        if self._section.remade == "refuse":
            raise KafkaSetupError(
                f"{fault}; the stored position of partition {partition}, offset {position.offset}, belongs to the old "
                "topic. Set input.remade to read, so that the new topic is read from its beginning, or choose another "
                "input.group_id"
            )
        log.warning("%s; partition %d is read from its beginning, as input.remade says", fault, partition)
        return True

    def _within_log(self, key: Key, position: Position, low: int, high: int) -> Position:
        """Return the position, moved to the beginning or the end of the log if it is outside. Counts lost messages."""
        topic, partition = key
        told, reached, cut = key in self._reached, self._reached.pop(key, 0), self._cut.pop(key, None)
        end = high if cut is None else min(high, cut)
        if position.offset < low:
            log.error(
                "%s/%d: offsets %d to %d expired before they were read", topic, partition, position.offset, low - 1
            )
            self._metrics.lose(topic, LossReason.EXPIRED, low - position.offset)
            return Position(low, position.topic_id)
        if position.offset > end:
            unread = max(0, reached - position.offset)
            log.error(
                "%s/%d: the log was truncated to offset %d, before the position %d (an unclean leader election?): %d "
                "unread messages are known to be lost; new messages at these offsets are read",
                topic,
                partition,
                end,
                position.offset,
                unread,
            )
            self._metrics.lose(topic, LossReason.TRUNCATED, unread)
            # The log may have grown since. If the brokers have not reported where it was truncated, the leader epoch is
            # kept, so that they report it at the next read, and `note_out_of_range` stores it.
            return replace(position, offset=end, leader_epoch=position.leader_epoch if cut is None else None)
        return replace(position, leader_epoch=None) if told else position
