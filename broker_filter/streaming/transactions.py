"""Exactly-once, as a state machine: partitions claimed, work produced, transactions committed or begun again.

Invariants. A position moves only in the transaction that holds the output of every packet before it. It grows as long
as a claim lasts. Work is let go when its transaction is committed or its claim has ended, and at no other time: never
because something failed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from broker_filter.metrics import Account, Metrics
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.encoding import OutputRecord
from broker_filter.streaming.kafka_client import (
    MAX_RECORD_BYTES,
    Complaints,
    KafkaSetupError,
    RecordLimits,
    explain,
    librdkafka_log,
    pauses,
)
from broker_filter.streaming.watchdog import Stage

BATCH_BYTES = 1_000_000
"""librdkafka's own: a batch of records is smaller, unless it is one record."""
LINGER_MS = 50
"""For a batch to fill: fewer requests cost both sides less. A transaction that ends waits for none, it flushes."""
HELD_BYTES = 64 * 2**20
"""A transaction ends when so much output waits in it, whatever its count and time."""
OPEN_TIMEOUT_S = 45.0
"""For a coordinator that is moving to another node, or that first has to end an earlier owner's transaction. With what
reading the positions may take, less than a stage may stand still."""
CALL_TIMEOUT_S = 5.0
"""Of one call to the transaction coordinator. A call that timed out is made again, so this bounds only how long the
watchdog hears nothing."""
RETRY_PAUSE_S = 0.1
GIVEN_UP = (KafkaError._FENCED, KafkaError.INVALID_TXN_STATE)
"""After these a producer can do no more, and its successor can: another instance has its name now, or the coordinator
died before it had heard of the transaction that is to be aborted."""
TRUNCATED = "truncated"
"""Header of a dead letter that no longer holds all bytes: how many there were."""

log = logging.getLogger(__name__)


class PositionError(RuntimeError):
    """A position would have gone back: work was about to be done twice."""


class FencedError(RuntimeError):
    """Another instance has taken over what this producer wrote, or the coordinator has given it up."""


class ClaimEndedError(RuntimeError):
    """Work in the transaction is of a partition that is not, or perhaps no longer, this instance's."""


@dataclass(eq=False, slots=True)
class Claim:
    """This instance's hold on a partition, from its assignment until it is revoked, lost or fenced.

    Claimed again, the partition gets a new claim, and what is left of the old one's work is dropped. The thread that
    reads writes `read` and `taken`, the one that commits `produced` and `committed`.
    """

    topic: str
    partition: int
    writer: Writer
    committed: int
    """The position, as Kafka has it: the next offset whose output is not there yet."""
    read: int = field(init=False)
    """The next offset after the last message that was read."""
    taken: int = field(init=False)
    """The next offset after the last packet that went on its way to be decoded, scored and committed."""
    produced: int = field(init=False)
    """The next offset after the last packet whose output was handed to the writer."""
    ended: bool = False
    """The group has taken the partition away."""

    def __post_init__(self) -> None:
        self.read = self.taken = self.produced = self.committed

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"

    @property
    def alive(self) -> bool:
        """Whether a position may be stored for it."""
        return not (self.ended or self.writer.fenced)

    @property
    def settled(self) -> bool:
        """Nothing of it is on its way, or nothing that will be committed."""
        return self.committed >= self.taken or not self.alive


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

    def fit(self, limits: RecordLimits) -> None:
        """Makes every record one that its topic takes: what is too large becomes a dead letter, at worst cut short."""
        refused = {i: record for i, record in self.records if _size(record) > limits.of(record.topic)}
        if not refused:
            return
        for i, record in refused.items():
            if record.topic != limits.dead_letter:
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


Store = Callable[[Any, Mapping[Claim, int]], None]
"""Adds positions to the producer's open transaction; raises ClaimEndedError where one of the claims is in doubt."""


