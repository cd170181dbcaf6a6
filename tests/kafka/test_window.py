"""The window of output in flight, and work that is divided to fit into the window."""

from __future__ import annotations

from broker_filter.kafka.transactions import Claim, Work
from broker_filter.kafka.window import FIRST_BYTES, LARGEST_BYTES, SMALLEST_BYTES, Window
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.streaming.account import Account
from broker_filter.streaming.encoding import OutputRecord

TIMEOUT_S = 16.0


class Link:
    """A window, and the time that its transactions take, which the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.window = Window(TIMEOUT_S, lambda: self.now)

    def commit(self, seconds: float) -> int:
        """Commit a transaction that fills the window; return the size of the window after it."""
        began, size = self.now, self.window.room
        assert self.window.take(size)
        self.now += seconds
        self.window.passed(size, began)
        self.window.give_back(size)
        return self.window.bytes

    def fail(self, seconds: float) -> int:
        """Let a transaction fail; return the size of the window after it."""
        began = self.now
        self.now += seconds
        self.window.failed(began)
        return self.window.bytes


def test_window_refuses_bytes_beyond_its_size() -> None:
    window = Link().window
    assert window.take(FIRST_BYTES - 1)
    assert not window.take(2)
    assert window.room == 1
    window.give_back(FIRST_BYTES - 1)
    assert window.room == FIRST_BYTES


def test_window_doubles_with_each_fast_full_commit_up_to_its_largest_size() -> None:
    link = Link()
    assert [link.commit(1) for _ in range(3)] == [2 * FIRST_BYTES, 4 * FIRST_BYTES, 8 * FIRST_BYTES]
    assert [link.commit(1) for _ in range(5)][-1] == LARGEST_BYTES


def test_small_commit_does_not_change_the_window() -> None:
    link = Link()
    link.window.take(1000)
    link.window.passed(1000, link.now)
    assert link.window.bytes == FIRST_BYTES


def test_window_keeps_its_size_for_medium_commits_and_halves_for_slow_ones() -> None:
    link = Link()
    assert link.commit(TIMEOUT_S / 3) == FIRST_BYTES
    assert link.commit(TIMEOUT_S * 2 / 3) == FIRST_BYTES // 2


def test_window_shrinks_after_a_timeout_and_grows_again() -> None:
    link = Link()
    assert link.fail(TIMEOUT_S) == FIRST_BYTES // 8
    assert link.commit(1) == FIRST_BYTES // 4


def test_window_does_not_shrink_after_a_fast_failure() -> None:
    assert Link().fail(1) == FIRST_BYTES


def test_transactions_that_fail_together_shrink_the_window_once() -> None:
    link = Link()
    began = link.now
    link.fail(TIMEOUT_S)
    link.window.failed(began)
    assert link.window.bytes == FIRST_BYTES // 8


def test_window_never_shrinks_below_its_smallest_size() -> None:
    link = Link()
    assert [link.fail(TIMEOUT_S) for _ in range(10)][-1] == SMALLEST_BYTES


def work_of(sizes: list[int]) -> Work:
    """Return packets at offsets 10, 20, ... with two records each; records and packets are in different orders."""
    packets = [Packet(b"", KafkaPosition("cluster", "input", 0, 10 * (i + 1))) for i in range(len(sizes))]
    records = [(i, OutputRecord(topic, None, bytes(size), [])) for topic in "ab" for i, size in enumerate(sizes)]
    claim = Claim("input", 0, None, 0)  # type: ignore[arg-type]
    return Work(claim, 10, 10 * len(sizes) + 1, packets, [Account(consumed=i) for i in range(len(sizes))], records)


def test_work_is_divided_between_packets_without_losing_a_position() -> None:
    first, rest = work_of([100, 200, 300]).split(700)
    assert (first.start, first.end, rest.start, rest.end) == (10, 30, 30, 31)
    assert [packet.position.offset for packet in (*first.packets, *rest.packets)] == [10, 20, 30]  # type: ignore[union-attr]
    assert [account.consumed for account in (*first.accounts, *rest.accounts)] == [0, 1, 2]
    assert [(i, record.topic, len(record.value)) for i, record in first.records] == [
        (0, "a", 100),
        (1, "a", 200),
        (0, "b", 100),
        (1, "b", 200),
    ]
    assert [(i, record.topic, len(record.value)) for i, record in rest.records] == [(0, "a", 300), (0, "b", 300)]


def test_work_of_one_packet_is_never_divided() -> None:
    work = work_of([1000])
    assert work.split(1) == [work]
    assert [len(part.packets) for part in work_of([1000, 1000]).split(1)] == [1, 1]
