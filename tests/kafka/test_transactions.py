"""Exactly-once without a broker: what fits into a topic, and what a writer does when its producer fails.

The producer and the admin client of confluent_kafka are replaced by small ones that fail where a test wants it. The
same state machine runs against Apache Kafka in `tests/integration/test_exactly_once.py`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import ConfigResource
from hypothesis import given
from hypothesis import strategies as st

from broker_filter.kafka import client, transactions
from broker_filter.kafka.client import (
    RECORD_OVERHEAD_BYTES,
    KafkaAwayError,
    KafkaSetupError,
    RecordLimits,
    ThrottledErrorLog,
)
from broker_filter.kafka.transactions import (
    TRUNCATED,
    Claim,
    ClaimEndedError,
    FencedError,
    PositionError,
    Work,
    Writer,
)
from broker_filter.kafka.watchdog import Stage
from broker_filter.kafka.window import AFTER_FAILURE, AFTER_SLOW, FIRST_BYTES, SHARES, Window
from broker_filter.metrics import Metrics
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import Account
from broker_filter.streaming.encoding import OutputRecord
from broker_filter.streaming.scored import LeftOut

SCORED, LETTERS = "me.scored", "me.dead-letter"
TIMED_OUT = KafkaError(KafkaError._TIMED_OUT, "timed out", retriable=True)
ABORTABLE = KafkaError(KafkaError.NOT_ENOUGH_REPLICAS, "too few replicas", txn_requires_abort=True)
FENCED = KafkaError(KafkaError._FENCED, "fenced by another instance", fatal=True)
FATAL = KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "out of order", fatal=True)
IN_ERROR_STATE = KafkaError(KafkaError._STATE, "the transaction has failed")
TOO_LARGE = KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "too large", txn_requires_abort=True)
REFUSED = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, "not authorized", txn_requires_abort=True)


@dataclass
class ConfigEntry:
    """A property of a topic, as `AdminClient.describe_configs` returns it."""

    value: str


class FakeAdmin:
    """Stands in for `AdminClient`: topics with the given limits of messages in bytes."""

    def __init__(self, **max_message_bytes: int) -> None:
        self.max_message_bytes = {f"me.{name.replace('_', '-')}": size for name, size in max_message_bytes.items()}

    def describe_configs(
        self, resources: Sequence[ConfigResource], request_timeout: float
    ) -> dict[ConfigResource, Future[dict[str, ConfigEntry]]]:
        answers = {resource: Future[dict[str, ConfigEntry]]() for resource in resources}
        for resource, answer in answers.items():
            answer.set_result({"max.message.bytes": ConfigEntry(str(self.max_message_bytes[resource.name]))})
        return answers


@dataclass
class FakeProducer:
    """Stands in for a transactional `Producer`: notes what it is asked for, and keeps what is committed.

    `failures` maps a method to the errors that it raises at its next calls, one after the other.
    """

    properties: Mapping[str, object]
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    pending: list[OutputRecord] = field(default_factory=list)
    committed: list[OutputRecord] = field(default_factory=list)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if errors := self.failures.get(name):
            raise errors.pop(0)

    def init_transactions(self, timeout: float) -> None:
        self._call("init")

    def begin_transaction(self) -> None:
        self._call("begin")

    def produce(self, topic: str, value: bytes, key: bytes | None, headers: list[tuple[str, bytes]]) -> None:
        self._call("produce")
        self.pending.append(OutputRecord(topic, key, value, headers))

    def poll(self, timeout: float) -> None:
        pass

    def flush(self, timeout: float) -> int:
        self._call("flush")
        return 0

    def commit_transaction(self, timeout: float) -> None:
        self._call("commit")
        self.committed += self.pending
        self.pending.clear()

    def abort_transaction(self, timeout: float) -> None:
        self._call("abort")
        self.pending.clear()

    @property
    def published(self) -> list[bytes]:
        """The values of all committed records."""
        return [record.value for record in self.committed]


class Harness:
    """Writers whose producers have no broker, on topics whose limits a test sets."""

    def __init__(self) -> None:
        self.admin = FakeAdmin(scored=1_000_000, dead_letter=1_000_000)
        self.limits = RecordLimits(self.admin, [SCORED, LETTERS], LETTERS)  # type: ignore[arg-type]
        self.metrics = Metrics()
        self.late_s = 0.0
        self.window = Window(transactions.GRACE_S, clock=lambda: time.monotonic() + self.late_s)
        self.stop = threading.Event()
        self.refusals: dict[tuple[str, int], str] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.stored: list[dict[str, int]] = []
        self.before_store: Callable[[], None] = lambda: None
        self.producers: list[FakeProducer] = []

    def make_producer(self, properties: Mapping[str, object], logger: object) -> FakeProducer:
        self.producers.append(FakeProducer(properties, self.failures))
        return self.producers[-1]

    @property
    def producer(self) -> FakeProducer:
        """The latest writer's producer."""
        return self.producers[-1]

    def fail(self, method: str, *errors: KafkaError | Exception) -> None:
        """Let the next calls of a method of the producer fail, each with one of the errors."""
        exceptions = [KafkaException(error) if isinstance(error, KafkaError) else error for error in errors]
        self.failures.setdefault(method, []).extend(exceptions)

    def writer(self) -> Writer:
        """Open a writer that shares the window and the refusals with the others."""
        stage = Stage("commit", self.metrics)
        options = {"window": self.window, "stop": self.stop, "refusals": self.refusals}
        error_log = ThrottledErrorLog("test brokers")
        return Writer({}, self.limits, self.metrics, error_log, stage, "me/group/0", self._store, **options)  # type: ignore[arg-type]

    def _store(self, producer: FakeProducer, positions: Mapping[Claim, int]) -> None:
        producer._call("store")
        self.before_store()
        self.stored.append({str(claim): position for claim, position in positions.items()})

    def transactions(self, outcome: str) -> float:
        """Return the number of transactions that the metrics count as `committed` or `aborted`."""
        name = f'broker_filter_transactions_total{{outcome="{outcome}"}} '
        lines = self.metrics.exposition().decode().splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    harness = Harness()
    monkeypatch.setattr(transactions, "Producer", harness.make_producer)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(transactions, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(transactions, "REFUSED_PAUSE_S", 0.0)
    return harness


def work(claim: Claim, start: int, *values: bytes, topic: str = SCORED) -> Work:
    """Return packets from the offset `start` on, each with one scored alert whose output is one of the values."""
    packets = [Packet(b"packet", KafkaPosition("cluster", "ztf", 0, start + i)) for i in range(len(values))]
    records = [(i, OutputRecord(topic, None, value, [])) for i, value in enumerate(values)]
    return Work(claim, start, start + len(values), packets, [Account(consumed=1, scored=1) for _ in values], records)


class NoWriter:
    """Stands in for the writer of a claim in tests that write nothing."""

    fenced = False


CLAIM = Claim("ztf", 0, NoWriter(), 0)  # type: ignore[arg-type]


def limits(scored: int = 1_000_000, dead_letter: int = 1_000_000) -> RecordLimits:
    """Return topics that accept records of the given sizes in bytes, without the framing of a batch."""
    sizes = {"scored": scored + RECORD_OVERHEAD_BYTES, "dead_letter": dead_letter + RECORD_OVERHEAD_BYTES}
    return RecordLimits(FakeAdmin(**sizes), [SCORED, LETTERS], LETTERS)  # type: ignore[arg-type]


# -- records that fit into a topic


def test_records_that_fit_into_their_topics_are_not_changed() -> None:
    some = work(CLAIM, 0, bytes(50), bytes(49))
    before = list(some.records)
    some.fit(limits(scored=50))
    assert some.records == before
    assert [account.scored for account in some.accounts] == [1, 1]


def test_too_large_record_becomes_a_dead_letter_with_the_packet_and_the_reason() -> None:
    some = work(CLAIM, 0, b"first", bytes(51), b"third")
    some.fit(limits(scored=50))

    assert [(i, record.topic) for i, record in some.records] == [(0, SCORED), (2, SCORED), (1, LETTERS)]
    letter = some.records[-1][1]
    assert letter.value == b"packet"
    assert dict(letter.headers)["reason"] == b"too_large"
    assert dict(letter.headers)["detail"] == (
        b"topic me.scored accepts no record of 51 bytes: raise its max.message.bytes"
    )
    assert [account.scored for account in some.accounts] == [1, 0, 1]
    assert [dict(account.rejected) for account in some.accounts] == [{}, {RejectReason.TOO_LARGE: 1}, {}]


def test_a_too_large_optional_record_is_left_out_and_rejects_no_alert() -> None:
    some = work(CLAIM, 0, bytes(50), bytes(51))
    shadows = [OutputRecord("me.shadow", None, bytes(n), [], optional=True) for n in (40, 60, 60)]
    some.records += [(0, shadows[0]), (0, shadows[1]), (1, shadows[2])]
    sizes = {"scored": 50, "shadow": 50, "dead_letter": 1000}
    admin = FakeAdmin(**{name: size + RECORD_OVERHEAD_BYTES for name, size in sizes.items()})
    some.fit(RecordLimits(admin, [SCORED, "me.shadow", LETTERS], LETTERS))  # type: ignore[arg-type]
    assert [(i, record.topic) for i, record in some.records] == [(0, SCORED), (0, "me.shadow"), (1, LETTERS)]
    assert [(account.scored, account.left_out) for account in some.accounts] == [(1, {LeftOut.TOO_LARGE: 1}), (0, {})]


def test_key_and_headers_count_in_the_size_of_a_record() -> None:
    some = work(CLAIM, 0, bytes(40))
    some.records = [(0, OutputRecord(SCORED, b"12345", bytes(40), [("abc", b"12")]))]
    some.fit(limits(scored=50))
    assert some.records[0][1].topic == SCORED
    some.fit(limits(scored=49))
    assert some.records[0][1].topic == LETTERS


def test_a_packet_with_a_large_alert_and_a_large_dead_letter_becomes_one_letter() -> None:
    some = work(CLAIM, 0, bytes(300))
    some.packets = [Packet(bytes(300), some.packets[0].position)]
    some.accounts = [Account(consumed=3, scored=1, duplicates=1, rejected=Counter({RejectReason.CORRUPT: 1}))]
    some.records = [(0, OutputRecord(topic, None, bytes(300), [])) for topic in (SCORED, SCORED, LETTERS)]

    some.fit(limits(scored=50, dead_letter=200))

    [(_, letter)] = some.records
    assert letter.topic == LETTERS
    assert dict(letter.headers)[TRUNCATED] == b"300"
    (account,) = some.accounts
    assert (account.scored, account.duplicates, account.rejected) == (0, 0, {RejectReason.TOO_LARGE: 3})


def test_too_large_dead_letter_is_shortened_and_tells_its_original_size() -> None:
    content = bytes(range(200))
    some = work(CLAIM, 0, content, topic=LETTERS)
    some.fit(limits(dead_letter=120))

    [(_, letter)] = some.records
    assert letter.value == content[:120]
    assert letter.headers == [(TRUNCATED, b"200")]
    assert [account.scored for account in some.accounts] == [1], "a letter that is cut rejects nothing more"


def test_dead_letter_of_exactly_the_largest_size_is_not_shortened() -> None:
    some = work(CLAIM, 0, bytes(200), bytes(120), topic=LETTERS)
    some.fit(limits(dead_letter=120))
    assert [(len(letter.value), letter.headers) for _, letter in some.records] == [
        (120, [(TRUNCATED, b"200")]),
        (120, []),
    ]


def test_dead_letter_that_is_shortened_twice_tells_its_first_size() -> None:
    some = work(CLAIM, 0, bytes(200), topic=LETTERS)
    some.fit(limits(dead_letter=120))
    some.fit(limits(dead_letter=80))
    [(_, letter)] = some.records
    assert letter.headers == [(TRUNCATED, b"200")]
    assert len(letter.value) + len(TRUNCATED) + len(b"200") == 80


def test_key_that_leaves_no_room_for_the_value_is_removed() -> None:
    some = work(CLAIM, 0, b"small", topic=LETTERS)
    some.records = [(0, OutputRecord(LETTERS, bytes(1000), b"small", []))]
    some.fit(limits(dead_letter=100))
    [(_, letter)] = some.records
    assert (letter.key, letter.value, letter.headers) == (None, b"small", [])


def test_key_is_kept_when_shortening_the_value_is_enough() -> None:
    some = work(CLAIM, 0, bytes(200), topic=LETTERS)
    some.records = [(0, OutputRecord(LETTERS, b"ZTF26a", bytes(200), []))]
    some.fit(limits(dead_letter=106))
    [(_, letter)] = some.records
    assert (letter.key, len(letter.value)) == (b"ZTF26a", 100)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), room=st.integers(0, 120))
