"""Exactly-once, as a state machine: partitions are claimed, work is produced, transactions are committed or repeated.

Invariants. A position moves only in the transaction that holds the output of every packet before it. While a claim
lasts, its position only grows. Work is dropped only when its transaction is committed or its claim has ended, and never
because of an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, count
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from broker_filter.kafka.client import (
    MAX_RECORD_BYTES,
    KafkaAwayError,
    KafkaSetupError,
    RecordLimits,
    ThrottledErrorLog,
    explain,
    librdkafka_log,
    pauses,
)
from broker_filter.kafka.rights import REFUSED, Right
from broker_filter.kafka.watchdog import Stage
from broker_filter.kafka.window import Window
from broker_filter.metrics import Metrics
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import Account
from broker_filter.streaming.dead_letters import REASON, REDRIVEN, letter_headers
from broker_filter.streaming.encoding import OutputRecord
from broker_filter.streaming.scored import LeftOut

BATCH_BYTES = 1_000_000
"""librdkafka's default. A batch of records is smaller, unless it holds a single record."""
LINGER_MS = 50
"""Time for a batch to fill, so that fewer requests are sent. A commit does not wait for it, because it flushes."""
GRACE_S = 15.0
"""The coordinator aborts a transaction that is late by this time, because others may wait for the partitions of a dead
instance. A cluster needs 6 to 10 s to move a coordinator from a dead node, which is less."""
OPEN_TIMEOUT_S = 45.0
"""Time limit to open a writer. The coordinator may be moving to another node, or may first have to end the transaction
of an earlier owner. Together with the time to read the positions, it is less than the default of `stall_timeout_s`."""
CALL_TIMEOUT_S = 5.0
"""Timeout of one call to the transaction coordinator. A call that timed out is repeated, so this only limits the time
between two beats for the watchdog."""
RETRY_PAUSE_S = 0.1
REFUSED_PAUSE_S = 10.0
"""Pause before a refused transaction is repeated, because an administrator must grant the right first."""
GIVEN_UP = (KafkaError._FENCED, KafkaError.INVALID_TXN_STATE)
"""Errors after which a producer is useless but a new one works: another instance has its transactional id, or the
coordinator died before it knew the transaction that is to be aborted."""
TRUNCATED = "truncated"
"""Header of a dead letter that was shortened. Its value is the original size in bytes."""

log = logging.getLogger(__name__)


class PositionError(RuntimeError):
    """A position would go back: the same packets would be published twice."""


class FencedError(RuntimeError):
    """Another instance has fenced this producer, or the producer is useless for another reason."""


class ClaimEndedError(RuntimeError):
    """The transaction holds work of a partition that this instance does not own, or may no longer own."""


@dataclass(eq=False, slots=True)
class Claim:
    """The claim of this instance on a partition, from the assignment until the partition is revoked, lost or fenced.

    A partition that is claimed again gets a new claim, and the remaining work of the old claim is dropped. The reading
    thread sets `read` and `enqueued`; the committing thread sets `produced` and `committed`.
    """

    topic: str
    partition: int
    writer: Writer
    committed: int
    """The position that is stored in Kafka: the first offset whose output is not committed."""
    read: int = field(init=False)
    """The offset of the last message that was read, plus one."""
    enqueued: int = field(init=False)
    """The offset of the last packet that was sent to the decoder, plus one. Up to it, packets are in flight."""
    produced: int = field(init=False)
    """The offset of the last packet whose output was given to the writer, plus one."""
    ended: bool = False
    """Whether the group has taken the partition away."""
    topic_id: str | None = None
    """The id of the topic that the offsets belong to, or None if it is unknown. It is stored with each position."""
    leader_epoch: int | None = None
    """The leader epoch of the latest message that was read, or None. It is stored with each position, so that a
    truncated log can be recognised."""

    def __post_init__(self) -> None:
        self.read = self.enqueued = self.produced = self.committed

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"

    @property
    def key(self) -> tuple[str, int]:
        """The partition as (topic, number)."""
        return self.topic, self.partition

    @property
    def alive(self) -> bool:
        """Whether a position may still be stored for this claim."""
        return not (self.ended or self.writer.fenced)

    @property
    def drained(self) -> bool:
        """Whether no packet of this claim is in flight that can still be committed."""
        return self.committed >= self.enqueued or not self.alive


