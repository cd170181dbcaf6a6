"""Scores dead letters again, exactly once: `broker-filter redrive`.

Invariant: a dead letter is marked as done in the transaction that holds its outcome, and is scored only while it is not
marked. The outcome is the records of its alerts, and a new dead letter if something is rejected again. So a letter has
one committed outcome, wherever the program is killed.

The marks are a ledger, the compacted topic `<prefix>.redriven`. Dead letters stay in their topic, where nothing is
moved or deleted: a letter that a run does not select has no mark, and a later run may select it. A run takes over the
transactional id of the earlier run before it reads the ledger, so the earlier run cannot mark a letter afterwards. It
reads up to the end that the topic had at its start, so it does not try a message twice.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any

from broker_filter.config import DEAD_LETTER, REDRIVEN
from broker_filter.kafka.client import (
    MAX_RECORD_BYTES,
    KafkaSetupError,
    RecordLimits,
    ThrottledErrorLog,
    admin_client,
    answered,
    client_properties,
    ensure_topics,
    output_section,
    reach_cluster,
    require_compaction,
    topic_ids,
)
from broker_filter.kafka.compacted_topic import CompactedTopic
from broker_filter.kafka.connect import output_topics, redriven_topic
from broker_filter.kafka.rights import account_of
from broker_filter.kafka.sink import divide
from broker_filter.kafka.source import DELIVERY_BYTES, Delivery
from broker_filter.kafka.topic_reader import read_with_headers
from broker_filter.kafka.transactions import GRACE_S, TRUNCATED, Claim, FencedError, Store, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics
from broker_filter.packets.packet import KafkaPosition
from broker_filter.streaming.dead_letters import Letter, LetterError, leave_out_published, read_letter
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_alerts
from broker_filter.streaming.generation import Generation, open_generation, open_input_schemas
from broker_filter.streaming.resolved import ResolvedService

CHUNK = 4096
"""Offsets in a record of the ledger: its value has about 1 kB, and ten million dead letters have 2,500 records."""

Chunk = tuple[int, int]
"""A partition of the dead-letter topic, and a number c: the offsets from CHUNK x c on."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters to score again."""

    reasons: frozenset[str] = frozenset()
    """The letters with at least one of these reject reasons; empty for all letters."""
    since: datetime | None = None
    """The letters that were written at this time or later."""
    max_tries: int | None = None
    """The letters that were scored again in vain fewer times than this."""

    def includes(self, letter: Letter, written_ms: int) -> bool:
        """Return whether a letter is selected. `written_ms`: its Kafka timestamp in Unix milliseconds."""
        return (
            (not self.reasons or not self.reasons.isdisjoint(letter.reasons))
            and (self.since is None or written_ms >= self.since.timestamp() * 1000)
            and (self.max_tries is None or letter.tries < self.max_tries)
        )


@dataclass(slots=True)
class Tally:
    """What a run has found and done."""

    selected: Counter[str] = field(default_factory=Counter)
    """Selected letters by the reason of their first rejected alert."""
    not_selected: Counter[str] = field(default_factory=Counter)
    """The other letters that are not done, by the same reason."""
    cut_short: int = 0
    """Letters that were shortened to fit into the topic, so that they cannot be scored."""
    unreadable: int = 0
    """Messages of the topic that have not the headers of a dead letter."""
    done: int = 0
    """Letters whose outcome is committed."""
    published: int = 0
    """Alerts that were published."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Alerts that were rejected again, by reason."""


class Ledger(CompactedTopic[int]):
    """`<prefix>.redriven`: for each chunk of offsets, the set of letters that are done, as the bits of an integer."""

    content = "set of dead letters"

    def parse(self, value: bytes) -> int:
        """See CompactedTopic."""
        return int(json.loads(value)["done"], 16)