def test_split_loses_nothing_and_its_first_part_is_the_longest_that_fits(sizes: list[int], room: int) -> None:
    whole = work(CLAIM, 7, *map(bytes, sizes))
    parts = whole.split(room)

    assert [packet for part in parts for packet in part.packets] == whole.packets
    assert [account for part in parts for account in part.accounts] == whole.accounts
    assert [len(record.value) for part in parts for _, record in part.records] == sizes
    assert [(part.start, part.end) for part in parts] == [
        (part.packets[0].position.offset, part.packets[-1].position.offset + 1)  # type: ignore[union-attr]
        for part in parts
    ]
    assert all(sorted(i for i, _ in part.records) == list(range(len(part.packets))) for part in parts)
    first, *rest = parts
    assert len(first.packets) == 1 or first.size <= room
    assert not rest or first.size + len(rest[0].records[0][1].value) > room


# -- the transaction state machine


def test_position_is_stored_in_the_transaction_of_the_output_before_it(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 5)
    writer.add(work(claim, 5, b"a", b"b"))
    writer.add(work(claim, 7, b"c"))
    assert claim.committed == 5
    assert harness.producer.published == []

    committed = writer.commit()

    assert harness.producer.calls == ["init", "begin", "produce", "produce", "produce", "store", "commit"]
    assert harness.producer.published == [b"a", b"b", b"c"]
    assert harness.stored == [{"ztf/0": 8}]
    assert claim.committed == 8
    assert [part.start for part in committed] == [5, 7]
    assert (writer.held_packets, writer.waiting_since) == (0, None)


