"""Where partitions are read on: from their stored positions, from where the configuration says, or after a loss.

Every offset between the position that was stored and the one that is returned is accounted for: it is counted as lost,
or the topic is a new one and refused unless the operator has decided. Asks the brokers for all partitions at once.
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
    """Decides where partitions are read on. For the thread that claims them.

    A gap between two offsets that are read is no loss: compaction and transactions leave such gaps. Messages are lost
    where the log begins after the position, or ends before it.
    """

    def __init__(self, section: Input, admin: AdminClient, cluster: Cluster, days: Days, metrics: Metrics) -> None:
        """`admin`: of the input's cluster; `cluster`: as it was before reading began."""
        self._section = section
        self._admin = admin
        self._cluster = cluster
        self._days = days
        self._metrics = metrics
        self._ids: dict[str, str | None] = {}  # of the topics that were placed, when they were placed last
        self._cut: dict[Key, int] = {}
        self._reached: dict[Key, int] = {}

    def note_out_of_range(self, key: Key, end: int | None, reached: int) -> None:
        """Notes that the brokers no longer have a partition's next offset, for when the partition is placed again.

        `end`: where the log departs from what was read, if the brokers have said so. `reached`: the end of the log as
        it was known before.
        """
        self._reached[key] = reached
        if end is not None:
            self._cut[key] = end

    def __call__(self, partitions: Sequence[TopicPartition], stored: Sequence[Position | None]) -> list[Position]:
        """The positions to read on from. Raises KafkaSetupError where the operator must decide, and KafkaException."""
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
        """Whether a partition was made after reading had begun, so that all of it is to be read."""
        topic, partition = key
        return (
            partition >= self._cluster.topics.get(topic, 0)
            or self._ids.get(topic, ids[topic]) != ids[topic]
            or self._days.follows(topic)
        )

    def _starts(self, partitions: Sequence[Key]) -> dict[Key, int]:
        """Where partitions that have no position begin, as the configuration says."""
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
        """Whether the position belongs to an earlier topic of the same name. Raises KafkaSetupError unless the operator
        wants such topics to be read."""
        topic, partition = key
        if topic_id is not None and position.topic_id is not None:
            if topic_id == position.topic_id:
                return False
            fault = f"topic {topic} was deleted and made anew"
        elif position.offset > high:  # without ids this alone tells
            fault = (
                f"topic {topic} was deleted and made anew, or has lost its end: partition {partition} ends at {high}"
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
        """The position, or where the log begins after it or departs before it. What lies between is counted as lost."""
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
                "messages that were not read are known to be lost; what comes at these offsets now is read",
                topic,
                partition,
                end,
                position.offset,
                unread,
            )
            self._metrics.lose(topic, LossReason.TRUNCATED, unread)
            # The log may have grown since. With the epoch brokers say where it departs, and that is noted as `end`.
            return replace(position, offset=end, leader_epoch=position.leader_epoch if cut is None else None)
        return replace(position, leader_epoch=None) if told else position
