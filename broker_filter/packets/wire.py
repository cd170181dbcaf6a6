"""Confluent wire format: byte 0x00, the schema's id (4 bytes), the Avro body. Frames, and knows no schema."""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = 0
_HEADER = struct.Struct(">BI")
"""Big-endian, as Confluent's serialisers write it (LSST's DMTN-093 says little-endian; its packets do not)."""


class WireMessage(NamedTuple):
    """A framed message: the registry's id of its schema, and the schemaless Avro body (a view)."""

    schema_id: int
    body: memoryview


def is_wire_message(data: bytes) -> bool:
    """Whether `data` starts as wire format does and has a body."""
    return len(data) > _HEADER.size and data[0] == MAGIC


def unframe(data: bytes) -> WireMessage:
    """Takes a message that `is_wire_message` apart, without copying."""
    return WireMessage(_HEADER.unpack_from(data)[1], memoryview(data)[_HEADER.size :])


def frame(schema_id: int, body: bytes) -> bytes:
    """`body` as a wire format message under `schema_id` (0 to 2^32 - 1)."""
    return _HEADER.pack(MAGIC, schema_id) + body
