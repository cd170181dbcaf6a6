"""Where positions are kept: in the input's consumer group or, where the output is on another cluster, in a topic there.

Either way a position is stored in the transaction of the output that it stands for, and an instance that no longer owns
a partition cannot store one: the group refuses an old generation's, a transactional id fences its earlier holder.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from broker_filter.kafka.client import (
    PROPAGATION_PAUSE_S,
    REQUEST_TIMEOUT_S,
    KafkaAwayError,
    KafkaSetupError,
    ThrottledErrorLog,
    explain,
    librdkafka_log,
)
from broker_filter.kafka.rights import REFUSED, Right
from broker_filter.kafka.transactions import Claim, ClaimEndedError, Store, Writer

STABLE_TIMEOUT_S = 60.0
"""An instance that is gone leaves its transaction open until the coordinator aborts it: 15 s, found every 10 s."""
OPENING_THREADS = 8
"""Producers that are initialised at a time: each waits a quarter of a second for the coordinator."""
READ_AT_A_TIME, POLL_S = 1000, 0.5
"""Records of the positions topic, and how long to wait for them before looking at the clock."""
NOT_A_MEMBER = (
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
)

NO_LEADER_EPOCH = -1
TOPIC_ID = re.compile(r"[A-Za-z0-9+/_-]{22}")
"""A topic's id as Kafka writes it. Other metadata of a group's offset, an operator's tool's, are no id."""


@dataclass(frozen=True, slots=True)
class Position:
    """The next offset of a partition whose output is not published yet, and the topic that the offset belongs to."""

    offset: int
    topic_id: str | None
    """The id of the topic, which differs from the id of a later topic of the same name; None where it is not known."""
    leader_epoch: int | None = None
    """The partition's leader epoch as it was read last: from it brokers tell whether the log was truncated since."""

    def claim(self, topic: str, partition: int, writer: Writer) -> Claim:
        """A claim on the partition, which begins at this position."""
        return Claim(topic, partition, writer, self.offset, topic_id=self.topic_id, leader_epoch=self.leader_epoch)


OpenWriter = Callable[[str, Store], Writer]
"""Opens a writer with a transactional id."""
Place = Callable[[Sequence[TopicPartition], Sequence[Position | None]], list[Position]]
"""Decides where partitions are read on, from the positions that are stored for them (None where there is none)."""

