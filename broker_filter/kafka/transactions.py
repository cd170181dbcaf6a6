"""Exactly-once, as a state machine: partitions claimed, work produced, transactions committed or begun again.

Invariants. A position moves only in the transaction that holds the output of every packet before it. It grows as long
as a claim lasts. Work is let go when its transaction is committed or its claim has ended, and at no other time: never
because something failed.
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
from broker_filter.streaming.encoding import OutputRecord

BATCH_BYTES = 1_000_000
"""librdkafka's own: a batch of records is smaller, unless it is one record."""
LINGER_MS = 50
"""For a batch to fill: fewer requests cost both sides less. A transaction that ends waits for none, it flushes."""
GRACE_S = 15.0
"""When a transaction is so late, the coordinator aborts it: its instance is gone, and others wait for its partitions.
The time is longer than a cluster needs to move a coordinator from a node that died (6 to 10 s)."""
OPEN_TIMEOUT_S = 45.0
"""For a coordinator that is moving to another node, or that first has to end an earlier owner's transaction. With what
reading the positions may take, less than a stage may stand still."""
CALL_TIMEOUT_S = 5.0
"""Of one call to the transaction coordinator. A call that timed out is made again, so this bounds only how long the
watchdog hears nothing."""
RETRY_PAUSE_S = 0.1
REFUSED_PAUSE_S = 10.0
"""Before a refused transaction is tried again as a whole: somebody has to grant the right first."""
GIVEN_UP = (KafkaError._FENCED, KafkaError.INVALID_TXN_STATE)
"""After these a producer can do no more, and its successor can: another instance has its name now, or the coordinator
died before it had heard of the transaction that is to be aborted."""
TRUNCATED = "truncated"
"""Header of a dead letter that no longer holds all bytes: how many there were."""

log = logging.getLogger(__name__)


class PositionError(RuntimeError):
    """A position would have gone back: work was about to be done twice."""


class FencedError(RuntimeError):
    """Another instance has taken over what this producer wrote, or the producer can do no more for another reason."""


class ClaimEndedError(RuntimeError):
    """Work in the transaction is of a partition that is not, or perhaps no longer, this instance's."""


@dataclass(eq=False, slots=True)
class Claim:
    """This instance's hold on a partition, from its assignment until it is revoked, lost or fenced.

    Claimed again, the partition gets a new claim, and what is left of the old one's work is dropped. The thread that
    reads writes `read` and `enqueued`, the one that commits `produced` and `committed`.
    """

    topic: str
    partition: int
    writer: Writer
    committed: int
    """The position, as Kafka has it: the next offset whose output is not there yet."""
    read: int = field(init=False)
    """The next offset after the last message that was read."""
    enqueued: int = field(init=False)
    """The next offset after the last packet that went on its way to be decoded, scored and committed."""
    produced: int = field(init=False)
    """The next offset after the last packet whose output was handed to the writer."""
    ended: bool = False
    """The group has taken the partition away."""
    topic_id: str | None = None
    """The id of the topic that the offsets belong to; None where it is not known. It is stored with each position."""
    leader_epoch: int | None = None
    """The partition's leader epoch when its latest message was written, stored likewise: it tells a truncated log."""

    def __post_init__(self) -> None:
        self.read = self.enqueued = self.produced = self.committed

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"

    @property
    def key(self) -> tuple[str, int]:
        """The partition, whoever claims it."""
        return self.topic, self.partition

    @property
    def alive(self) -> bool:
        """Whether a position may be stored for it."""
        return not (self.ended or self.writer.fenced)

    @property
    def drained(self) -> bool:
        """Nothing of it is on its way, or nothing that will be committed."""
        return self.committed >= self.enqueued or not self.alive


