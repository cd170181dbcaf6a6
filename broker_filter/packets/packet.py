"""A packet as it arrived: its bytes, its position and its time. This module never interprets the bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KafkaPosition:
    """The position of a Kafka message. `cluster`: the cluster's id, or its bootstrap servers if it has no id."""

    cluster: str
    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.cluster}/{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class FilePosition:
    """The position of a packet in a file. `member`: the path inside an archive (`a.tar.gz/b.avro`), empty otherwise.

    `record`: the number of alerts before this packet in the same file or member, so alert k of the packet is record
    `record + k`.
    """

    path: str
    member: str = ""
    record: int = 0

    def __str__(self) -> str:
        where = f"{self.path}::{self.member}" if self.member else self.path
        return f"{where}#{self.record}" if self.record else where


Position = KafkaPosition | FilePosition

IN_MEMORY = FilePosition("<memory>")
"""The position of a packet whose owner names no other."""


@dataclass(frozen=True, slots=True)
class Redriven:
    """What is known about a message that was rejected and comes back from a dead-letter topic to be scored again."""

    input: str
    """The position at which the message was first read."""
    tries: int
    """How many times the message was scored again, counting this time."""
    published: tuple[range, ...] = ()
    """Indices of the alerts of the message that were published earlier and must not be published again."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One Kafka message, or one piece of an archive that holds whole alerts. `data` is untrusted input.

    `data`: an Avro object container file, or a record in Confluent wire format. `position`: where the bytes were read;
    logs and tables quote it. `timestamp_ms`: the Kafka timestamp of the message (Unix milliseconds); None if it has
    none. `redriven`: is set if the packet was read from a dead-letter topic to be scored again.

    >>> from broker_filter import Packet
    >>> str(Packet(b"Obj...").position)
    '<memory>'
    """

    data: bytes
    position: Position = IN_MEMORY
    timestamp_ms: int | None = None
    redriven: Redriven | None = None
