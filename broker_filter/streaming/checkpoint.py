"""Where positions are kept: in the input's consumer group or, where the output is on another cluster, in a topic there.

Either way a position is stored in the transaction of the output that it stands for, and an instance that no longer owns
a partition cannot store one: the group refuses an old generation's, a transactional id fences its earlier holder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

from broker_filter.streaming.kafka_client import (
    PROPAGATION_PAUSE_S,
    REQUEST_TIMEOUT_S,
    Complaints,
    KafkaSetupError,
    explain,
    librdkafka_log,
)
from broker_filter.streaming.rights import REFUSED, Right
from broker_filter.streaming.transactions import Claim, ClaimEndedError, Store, Writer

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

OpenWriter = Callable[[str, Store], Writer]
"""Opens a writer with a transactional id."""
Start = Callable[[TopicPartition], int]
"""The offset at which a partition without a position is started."""

log = logging.getLogger(__name__)


class Checkpoint(Protocol):
    """How partitions are claimed. For the thread that reads: a consumer lets no second one in while the first polls."""

    def claim(self, partitions: Sequence[TopicPartition], start: Start) -> list[Claim]:
        """Shuts earlier owners out, and only then reads where each partition goes on; what has no position gets one."""
        ...

    def stored(self, partitions: Sequence[TopicPartition]) -> list[int | None]:
        """The positions that partitions have now, None where there is none. They need not be assigned."""
        ...

    def renew(self) -> None:
        """To be called when the group has been served: positions are stored in the generation that it is in now."""
        ...


class GroupCheckpoint:
    """Positions as the input group's offsets, for input and output on one cluster. One writer serves all partitions."""

    def __init__(self, consumer: Consumer, open_writer: OpenWriter, transactional_id: str) -> None:
        """`transactional_id`: unique among living instances; need not be stable, since the group does the fencing."""
        self._consumer = consumer
        self._open_writer = open_writer
        self._transactional_id = transactional_id
        self._writer: Writer | None = None
        self._member: str | None = None
        self._metadata: object = None

    def claim(self, partitions: Sequence[TopicPartition], start: Start) -> list[Claim]:
        """Reads the group's offsets, once no transaction is pending on them. To be called when they are assigned."""
        self._member = self._consumer.memberid()
        self.renew()
        if not partitions:
            return []
        if self._writer is None or self._writer.fenced:
            self._writer = self._open_writer(self._transactional_id, self._store)
        claims, starts = [], []
        for p, stored in zip(partitions, self.stored(partitions), strict=True):
            claim = Claim(p.topic, p.partition, self._writer, start(p) if stored is None else stored)
            if stored is None:
                starts.append(TopicPartition(p.topic, p.partition, claim.committed))
            claims.append(claim)
        if starts:
            self._store_starts(starts)
        return claims

    def stored(self, partitions: Sequence[TopicPartition]) -> list[int | None]:
        """Asks the group's coordinator, which waits until no transaction holds an offset that may yet come."""
        if not partitions:
            return []
        try:
            answer = self._consumer.committed(list(partitions), timeout=STABLE_TIMEOUT_S)
        except KafkaException as error:
            raise KafkaSetupError(f"the group's positions cannot be read: {explain(error.args[0])}") from None
        for p in answer:
            if p.error:  # is not the same as no position, from which reading would begin anew
                raise KafkaSetupError(f"the group's position in {p.topic}/{p.partition}: {explain(p.error)}")
        offsets = {(p.topic, p.partition): p.offset for p in answer}
        return [offset if (offset := offsets[p.topic, p.partition]) >= 0 else None for p in partitions]

    def renew(self) -> None:
        """Takes the membership that the next positions are stored under."""
        metadata = self._consumer.consumer_group_metadata()
        # In this order: metadata without a member, taken while a membership is being replaced, would be anybody's, and
        # the broker would accept them. Ids are not used twice: if it is the member's now, it was when they were taken.
        if self._member and self._consumer.memberid() == self._member:
            self._metadata = metadata

    def _store_starts(self, starts: list[TopicPartition]) -> None:
        try:
            self._consumer.commit(offsets=starts, asynchronous=False)
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
        offsets = [TopicPartition(claim.topic, claim.partition, end) for claim, end in ends.items()]
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

    def claim(self, partitions: Sequence[TopicPartition], start: Start) -> list[Claim]:
        """Opens the partitions' writers, then reads the positions topic as it is after that."""
        with ThreadPoolExecutor(OPENING_THREADS, "open-writer") as pool:
            writers = list(pool.map(self._open, partitions))
        claims = []
        for partition, writer, stored in zip(partitions, writers, self.stored(partitions), strict=True):
            claim = Claim(partition.topic, partition.partition, writer, start(partition) if stored is None else stored)
            if stored is None:
                writer.store_start(claim)
            claims.append(claim)
        return claims

    def stored(self, partitions: Sequence[TopicPartition]) -> list[int | None]:
        """Reads the positions topic on to its end."""
        positions = self._topic.read()
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
            value = json.dumps({"next_offset": end}).encode()
            producer.produce(self._topic.name, value, self._key(claim.topic, claim.partition), partition=0)