class Writer:
    """A transactional producer, and the work that it holds until it is committed."""

    def __init__(
        self,
        properties: Mapping[str, object],
        limits: RecordLimits,
        metrics: Metrics,
        complaints: Complaints,
        stage: Stage,
        transactional_id: str,
        store: Store,
    ) -> None:
        """Fences whoever had `transactional_id` before. `stage` hears that a wait is no standstill.

        Raises KafkaSetupError where the coordinator does not answer.
        """
        self._limits = limits
        self._metrics = metrics
        self._complaints = complaints
        self._stage = stage
        self._store = store
        self._held: list[Work] = []
        self._held_bytes = 0
        self._produced = 0  # how many of `_held` are in the open transaction
        self._open = False
        self._failure: KafkaException | None = None
        self._began = 0.0
        self.fenced = False
        self.trouble = ""
        """Why the latest attempt to commit has failed; empty once one has not."""
        defaults = {
            "batch.size": min(BATCH_BYTES, limits.smallest),
            "linger.ms": LINGER_MS,
            "message.max.bytes": MAX_RECORD_BYTES,
            # By the default, after all brokers were away, librdkafka 2.16 waits for ever in send_offsets_to_transaction
            # for a group coordinator among the brokers that it has just forgotten.
            "metadata.recovery.strategy": "none",
        }
        own = {"transactional.id": transactional_id, "error_cb": complaints}
        self._producer = Producer({**defaults, **properties, **own}, logger=librdkafka_log)
        self._initialise(transactional_id)

    def _initialise(self, transactional_id: str) -> None:
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        while True:
            try:
                self._producer.init_transactions(CALL_TIMEOUT_S)
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    raise KafkaSetupError(
                        f"{self._complaints.cluster}: no transactions as {transactional_id!r}: {explain(error.args[0])}"
                    ) from None
            else:
                return

    def store_start(self, claim: Claim) -> None:
        """Commits where a claim starts before anything is read of it, so that a restart does not start elsewhere."""
        self._producer.begin_transaction()
        self._store(self._producer, {claim: claim.committed})
        self._producer.commit_transaction(OPEN_TIMEOUT_S)

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
        self._held_bytes += work.size
        if self._failure is None:
            try:
                self._produce()
            except KafkaException as error:
                self._failure = error  # `commit` deals with it

    @property
    def waiting_since(self) -> float | None:
        """When the oldest work that is held came (monotonic seconds); None where none is held."""
        return self._began if self._held else None

    @property
    def full(self) -> bool:
        """More is held than memory should be spent on."""
        return self._held_bytes >= HELD_BYTES

    @property
    def held_packets(self) -> int:
        """Packets whose output is not committed yet."""
        return sum(len(work.packets) for work in self._held)

    def commit(self) -> list[Work]:
        """Commits all that is held, however often it takes; gives back what was committed.

        Work whose claim has ended is dropped. Raises FencedError where none of it may be committed here any more, and
        KafkaSetupError where trying again cannot help.
        """
        for pause in pauses():
            try:
                if self._failure:
                    raise self._failure
                return self._attempt()
            except (KafkaException, ClaimEndedError) as error:
                self._failure = None
                self._recover(error)
            self._stage.rest(pause)
        raise AssertionError("pauses() does not end")

    def close(self) -> None:
        """Gives up what is held, and the producer."""
        self._held.clear()
        if self._open and not self.fenced:
            with suppress(KafkaException):  # the coordinator ends the transaction by itself
                self._producer.abort_transaction(CALL_TIMEOUT_S)
        self._open = False

    def _attempt(self) -> list[Work]:
        if not all(work.claim.alive for work in self._held):
            self._abort()
            self._held = [work for work in self._held if work.claim.alive]
            self._held_bytes = sum(work.size for work in self._held)
        if not self._held:
            return []
        self._produce()
        ends = {work.claim: work.end for work in self._held}
        self._insist(lambda: self._store(self._producer, ends))
        self._insist(lambda: self._producer.commit_transaction(CALL_TIMEOUT_S))
        committed, self._held, self._held_bytes, self._open = self._held, [], 0, False
        for claim, end in ends.items():
            claim.committed = end
        self.trouble = ""
        return committed

    def _produce(self) -> None:
        if not self._open:
            self._producer.begin_transaction()
            self._open, self._produced = True, 0
        for work in self._held[self._produced :]:
            for _, record in work.records:
                self._insist(partial(self._send, record))
            self._produced += 1
            self._producer.poll(0)  # not for every record: each time the interpreter is given away

    def _send(self, record: OutputRecord) -> None:
        self._producer.produce(record.topic, record.value, record.key, headers=record.headers)

    def _insist(self, call: Callable[[], None]) -> None:
        """Makes a call until it succeeds: after a timeout the protocol allows only the same call again."""
        while True:
            try:
                call()
            except KafkaException as error:
                if not error.args[0].retriable():
                    raise
                self._complain(error.args[0])
                self._stage.rest(RETRY_PAUSE_S)
            except BufferError:  # librdkafka's queue is full
                self._producer.poll(RETRY_PAUSE_S)
                self._stage.beat()
            else:
                return

    def _abort(self) -> None:
        if self._open:
            self._insist(lambda: self._producer.abort_transaction(CALL_TIMEOUT_S))
            self._open = False
            self._metrics.abort()

    def _recover(self, failure: Exception) -> None:
        """Ends the failed transaction, so that all that is held can be produced again in the next."""
        try:
            if isinstance(failure, KafkaException):
                self._complain(failure.args[0])
                if failure.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                    self._limits.refresh()
                    for work in self._held:
                        work.fit(self._limits)
                if failure.args[0].fatal():
                    raise failure
            self._abort()
        except KafkaException as final:
            error = final.args[0]
            if error.code() in GIVEN_UP:
                self.fenced = True
                raise FencedError(f"{self._complaints.cluster}: {explain(error)}") from None
            raise KafkaSetupError(f"{self._complaints.cluster}: {explain(error)}") from None

    def _complain(self, error: KafkaError) -> None:
        self.trouble = explain(error)
        self._complaints.say(error.code(), "%s: transaction tried again: %s", self._complaints.cluster, self.trouble)
