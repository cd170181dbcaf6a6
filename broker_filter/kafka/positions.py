"""Shows the stored positions of a service's input, and moves them while the service is stopped.

A position is never moved while the input's group has members, and a service that starts in the middle is safe. On one
cluster, Kafka refuses new offsets for a group that is not empty. On two clusters, the partition's transactional id is
taken over before the position is stored, as an instance of the service does: whichever of the two takes it over last
decides, and the service reads the position only afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal, TypeVar

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import MemberDescription, OffsetSpec

from broker_filter.config import POSITIONS, Service
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.kafka.checkpoint import (
    Position,
    PositionsCheckpoint,
    PositionsTopic,
    group_positions,
    position_key,
    stored_offset,
)
from broker_filter.kafka.client import (
    PATIENCE_S,
    PROPAGATION_PAUSE_S,
    REQUEST_TIMEOUT_S,
    KafkaSetupError,
    RecordLimits,
    ThrottledErrorLog,
    admin_client,
    answered,
    client_properties,
    ensure_topics,
    explain,
    librdkafka_log,
    list_offsets,
    output_section,
    reach_cluster,
    require_compaction,
    topic_ids,
)
from broker_filter.kafka.compacted_topic import STABLE_TIMEOUT_S
from broker_filter.kafka.connect import output_topics
from broker_filter.kafka.days import existing_topics
from broker_filter.kafka.rights import account_of
from broker_filter.kafka.source import group_observer
from broker_filter.kafka.transactions import GRACE_S, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics

SMALL_FETCH_BYTES = 1
"""A broker returns at least one batch of messages. More is not needed to learn the time of one message."""
MESSAGES_AT_A_TIME, POLL_S = 100, 0.5

COORDINATOR_MOVES = (
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
)
"""Errors of a request about a group that pass: a cluster that has just started has no coordinator for a moment."""

Key = tuple[str, int]
T = TypeVar("T")
Place = int | datetime | Literal["beginning", "end"]
"""Where to move positions: an offset, the first message at or after a time, the beginning or the end of the log."""


class PlaceError(BrokerFilterError):
    """The partition does not exist, or its log does not hold the offset."""

    exit_status = USAGE


class LiveMembersError(KafkaSetupError):
    """Positions cannot be moved, because the input's group has members."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The position of one partition, and what its log holds."""

    topic: str
    partition: int
    position: int | None
    """The stored position: the first offset whose output is not committed. None if no position is stored."""
    beginning: int
    """The first offset that the log holds."""
    end: int
    """The offset that the next message gets."""
    remade: bool = False
    """Whether the position belongs to a deleted topic of the same name."""
    time: datetime | None = None
    """The time of the message at the position in UTC; None at the end of the log, or if it cannot be read."""

    @property
    def key(self) -> Key:
        """The partition as (topic, number)."""
        return self.topic, self.partition

    @property
    def lag(self) -> int | None:
        """The number of offsets from the position to the end; None if no position of this topic is stored."""
        return None if self.position is None or self.remade else max(0, self.end - max(self.position, self.beginning))


