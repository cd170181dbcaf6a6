"""Commits scored batches in transactions, each with its records and positions. Every alert must have an outcome."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from broker_filter.config import Transaction
from broker_filter.kafka.source import Delivery
from broker_filter.kafka.transactions import Claim, FencedError, Refusals, Work, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics
from broker_filter.streaming.account import account_packets
from broker_filter.streaming.routing import Routed
from broker_filter.streaming.scored import ScoredBatch

COMMITTING_THREADS = 8
"""Writers that commit in parallel. Each one mostly waits for the transaction coordinator."""

log = logging.getLogger(__name__)


class UnaccountedError(RuntimeError):
    """A packet is neither scored, rejected nor a duplicate, or its output is missing.

    This is a fault of the program.
    """


def divide(delivery: Delivery, scored: ScoredBatch, routed: Routed) -> list[Work]:
    """Return the output of a batch by claim, in the order of reading, without packets whose claim has ended.

    An optional record does not count as the output of its alert. Raises UnaccountedError for a packet without an
    outcome, or with an outcome but no output record. Only a redriven packet may have no outcome, if all its alerts were
    published before.
    """
    accounts = account_packets(scored.less(routed.refused))
    for k, reason in routed.left_out:
        accounts[k].left_out[reason] += 1
    published = Counter(k for k, record in zip(routed.packet_index, routed.records, strict=True) if not record.optional)
    works: dict[Claim, Work] = {}
    place: dict[int, tuple[Work, int]] = {}
    for k, (packet, offset, claim) in enumerate(zip(delivery.packets, delivery.offsets, delivery.claims, strict=True)):
        account = accounts[k]
        letters = 1 if account.rejected else 0  # one dead letter, even if several alerts of the packet were rejected
        due = account.scored + letters
        if published[k] < due or not (due + account.duplicates or packet.redriven):
            raise UnaccountedError(f"{packet.position}: {published[k]} records for {account}")
        if not claim.alive:
            continue
        work = works.setdefault(claim, Work(claim, offset, offset))
        work.end = offset + 1
        place[k] = work, len(work.packets)
        work.packets.append(packet)
        work.accounts.append(account)
    for k, record in zip(routed.packet_index, routed.records, strict=True):
        if k in place:
            work, i = place[k]
            work.records.append((i, record))
    return list(works.values())


class KafkaSink:
    """Holds the open transactions. One thread calls `put` and `commit`; another thread may call `drain`."""

    def __init__(
        self, limits: Transaction, dead_letter: str, metrics: Metrics, stage: Stage, refusals: Refusals
    ) -> None:
        """`limits`: when a transaction is committed.

        `dead_letter`: the topic whose records are counted as dead letters.

        `refusals`: shared with the writers, which fill it.
        """
        self._limits = limits
        self._dead_letter = dead_letter
        self._metrics = metrics
        self._stage = stage
        self._writers: set[Writer] = set()
        self._refusals = refusals
        self._committed = threading.Condition()
        self._pool = ThreadPoolExecutor(COMMITTING_THREADS, "commit")

    def put(self, works: list[Work]) -> None:
        """Give work to the writers of its claims. Drops work whose claim has ended: another instance repeats it."""
        for work in works:
            if work.claim.alive:
                self._writers.add(work.claim.writer)
                work.claim.writer.add(work)

    def seconds_left(self, *, idle: bool) -> float:
        """Return the seconds until the next transaction is due; infinity if no transaction is open.

        `idle`: no more alerts are in flight.
        """
        begun = [since for writer in self._writers if (since := writer.waiting_since) is not None]
        return max(0.0, min(begun, default=math.inf) + self._open_s(idle) - time.monotonic())

    def trouble(self, partitions: Collection[tuple[str, int]]) -> str:
        """Return why transactions are not committed at present; empty if they are.

        `partitions`: the input partitions of this instance. A refusal that concerns another partition is left out.
        """
        refused = [reason for key, reason in self._refusals.copy().items() if key in partitions]
        troubles = [writer.trouble for writer in self._writers.copy() if writer.trouble]
        return "; ".join(dict.fromkeys([*troubles, *refused]))

    def commit(self, *, idle: bool) -> None:
        """Commit the transactions that are due, and forget writers that hold no more work.

        `idle`: no more alerts are in flight.
        """
        while due := self._due(self._open_s(idle)):
            self._commit_all(due)

    def commit_everything(self) -> None:
        """Commit all work that `put` has given to the writers."""
        while self._writers:
            self._commit_all(list(self._writers))

    def drain(self, claims: Collection[Claim], timeout_s: float) -> bool:
        """Wait until all work of the claims is committed. Returns False if it takes longer than `timeout_s`."""
        with self._committed:
            return self._committed.wait_for(lambda: all(claim.drained for claim in claims), timeout_s)

    def close(self) -> None:
        """Wait until running commits end, and abort the open transactions."""
        self._pool.shutdown()
        for writer in self._writers:
            writer.close()

    def _open_s(self, idle: bool) -> float:
        """Return the seconds after which an open transaction is committed."""
        return (min(self._limits.linger_ms, self._limits.max_ms) if idle else self._limits.max_ms) / 1000

    def _due(self, open_s: float) -> list[Writer]:
        """Return the writers whose transactions are due: all writers if the window is too full for one of them."""
        if any(writer.crowded for writer in self._writers):
            return list(self._writers)
        return [writer for writer in self._writers if self._is_due(writer, open_s)]

    def _is_due(self, writer: Writer, open_s: float) -> bool:
        since = writer.waiting_since
        return since is not None and (
            time.monotonic() - since >= open_s or writer.held_packets >= self._limits.max_alerts
        )

    def _commit_all(self, writers: list[Writer]) -> None:
        for committed in self._pool.map(self._commit, writers):
            if committed:
                self._account(committed)
        with self._committed:
            self._committed.notify_all()
        self._writers.difference_update(writer for writer in writers if writer.waiting_since is None)

    def _commit(self, writer: Writer) -> list[Work]:
        with self._stage.working():
            try:
                return writer.commit()
            except FencedError as error:
                log.log(
                    logging.DEBUG if writer.refused else logging.WARNING,  # the writer has logged a refusal already
                    "producer fenced; its partitions are read again from the committed positions: %s",
                    error,
                )
                writer.close()
                return []

    def _account(self, committed: list[Work]) -> None:
        accounts = [account for work in committed for account in work.accounts]
        published = Counter(record.topic for work in committed for _, record in work.records)
        self._metrics.commit(accounts, published, self._dead_letter)
