"""Stores positions: in the input's consumer group or, if the output is on another cluster, in a topic of that cluster.

In both cases a position is stored in the transaction that holds the output of the alerts before it. An instance that no
longer owns a partition cannot store a position: the group refuses a member of an old generation, and a transactional id
fences its earlier owner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from broker_filter.kafka.client import REQUEST_TIMEOUT_S, KafkaSetupError, explain
from broker_filter.kafka.compacted_topic import STABLE_TIMEOUT_S, CompactedTopic
from broker_filter.kafka.rights import REFUSED
from broker_filter.kafka.transactions import Claim, ClaimEndedError, Store, Writer

OPENING_THREADS = 8
"""Producers that are initialised in parallel. Each one waits about 0.25 s for the coordinator."""
NOT_A_MEMBER = (
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
)

NO_LEADER_EPOCH = -1
TOPIC_ID = re.compile(r"[A-Za-z0-9+/_-]{22}")
"""A topic id as Kafka writes it. Other tools may store other metadata with a group's offset."""


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a partition: the first offset whose output is not committed yet."""

    offset: int
    topic_id: str | None
    """The id of the topic that the offset belongs to, or None if it is unknown. A topic that is deleted and created
    again has another id."""
    leader_epoch: int | None = None
    """The partition's leader epoch of the last message that was read, or None. With it, brokers can tell whether the
    log was truncated since."""

    def claim(self, topic: str, partition: int, writer: Writer) -> Claim:
        """Return a claim on the partition that starts at this position."""
        return Claim(topic, partition, writer, self.offset, topic_id=self.topic_id, leader_epoch=self.leader_epoch)


OpenWriter = Callable[[str, Store], Writer]
"""Opens a writer. Arguments: its transactional id, and the function that adds positions to its transactions."""
Place = Callable[[Sequence[TopicPartition], Sequence[Position | None]], list[Position]]
"""Decides where reading of partitions starts. Arguments: the partitions, and the stored position of each or None."""


class Checkpoint(Protocol):
    """Claims partitions and reads their stored positions.

    Only the reading thread may call `claim` and `renew`, because a consumer blocks other threads while it polls. Any
    thread may call `glance`.
    """

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """Fence earlier owners first, then read the stored positions and ask `place` where reading starts.

        Returns one claim for each partition, in the same order. Stores each position that `place` has changed. Raises
        KafkaAwayError or KafkaException if the brokers do not answer; then nothing is claimed, and the call may be
        repeated.
        """
        ...

    def glance(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """Return the committed position of each partition, or None, whichever instance owns the partition.

        Does not wait until open transactions end.
        """
        ...

    def renew(self) -> None:
        """Update the group's generation with which positions are stored. Call this after each poll of the consumer."""
        ...


