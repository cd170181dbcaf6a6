"""Confluent wire format: byte 0x00, the schema id (4 bytes), the Avro body. This module never looks up a schema."""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = 0
_HEADER = struct.Struct(">BI")
"""The magic byte and the schema id. The id is big-endian, as Confluent's serialisers write it. LSST's DMTN-093 says
little-endian, but LSST's packets are big-endian."""


class WireMessage(NamedTuple):
    """A framed message: the id of its schema in the registry, and its Avro body (a zero-copy view)."""

    schema_id: int
    body: memoryview


def is_wire_message(data: bytes) -> bool:
    """Return whether `data` starts with the magic byte of wire format and is long enough to have a body."""
    return len(data) > _HEADER.size and data[0] == MAGIC


def unframe(data: bytes) -> WireMessage:
    """Return the schema id and the body of a message, without copying. `data` must pass `is_wire_message`."""
    return WireMessage(_HEADER.unpack_from(data)[1], memoryview(data)[_HEADER.size :])


def frame(schema_id: int, body: bytes) -> bytes:
    """Return a wire format message with this schema id (0 to 2^32 - 1) and Avro body.

    Raises struct.error for other ids.
    """
    return _HEADER.pack(MAGIC, schema_id) + body