log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """How partitions are claimed. `claim` and `renew` are for the thread that reads, since a consumer lets no second
    thread in while the first one polls; `glance` is for any thread."""

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """Shuts earlier owners out, and only then reads the positions and asks `place` where reading goes on.

        Stores each position that `place` has changed. Raises KafkaAwayError or KafkaException where the brokers do not
        answer: nothing is claimed then, and the call may be repeated.
        """
        ...

    def glance(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """The positions that are committed now, whoever owns the partitions. Waits for no open transaction."""
        ...

    def renew(self) -> None:
        """To be called when the group has been served: positions are stored in the generation that it is in now."""
        ...


class GroupCheckpoint:
    """Positions as the input group's offsets, for input and output on one cluster. One writer serves all partitions.

    The metadata of each offset hold the topic's id.
    """

    def __init__(self, consumer: Consumer, open_writer: OpenWriter, transactional_id: str, observer: Consumer) -> None:
        """`transactional_id`: unique among living instances; need not be stable, since the group does the fencing.
        `observer`: another client of the group of `consumer`, which has not joined it."""
        self._consumer = consumer
        self._open_writer = open_writer
        self._transactional_id = transactional_id
        self._observer = observer
        self._writer: Writer | None = None
        self._member: str | None = None
        self._metadata: object = None

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """Reads the group's offsets, once no transaction is pending on them. To be called when they are assigned."""
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
        """Asks the group's coordinator once, for all partitions."""
        if not partitions:
            return []
        # Not `AdminClient.list_consumer_group_offsets`: that client has no group, and librdkafka 2.16 ends the process
        # with a segmentation fault when the coordinator is moving.
        return _group_positions(partitions, self._observer.committed(list(partitions), timeout=REQUEST_TIMEOUT_S))

    def _stored(self, partitions: Sequence[TopicPartition]) -> list[Position | None]:
        """Asks the group's coordinator, which waits until no transaction holds an offset that may yet come."""
        try:
            return _group_positions(partitions, self._consumer.committed(list(partitions), timeout=STABLE_TIMEOUT_S))
        except KafkaException as error:
            if error.args[0].code() not in REFUSED:
                raise
            raise KafkaSetupError(f"the group's positions cannot be read: {explain(error.args[0])}") from None

    def renew(self) -> None:
        """Takes the membership that the next positions are stored under."""
        metadata = self._consumer.consumer_group_metadata()
        # In this order: metadata without a member, taken while a membership is being replaced, would be anybody's, and
        # the broker would accept them. Ids are not used twice: if it is the member's now, it was when they were taken.
        if self._member and self._consumer.memberid() == self._member:
            self._metadata = metadata

    def _store_moved(self, offsets: list[TopicPartition]) -> None:
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in (*NOT_A_MEMBER, *REFUSED):
                raise
            # The group has moved on, and these partitions are about to be taken away again; or they may not be read,
            # which is said when that is tried.

    def _store(self, producer: Any, ends: Mapping[Claim, int]) -> None:
        # In this order: a membership is renewed only when the claims that it cost have ended. So what is alive after
        # the metadata were taken belongs to the generation that they name, and the broker judges whether that still is.
        metadata = self._metadata
        if metadata is None or not all(claim.alive for claim in ends):
            raise ClaimEndedError("the group has taken partitions away")
        offsets = [claim_offset(claim, end) for claim, end in ends.items()]
        producer.send_offsets_to_transaction(offsets, metadata, REQUEST_TIMEOUT_S)


class PositionsCheckpoint:
    """Positions as records of a compacted topic on the output's cluster. A writer for each partition.

    The writer's transactional id names the partition, so that opening it fences the partition's earlier owner.
    """

    def __init__(self, topic: PositionsTopic, open_writer: OpenWriter, prefix: str, group: str, cluster: str) -> None:
        """`cluster`: the id of the input's."""
        self._topic = topic
        self._open_writer = open_writer
        self._prefix = prefix
        self._group = group
        self._cluster = cluster

    def claim(self, partitions: Sequence[TopicPartition], place: Place) -> list[Claim]:
        """Opens the partitions' writers, then reads the positions topic as it is after that."""
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
        """Reads the positions topic on, as far as it is committed."""
        return self._positions(partitions, self._topic.glance()) if partitions else []

    def _positions(
        self, partitions: Sequence[TopicPartition], positions: Mapping[bytes, Position]
    ) -> list[Position | None]:
        return [positions.get(self._key(p.topic, p.partition)) for p in partitions]

    def renew(self) -> None:
        """Nothing to do: positions are stored under the writers' transactional ids."""

    def _open(self, partition: TopicPartition) -> Writer:
        # A topic's name has no slash, so no two partitions share an id; the prefix leads, for access rules by prefix.
        identity = (self._prefix, self._group, self._cluster, partition.topic, str(partition.partition))
        return self._open_writer("/".join(identity), self._store)

    def _key(self, topic: str, partition: int) -> bytes:
        return position_key(self._cluster, self._group, topic, partition)

    def _store(self, producer: Any, ends: Mapping[Claim, int]) -> None:
        for claim, end in ends.items():
            value = position_value(Position(end, claim.topic_id, claim.leader_epoch))
            producer.produce(self._topic.name, value, self._key(claim.topic, claim.partition), partition=0)


def position_key(cluster: str, group: str, topic: str, partition: int) -> bytes:
    """The key of a partition's records in the positions topic."""
    identity = {"cluster": cluster, "group": group, "topic": topic, "partition": partition}
    return json.dumps(identity, sort_keys=True).encode()


def position_value(position: Position) -> bytes:
    """The value of a partition's record in the positions topic."""
    value = {"next_offset": position.offset, "topic_id": position.topic_id, "leader_epoch": position.leader_epoch}
    return json.dumps({name: known for name, known in value.items() if known is not None}).encode()


def claim_offset(claim: Claim, offset: int) -> TopicPartition:
    """A position of a claim's partition as Kafka's clients have it, with the topic's id as metadata."""
    epoch = NO_LEADER_EPOCH if claim.leader_epoch is None else claim.leader_epoch
    return TopicPartition(claim.topic, claim.partition, offset, claim.topic_id or "", epoch)


def _group_positions(partitions: Sequence[TopicPartition], answer: Sequence[TopicPartition]) -> list[Position | None]:
    """The positions that a coordinator has answered with, in the order of `partitions`; raises KafkaException."""
    found: dict[tuple[str, int], Position] = {}
    for p in answer:
        if p.error:  # is not the same as no position, from which reading would begin anew
            raise KafkaException(p.error)
        if p.offset >= 0:
            known = p.metadata and TOPIC_ID.fullmatch(p.metadata)
            found[p.topic, p.partition] = Position(p.offset, p.metadata if known else None, p.leader_epoch)
    return [found.get((p.topic, p.partition)) for p in partitions]


class PositionsTopic:
    """The committed positions of all partitions of all groups, as last read from `<prefix>.positions`.

    May be read by several threads.
    """

    def __init__(
        self, name: str, properties: Mapping[str, object], admin: AdminClient, error_log: ThrottledErrorLog
    ) -> None:
        """`properties`: of the output's cluster."""
        self.name = name
        self._admin = admin
        self._account = error_log.account
        self._partition = TopicPartition(name, 0, OFFSET_BEGINNING)
        self._positions: dict[bytes, Position] = {}
        self._reached = 0
        self._one_at_a_time = threading.Lock()
        reader = {
            "group.id": name,  # never joined: librdkafka wants one
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "error_cb": error_log,
        }
        self._consumer = Consumer({**properties, **reader}, logger=librdkafka_log)
        self._consumer.assign([self._partition])

    def read(self) -> Mapping[bytes, Position]:
        """Reads on to the end that the topic has now: everything committed before this call is in the answer.

        Raises KafkaAwayError where another producer's transaction hides that end for too long, and KafkaSetupError
        where the topic may not be read.
        """
        return self._read(IsolationLevel.READ_UNCOMMITTED, STABLE_TIMEOUT_S)

    def glance(self) -> Mapping[bytes, Position]:
        """As `read`, but reads only to the first transaction that is open, and does not wait for its end."""
        return self._read(IsolationLevel.READ_COMMITTED, REQUEST_TIMEOUT_S)

    def _read(self, isolation: IsolationLevel, timeout_s: float) -> Mapping[bytes, Position]:
        with self._one_at_a_time:
            self._read_to_end(isolation, time.monotonic() + timeout_s)
            return self._positions.copy()

    def _read_to_end(self, isolation: IsolationLevel, deadline: float) -> None:
        end = self._end(isolation, deadline)
        while self._reached < end:
            if time.monotonic() > deadline:
                raise KafkaAwayError(
                    f"topic {self.name} can be read to offset {self._reached} of {end} only: "
                    "a transaction on it does not end, or its brokers do not answer"
                )
            for message in self._consumer.consume(READ_AT_A_TIME, POLL_S):
                if message.error() is None:
                    self._note(message)
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    # The end of what is committed, which an open transaction holds back.
                    self._reached = message.offset()
                elif message.error().code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    pass  # librdkafka looks for the coordinator of a group that is not used here
                elif self._account and message.error().code() in REFUSED:
                    raise KafkaSetupError(self._account.lacks(Right(("Read",), "topic", self.name)))
                elif not message.error().retriable():
                    log.warning("topic %s: %s", self.name, explain(message.error()))

    def _note(self, message: Any) -> None:
        if message.value() is None:  # an operator's way to forget a position
            self._positions.pop(message.key(), None)
            return
        try:
            record = json.loads(message.value())
            # Versions before these were kept wrote the offset alone.
            topic_id, epoch = record.get("topic_id"), record.get("leader_epoch")
            self._positions[message.key()] = Position(
                int(record["next_offset"]), topic_id and str(topic_id), None if epoch is None else int(epoch)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KafkaSetupError(f"topic {self.name}: no position at offset {message.offset()}: {error!r}") from None

    def _end(self, isolation: IsolationLevel, deadline: float) -> int:
        # Uncommitted: the high watermark, past the markers of every transaction that has ended.
        request = {self._partition: OffsetSpec.latest()}
        while True:
            answer = self._admin.list_offsets(request, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S)
            try:
                return int(answer[self._partition].result().offset)
            except KafkaException as error:  # it has no leader while it is new, or while that moves
                if time.monotonic() > deadline:
                    raise KafkaAwayError(f"topic {self.name} cannot be read: {explain(error.args[0])}") from None
            time.sleep(PROPAGATION_PAUSE_S)
            # librdkafka may keep it for good that a new topic has no leader, and answer from that. This asks brokers.
            with suppress(KafkaException):
                self._admin.list_topics(self.name, timeout=REQUEST_TIMEOUT_S)
