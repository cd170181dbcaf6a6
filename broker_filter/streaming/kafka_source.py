"""The consumer: messages in, as packets with the claim that they were read under. All its methods are for one thread.

Never commits a position: that is for the transaction that holds the output. Never waits long without serving the group:
whoever does is taken for dead, and its partitions are given away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from broker_filter.config import Input
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.streaming.checkpoint import Checkpoint
from broker_filter.streaming.kafka_client import (
    REQUEST_TIMEOUT_S,
    YESTERDAY_AND_TODAY,
    Cluster,
    Complaints,
    KafkaSetupError,
    explain,
    librdkafka_log,
    topic_names,
)
from broker_filter.streaming.rights import REFUSED, Right
from broker_filter.streaming.transactions import Claim

SESSION_TIMEOUT_MS = 10_000
"""After so long without a heartbeat a dead instance's partitions go to another: a minute is all that an alert has."""
MAX_POLL_INTERVAL_MS = 300_000
METADATA_REFRESH_MS = 10_000
"""How soon a topic is found that was waited for."""
PREFETCH_KBYTES = 64 * 1024
"""Read ahead, at most; with the queues' bounds this keeps memory flat."""
FETCH_PARTITION_BYTES = 4 * 2**20
"""About fifty alerts of a partition at a time. A larger message still comes, alone."""
QUEUE_FULL_BACKOFF_MS = 10
"""Before fetching on when the read-ahead was full: librdkafka's second would be a second's silence in a burst."""
IDLE_S = 0.1
"""How long to wait for a first message before looking at anything else, as at what was assigned meanwhile."""
DELIVERY_BYTES = 32 * 2**20
"""Messages that are taken at a time end here: a dozen such batches are on their way. 128 LSST alerts have 18 MB."""
MESSAGES_AT_A_TIME = 16
"""How many are asked of librdkafka before their bytes are counted."""
DAYS_BACK = (7, 6, 5, 4, 3, 2)
"""Days of which something may be left to read, the first ones first: ZTF keeps a topic for a week."""
RECLAIM_PAUSE_S = 2.0
"""Before claiming again what was fenced though it is ours: time for the group to say whose it is."""
TIMESTAMP_HEADER = "producer_timestamp"
"""Rubin's header with the time of sending, Unix milliseconds in decimal."""
MAX_TIMESTAMP_DIGITS = 15

log = logging.getLogger(__name__)

Key = tuple[str, int]


class UnexpectedMessageError(RuntimeError):
    """A message that the rules of this client rule out. Work ends, since its position cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Packets in the order in which they were read, each with the claim on its partition."""

    packets: list[Packet] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def set_out(self) -> None:
        """Says that the packets are on their way: a partition that is taken away now is waited for."""
        for offset, claim in zip(self.offsets, self.claims, strict=True):
            claim.taken = offset + 1

    def split(self, n_packets: int) -> tuple[Delivery, Delivery]:
        """The first `n_packets`, and the others."""
        first, rest = slice(n_packets), slice(n_packets, None)
        return (
            Delivery(self.packets[first], self.offsets[first], self.claims[first]),
            Delivery(self.packets[rest], self.offsets[rest], self.claims[rest]),
        )