@dataclass(slots=True)
class Work:
    """Some packets of one claim, their output, and what became of their alerts."""

    claim: Claim
    start: int
    """The first packet's offset."""
    end: int
    """The last packet's offset, plus one."""
    packets: list[Packet] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    """One a packet."""
    records: list[tuple[int, OutputRecord]] = field(default_factory=list)
    """Each with the index in `packets` of what it was made from."""

    @property
    def size(self) -> int:
        """Bytes of output."""
        return sum(len(record.value) for _, record in self.records)

    def split(self, room: int) -> list[Work]:
        """Divides the work in two, where it can be: the first packets, as many as fit into `room` but at least one."""
        sizes = [0] * len(self.packets)
        for i, record in self.records:
            sizes[i] += len(record.value)
        n = next((n for n, total in enumerate(accumulate(sizes)) if n and total > room), len(sizes))
        if n == len(sizes):
            return [self]
        position = self.packets[n].position
        assert isinstance(position, KafkaPosition), "what is written to Kafka was read from it"
        first = [(i, record) for i, record in self.records if i < n]
        rest = [(i - n, record) for i, record in self.records if i >= n]
        middle = position.offset
        return [
            Work(self.claim, self.start, middle, self.packets[:n], self.accounts[:n], first),
            Work(self.claim, middle, self.end, self.packets[n:], self.accounts[n:], rest),
        ]

    def fit(self, limits: RecordLimits) -> None:
        """Makes every record one that its topic takes: what is too large becomes a dead letter, at worst cut short."""
        too_large = [(i, record) for i, record in self.records if _size(record) > limits.of(record.topic)]
        if not too_large:
            return
        refused = {i: record for i, record in too_large if record.topic != limits.dead_letter}
        for i, record in refused.items():
            self._reject_too_large(i, record, limits)
        self.records = [(i, _cut(record, limits)) for i, record in self.records]

    def _reject_too_large(self, i: int, record: OutputRecord, limits: RecordLimits) -> None:
        detail = f"topic {record.topic} takes no record of {_size(record)} bytes: raise its max.message.bytes"
        headers = [*record.headers, ("reason", RejectReason.TOO_LARGE.encode()), ("detail", detail.encode())]
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
    if record.key and excess > len(record.value):  # an object id that fills a record by itself
        return _cut(replace(record, key=None), limits)
    headers = record.headers
    if TRUNCATED not in dict(headers):
        headers = [*headers, (TRUNCATED, str(len(record.value)).encode())]
    return OutputRecord(record.topic, record.key, record.value[: max(0, len(record.value) - excess)], headers)


Refusals = dict[tuple[str, int], str]
"""By input partition, why its output was refused last: what must be granted. Outlives the writer that was refused."""
Store = Callable[[Any, Mapping[Claim, int]], None]
"""Adds positions to the producer's open transaction; raises ClaimEndedError where one of the claims is in doubt."""


