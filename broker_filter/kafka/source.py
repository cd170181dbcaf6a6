"""The consumer: reads messages as packets, each with the claim on its partition. Only one thread may use it.

It never commits a position: the transaction that holds the output does. It never waits long without polling, because
the group would consider this instance dead and give its partitions to others. It never reads the headers of a message,
which are untrusted input: confluent-kafka 2.16.1 crashes with a segmentation fault if the key of a header is not UTF-8.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from broker_filter.config import Input
from broker_filter.kafka.checkpoint import Checkpoint, claim_offset
from broker_filter.kafka.client import (
    REQUEST_TIMEOUT_S,
    Cluster,
    KafkaAwayError,
    KafkaSetupError,
    ThrottledErrorLog,
    admin_client,
    explain,
    librdkafka_log,
)
from broker_filter.kafka.days import Days, Found
from broker_filter.kafka.placement import Placement
from broker_filter.kafka.rights import REFUSED, Right
from broker_filter.kafka.transactions import Claim
from broker_filter.metrics import Metrics
from broker_filter.packets.packet import KafkaPosition, Packet

SESSION_TIMEOUT_MS = 10_000
"""After this time without a heartbeat, the partitions of a dead instance go to another. An alert must arrive within a
minute."""
MAX_POLL_INTERVAL_MS = 300_000
METADATA_REFRESH_MS = 10_000
"""Time until a new topic is found."""
PREFETCH_KBYTES = 64 * 1024
"""Largest amount that librdkafka reads ahead. With the bounded queues, it limits the memory."""
FETCH_PARTITION_BYTES = 4 * 2**20
"""About fifty alerts of a partition in one response. A larger message still arrives, alone in a response."""
QUEUE_FULL_BACKOFF_MS = 10
"""Pause before the next fetch when the read-ahead queue is full. librdkafka's default of 1 s would delay a burst."""
IDLE_S = 0.1
"""Time to wait for the first message of a batch before other work, such as new claims, is done."""
DELIVERY_BYTES = 32 * 2**20
"""A batch ends at this size, because about twelve batches are in flight. 128 LSST alerts have 18 MB."""
MESSAGES_AT_A_TIME = 16
"""Messages that are requested from librdkafka before the size of the batch is checked."""
CLAIM_PAUSE_S = 2.0
"""Pause before an assigned partition is claimed again: time for the group to rebalance, or for brokers to come back."""
FENCED = "fenced"
"""Why a partition is claimed again after its transaction was fenced. This is routine and logged at level DEBUG."""
TRUNCATED = re.compile(r"broker end offset is (\d+)")
"""The part of librdkafka's error message (rdkafka_offset.c) that states the offset to which a log was truncated."""

log = logging.getLogger(__name__)

Key = tuple[str, int]


