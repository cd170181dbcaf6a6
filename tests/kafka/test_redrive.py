"""The marks of dead letters that are done: what a transaction adds to the ledger, and what the next run reads in it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from broker_filter.kafka.redrive import CHUNK, Ledger, Marks, Selection
from broker_filter.kafka.transactions import Claim
from broker_filter.packets.packet import Packet
from broker_filter.streaming.dead_letters import Letter


class Producer:
    """Collects what is produced, as the compacted topic does."""

    def __init__(self) -> None:
        self.table: dict[bytes, bytes] = {}

    def produce(self, topic: str, value: bytes, key: bytes, partition: int) -> None:
        assert (topic, partition) == ("me.redriven", 0)
        self.table[key] = value


def claim(partition: int, committed: int) -> Claim:
    """Return a claim on a partition of the dead-letter topic, whose writer is not used."""
    no_writer: Any = None
    return Claim("me.dead-letter", partition, no_writer, committed)


def contents(producer: Producer) -> dict[bytes, int]:
    return {key: Ledger.parse(None, value) for key, value in producer.table.items()}  # type: ignore[arg-type]


def test_a_transaction_marks_its_letters_and_keeps_the_marks_before() -> None:
    producer = Producer()
    first = Marks("me.redriven", "id")
    letters = [(0, 3), (0, CHUNK - 1), (0, CHUNK), (0, CHUNK + 5), (2, 3)]
    for letter in letters:
        first.select(*letter)
    first.store(producer, {claim(0, 0): CHUNK + 1})
    assert len(producer.table) == 2
    first.store(producer, {claim(0, 0): CHUNK + 1})  # a repeated transaction changes nothing
    first.store(producer, {claim(0, CHUNK + 1): CHUNK + 6, claim(2, 0): 4})

    second = Marks("me.redriven", "id")
    second.ledger = contents(producer)
    around = [(partition, offset + step) for partition, offset in letters for step in (-1, 0, 1)]
    assert {letter for letter in around if second.done(*letter)} == set(letters)
    second.select(0, 4)
    second.store(producer, {claim(0, 0): 5})
    third = Marks("me.redriven", "id")
    third.ledger = contents(producer)
    assert all(third.done(*letter) for letter in [*letters, (0, 4)])
    assert not third.done(0, 5)


def test_marks_of_a_deleted_topic_do_not_count() -> None:
    producer = Producer()
    marks = Marks("me.redriven", "old")
    marks.select(0, 1)
    marks.store(producer, {claim(0, 0): 2})
    new = Marks("me.redriven", "new")
    new.ledger = contents(producer)
    assert not new.done(0, 1)


def test_a_letter_is_selected_by_reason_time_and_tries() -> None:
    letter = Letter(Packet(b""), "corrupt", frozenset({"corrupt", "bad_cutout"}), tries=2)
    noon = datetime(2026, 11, 27, 12, tzinfo=UTC)
    at_noon = int(noon.timestamp() * 1000)
    assert Selection().includes(letter, at_noon)
    assert Selection(frozenset({"bad_cutout", "empty"}), noon, 3).includes(letter, at_noon)
    assert not Selection(frozenset({"empty"})).includes(letter, at_noon)
    assert not Selection(since=noon).includes(letter, at_noon - 1)
    assert not Selection(max_tries=2).includes(letter, at_noon)