class Marks:
    """The marks of one run: those that the ledger held at its start, and the letters that the run has selected."""

    def __init__(self, topic: str, topic_id: str | None) -> None:
        """`topic`: the name of the ledger. `topic_id`: the id of the dead-letter topic, whose offsets are marked."""
        self._topic = topic
        self._topic_id = topic_id
        self.ledger: Mapping[bytes, int] = {}
        """The content of the ledger at the start of the run."""
        self._selected: dict[int, list[int]] = defaultdict(list)  # by partition, in ascending order

    def done(self, partition: int, offset: int) -> bool:
        """Return whether an earlier run has marked a letter."""
        return bool(self._before((partition, offset // CHUNK)) >> offset % CHUNK & 1)

    def select(self, partition: int, offset: int) -> None:
        """Note that this run scores a letter. The offsets of a partition must ascend."""
        self._selected[partition].append(offset)

    def store(self, producer: Any, ends: Mapping[Claim, int]) -> None:
        """Mark the selected letters from `committed` to the end of each claim, in the producer's open transaction."""
        for claim, end in ends.items():
            selected = self._selected[claim.partition]
            stop = bisect_left(selected, end)
            new = selected[bisect_left(selected, claim.committed) : stop]
            for number, _ in groupby(new, key=lambda offset: offset // CHUNK):
                chunk = claim.partition, number
                first = bisect_left(selected, CHUNK * number)
                last = min(stop, bisect_left(selected, CHUNK * (number + 1)))
                bits = self._before(chunk) | sum(1 << offset % CHUNK for offset in selected[first:last])
                producer.produce(self._topic, json.dumps({"done": f"{bits:x}"}).encode(), self._key(chunk), partition=0)

    def _before(self, chunk: Chunk) -> int:
        return self.ledger.get(self._key(chunk), 0)

    def _key(self, chunk: Chunk) -> bytes:
        partition, number = chunk
        return json.dumps({"topic_id": self._topic_id, "partition": partition, "chunk": number}).encode()


class Redrive:
    """Scores the dead letters of one service. It connects to the output's cluster when it is made.

    Raises KafkaSetupError if the cluster does not answer within PATIENCE_S.
    """

    def __init__(self, service: ResolvedService, selection: Selection) -> None:
        self._service = service
        self._config = config = service.config
        self._selection = selection
        self._output = output_section(config.input, config.output)
        self._dead_letter, self._ledger = (f"{self._output.prefix}.{name}" for name in (DEAD_LETTER, REDRIVEN))
        self._properties = client_properties(self._output)
        self._error_log = ThrottledErrorLog(
            f"output brokers {self._output.bootstrap_servers}", account=account_of(self._output)
        )
        self._admin = admin_client(self._properties, self._error_log)
        self._cluster = reach_cluster(self._properties, self._error_log)
        self.tally = Tally()

    def count(self) -> None:
        """Count the letters in `tally`, and change nothing."""
        if self._dead_letter in self._cluster.topics:
            with answered(self._error_log):
                marks = self._new_marks()
                if self._ledger in self._cluster.topics:
                    marks.ledger = self._open_ledger().read()
                for _ in self._letters(marks):
                    pass

    def run(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Score the selected letters, and count in `tally`. `advance` is called with the number of letters done.

        Raises RegistryUnavailable if a schema registry does not answer, and KafkaSetupError for an error of Kafka or
        if another run has started. The letters that are not done then stay for the next run.
        """
        if self._dead_letter not in self._cluster.topics:
            return
        generation = open_generation(self._service, open_input_schemas(self._config.input))
        window = DuplicateWindow(self._config.duplicate_window)
        account = self._error_log.account
        with answered(self._error_log):
            topics = output_topics(self._output, self._config.output_topics, separate_clusters=False)
            ensure_topics(self._admin, [*topics, redriven_topic(self._output)], account)
            require_compaction(self._admin, self._ledger, account)
            marks = self._new_marks()
            writer = self._open_writer(marks.store)
            try:
                marks.ledger = self._open_ledger().read()
                for delivery in self._deliveries(marks, writer):
                    n_letters = len(delivery.packets)
                    self._score(delivery, generation, window, writer)
                    self._commit(writer)
                    advance(n_letters)
            finally:
                writer.close()

    def _score(self, delivery: Delivery, generation: Generation, window: DuplicateWindow, writer: Writer) -> None:
        """Score and route letters as the service does, and give their outcome to the writer."""
        generation.files.look()
        while delivery.packets:
            alerts, rejects = generation.decoder.decode_some(delivery.packets)
            part, delivery = delivery.split(len(alerts.packets))
            scored = leave_out_published(
                score_alerts(alerts, rejects, generation.scorer, window, generation.judge, generation.filters)
            )
            if generation.shadows.models:
                scored, _ = generation.shadows.score(scored)
            routed = generation.router.route(scored)
            window.forget(alerts, [i for i in routed.refused if not scored.duplicate[i]])
            for work in divide(part, scored, routed):
                writer.add(work)

    def _commit(self, writer: Writer) -> None:
        """Commit all work of the writer, in one transaction if the window has room for it."""
        while writer.waiting_since is not None:
            try:
                committed = writer.commit()
            except FencedError as error:
                why = writer.trouble if writer.refused else f"did another `redrive` of this service start? ({error})"
                raise KafkaSetupError(f"{self._error_log.cluster}: the letters are not done: {why}") from None
            for account in (account for work in committed for account in work.accounts):
                self.tally.done += 1
                self.tally.published += account.scored + account.duplicates
                self.tally.rejected.update({reason.value: n for reason, n in account.rejected.items()})

    def _deliveries(self, marks: Marks, writer: Writer) -> Iterator[Delivery]:
        """Yield the selected letters in batches of at most `batch.max_size` letters, or of about DELIVERY_BYTES."""
        claims: dict[int, Claim] = {}
        delivery, n_bytes = Delivery(), 0
        for letter, at in self._letters(marks):
            marks.select(at.partition, at.offset)
            delivery.packets.append(letter.packet)
            delivery.offsets.append(at.offset)
            delivery.claims.append(claims.setdefault(at.partition, Claim(self._dead_letter, at.partition, writer, 0)))
            n_bytes += len(letter.packet.data)
            if len(delivery.packets) >= self._config.batch.max_size or n_bytes >= DELIVERY_BYTES:
                yield delivery
                delivery, n_bytes = Delivery(), 0
        if delivery.packets:
            yield delivery

    def _letters(self, marks: Marks) -> Iterator[tuple[Letter, KafkaPosition]]:
        """Yield the selected letters that are not done, with their positions. Counts all letters that are not done."""
        account = self._error_log.account
        for packet, headers, written_ms in read_with_headers(self._properties, self._dead_letter, account):
            at = packet.position
            assert isinstance(at, KafkaPosition), "dead letters come from Kafka"
            if marks.done(at.partition, at.offset):
                continue
            if TRUNCATED in headers:
                self.tally.cut_short += 1
                continue
            try:
                letter = read_letter(packet, headers)
            except LetterError:
                self.tally.unreadable += 1
                continue
            if self._selection.includes(letter, written_ms):
                self.tally.selected[letter.reason] += 1
                yield letter, at
            else:
                self.tally.not_selected[letter.reason] += 1

    def _new_marks(self) -> Marks:
        return Marks(self._ledger, topic_ids(self._admin, [self._dead_letter])[self._dead_letter])

    def _open_ledger(self) -> Ledger:
        return Ledger(self._ledger, self._properties, self._admin, self._error_log)

    def _open_writer(self, store: Store) -> Writer:
        metrics = Metrics()
        largest = min(MAX_RECORD_BYTES, int(str(self._properties.get("message.max.bytes", MAX_RECORD_BYTES))))
        topics, account = self._config.output_topics, self._error_log.account
        limits = RecordLimits(self._admin, topics, self._dead_letter, largest, account, [self._ledger])
        properties = {"transaction.timeout.ms": int(1000 * GRACE_S), **self._properties}
        identity = f"{self._output.prefix}/redrive"
        return Writer(properties, limits, metrics, self._error_log, Stage("commit", metrics), identity, store)