class KafkaSource:
    """A member of the consumer group, and the claims on the partitions that it was given."""

    def __init__(
        self,
        section: Input,
        properties: Mapping[str, object],
        cluster: Cluster,
        complaints: Complaints,
        settle: Callable[[Collection[Claim]], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`settle` waits, not for ever, until what was read under the claims is committed. `clock`: the time in UTC."""
        self._section = section
        self._cluster = cluster
        self._complaints = complaints
        self._settle = settle
        self._clock = clock
        defaults = {
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "max.poll.interval.ms": MAX_POLL_INTERVAL_MS,
            "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
            "queued.max.messages.kbytes": PREFETCH_KBYTES,
            "max.partition.fetch.bytes": FETCH_PARTITION_BYTES,
            "fetch.queue.backoff.ms": QUEUE_FULL_BACKOFF_MS,
        }
        own = {
            "group.id": section.group_id,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "cooperative-sticky",
            "auto.offset.reset": "earliest",  # only where a position has expired: every partition is placed explicitly
            "error_cb": complaints,
        }
        self.consumer = Consumer({**defaults, **properties, **own}, logger=librdkafka_log)
        self._claims: dict[Key, Claim] = {}
        self._ends: dict[Claim, tuple[int, int]] = {}  # the end that was reached, and what was to be read before it
        self._refused: dict[str, str] = {}  # topics that may not be read, until something of them comes: why
        self._unread: list[Claim] = []  # paused since they were claimed
        self._paused: set[Key] = set()
        self._subscribed: list[str] = []
        self._reclaim_after: float | None = None
        self.joined = False

    def subscribe(self, checkpoint: Checkpoint) -> None:
        """Joins the group. Partitions are claimed through `checkpoint`."""
        self._checkpoint = checkpoint
        self._follow_calendar()

    @property
    def claims(self) -> list[Claim]:
        """The living claims."""
        return [claim for claim in self._claims.values() if claim.alive]

    @property
    def waits_for(self) -> str:
        """Why it is not in the group, or may not read a topic, as far as it is known; empty where it does both."""
        if self.joined:
            return "; ".join(reason for topic, reason in self._refused.items() if topic in self._subscribed)
        return f"not joined yet: {self._complaints.latest}" if self._complaints.latest else "not joined yet"

    def take(self, max_packets: int, max_wait_s: float) -> Delivery | None:
        """Up to `max_packets`, or fewer where no more come within `max_wait_s` of the first; None where none come.

        Also fewer where they have DELIVERY_BYTES already.
        """
        self._follow_calendar()
        self._reclaim_fenced()
        self._resume()
        delivery = Delivery()
        first = self.consumer.poll(IDLE_S)
        if first is None:
            self._checkpoint.renew()
            return None
        messages, n_bytes = [(first, self._claim_of(first))], len(first)
        deadline = time.monotonic() + max_wait_s
        while len(messages) < max_packets and n_bytes < DELIVERY_BYTES:
            some = self.consumer.consume(
                min(max_packets - len(messages), MESSAGES_AT_A_TIME), max(0.0, deadline - time.monotonic())
            )
            if not some:
                break
            messages += [(message, self._claim_of(message)) for message in some]
            n_bytes += sum(map(len, some))
        self._checkpoint.renew()
        for message, claim in messages:
            if claim is self._claim_of(message):  # the group may have been served in between
                self._admit(message, delivery)
        return delivery if delivery.packets else None

    def hold(self) -> None:
        """Serves the group and takes no message: for as long as there is no room for what was taken last."""
        unpaused = [key for key in self._claims if key not in self._paused]
        if unpaused:
            self.consumer.pause([TopicPartition(*key) for key in unpaused])
            self._paused.update(unpaused)
        message = self.consumer.poll(0)
        self._checkpoint.renew()
        if message is not None:
            self._admit(message, Delivery())

    def lags(self) -> dict[Key, int]:
        """Messages between the committed position and the end of each partition, 0 until its end is known."""
        lags = {}
        for key, claim in self._claims.items():
            _, high = self.consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
            end, last = self._ends.get(claim, (0, 0))
            # Behind the last message there may be transactions' marks and what they aborted: nothing that is to come.
            lags[key] = max(0, high - (end if claim.committed == last else claim.committed))
        return lags

    def report_positions(self, *, wait: bool = False) -> None:
        """Tells the input's group where its partitions are, for tools that show lag: not where anything starts from."""
        offsets = [TopicPartition(claim.topic, claim.partition, claim.committed) for claim in self.claims]
        if not offsets:
            return
        try:
            self.consumer.commit(offsets=offsets, asynchronous=not wait)
        except KafkaException as error:
            log.debug("positions are not shown in group %s: %s", self._section.group_id, error)

    def close(self) -> None:
        """Leaves the group. What was read and is not committed is left to the next owner."""
        for claim in self._claims.values():
            claim.ended = not claim.settled
        self.consumer.close()

    def _claim_of(self, message: Any) -> Claim | None:
        return self._claims.get((message.topic(), message.partition()))

    def _admit(self, message: Any, delivery: Delivery) -> None:
        claim = self._claim_of(message)
        if message.error():
            if message.error().code() != KafkaError._PARTITION_EOF:
                reason = self._judge(message.error(), message.topic())
                if message.topic() and message.error().code() in REFUSED:
                    self._refused[message.topic()] = reason
            elif claim:
                self._ends[claim] = message.offset(), claim.read
                self._refused.pop(claim.topic, None)
            return
        if claim is None or not claim.alive:
            return  # its next owner reads it again
        offset = message.offset()
        if (claim.topic, claim.partition) in self._paused:
            raise UnexpectedMessageError(f"{claim}: offset {offset} came although the partition is paused")
        if offset < claim.read:
            raise UnexpectedMessageError(
                f"{claim}: offset {offset} came after {claim.read - 1}: was the topic made anew? Its positions are of "
                "the old one: choose another input.group_id"
            )
        claim.read = offset + 1
        if self._refused:
            self._refused.pop(claim.topic, None)
        position = KafkaPosition(self._cluster.id, claim.topic, claim.partition, offset)
        delivery.packets.append(Packet(message.value() or b"", position, _timestamp_ms(message)))
        delivery.offsets.append(offset)
        delivery.claims.append(claim)

    # -- the group

    def _on_assign(self, _: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self.joined = True
        try:
            self._claim(partitions)
        except KafkaException as error:  # as it is, it would lose its type on its way through librdkafka
            raise KafkaSetupError(f"{self._complaints.cluster}: {explain(error.args[0])}") from None

    def _claim(self, partitions: Sequence[TopicPartition], level: int = logging.INFO) -> None:
        claims = self._checkpoint.claim(partitions, self._start)
        if not claims:
            return
        placed = [TopicPartition(claim.topic, claim.partition, claim.committed) for claim in claims]
        self.consumer.incremental_assign(placed)
        # Paused until `take` resumes it, so that nothing fetched for an earlier claim passes for a message of this one.
        self.consumer.pause(placed)
        for claim in claims:
            key = (claim.topic, claim.partition)
            self._claims[key] = claim
            self._unread.append(claim)
            self._paused.add(key)
            log.log(level, "reading %s from offset %d", claim, claim.committed)

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        claims = [self._claims[key] for p in partitions if (key := (p.topic, p.partition)) in self._claims]
        self._checkpoint.renew()
        self._settle(claims)
        self._end(consumer, partitions, "handed over")

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self.joined = False
        self._end(consumer, partitions, "lost: the group took this instance for dead")

    def _end(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], how: str, level: int = logging.INFO
    ) -> None:
        for partition in partitions:
            key = (partition.topic, partition.partition)
            if claim := self._claims.pop(key, None):
                claim.ended = True
                self._ends.pop(claim, None)
                self._refused.pop(claim.topic, None)
                log.log(level, "%s at offset %d %s", claim, claim.committed, how)
            self._paused.discard(key)
        consumer.incremental_unassign(list(partitions))

    def _resume(self) -> None:
        if self._paused:
            self.consumer.resume([TopicPartition(*key) for key in self._paused])
            self._paused.clear()
        if self._unread:
            # Only now: the answer wakes librdkafka's thread for the broker. It would sleep for up to a second before it
            # fetched what was resumed.
            self._warn_of_expired(self._unread)
            self._unread.clear()

    def _reclaim_fenced(self) -> None:
        """Claims again what the group still says is ours although a transaction of it was fenced.

        Somebody who had been away for long may have fenced it, not knowing that the partition was no longer theirs.
        """
        fenced = [TopicPartition(*key) for key, claim in self._claims.items() if not claim.alive]
        if not fenced:
            self._reclaim_after = None
        elif self._reclaim_after is None:
            self._reclaim_after = time.monotonic() + RECLAIM_PAUSE_S
        elif time.monotonic() > self._reclaim_after:
            self._reclaim_after = None
            self._end(self.consumer, fenced, "fenced", logging.DEBUG)
            self._claim(fenced, logging.DEBUG)

    # -- where to read

    def _follow_calendar(self) -> None:
        """Subscribes to the day's topics, and to earlier ones that are not read to their end."""
        names = topic_names(self._section.topics, self._clock())
        if not set(names) - set(self._subscribed) and self._subscribed:
            return
        try:
            unfinished = self._unfinished(names)
        except KafkaException as error:
            if not self._subscribed:
                raise
            self._complaints(error.args[0])  # midnight can wait until the brokers answer
            return
        self._subscribed = [*names, *unfinished]
        log.info("subscribed to %s", ", ".join(self._subscribed))
        self.consumer.subscribe(
            self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _unfinished(self, names: Sequence[str]) -> list[str]:
        """Topics of days before those of `names` from the first one on that the group has begun, as far as they hold
        what it has not read: it is far behind, or was away."""
        unfinished = []
        for template in self._section.topics:
            begun = False
            for topic in topic_names([template], self._clock(), DAYS_BACK):
                if topic in names:
                    continue
                partitions = self._partitions(topic)
                stored = self._checkpoint.stored(partitions)
                begun = begun or any(position is not None for position in stored)
                if begun and any(self._is_unread(*each) for each in zip(partitions, stored, strict=True)):
                    unfinished.append(topic)
        return unfinished

    def _is_unread(self, partition: TopicPartition, position: int | None) -> bool:
        low, high = self._watermarks(partition)
        return max(low, position or 0) < high

    def _partitions(self, topic: str) -> list[TopicPartition]:
        """None where there is no such topic."""
        known = self.consumer.list_topics(topic, timeout=REQUEST_TIMEOUT_S).topics[topic].partitions
        return [TopicPartition(topic, number) for number in sorted(known)]

    def _start(self, partition: TopicPartition) -> int:
        """Where to begin a partition that has no position."""
        low, high = self._watermarks(partition)
        if partition.partition >= self._cluster.topics.get(partition.topic, 0) or self._follows(partition.topic):
            return low  # it was made after reading had begun: all of it is to come
        match self._section.start:
            case "earliest":
                return low
            case "latest":
                return high
            case "stored":
                raise KafkaSetupError(
                    f"{partition.topic}/{partition.partition} has no stored position for group "
                    f"{self._section.group_id}: set input.start to earliest, latest or a time"
                )
            case moment:
                return self._offset_at(partition, moment, high)

    def _follows(self, topic: str) -> bool:
        """Whether it is a day's topic, and the group has been reading another day's."""
        for template in self._section.topics:
            days = topic_names([template], self._clock(), (*YESTERDAY_AND_TODAY, *reversed(DAYS_BACK)))
            if topic in days:
                others = (self._checkpoint.stored(self._partitions(day)) for day in days if day != topic)
                return any(position is not None for stored in others for position in stored)
        return False

    def _offset_at(self, partition: TopicPartition, moment: datetime, high: int) -> int:
        milliseconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
        wanted = TopicPartition(partition.topic, partition.partition, milliseconds)
        (found,) = self.consumer.offsets_for_times([wanted], timeout=REQUEST_TIMEOUT_S)
        if found.error:
            raise KafkaException(found.error)
        return int(found.offset) if found.offset >= 0 else high

    def _watermarks(self, partition: TopicPartition) -> tuple[int, int]:
        low, high = self.consumer.get_watermark_offsets(partition, timeout=REQUEST_TIMEOUT_S)
        return int(low), int(high)

    def _warn_of_expired(self, claims: Sequence[Claim]) -> None:
        with suppress(KafkaException):  # reading can begin without knowing
            for claim in claims:
                low, _ = self._watermarks(TopicPartition(claim.topic, claim.partition))
                if claim.committed < low:
                    log.error("%s: offsets %d to %d expired before they were read", claim, claim.committed, low - 1)

    # -- what comes

    def _judge(self, error: KafkaError, topic: str | None) -> str:
        """Logs an error of `topic`, or of the group without one, and returns what it says. Raises where it is fatal."""
        code = error.code()
        if error.fatal():
            raise KafkaSetupError(f"{self._complaints.cluster}: {explain(error)}")
        self._complaints.note(error)
        if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
            self._complaints.say(error.str(), "waiting for a topic: %s", error.str())
        elif code in REFUSED:
            return self._refusal(error, topic)
        else:
            self._complaints(error)
        return self._complaints.latest

    def _refusal(self, error: KafkaError, topic: str | None) -> str:
        """Logs what the account may not do, and how that is granted."""
        right = (
            Right(("Read", "Describe"), "topic", topic) if topic else Right(("Read",), "group", self._section.group_id)
        )
        account = self._complaints.account
        self._complaints.latest = account.lacks(right) if account else f"{error.str()}: ask for access"
        self._complaints.say(right, "%s: %s", self._complaints.cluster, self._complaints.latest)
        return self._complaints.latest


def _timestamp_ms(message: Any) -> int | None:
    """The producer's own word, else Kafka's timestamp."""
    for name, value in message.headers() or ():
        if name == TIMESTAMP_HEADER and value and value.isdigit() and len(value) <= MAX_TIMESTAMP_DIGITS:
            return int(value)
    kind, milliseconds = message.timestamp()
    return int(milliseconds) if kind else None