@dataclass(slots=True)
class Work:
    """Some consecutive packets of one claim, with their output records and the outcome of their alerts."""

    claim: Claim
    start: int
    """The first packet's offset."""
    end: int
    """The last packet's offset, plus one."""
    packets: list[Packet] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    """The account of each packet."""
    records: list[tuple[int, OutputRecord]] = field(default_factory=list)
    """Output records, each with the index in `packets` of the packet that it was made from."""

    @property
    def size(self) -> int:
        """The size of the output records in bytes."""
        return sum(len(record.value) for _, record in self.records)

    def split(self, room: int) -> list[Work]:
        """Divide the work after the packets whose output fits into `room` bytes, but after at least one packet.

        Returns a list of one or two pieces of work.
        """
        sizes = [0] * len(self.packets)
        for i, record in self.records:
            sizes[i] += len(record.value)
        n = next((n for n, total in enumerate(accumulate(sizes)) if n and total > room), len(sizes))
        if n == len(sizes):
            return [self]
        position = self.packets[n].position
        assert isinstance(position, KafkaPosition), "packets of the service come from Kafka"
        first = [(i, record) for i, record in self.records if i < n]
        rest = [(i - n, record) for i, record in self.records if i >= n]
        middle = position.offset
        return [
            Work(self.claim, self.start, middle, self.packets[:n], self.accounts[:n], first),
            Work(self.claim, middle, self.end, self.packets[n:], self.accounts[n:], rest),
        ]

    def fit(self, limits: RecordLimits) -> None:
        """Make every record fit into its topic. A record that is too large becomes a dead letter.

        A dead letter that is too large is shortened, and gets the header TRUNCATED. An optional record that is too
        large is left out.
        """
        too_large = [(i, record) for i, record in self.records if _size(record) > limits.of(record.topic)]
        if not too_large:
            return
        refused = {i: one for i, one in too_large if not (one.optional or one.topic == limits.dead_letter)}
        for i, record in refused.items():
            self._reject_too_large(i, record, limits)
        kept = []
        for i, record in self.records:
            if record.optional and _size(record) > limits.of(record.topic):
                self.accounts[i].left_out[LeftOut.TOO_LARGE] += 1
            else:
                kept.append((i, _cut(record, limits)))
        self.records = kept

    def _reject_too_large(self, i: int, record: OutputRecord, limits: RecordLimits) -> None:
        detail = f"topic {record.topic} accepts no record of {_size(record)} bytes: raise its max.message.bytes"
        kept = [header for header in record.headers if header[0] != REDRIVEN]
        headers = [*kept, (REASON, RejectReason.TOO_LARGE.encode()), ("detail", detail.encode())]
        headers += letter_headers(self.packets[i])  # nothing of the packet is published now
        letter = OutputRecord(limits.dead_letter, record.key, self.packets[i].data, headers)
        account = self.accounts[i]
        account.rejected = Counter({RejectReason.TOO_LARGE: account.consumed})
        account.scored = account.duplicates = 0
        self.records = [(k, kept) for k, kept in self.records if k != i] + [(i, letter)]


def _size(record: OutputRecord) -> int:
    headers = sum(len(name) + len(value) for name, value in record.headers)
    return len(record.value) + len(record.key or b"") + headers


def _cut(record: OutputRecord, limits: RecordLimits) -> OutputRecord:
    excess = _size(record) - limits.of(record.topic)
    if excess <= 0:
        return record
    if record.key and excess > len(record.value):  # the key alone is too large for a record
        return _cut(replace(record, key=None), limits)
    headers = record.headers
    if TRUNCATED not in dict(headers):
        headers = [*headers, (TRUNCATED, str(len(record.value)).encode())]
    return OutputRecord(record.topic, record.key, record.value[: max(0, len(record.value) - excess)], headers)