class Writer:
    """A transactional producer, and the work that it holds until it is committed."""

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
        """Fences whoever had `transactional_id` before. `stage` hears that a wait is no standstill.

        `window` and `refusals` are shared by the writers of one cluster. Once `stop` is set, a writer that is refused
        raises KafkaSetupError. Raises KafkaAwayError where the coordinator does not answer.
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
        self._in_flight = 0  # their bytes
        self._open = False
        self._opened = 0.0
        self._failure: KafkaException | None = None
        self._began = 0.0
        self.fenced = False
        self.refused = False
        """It was given up because its brokers refused the output, and has said so."""
        self.trouble = ""
        """Why the latest attempt to commit has failed; empty once one has not."""
        self._batch_bytes = min(BATCH_BYTES, limits.smallest)
        defaults = {
            "batch.size": self._batch_bytes,
            "linger.ms": LINGER_MS,
            "message.max.bytes": MAX_RECORD_BYTES,
            # By the default, after all brokers were away, librdkafka 2.16 waits for ever in send_offsets_to_transaction
            # for a group coordinator among the brokers that it has just forgotten.
            "metadata.recovery.strategy": "none",
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
                        f"{self._error_log.cluster}: no transactions as {self._transactional_id!r}: "
                        f"{self._explain(error.args[0])}"
                    ) from None
            else:
                return

    def store_start(self, claim: Claim) -> None:
        """Commits where a claim starts before anything is read of it, so that a restart does not start elsewhere.

        Where that is refused, the claim is not alive any more. Raises KafkaSetupError where it fails otherwise.
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
        """Takes work into the open or a new transaction. Raises PositionError where its packets come again."""
        claim = work.claim
        if work.start < claim.produced or work.end <= work.start:
            raise PositionError(f"{claim}: packets {work.start} to {work.end - 1} after position {claim.produced}")
        claim.produced = work.end
        work.fit(self._limits)
        if not self._held:
            self._began = time.monotonic()
        self._held.append(work)
        self._produce_ahead()

    @property
    def waiting_since(self) -> float | None:
        """When the oldest work that is held came (monotonic seconds); None where none is held."""
        return self._began if self._held else None

    @property
    def crowded(self) -> bool:
        """The window has no room for all that is held: it is time to commit."""
        return self._produced < len(self._held)

    @property
    def held_packets(self) -> int:
        """Packets whose output is not committed yet."""
        return sum(len(work.packets) for work in self._held)

    def commit(self) -> list[Work]:
        """Commits one transaction, however often it takes, of what is held; gives back what was committed.

        That is all of it, or as much as the window has room for. Work whose claim has ended is dropped. Raises
        FencedError where none of it may be committed here any more, and KafkaSetupError where trying again cannot help.
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
        """Gives up what is held, and the producer."""
        self._held.clear()
        if self._open and not self.fenced:
            with suppress(KafkaException):  # the coordinator ends the transaction by itself
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
            self.fenced = True  # a record at a time is slow: the partitions are claimed anew, by a producer that fits
        self._produce_ahead()
        return committed

    def _produce_ahead(self) -> None:
        """Produces what is held as far as the window has room, so that it is on its way before the commit is due."""
        if self._failure is None:
            try:
                self._produce(least=0)
            except KafkaException as error:
                self._failure = error  # `commit` deals with it

    def _produce(self, least: int) -> None:
        """Produces what is held as far as the window has room, but works until `least` are in the transaction."""
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
            self._producer.poll(0)  # not for every record: each time the interpreter is given away

    def _send(self, record: OutputRecord) -> None:
        self._producer.produce(record.topic, record.value, record.key, headers=record.headers)

    @property
    def _batches_too_large(self) -> bool:
        """A topic takes less at a time now than the producer puts into a batch. Its batches keep their size."""
        return self._batch_bytes > self._limits.smallest

    def _flush(self) -> None:
        """Sends what was produced, so that the next record is in another batch."""
        while self._producer.flush(CALL_TIMEOUT_S):
            self._stage.beat()

    def _retry(self, call: Callable[[], None]) -> None:
        """Makes a call until it succeeds: after a timeout the protocol allows only the same call again."""
        for attempt in count():
            try:
                call()
            except KafkaException as error:
                if not error.args[0].retriable():
                    raise
                if attempt:  # a commit over a slow link lasts longer than one call, and nothing is wrong
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
        """Forgets the transaction, which is counted as aborted where it is still open: all that is held is to be
        produced again."""
        if self._open:
            self._metrics.abort()
        self._window.give_back(self._in_flight)
        self._open, self._produced, self._in_flight = False, 0, 0

    def _cause(self, error: KafkaError) -> KafkaError:
        """Why a transaction has failed, where a call only says that the producer is in a state for aborting it."""
        if error.code() == KafkaError._STATE and self._open:
            try:
                self._producer.begin_transaction()  # changes nothing in this state, and is refused with the cause
            except KafkaException as refusal:
                return refusal.args[0]
        return error

    def _recover(self, cause: KafkaError | None, refused: bool) -> None:
        """Ends the failed transaction, so that all that is held can be produced again in the next.

        What is said is the `cause` of the failure, whatever becomes of the abort; None where a claim has ended.
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
                f"{self._error_log.cluster}: what was read is not committed, and is read again at the next start: "
                f"{self.trouble}"
            )

    def _learn_limits(self) -> None:
        self._limits.refresh()
        for work in self._held:
            work.fit(self._limits)

    def _log_error(self, error: KafkaError) -> None:
        self.trouble = self._explain(error)
        self._error_log.say(error.code(), "%s: transaction tried again: %s", self._error_log.cluster, self.trouble)

    def _explain(self, error: KafkaError) -> str:
        """What went wrong; of a refusal, what to grant."""
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