def position_key(cluster: str, group: str, topic: str, partition: int) -> bytes:
    """The key of a partition's records in the positions topic."""
    identity = {"cluster": cluster, "group": group, "topic": topic, "partition": partition}
    return json.dumps(identity, sort_keys=True).encode()


class PositionsTopic:
    """The committed positions of all partitions of all groups, as last read from `<prefix>.positions`."""

    def __init__(self, name: str, properties: Mapping[str, object], admin: AdminClient, complaints: Complaints) -> None:
        """`properties`: of the output's cluster."""
        self.name = name
        self._admin = admin
        self._account = complaints.account
        self._partition = TopicPartition(name, 0, OFFSET_BEGINNING)
        self._positions: dict[bytes, int] = {}
        self._reached = 0
        reader = {
            "group.id": name,  # never joined: librdkafka wants one
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "error_cb": complaints,
        }
        self._consumer = Consumer({**properties, **reader}, logger=librdkafka_log)
        self._consumer.assign([self._partition])

    def read(self) -> dict[bytes, int]:
        """Reads on to the end that the topic has now: everything committed before this call is in the answer.

        Raises KafkaSetupError where another producer's transaction hides that end for too long, and where the topic may
        not be read.
        """
        deadline = time.monotonic() + STABLE_TIMEOUT_S
        end = self._end(deadline)
        while self._reached < end:
            if time.monotonic() > deadline:
                raise KafkaSetupError(
                    f"topic {self.name} can be read to offset {self._reached} of {end} only: "
                    "a transaction on it does not end, or its brokers do not answer"
                )
            for message in self._consumer.consume(READ_AT_A_TIME, POLL_S):
                if message.error() is None:
                    self._note(message)
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    # The end of what is committed, which an open transaction holds back.
                    self._reached = message.offset()
                elif self._account and message.error().code() in REFUSED:
                    raise KafkaSetupError(self._account.lacks(Right(("Read",), "topic", self.name)))
                elif not message.error().retriable():
                    log.warning("topic %s: %s", self.name, explain(message.error()))
        return self._positions

    def _note(self, message: Any) -> None:
        if message.value() is None:  # an operator's way to forget a position
            self._positions.pop(message.key(), None)
            return
        try:
            self._positions[message.key()] = int(json.loads(message.value())["next_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise KafkaSetupError(f"topic {self.name}: no position at offset {message.offset()}: {error!r}") from None

    def _end(self, deadline: float) -> int:
        # Uncommitted: the high watermark, past the markers of every transaction that has ended.
        request = {self._partition: OffsetSpec.latest()}
        while True:
            answer = self._admin.list_offsets(
                request, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=REQUEST_TIMEOUT_S
            )
            try:
                return int(answer[self._partition].result().offset)
            except KafkaException as error:  # it has no leader while it is new, or while that moves
                if time.monotonic() > deadline:
                    raise KafkaSetupError(f"topic {self.name} cannot be read: {explain(error.args[0])}") from None
            time.sleep(PROPAGATION_PAUSE_S)
            # librdkafka may keep it for good that a new topic has no leader, and answer from that. This asks brokers.
            with suppress(KafkaException):
                self._admin.list_topics(self.name, timeout=REQUEST_TIMEOUT_S)