Refusals = dict[tuple[str, int], str]
"""By input partition, why its output was refused last and which right to grant. It outlives the refused writer."""
Store = Callable[[Any, Mapping[Claim, int]], None]
"""Adds positions to the producer's open transaction. Raises ClaimEndedError if one of the claims may have ended."""


class Writer:
    """A transactional producer. It holds work until the work's transaction is committed."""

    def __init__(
        self,
        properties: Mapping[str, object],
        limits: RecordLimits,
        metrics: Metrics,
        error_log: ThrottledErrorLog,
        stage: Stage,
        transactional_id: str,
        store: Store,
        *,
        window: Window | None = None,
        stop: threading.Event | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        """Fence the producer that had `transactional_id` before. Waits count as progress of `stage`.

        The writers of one cluster share `window` and `refusals`. Once `stop` is set, a writer that is refused raises
        KafkaSetupError. Raises KafkaAwayError if the coordinator does not answer, and KafkaSetupError if it refuses.
        """
        self._limits = limits
        self._metrics = metrics
        self._error_log = error_log
        self._stage = stage
        self._store = store
        self._window = window or Window(GRACE_S)
        self._stop = stop or threading.Event()
        self._refusals = {} if refusals is None else refusals
        self._held: list[Work] = []
        self._produced = 0  # how many of `_held` are in the open transaction
        self._in_flight = 0  # bytes of the open transaction
        self._open = False
        self._opened = 0.0
        self._failure: KafkaException | None = None
        self._began = 0.0
        self.fenced = False
        self.refused = False
        """Whether this writer was closed because the brokers refused its output. The refusal is logged."""
        self.trouble = ""
        """Why the latest attempt to commit failed; empty if it succeeded."""
        self._batch_bytes = min(BATCH_BYTES, limits.smallest)
        defaults = {
            "batch.size": self._batch_bytes,
            "linger.ms": LINGER_MS,
            "message.max.bytes": MAX_RECORD_BYTES,
            # With the default, librdkafka 2.16 can wait for ever in send_offsets_to_transaction after an outage of all
            # brokers: it waits for a group coordinator that it has dropped from its list of brokers.
            "metadata.recovery.strategy": "none",
            # With more requests in flight, the thread of librdkafka 2.16 that sends them polls its socket without a
            # pause while it waits for answers. It takes a core from the service, and from a broker on the same machine.
            "max.in.flight.requests.per.connection": 1,
        }
        own = {"transactional.id": transactional_id, "error_cb": error_log}
        self._producer = Producer({**defaults, **properties, **own}, logger=librdkafka_log)
        self._transactional_id = transactional_id
        self._initialise()

    def _initialise(self) -> None:
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while True:
            try:
                self._producer.init_transactions(CALL_TIMEOUT_S)
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    failure = KafkaAwayError if error.args[0].retriable() else KafkaSetupError
                    raise failure(
                        f"{self._error_log.cluster}: cannot open transactions as {self._transactional_id!r}: "
                        f"{self._explain(error.args[0])}"
                    ) from None
            else:
                return

    def store_start(self, claim: Claim) -> None:
        """Commit the start of a claim before anything is read, so that a restart starts at the same position.

        If the brokers refuse it, the writer is fenced and the claim ends. Raises KafkaSetupError if it fails otherwise.
        """
        try:
            self._producer.begin_transaction()
            self._store(self._producer, {claim: claim.committed})
            self._producer.commit_transaction(OPEN_TIMEOUT_S)
        except KafkaException as error:
            cause = error.args[0]
            self._log_error(cause)
            if cause.code() not in REFUSED:
                raise KafkaSetupError(f"{self._error_log.cluster}: {self.trouble}") from None
            self.fenced = True
            self._metrics.abort()
            self._refusals[claim.key] = self.trouble
        else:
            self._refusals.pop(claim.key, None)

    def add(self, work: Work) -> None:
        """Add work to the open transaction, or to a new one. Raises PositionError if its packets were added before."""
        claim = work.claim
        if work.start < claim.produced or work.end <= work.start:
            raise PositionError(
                f"{claim}: packets {work.start} to {work.end - 1} do not follow position {claim.produced}"
            )
        claim.produced = work.end
        work.fit(self._limits)
        if not self._held:
            self._began = time.monotonic()
        self._held.append(work)
        self._produce_ahead()

    @property
    def waiting_since(self) -> float | None:
        """The monotonic time in seconds at which the oldest held work was added; None if no work is held."""
        return self._began if self._held else None

    @property
    def crowded(self) -> bool:
        """Whether the window has no room for all held work, so that a commit is due."""
        return self._produced < len(self._held)

    @property
    def held_packets(self) -> int:
        """The number of packets whose output is not committed yet."""
        return sum(len(work.packets) for work in self._held)

    def commit(self) -> list[Work]:
        """Commit held work in one transaction, repeat this until it succeeds, and return the committed work.

        The transaction holds all work, or as much as the window has room for. Work whose claim has ended is dropped.
        Raises FencedError if this writer can no longer commit, and KafkaSetupError if a repetition cannot succeed.
        """
        for pause in pauses():
            try:
                if self._failure:
                    raise self._failure
                return self._attempt()
            except (KafkaException, ClaimEndedError) as error:
                self._failure = None
                cause = self._cause(error.args[0]) if isinstance(error, KafkaException) else None
                refused = cause is not None and cause.code() in REFUSED
                self._recover(cause, refused)
            self._stage.rest(pause, self._stop if refused else None)
        raise AssertionError("pauses() does not end")

    def close(self) -> None:
        """Drop the held work, and abort the open transaction."""
        self._held.clear()
        if self._open:
            with suppress(KafkaException):  # if the abort fails, the coordinator ends the transaction after its timeout
                self._producer.abort_transaction(CALL_TIMEOUT_S)
        self._reset()

    def _attempt(self) -> list[Work]:
        if not all(work.claim.alive for work in self._held):
            self._abort()
            self._held = [work for work in self._held if work.claim.alive]
        if not self._held:
            return []
        began = time.monotonic()
        self._produce(least=1)
        committed = self._held[: self._produced]
        ends = {work.claim: work.end for work in committed}
        self._retry(lambda: self._store(self._producer, ends))
        self._retry(lambda: self._producer.commit_transaction(CALL_TIMEOUT_S))
        self._window.passed(self._in_flight, began)
        del self._held[: self._produced]
        self._open = False
        self._reset()
        for claim, end in ends.items():
            claim.committed = end
            self._refusals.pop(claim.key, None)
        self.trouble = ""
        self._began = time.monotonic()
        if self._batches_too_large and not self._held:
            self.fenced = True  # batches of one record are slow: a new producer with smaller batches takes over
        self._produce_ahead()
        return committed

    def _produce_ahead(self) -> None:
        """Produce held work as far as the window has room, so that it is in flight before the commit is due."""
        if self._failure is None:
            try:
                self._produce(least=0)
            except KafkaException as error:
                self._failure = error  # `commit` handles it

    def _produce(self, least: int) -> None:
        """Produce held work as far as the window has room, but at least `least` pieces of work."""
        while self._produced < len(self._held):
            work = self._held[self._produced]
            size = work.size
            if not self._window.take(size):
                if self._produced:
                    return
                room = max(self._window.room, self._window.share if least else 0)
                work, *rest = work.split(room)
                size = work.size
                if size > room and not least:
                    return
                self._window.overdraw(size)
                self._held[:1] = [work, *rest]
            self._in_flight += size
            if not self._open:
                self._producer.begin_transaction()
                self._open, self._opened = True, time.monotonic()
            for _, record in work.records:
                self._retry(partial(self._send, record))
                if self._batches_too_large:
                    self._flush()
            self._produced += 1
            self._producer.poll(0)  # not for every record, because each call releases the interpreter lock

    def _send(self, record: OutputRecord) -> None:
        self._producer.produce(record.topic, record.value, record.key, headers=record.headers)

    @property
    def _batches_too_large(self) -> bool:
        """Whether a topic now accepts less than the producer's batch size, which cannot be changed."""
        return self._batch_bytes > self._limits.smallest

    def _flush(self) -> None:
        """Wait until all produced records are sent, so that the next record is in another batch."""
        while self._producer.flush(CALL_TIMEOUT_S):
            self._stage.beat()

    def _retry(self, call: Callable[[], None]) -> None:
        """Repeat a call until it succeeds, because after a timeout the protocol allows only the same call."""
        for attempt in count():
            try:
                call()
            except KafkaException as error:
                if not error.args[0].retriable():
                    raise
                if attempt:  # one timeout is normal for a commit over a slow link
                    self._log_error(error.args[0])
                self._stage.rest(RETRY_PAUSE_S)
            except BufferError:  # librdkafka's queue is full
                self._producer.poll(RETRY_PAUSE_S)
                self._stage.beat()
            else:
                return

    def _abort(self) -> None:
        if self._open:
            self._retry(lambda: self._producer.abort_transaction(CALL_TIMEOUT_S))
        self._reset()

    def _reset(self) -> None:
        """Reset the state of the transaction, so that all held work is produced again.

        A transaction that is still open is counted as aborted.
        """
        if self._open:
            self._metrics.abort()
        self._window.give_back(self._in_flight)
        self._open, self._produced, self._in_flight = False, 0, 0

    def _cause(self, error: KafkaError) -> KafkaError:
        """Return the cause of a failed transaction if `error` only says that the transaction must be aborted."""
        if error.code() == KafkaError._STATE and self._open:
            try:
                self._producer.begin_transaction()  # in this state it fails with the cause
            except KafkaException as refusal:
                return refusal.args[0]
        return error

    def _recover(self, cause: KafkaError | None, refused: bool) -> None:
        """Abort the failed transaction, so that all held work can be produced again in the next transaction.

        `cause`: the error, which is logged; None if the transaction failed because a claim has ended. Raises
        FencedError if a new producer is needed, and KafkaSetupError if a repetition cannot succeed.
        """
        if self._open:
            self._window.failed(self._opened)
        try:
            if cause is not None:
                self._log_error(cause)
                if refused:
                    self._give_up_if_stopped()
                if cause.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                    self._learn_limits()
                if cause.fatal():
                    raise KafkaException(cause)
            self._abort()
        except KafkaException as final:
            error = final.args[0]
            if error.code() not in GIVEN_UP:
                raise KafkaSetupError(f"{self._error_log.cluster}: {self._explain(error)}") from None
            if refused:
                self._refusals |= {work.claim.key: self.trouble for work in self._held}
                self._stage.rest(REFUSED_PAUSE_S, self._stop)
                self._give_up_if_stopped()
            self._reset()
            self.fenced, self.refused = True, refused
            reasons = dict.fromkeys(self._explain(reason) for reason in (cause, error) if reason is not None)
            raise FencedError(f"{self._error_log.cluster}: {'; '.join(reasons)}") from None

    def _give_up_if_stopped(self) -> None:
        if self._stop.is_set():
            raise KafkaSetupError(
                f"{self._error_log.cluster}: messages in flight are not committed; the next start reads them again: "
                f"{self.trouble}"
            )

    def _learn_limits(self) -> None:
        self._limits.refresh()
        for work in self._held:
            work.fit(self._limits)

    def _log_error(self, error: KafkaError) -> None:
        self.trouble = self._explain(error)
        self._error_log.say(error.code(), "%s: transaction is repeated: %s", self._error_log.cluster, self.trouble)

    def _explain(self, error: KafkaError) -> str:
        """Return the text of an error; for a refusal, the right to grant."""
        account = self._error_log.account
        if account is None:
            return explain(error)
        match error.code():
            case KafkaError.TOPIC_AUTHORIZATION_FAILED:
                rights = self._limits.unwritable()
            case KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                rights = [Right(("Write",), "transactional-id", self._transactional_id.partition("/")[0] + "/", True)]
            case _:
                rights = []
        return "; ".join(map(account.lacks, rights)) or explain(error)