def test_writer_without_work_commits_nothing(harness: Harness) -> None:
    assert harness.writer().commit() == []
    assert harness.producer.calls == ["init"]


def test_too_large_record_is_never_produced(harness: Harness) -> None:
    harness.admin.max_message_bytes[SCORED] = 10_000
    harness.limits.refresh()
    writer = harness.writer()
    writer.add(work(Claim("ztf", 0, writer, 0), 0, bytes(10_000)))
    assert len(writer.commit()) == 1
    assert [(record.topic, record.value) for record in harness.producer.committed] == [(LETTERS, b"packet")]
    assert "abort" not in harness.producer.calls


def test_packet_that_is_added_twice_is_an_error(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"a", b"b"))
    with pytest.raises(PositionError, match="ztf/0: packets 1 to 1 do not follow position 2"):
        writer.add(work(claim, 1, b"b"))
    with pytest.raises(PositionError):
        writer.add(Work(claim, 2, 2))  # work without a packet
    assert len(writer.commit()) == 1


@pytest.mark.parametrize("call", ["store", "commit"])
def test_call_that_timed_out_is_repeated_in_the_same_transaction(harness: Harness, call: str) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"a"))
    harness.fail(call, TIMED_OUT, TIMED_OUT)

    assert len(writer.commit()) == 1

    assert harness.producer.calls.count(call) == 3
    assert "abort" not in harness.producer.calls
    assert harness.producer.published == [b"a"]
    assert writer.trouble == ""