class UnexpectedMessageError(RuntimeError):
    """A message arrived that the consumer should not deliver. The service ends, because positions cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """N packets in the order of reading, with the offset and the claim of each."""

    packets: list[Packet] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def set_out(self) -> None:
        """Mark the packets as in flight; revocation of a partition waits for them."""
        for offset, claim in zip(self.offsets, self.claims, strict=True):
            claim.enqueued = offset + 1

    def split(self, n_packets: int) -> tuple[Delivery, Delivery]:
        """Return a delivery with the first `n_packets`, and one with the other packets."""
        first, rest = slice(n_packets), slice(n_packets, None)
        return (
            Delivery(self.packets[first], self.offsets[first], self.claims[first]),
            Delivery(self.packets[rest], self.offsets[rest], self.claims[rest]),
        )


class KafkaSource:
    """A member of the consumer group, with the claims on its assigned partitions."""

    def __init__(
        self,
        section: Input,
        properties: Mapping[str, object],
        cluster: Cluster,
        error_log: ThrottledErrorLog,
        drain: Callable[[Collection[Claim]], None],
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`drain`: waits, for a limited time, until all messages that were read under the claims are committed.

        `cluster`: the input's cluster with its topics before reading began. `metrics`: counts lost messages. `clock`:
        returns the time in UTC.
        """
        self._section = section
        self._cluster = cluster
        self._error_log = error_log
        self._drain = drain
        self._metrics = metrics
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
            "auto.offset.reset": "error",  # a position that the log no longer holds is a loss: see `Placement`
            "error_cb": error_log,
        }
        self.consumer = Consumer({**defaults, **properties, **own}, logger=librdkafka_log)
        self._admin = admin_client(properties, error_log)
        self._claims: dict[Key, Claim] = {}
        self._highs: dict[Key, int] = {}  # ends of logs, as seen while their messages were in flight
        self._ends: dict[Claim, tuple[int, int]] = {}  # the end that was reached, and `read` at that time
        self._refused: dict[str, str] = {}  # by topic that the account cannot read, the reason
        self._unread: list[Claim] = []  # paused since they were claimed
        self._paused: set[Key] = set()
        self._adrift: dict[Key, str] = {}  # assigned partitions that must be claimed again, and why
        self._claim_after: float | None = None
        self._subscribed: list[str] = []
        self._found: Found | None = None
        self.joined = False

    def subscribe(self, checkpoint: Checkpoint) -> None:
        """Join the group. `checkpoint` claims the partitions that are assigned later."""
        self._checkpoint = checkpoint
        self._days = Days(self._section, self._admin, self._cluster, checkpoint, self._error_log, self._clock)
        self._days.start()
        self._placement = Placement(self._section, self._admin, self._cluster, self._days, self._metrics)
        self._follow_topics()

    @property
    def claims(self) -> list[Claim]:
        """The claims that are alive."""
        return [claim for claim in self._claims.values() if claim.alive]

    @property
    def waits_for(self) -> str:
        """Why this instance is not in the group or does not read a topic; empty if there is no such reason."""
        if self.joined:
            unclaimed = len(self._adrift.keys() - self._claims.keys())
            away = f"{unclaimed} partitions cannot be claimed yet: {self._error_log.latest}" if unclaimed else ""
            refused = [reason for topic, reason in self._refused.items() if topic in self._subscribed]
            return "; ".join(filter(None, [away, *refused]))
        return f"not joined yet: {self._error_log.latest}" if self._error_log.latest else "not joined yet"

    def take(self, max_packets: int, max_wait_s: float) -> Delivery | None:
        """Read up to `max_packets` packets. Returns None if no packet arrives within IDLE_S.

        Returns fewer packets if no more arrive within `max_wait_s` seconds of the first, or when they have
        DELIVERY_BYTES.
        """
        self._follow_topics()
        self._claim_again()
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
            if claim is self._claim_of(message):  # a poll since may have revoked the claim
                self._admit(message, delivery)
        return delivery if delivery.packets else None

    def pause(self) -> None:
        """Pause all partitions and poll, to stay in the group while the queue to the scorer is full."""
        unpaused = [key for key in self._claims if key not in self._paused]
        if unpaused:
            self.consumer.pause([TopicPartition(*key) for key in unpaused])
            self._paused.update(unpaused)
        message = self.consumer.poll(0)
        self._checkpoint.renew()
        if message is not None:
            self._admit(message, Delivery())

    def lags(self) -> dict[Key, int]:
        """Return the number of messages between the committed position and the end of each partition.

        The number is 0 until the end of the partition is known.
        """
        lags = {}
        for key, claim in self._claims.items():
            _, high = self.consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
            if claim.read > claim.committed and key not in self._adrift:  # the log has not been replaced or truncated
                self._highs[key] = high
            end, last = self._ends.get(claim, (0, 0))
            # Offsets after the last message may be transaction markers or aborted records, which are never delivered.
            lags[key] = max(0, high - (end if claim.committed == last else claim.committed))
        return lags

    def report_positions(self, *, wait: bool = False) -> None:
        """Commit the positions to the input's group, for tools that show the lag. The service never reads them.

        `wait`: returns after the brokers have answered.
        """
        offsets = [TopicPartition(claim.topic, claim.partition, claim.committed) for claim in self.claims]
        if not offsets:
            return
        try:
            self.consumer.commit(offsets=offsets, asynchronous=not wait)
        except KafkaException as error:
            log.debug("positions were not committed to group %s: %s", self._section.group_id, error)

    def close(self) -> None:
        """Leave the group. The next owner reads uncommitted messages again."""
        for claim in self._claims.values():
            claim.ended = not claim.drained
        self._days.stop()
        self.consumer.close()

    def _claim_of(self, message: Any) -> Claim | None:
        return self._claims.get((message.topic(), message.partition()))

    def _admit(self, message: Any, delivery: Delivery) -> None:
        claim = self._claim_of(message)
        if message.error():
            match message.error().code():
                case KafkaError._PARTITION_EOF:
                    if claim:
                        self._ends[claim] = message.offset(), claim.read
                        self._refused.pop(claim.topic, None)
                case KafkaError._AUTO_OFFSET_RESET:
                    if claim:
                        self._leave(claim, message.error())
                case code:
                    reason = self._judge(message.error(), message.topic())
                    if message.topic() and code in REFUSED:
                        self._refused[message.topic()] = reason
            return
        if claim is None or not claim.alive:
            return  # the next owner of the partition reads the message again
        offset = message.offset()
        if (claim.topic, claim.partition) in self._paused:
            raise UnexpectedMessageError(f"{claim}: offset {offset} was delivered although the partition is paused")
        if offset < claim.read:
            raise UnexpectedMessageError(
                f"{claim}: offset {offset} was delivered after {claim.read - 1}: was the topic deleted and created "
                "again? Restart the service: it compares the stored position with the topic"
            )
        claim.read = offset + 1
        claim.leader_epoch = message.leader_epoch()
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
        except KafkaException as error:  # librdkafka would not keep the type of this exception
            raise KafkaSetupError(f"{self._error_log.cluster}: {explain(error.args[0])}") from None

    def _claim(self, partitions: Sequence[TopicPartition], level: int = logging.INFO) -> None:
        try:
            claims = self._checkpoint.claim(partitions, self._placement)
        except (KafkaAwayError, KafkaException) as error:
            self._put_off(partitions, error)
            return
        if not claims:
            return
        placed = [claim_offset(claim, claim.committed) for claim in claims]
        self.consumer.incremental_assign(placed)
        # Paused until `take` resumes the partitions, so that a message fetched for an earlier claim is not delivered.
        self.consumer.pause(placed)
        for claim in claims:
            key = (claim.topic, claim.partition)
            self._claims[key] = claim
            self._unread.append(claim)
            self._paused.add(key)
            log.log(level, "reading %s from offset %d", claim, claim.committed)

    def _put_off(self, partitions: Sequence[TopicPartition], error: KafkaAwayError | KafkaException) -> None:
        """Accept partitions that cannot be claimed yet because brokers do not answer, so that polling can go on."""
        if isinstance(error, KafkaException):
            if error.args[0].fatal() or error.args[0].code() in REFUSED:
                raise error
            self._error_log(error.args[0])
        else:
            self._error_log.say("claim", "%s", error)
        taken = [TopicPartition(p.topic, p.partition, 0) for p in partitions]
        self.consumer.incremental_assign(taken)
        self.consumer.pause(taken)
        self._adrift |= {(p.topic, p.partition): "put off" for p in partitions}

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        claims = [self._claims[key] for p in partitions if (key := (p.topic, p.partition)) in self._claims]
        self._checkpoint.renew()
        self._drain(claims)
        self._end(consumer, partitions, "revoked")

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self.joined = False
        self._end(consumer, partitions, "lost: the group considered this instance dead")

    def _end(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], how: str, level: int = logging.INFO
    ) -> None:
        for partition in partitions:
            key = (partition.topic, partition.partition)
            if claim := self._claims.pop(key, None):
                claim.ended = True
                self._ends.pop(claim, None)
                self._refused.pop(claim.topic, None)
                self._unread = [other for other in self._unread if other is not claim]
                log.log(level, "%s at offset %d %s", claim, claim.committed, how)
            self._paused.discard(key)
            self._adrift.pop(key, None)
        consumer.incremental_unassign(list(partitions))

    def _resume(self) -> None:
        if self._paused:
            self.consumer.resume([TopicPartition(*key) for key in self._paused])
            self._paused.clear()
        if self._unread:
            with suppress(KafkaException):  # reading works without these two calls
                # librdkafka always checks the leader epoch after a seek, but not always after an assignment.
                for claim in self._unread:
                    if claim.leader_epoch is not None:
                        self.consumer.seek(claim_offset(claim, claim.committed))
                # This request must follow `resume`: its answers wake librdkafka's broker threads, which could otherwise
                # sleep for up to a second before they fetch the resumed partitions.
                times = [TopicPartition(claim.topic, claim.partition, 0) for claim in self._unread]
                self.consumer.offsets_for_times(times, timeout=REQUEST_TIMEOUT_S)
            self._unread.clear()

    def _leave(self, claim: Claim, error: KafkaError) -> None:
        """Mark a partition whose next offset is gone: it is claimed again when all its messages are committed."""
        key = (claim.topic, claim.partition)
        truncated = TRUNCATED.search(error.str())
        self._placement.note_out_of_range(key, int(truncated[1]) if truncated else None, self._highs.pop(key, 0))
        self._adrift[key] = f"left: {error.str()}"

    def _claim_again(self) -> None:
        """Claim assigned partitions that no living claim reads.

        There are three causes. The claim was fenced by an instance that did not know yet that it had lost the
        partition; the log no longer holds the next offset; or the brokers did not answer when the partition was to be
        claimed.
        """
        self._adrift |= {key: FENCED for key, claim in self._claims.items() if not claim.alive}
        if not self._adrift:
            self._claim_after = None
        elif self._claim_after is None:
            self._claim_after = time.monotonic() + CLAIM_PAUSE_S
        elif time.monotonic() > self._claim_after:
            self._claim_after = None
            ready = {
                key: why for key, why in self._adrift.items() if not (claim := self._claims.get(key)) or claim.drained
            }
            for key, why in ready.items():
                self._end(self.consumer, [TopicPartition(*key)], why, logging.DEBUG if why == FENCED else logging.INFO)
            if ready:
                level = logging.DEBUG if set(ready.values()) == {FENCED} else logging.INFO
                self._claim([TopicPartition(*key) for key in ready], level)

    def _follow_topics(self) -> None:
        """Subscribe to the topics to read, and mark partitions of topics that were created again."""
        found = self._days.found
        if found is self._found:
            return
        self._found = found
        for key, claim in self._claims.items():
            if claim.topic_id and found.ids.get(claim.topic, claim.topic_id) not in (claim.topic_id, None):
                self._adrift[key] = "left: its topic was created again"
        if found.topics != self._subscribed:
            self._subscribed = found.topics
            log.info("subscribed to %s", ", ".join(self._subscribed))
            self.consumer.subscribe(
                self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    # -- errors of the consumer

    def _judge(self, error: KafkaError, topic: str | None) -> str:
        """Log an error of `topic`, or of the group if `topic` is None, and return its message.

        Raises KafkaSetupError if the error is fatal.
        """
        code = error.code()
        if error.fatal():
            raise KafkaSetupError(f"{self._error_log.cluster}: {explain(error)}")
        self._error_log.note(error)
        if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
            self._error_log.say(error.str(), "waiting for a topic: %s", error.str())
        elif code in REFUSED:
            return self._refusal(error, topic)
        else:
            self._error_log(error)
        return self._error_log.latest

    def _refusal(self, error: KafkaError, topic: str | None) -> str:
        """Log and return which right the account lacks and how to grant it."""
        right = (
            Right(("Read", "Describe"), "topic", topic) if topic else Right(("Read",), "group", self._section.group_id)
        )
        account = self._error_log.account
        self._error_log.latest = account.lacks(right) if account else f"{error.str()}: ask for access"
        self._error_log.say(right, "%s: %s", self._error_log.cluster, self._error_log.latest)
        return self._error_log.latest


def group_observer(properties: Mapping[str, object], group: str) -> Consumer:
    """Return a client that reads a group's positions without joining it, so that another thread can use the client."""
    own = {"group.id": group, "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
    return Consumer({**properties, **own}, logger=librdkafka_log)


def _timestamp_ms(message: Any) -> int | None:
    """Return the message's Kafka timestamp in Unix milliseconds, or None.

    It is the time at which the producer sent the message or, if the topic is configured so, the broker stored it.
    """
    kind, milliseconds = message.timestamp()
    return int(milliseconds) if kind else None