class GroupCheckpoint:
    """Positions as offsets of the consumer group, for input and output on one cluster.

    One writer serves all partitions. The metadata of each offset hold the topic's id.
    """

    def __init__(self, consumer: Consumer, open_writer: OpenWriter, transactional_id: str, observer: Consumer) -> None:
        """`transactional_id`: unique among running instances; it may change, because the group fences old members.

        `observer`: another client that is configured for the group of `consumer` but has not joined it.
        """
        self._consumer = consumer
        self._open_writer = open_writer
        self._transactional_id = transactional_id
        self._observer = observer
        self._writer: Writer | None = None
        self._member: str | None = None
        self._metadata: object = None

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """See Checkpoint. Waits until no open transaction holds an offset. Call this when partitions are assigned."""
        self._member = self._consumer.memberid()
        self.renew()
        if not partitions:
            return []
        if self._writer is None or self._writer.fenced:
            self._writer = self._open_writer(self._transactional_id, self._store)
        stored = self._stored(partitions)
        claims, moved = [], []
        for p, before, position in zip(partitions, stored, place(partitions, stored), strict=True):
            claims.append(position.claim(p.topic, p.partition, self._writer))
            if position != before:
                moved.append(claim_offset(claims[-1], position.offset))
        if moved:
            self._store_moved(moved)
        return claims

    def glance(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """See Checkpoint. Sends one request to the group's coordinator, for all partitions."""
        if not partitions:
            return []
        # `AdminClient.list_consumer_group_offsets` is not used: that client has no group, and librdkafka 2.16 crashes
        # with a segmentation fault while the coordinator moves to another broker.
        return group_positions(partitions, self._observer.committed(list(partitions), timeout=REQUEST_TIMEOUT_S))

    def _stored(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """Return the offsets from the group's coordinator, which answers when no open transaction holds one."""
        try:
            return group_positions(partitions, self._consumer.committed(list(partitions), timeout=STABLE_TIMEOUT_S))
        except KafkaException as error:
            if error.args[0].code() not in REFUSED:
                raise
            raise KafkaSetupError(f"the group's positions cannot be read: {explain(error.args[0])}") from None

    def renew(self) -> None:
        """See Checkpoint."""
        metadata = self._consumer.consumer_group_metadata()
        # The metadata are read before the member id is compared. While a membership is being replaced, the metadata may
        # have no member id, and the broker would accept such metadata from any instance. Member ids are never reused:
        # if the id is the same now, the metadata belong to this member.
        if self._member and self._consumer.memberid() == self._member:
            self._metadata = metadata

    def _store_moved(self, offsets: list[TopicPartition]) -> None:
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in (*NOT_A_MEMBER, *REFUSED):
                raise
            # Either the group has started a rebalance and revokes these partitions soon, or the account has no right
            # to read them, which the next read reports.

    def _store(self, producer: Any, ends: Mapping[Claim, int]) -> None:
        # The metadata are read before the claims are checked. `renew` runs only after the claims that a rebalance has
        # revoked are ended. So a claim that is alive here belongs to the generation in the metadata, and the broker
        # refuses the commit if that generation has ended.
        metadata = self._metadata
        if metadata is None or not all(claim.alive for claim in ends):
            raise ClaimEndedError("the group has taken partitions away")
        offsets = [claim_offset(claim, end) for claim, end in ends.items()]
        producer.send_offsets_to_transaction(offsets, metadata, REQUEST_TIMEOUT_S)


class PositionsCheckpoint:
    """Positions as records of a compacted topic on the output's cluster. Each partition has a writer of its own.

    The writer's transactional id contains the partition, so that opening the writer fences the partition's earlier
    owner.
    """

    def __init__(self, topic: PositionsTopic, open_writer: OpenWriter, prefix: str, group: str, cluster: str) -> None:
        """`prefix`: output.prefix. `group`: the input's consumer group. `cluster`: the id of the input's cluster."""
        self._topic = topic
        self._open_writer = open_writer
        self._prefix = prefix
        self._group = group
        self._cluster = cluster

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """See Checkpoint. Opens the writers of the partitions first, and then reads the positions topic to its end."""
        if not partitions:
            return []
        with ThreadPoolExecutor(OPENING_THREADS, "open-writer") as pool:
            writers = list(pool.map(self._open, partitions))
            stored = self._positions(partitions, self._topic.read())
            claims, moved = [], []
            for p, writer, before, position in zip(partitions, writers, stored, place(partitions, stored), strict=True):
                claims.append(position.claim(p.topic, p.partition, writer))
                if position != before:
                    moved.append(claims[-1])
            list(pool.map(lambda claim: claim.writer.store_start(claim), moved))
        return claims

    def glance(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """See Checkpoint. Reads the new committed records of the positions topic."""
        return self._positions(partitions, self._topic.glance()) if partitions else []

    def _positions(
        self, partitions: Sequence[TopicPartition], positions: Mapping[bytes, Position]
    ) -> list[Position | None]:
        return [positions.get(self._key(p.topic, p.partition)) for p in partitions]

    def renew(self) -> None:
        """See Checkpoint. Does nothing, because positions are stored with the transactional ids of the writers."""

    def _open(self, partition: TopicPartition) -> Writer:
        # A topic's name contains no slash, so the id is unique. It begins with the prefix, so that one prefixed access
        # rule covers all ids.
        identity = (self._prefix, self._group, self._cluster, partition.topic, str(partition.partition))
        return self._open_writer("/".join(identity), self._store)

    def _key(self, topic: str, partition: int) -> bytes:
        return position_key(self._cluster, self._group, topic, partition)

    def _store(self, producer: Any, ends: Mapping[Claim, int]) -> None:
        for claim, end in ends.items():
            value = position_value(Position(end, claim.topic_id, claim.leader_epoch))
            producer.produce(self._topic.name, value, self._key(claim.topic, claim.partition), partition=0)


def position_key(cluster: str, group: str, topic: str, partition: int) -> bytes:
    """Return the key of a partition's records in the positions topic. `cluster`: id of the input's cluster."""
    identity = {"cluster": cluster, "group": group, "topic": topic, "partition": partition}
    return json.dumps(identity, sort_keys=True).encode()


def position_value(position: Position) -> bytes:
    """Return the value of a record in the positions topic: JSON without the keys that are unknown."""
    value = {"next_offset": position.offset, "topic_id": position.topic_id, "leader_epoch": position.leader_epoch}
    return json.dumps({name: known for name, known in value.items() if known is not None}).encode()


def claim_offset(claim: Claim, offset: int) -> TopicPartition:
    """Return `offset` in the claim's partition as a TopicPartition, with the topic's id as metadata."""
    return stored_offset(claim.topic, claim.partition, Position(offset, claim.topic_id, claim.leader_epoch))


def stored_offset(topic: str, partition: int, position: Position) -> TopicPartition:
    """Return a position as a TopicPartition, as a group stores it: with the topic's id as metadata."""
    epoch = NO_LEADER_EPOCH if position.leader_epoch is None else position.leader_epoch
    return TopicPartition(topic, partition, position.offset, position.topic_id or "", epoch)


def group_positions(partitions: Sequence[TopicPartition], answer: Sequence[TopicPartition]) -> list[Position | None]:
    """Convert the coordinator's answer to positions, in the order of `partitions`; None for no stored offset.

    Raises KafkaException if the answer has an error for a partition.
    """
    found: dict[tuple[str, int], Position] = {}
    for p in answer:
        if p.error:  # an error must not look like "no position": such a partition would be read from its start
            raise KafkaException(p.error)
        if p.offset >= 0:
            known = p.metadata and TOPIC_ID.fullmatch(p.metadata)
            found[p.topic, p.partition] = Position(p.offset, p.metadata if known else None, p.leader_epoch)
    return [found.get((p.topic, p.partition)) for p in partitions]


class PositionsTopic(CompactedTopic[Position]):
    """`<prefix>.positions`: the committed positions of all partitions of all groups, by `position_key`."""

    content = "position"

    def parse(self, value: bytes) -> Position:
        """See CompactedTopic. Records of old versions hold only the offset."""
        record = json.loads(value)
        topic_id, epoch = record.get("topic_id"), record.get("leader_epoch")
        return Position(int(record["next_offset"]), topic_id and str(topic_id), None if epoch is None else int(epoch))
