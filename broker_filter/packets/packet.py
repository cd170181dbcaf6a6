"""A packet as it arrived: its bytes, where they stood, and when. Knows nothing of what the bytes mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KafkaPosition:
    """Where a message stands. `cluster`: its id, or its bootstrap servers where it names none."""

    cluster: str
    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.cluster}/{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class FilePosition:
    """Where a packet stands: file, and in an archive the path inside it (`a.tar.gz/b.avro`).

    `record` counts the alerts of that member before this packet: alert k of the packet is record `record + k`.
    """

    path: str
    member: str = ""
    record: int = 0

    def __str__(self) -> str:
        where = f"{self.path}::{self.member}" if self.member else self.path
        return f"{where}#{self.record}" if self.record else where


Position = KafkaPosition | FilePosition


@dataclass(frozen=True, slots=True)
class Packet:
    """One Kafka message, or one piece of an archive that holds whole alerts: any bytes at all until they are decoded.

    `timestamp_ms`: the message's Kafka timestamp (Unix milliseconds), None where it has none.
    """

    data: bytes
    position: Position
    timestamp_ms: int | None = None
