"""The consumer: messages in, as packets with the claim that they were read under. All its methods are for one thread.

Never commits a position: that is for the transaction that holds the output. Never waits long without serving the group:
whoever does is taken for dead, and its partitions are given away. Never reads the headers of a message, which may be
anybody's: confluent-kafka 2.16.1 ends the process with a segmentation fault where a header's key is not UTF-8.
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
CLAIM_PAUSE_S = 2.0
"""Before claiming again what the group says is ours: time for the group to say whose it is, or for brokers to come
back."""
FENCED = "fenced"
"""Why a partition is claimed again whose transaction was fenced: routine, and logged as that."""
TRUNCATED = re.compile(r"broker end offset is (\d+)")
"""How librdkafka says where a log that was truncated departs from what was read (its rdkafka_offset.c)."""

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
            claim.enqueued = offset + 1

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
        error_log: ThrottledErrorLog,
        drain: Callable[[Collection[Claim]], None],
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`drain` waits, not for ever, until what was read under the claims is committed. `metrics`: where lost
        messages are counted. `clock`: the time in UTC."""
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
        self._highs: dict[Key, int] = {}  # the ends of logs as they were seen while messages of them were on their way
        self._ends: dict[Claim, tuple[int, int]] = {}  # the end that was reached, and what was to be read before it
        self._refused: dict[str, str] = {}  # topics that may not be read, until something of them comes: why
        self._unread: list[Claim] = []  # paused since they were claimed
        self._paused: set[Key] = set()
        self._adrift: dict[Key, str] = {}  # ours, but not read until they are claimed again, and why
        self._claim_after: float | None = None
        self._subscribed: list[str] = []
        self._found: Found | None = None
        self.joined = False

    def subscribe(self, checkpoint: Checkpoint) -> None:
        """Joins the group. Partitions are claimed through `checkpoint`."""
        self._checkpoint = checkpoint
        self._days = Days(self._section, self._admin, self._cluster, checkpoint, self._error_log, self._clock)
        self._days.start()
        self._placement = Placement(self._section, self._admin, self._cluster, self._days, self._metrics)
        self._follow_topics()

    @property
    def claims(self) -> list[Claim]:
        """The living claims."""
        return [claim for claim in self._claims.values() if claim.alive]

    @property
    def waits_for(self) -> str:
        """Why it is not in the group, or may not read a topic, as far as it is known; empty where it does both."""
        if self.joined:
            unclaimed = len(self._adrift.keys() - self._claims.keys())
            away = f"{unclaimed} partitions cannot be claimed yet: {self._error_log.latest}" if unclaimed else ""
            refused = [reason for topic, reason in self._refused.items() if topic in self._subscribed]
            return "; ".join(filter(None, [away, *refused]))
        return f"not joined yet: {self._error_log.latest}" if self._error_log.latest else "not joined yet"

    def take(self, max_packets: int, max_wait_s: float) -> Delivery | None:
        """Up to `max_packets`, or fewer where no more come within `max_wait_s` of the first; None where none come.

        Also fewer where they have DELIVERY_BYTES already.
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
            if claim is self._claim_of(message):  # the group may have been served in between
                self._admit(message, delivery)
        return delivery if delivery.packets else None

    def pause(self) -> None:
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
            if claim.read > claim.committed and key not in self._adrift:  # the log is the one that was read
                self._highs[key] = high
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
            return  # its next owner reads it again
        offset = message.offset()
        if (claim.topic, claim.partition) in self._paused:
            raise UnexpectedMessageError(f"{claim}: offset {offset} came although the partition is paused")
        if offset < claim.read:
            raise UnexpectedMessageError(
                f"{claim}: offset {offset} came after {claim.read - 1}: was the topic deleted and made anew? "
                "Start again: the stored position is compared with the topic then"
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
        except KafkaException as error:  # as it is, it would lose its type on its way through librdkafka
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
        # Paused until `take` resumes it, so that nothing fetched for an earlier claim passes for a message of this one.
        self.consumer.pause(placed)
        for claim in claims:
            key = (claim.topic, claim.partition)
            self._claims[key] = claim
            self._unread.append(claim)
            self._paused.add(key)
            log.log(level, "reading %s from offset %d", claim, claim.committed)

    def _put_off(self, partitions: Sequence[TopicPartition], error: KafkaAwayError | KafkaException) -> None:
        """Takes partitions that cannot be claimed while brokers are away, so that the group is served meanwhile."""
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
            with suppress(KafkaException):  # reading can begin without either
                # librdkafka compares the epoch of a position that is sought, but not always of one that is assigned.
                for claim in self._unread:
                    if claim.leader_epoch is not None:
                        self.consumer.seek(claim_offset(claim, claim.committed))
                # Only now: the answers wake librdkafka's threads for the brokers. They would sleep for up to a second
                # before they fetched what was resumed.
                times = [TopicPartition(claim.topic, claim.partition, 0) for claim in self._unread]
                self.consumer.offsets_for_times(times, timeout=REQUEST_TIMEOUT_S)
            self._unread.clear()

    def _leave(self, claim: Claim, error: KafkaError) -> None:
        """Puts a partition aside whose next offset is gone, until what was read of it before is committed."""
        key = (claim.topic, claim.partition)
        truncated = TRUNCATED.search(error.str())
        self._placement.note_out_of_range(key, int(truncated[1]) if truncated else None, self._highs.pop(key, 0))
        self._adrift[key] = f"left: {error.str()}"

    def _claim_again(self) -> None:
        """Claims again what the group still says is ours and no living claim reads.

        A claim was fenced by somebody who had been away for long and did not know that the partition was no longer
        theirs; the log no longer holds the next offset; or brokers were away when the partition was to be claimed.
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
        """Subscribes to the topics that are to be read, and leaves partitions of topics that were made anew."""
        found = self._days.found
        if found is self._found:
            return
        self._found = found
        for key, claim in self._claims.items():
            if claim.topic_id and found.ids.get(claim.topic, claim.topic_id) not in (claim.topic_id, None):
                self._adrift[key] = "left: its topic was made anew"
        if found.topics != self._subscribed:
            self._subscribed = found.topics
            log.info("subscribed to %s", ", ".join(self._subscribed))
            self.consumer.subscribe(
                self._subscribed, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    # -- what comes

    def _judge(self, error: KafkaError, topic: str | None) -> str:
        """Logs an error of `topic`, or of the group without one, and returns what it says. Raises where it is fatal."""
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
        """Logs what the account may not do, and how that is granted."""
        right = (
            Right(("Read", "Describe"), "topic", topic) if topic else Right(("Read",), "group", self._section.group_id)
        )
        account = self._error_log.account
        self._error_log.latest = account.lacks(right) if account else f"{error.str()}: ask for access"
        self._error_log.say(right, "%s: %s", self._error_log.cluster, self._error_log.latest)
        return self._error_log.latest


def group_observer(properties: Mapping[str, object], group: str) -> Consumer:
    """A client that reads a group's positions without being a member, for another thread than the member's own."""
    own = {"group.id": group, "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
    return Consumer({**properties, **own}, logger=librdkafka_log)


def _timestamp_ms(message: Any) -> int | None:
    """Kafka's timestamp: when the producer sent the message or, where the topic says so, when the broker took it."""
    kind, milliseconds = message.timestamp()
    return int(milliseconds) if kind else None