class StoredPositions:
    """The stored positions of the input of one service. Connects when it is made.

    Raises KafkaSetupError if a cluster does not answer within PATIENCE_S or refuses a request.
    """

    def __init__(self, config: Service) -> None:
        source, self._output = config.input, output_section(config.input, config.output)
        self.group = source.group_id
        self._templates = source.topics
        in_properties, self._out_properties = client_properties(source), client_properties(self._output)
        self._in_log = ThrottledErrorLog(f"input brokers {source.bootstrap_servers}", account=account_of(source))
        self._out_log = ThrottledErrorLog(
            f"output brokers {self._output.bootstrap_servers}", account=account_of(self._output)
        )
        in_cluster = reach_cluster(in_properties, self._in_log)
        out_cluster = reach_cluster(self._out_properties, self._out_log)
        self._cluster = in_cluster
        self._admin = admin_client(in_properties, self._in_log)
        self._out_admin = admin_client(self._out_properties, self._out_log)
        self._consumer = Consumer(
            {
                **in_properties,
                "group.id": self.group,  # the client does not join the group
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "max.partition.fetch.bytes": SMALL_FETCH_BYTES,
                "error_cb": self._in_log.note,
            },
            logger=librdkafka_log,
        )
        self._observer = group_observer(in_properties, self.group)
        self._topic_name = f"{self._output.prefix}.{POSITIONS}" if in_cluster.id != out_cluster.id else None
        self._topic: PositionsTopic | None = None
        if self._topic_name and self._topic_name in out_cluster.topics:
            self._topic = self._open_topic(self._topic_name)

    @property
    def stored_in(self) -> str:
        """Where the positions are stored, in words."""
        return f"topic {self._topic_name}" if self._topic_name else f"offsets of group {self.group}"

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close()
        self._observer.close()

    def partitions(self, topic: str | None = None, partition: int | None = None) -> list[Key]:
        """Return the partitions of the input's topics of all days that exist: all, those of one topic, or one.

        Raises PlaceError if there is no such topic or partition.
        """
        existing = self._cluster.topics
        topics = existing_topics(self._templates, datetime.now(UTC), existing)
        if topic is not None and topic not in topics:
            known = ", ".join(topics) or "none exists"
            raise PlaceError(f"{topic} is not an existing topic of `input.topics` ({known})")
        keys = [(name, number) for name in topics if topic in (None, name) for number in range(existing[name])]
        if partition is not None and (found := [key for key in keys if key[1] == partition]) != keys:
            if not found and topic is None:
                raise PlaceError(f"no topic of `input.topics` has a partition {partition}")
            if not found:
                raise PlaceError(f"{topic} has no partition {partition}")
            return found
        return keys

    def standings(self, keys: Sequence[Key], *, settled: bool = True, times: bool = False) -> list[Standing]:
        """Return the standing of each partition, in the order of `keys`.

        `settled`: wait until the open transactions that hold positions have ended, which a busy service may delay.
        `times`: also read the message at each position to learn its time.
        """
        if not keys:
            return []
        with answered(self._in_log):
            stored = _retried(lambda: self._stored(keys, settled))
            ids = topic_ids(self._admin, {topic for topic, _ in keys})
            low = list_offsets(self._admin, keys, OffsetSpec.earliest())
            high = list_offsets(self._admin, keys, OffsetSpec.latest())
        standings = [
            Standing(
                *key,
                position=None if position is None else position.offset,
                beginning=low[key],
                end=high[key],
                remade=position is not None and _is_of_deleted_topic(position, ids[key[0]]),
            )
            for key, position in zip(keys, stored, strict=True)
        ]
        return self._with_times(standings) if times else standings

    def members(self) -> list[str]:
        """Return a description of each member of the input's group; an empty list if the service does not run."""
        with answered(self._in_log):
            return [
                f"{member.client_id} at {member.host.lstrip('/')}"
                f" ({len(member.assignment.topic_partitions) if member.assignment else 0} partitions)"
                for member in _retried(self._members)
            ]

    def targets(self, standings: Sequence[Standing], place: Place, *, back_only: bool = False) -> dict[Key, int]:
        """Return the new position of each partition whose position changes.

        `back_only`: leave out partitions whose position is before the place already, or is not stored. Raises
        PlaceError if the log does not hold the offset, and, with `back_only`, if a position belongs to a deleted topic.
        """
        if back_only and (remade := [one for one in standings if one.remade]):
            raise PlaceError(
                f"the position of {remade[0].topic}/{remade[0].partition} belongs to a deleted topic of this name: "
                "`positions set` stores a position in the new topic"
            )
        found: Mapping[Key, int] = {}
        if isinstance(place, datetime):
            with answered(self._in_log):
                spec = OffsetSpec.for_timestamp(int(place.timestamp() * 1000))
                found = list_offsets(self._admin, [one.key for one in standings], spec)
        targets = {}
        for one in standings:
            match place:
                case int() if not one.beginning <= place <= one.end:
                    raise PlaceError(
                        f"offset {place} is outside the log of {one.topic}/{one.partition}: give an offset from "
                        f"{one.beginning} to {one.end} (the end)"
                    )
                case int():
                    target = place
                case datetime():
                    target = found[one.key] if found[one.key] >= 0 else one.end
                case "beginning":
                    target = one.beginning
                case "end":
                    target = one.end
            if back_only and (one.position is None or one.position <= target):
                continue
            if target != one.position or one.remade:
                targets[one.key] = target
        return targets

    def move(self, targets: Mapping[Key, int]) -> None:
        """Store the new positions of a stopped service.

        Raises LiveMembersError if the input's group has members, and the errors of `store`.
        """
        if members := self.members():
            raise LiveMembersError(
                f"group {self.group} has live members ({len(members)}), and only a stopped service's positions can be "
                f"moved: {'; '.join(members)}. Stop them; a member that was killed leaves after its session timeout"
            )
        self.store(targets)

    def store(self, targets: Mapping[Key, int]) -> None:
        """Store positions without a look at the members; see the module about a service that has just started.

        Raises KafkaSetupError if a position is not stored, for example because the service has started. Some of the
        other positions may then be stored.
        """
        with answered(self._in_log):
            ids = topic_ids(self._admin, {topic for topic, _ in targets})
        positions = {key: Position(offset, ids[key[0]]) for key, offset in targets.items()}
        if self._topic_name:
            self._store_in_topic(self._topic_name, positions)
        else:
            self._store_in_group(positions)

    def _stored(self, keys: Sequence[Key], settled: bool) -> list[Position | None]:
        if not self._topic_name:
            asked = [TopicPartition(*key) for key in keys]
            client = self._consumer if settled else self._observer
            return group_positions(asked, client.committed(asked, timeout=STABLE_TIMEOUT_S))
        positions: Mapping[bytes, Position] = {}
        if self._topic:
            positions = self._topic.read() if settled else self._topic.glance()
        return [positions.get(position_key(self._cluster.id, self.group, *key)) for key in keys]

    def _members(self) -> Sequence[MemberDescription]:
        answer = self._admin.describe_consumer_groups([self.group], request_timeout=REQUEST_TIMEOUT_S)[self.group]
        try:
            members: Sequence[MemberDescription] = answer.result().members
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return []
            raise
        return members

    def _store_in_group(self, positions: Mapping[Key, Position]) -> None:
        offsets = [stored_offset(*key, position) for key, position in positions.items()]
        request = ConsumerGroupTopicPartitions(self.group, offsets)
        (answer,) = self._admin.alter_consumer_group_offsets([request], request_timeout=REQUEST_TIMEOUT_S).values()
        try:
            stored = answer.result().topic_partitions
        except KafkaException as error:
            raise KafkaSetupError(f"{self._in_log.cluster}: group {self.group}: {explain(error.args[0])}") from None
        if failed := [p for p in stored if p.error]:
            refused = "; ".join(f"{p.topic}/{p.partition}: {explain(p.error)}" for p in failed)
            raise KafkaSetupError(
                f"{self._in_log.cluster}: {len(failed)} of {len(stored)} positions are not stored; did the service "
                f"start? {refused}"
            )

    def _store_in_topic(self, name: str, positions: Mapping[Key, Position]) -> None:
        account = self._out_log.account
        with answered(self._out_log):
            if self._topic is None:
                ensure_topics(self._out_admin, output_topics(self._output, [], separate_clusters=True), account)
                self._topic = self._open_topic(name)
            require_compaction(self._out_admin, name, account)
            self._checkpoint(self._topic).claim(
                [TopicPartition(*key) for key in positions], lambda _partitions, _stored: list(positions.values())
            )

    def _open_topic(self, name: str) -> PositionsTopic:
        return PositionsTopic(name, self._out_properties, self._out_admin, self._out_log)

    def _checkpoint(self, topic: PositionsTopic) -> PositionsCheckpoint:
        metrics = Metrics()
        properties = {"transaction.timeout.ms": int(1000 * GRACE_S), **self._out_properties}
        limits = RecordLimits(self._out_admin, [topic.name], dead_letter=topic.name)
        open_writer = partial(Writer, properties, limits, metrics, self._out_log, Stage("commit", metrics))
        return PositionsCheckpoint(topic, open_writer, self._output.prefix, self.group, self._cluster.id)

    def _with_times(self, standings: Sequence[Standing]) -> list[Standing]:
        """Return the standings with the times of the messages at the positions, read within REQUEST_TIMEOUT_S."""
        at = [
            TopicPartition(*one.key, one.position)
            for one in standings
            if one.position is not None and not one.remade and one.beginning <= one.position < one.end
        ]
        times: dict[Key, datetime] = {}
        waiting = {(p.topic, p.partition) for p in at}
        self._consumer.assign(at)
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while waiting and time.monotonic() < deadline:
            for message in self._consumer.consume(MESSAGES_AT_A_TIME, POLL_S):
                key = message.topic(), message.partition()
                if key not in waiting:
                    continue
                waiting.discard(key)
                self._consumer.pause([TopicPartition(*key)])
                kind, milliseconds = message.timestamp()
                if message.error() is None and kind:
                    times[key] = datetime.fromtimestamp(milliseconds / 1000, UTC)
        self._consumer.unassign()
        return [replace(one, time=times.get(one.key)) for one in standings]


def _is_of_deleted_topic(position: Position, topic_id: str | None) -> bool:
    """Return whether a position belongs to a topic with another id than `topic_id`; False if an id is unknown."""
    return None not in (position.topic_id, topic_id) and position.topic_id != topic_id


def moved_messages(standings: Collection[Standing], targets: Mapping[Key, int]) -> tuple[int, int]:
    """Return how many offsets will be read again, and how many will be skipped, if positions move to `targets`."""
    again = skipped = 0
    for one in standings:
        if one.key in targets and one.position is not None and not one.remade:
            difference = targets[one.key] - max(one.position, one.beginning)
            again, skipped = again + max(0, -difference), skipped + max(0, difference)
    return again, skipped


def _retried(call: Callable[[], T]) -> T:
    """Return the result of a request about a group; repeat it for PATIENCE_S while the group's coordinator moves."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if error.args[0].code() not in COORDINATOR_MOVES or time.monotonic() > deadline:
                raise
        time.sleep(PROPAGATION_PAUSE_S)