def test_record_that_the_full_queue_refuses_is_produced_again(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    harness.fail("produce", BufferError("queue full"), BufferError("queue full"))
    writer.add(work(claim, 0, b"a", b"b"))
    assert len(writer.commit()) == 1
    assert harness.producer.published == [b"a", b"b"]


@pytest.mark.parametrize("call", ["begin", "produce", "store", "commit"])
def test_failed_transaction_is_aborted_and_repeated_with_the_same_records(harness: Harness, call: str) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    harness.fail(call, ABORTABLE)
    writer.add(work(claim, 0, b"a"))
    writer.add(work(claim, 1, b"b"))

    assert len(writer.commit()) == 2

    assert harness.producer.published == [b"a", b"b"]
    assert harness.stored[-1] == {"ztf/0": 2}
    assert claim.committed == 2
    assert writer.trouble == ""
    assert harness.transactions("aborted") == (0 if call == "begin" else 1)
    assert harness.window.room == FIRST_BYTES


def test_cause_of_a_failure_is_logged_if_the_call_names_only_the_state(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    writer = harness.writer()
    writer.add(work(Claim("ztf", 0, writer, 0), 0, b"a"))
    harness.fail("commit", IN_ERROR_STATE)
    harness.fail("begin", ABORTABLE)
    assert len(writer.commit()) == 1
    assert caplog.messages == ["test brokers: transaction is repeated: too few replicas"]


def test_fenced_writer_commits_nothing_and_its_claims_end(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"a"))
    harness.fail("commit", FENCED)
    harness.fail("abort", FENCED)

    with pytest.raises(FencedError, match="test brokers: fenced by another instance"):
        writer.commit()

    assert (claim.alive, claim.committed) == (False, 0)
    assert harness.producer.published == []
    assert harness.transactions("aborted") == 1
    assert harness.window.room == FIRST_BYTES
    writer.close()
    assert harness.producer.calls.count("abort") == 0, "another instance has the transaction"


def test_fatal_error_of_a_producer_is_a_setup_error(harness: Harness) -> None:
    writer = harness.writer()
    writer.add(work(Claim("ztf", 0, writer, 0), 0, b"a"))
    harness.fail("commit", FATAL)
    with pytest.raises(KafkaSetupError, match="test brokers: out of order"):
        writer.commit()
    assert harness.producer.published == []


def test_work_of_a_claim_that_has_ended_is_dropped_and_the_rest_committed(harness: Harness) -> None:
    writer = harness.writer()
    kept, revoked = (Claim("ztf", partition, writer, 0) for partition in (0, 1))
    writer.add(work(kept, 0, b"kept"))
    writer.add(work(revoked, 0, b"revoked"))
    revoked.ended = True

    (committed,) = writer.commit()

    assert committed.claim is kept
    assert harness.producer.published == [b"kept"]
    assert harness.stored == [{"ztf/0": 1}]
    assert revoked.committed == 0


def test_claim_that_ends_during_a_commit_does_not_drop_other_work(harness: Harness) -> None:
    writer = harness.writer()
    kept, revoked = (Claim("ztf", partition, writer, 0) for partition in (0, 1))
    writer.add(work(kept, 0, b"kept"))
    writer.add(work(revoked, 0, b"revoked"))

    def revoke() -> None:
        if not revoked.ended:
            revoked.ended = True
            raise ClaimEndedError

    harness.before_store = revoke

    (committed,) = writer.commit()

    assert committed.claim is kept
    assert harness.producer.published == [b"kept"]
    assert harness.stored == [{"ztf/0": 1}]


def test_output_beyond_the_window_waits_for_the_next_transaction(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    half = bytes(FIRST_BYTES // 2 - 10_000)
    harness.admin.max_message_bytes[SCORED] = FIRST_BYTES
    harness.limits.refresh()
    for i in range(3):
        writer.add(work(claim, i, half))
    assert writer.crowded

    assert [part.start for part in writer.commit()] == [0, 1]
    assert claim.committed == 2
    assert writer.held_packets == 1
    assert len(harness.producer.pending) == 1, "the rest is on its way before the next commit is due"
    assert [part.start for part in writer.commit()] == [2]
    assert harness.stored == [{"ztf/0": 2}, {"ztf/0": 3}]
    assert harness.producer.published == [half] * 3


def test_work_that_is_larger_than_the_window_is_divided_between_packets(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    value = bytes(FIRST_BYTES // 4)
    writer.add(work(claim, 0, *[value] * 6))

    while writer.waiting_since is not None:
        writer.commit()

    assert harness.producer.published == [value] * 6
    positions = [stored["ztf/0"] for stored in harness.stored]
    assert positions == sorted(positions)
    assert len(positions) > 1
    assert claim.committed == positions[-1] == 6
    assert harness.window.room == harness.window.bytes


def test_writer_has_a_share_of_a_window_that_others_have_filled(harness: Harness) -> None:
    harness.window.overdraw(FIRST_BYTES)
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    small = bytes(FIRST_BYTES // SHARES // 4)
    writer.add(work(claim, 0, *[small] * 6))
    assert writer.crowded
    assert harness.producer.calls == ["init"], "nothing is sent before the commit is due"

    (committed,) = writer.commit()

    assert len(committed.packets) == 4
    assert claim.committed == 4


def test_window_grows_by_the_bytes_of_a_fast_transaction(harness: Harness) -> None:
    writer = harness.writer()
    size = FIRST_BYTES * 3 // 4
    writer.add(work(Claim("ztf", 0, writer, 0), 0, *[bytes(size // 4)] * 4))
    writer.commit()
    assert harness.window.bytes == FIRST_BYTES + size


@pytest.mark.parametrize(
    ("call", "divisor"), [("commit", AFTER_FAILURE), (None, AFTER_SLOW)], ids=["it fails", "it passes late"]
)
def test_window_shrinks_after_a_slow_transaction(harness: Harness, call: str | None, divisor: int) -> None:
    writer = harness.writer()
    if call:
        harness.fail(call, ABORTABLE)

    def let_time_pass() -> None:
        harness.late_s += transactions.GRACE_S * 0.6
        harness.before_store = lambda: None  # the next attempt is fast

    harness.before_store = let_time_pass
    writer.add(work(Claim("ztf", 0, writer, 0), 0, b"a"))
    writer.commit()
    assert harness.window.bytes == FIRST_BYTES // divisor


@pytest.mark.parametrize("end", ["commit", "revoke"])
def test_claim_is_drained_when_its_work_is_committed_or_its_partition_revoked(harness: Harness, end: str) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    assert claim.drained
    claim.enqueued = 1
    writer.add(work(claim, 0, b"a"))
    assert not claim.drained
    if end == "commit":
        writer.commit()
    else:
        claim.ended = True
    assert claim.drained


def test_topic_with_a_lowered_limit_gets_dead_letters(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"small", bytes(50_000)))
    harness.admin.max_message_bytes[SCORED] = 10_000
    harness.fail("commit", TOO_LARGE)

    (committed,) = writer.commit()

    assert [(record.topic, record.value) for record in harness.producer.committed] == [
        (SCORED, b"small"),
        (LETTERS, b"packet"),
    ]
    assert [account.scored for account in committed.accounts] == [1, 0]
    assert claim.committed == 2


def test_writer_with_too_large_batches_sends_single_records_and_is_replaced(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"a", b"b"))
    harness.admin.max_message_bytes[SCORED] = 10_000
    harness.fail("commit", TOO_LARGE)

    assert len(writer.commit()) == 1

    after = harness.producer.calls[harness.producer.calls.index("abort") :]
    assert after == ["abort", "begin", "produce", "flush", "produce", "flush", "store", "commit"]
    assert not claim.alive
    assert claim.committed == 2
    harness.writer()
    assert harness.producer.properties["batch.size"] == 10_000


def test_refused_output_is_repeated_until_the_right_is_granted(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    harness.fail("commit", REFUSED, REFUSED)
    writer.add(work(claim, 0, b"a"))
    assert len(writer.commit()) == 1
    assert harness.producer.published == [b"a"]
    assert harness.transactions("aborted") == 2
    assert claim.alive


def test_refused_output_does_not_delay_the_end_of_the_service(harness: Harness) -> None:
    writer = harness.writer()
    harness.fail("commit", REFUSED)
    writer.add(work(Claim("ztf", 0, writer, 0), 0, b"a"))
    harness.stop.set()
    with pytest.raises(KafkaSetupError, match="the next start reads them again: a right is missing"):
        writer.commit()
    assert harness.producer.published == []


def test_refusal_is_kept_until_the_partition_is_committed_even_if_the_abort_fails(
    harness: Harness,
) -> None:
    refused = harness.writer()
    claim = Claim("ztf", 0, refused, 0)
    refused.add(work(claim, 0, b"a"))
    harness.fail("commit", REFUSED)
    harness.fail("abort", KafkaError(KafkaError.INVALID_TXN_STATE, "invalid state", fatal=True))
    with pytest.raises(FencedError, match="invalid state"):
        refused.commit()
    assert refused.refused
    assert "a right is missing" in harness.refusals["ztf", 0]

    successor = harness.writer()
    claim = Claim("ztf", 0, successor, 0)
    successor.add(work(claim, 0, b"a"))
    successor.commit()
    assert harness.refusals == {}
    assert harness.producer.published == [b"a"]


def test_start_of_a_claim_is_stored_before_anything_is_read(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 42)
    harness.refusals["ztf", 0] = "refused earlier"
    writer.store_start(claim)
    assert harness.producer.calls == ["init", "begin", "store", "commit"]
    assert harness.stored == [{"ztf/0": 42}]
    assert claim.alive
    assert harness.refusals == {}


def test_claim_whose_start_the_brokers_refuse_is_not_alive(harness: Harness) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 42)
    harness.fail("commit", REFUSED)
    writer.store_start(claim)
    assert not claim.alive
    assert "a right is missing" in harness.refusals["ztf", 0]
    assert harness.transactions("aborted") == 1


def test_failure_to_store_the_start_of_a_claim_is_a_setup_error(harness: Harness) -> None:
    writer = harness.writer()
    harness.fail("store", FATAL)
    with pytest.raises(KafkaSetupError, match="test brokers: out of order"):
        writer.store_start(Claim("ztf", 0, writer, 42))


def test_writer_waits_for_a_coordinator_that_is_moving(harness: Harness) -> None:
    harness.fail("init", TIMED_OUT, TIMED_OUT)
    harness.writer()
    assert harness.producer.calls == ["init"] * 3


def test_coordinator_that_does_not_answer_in_time_raises_kafka_away_error(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "OPEN_TIMEOUT_S", -1.0)
    harness.fail("init", TIMED_OUT)
    with pytest.raises(KafkaAwayError, match="cannot open transactions as 'me/group/0': timed out"):
        harness.writer()


def test_refusal_by_the_coordinator_is_a_setup_error(harness: Harness) -> None:
    harness.fail("init", FATAL)
    with pytest.raises(KafkaSetupError) as raised:
        harness.writer()
    assert not isinstance(raised.value, KafkaAwayError), "the same request cannot succeed later"


@pytest.mark.parametrize("errors", [(), (TIMED_OUT,)], ids=["the abort succeeds", "the abort fails"])
def test_closed_writer_drops_its_work(harness: Harness, errors: Sequence[Any]) -> None:
    writer = harness.writer()
    claim = Claim("ztf", 0, writer, 0)
    writer.add(work(claim, 0, b"a"))
    harness.fail("abort", *errors)
    writer.close()
    assert harness.producer.calls[-1] == "abort"
    assert (writer.held_packets, writer.waiting_since) == (0, None)
    assert (harness.producer.published, claim.committed) == ([], 0)
    assert harness.window.room == FIRST_BYTES
