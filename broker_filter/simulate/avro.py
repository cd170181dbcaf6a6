"""Encodes Avro records, for schemas that consist of records, arrays, nullable fields and primitives.

For simulated alerts it is four times as fast as the writer of fastavro, because it does not try the branches of unions.
It only supports what the schemas of simulated alerts need, so it must never be used for other schemas.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from broker_filter.packets.framing.ocf import encode_long

Put = Callable[[bytes], None]
Write = Callable[[Any, Put], None]

_pack_float, _pack_double = struct.Struct("<f").pack, struct.Struct("<d").pack


def _write_bytes(value: bytes, put: Put) -> None:
    put(encode_long(len(value)))
    put(value)


_PRIMITIVES: dict[str, Write] = {
    "boolean": lambda value, put: put(b"\1" if value else b"\0"),
    "int": lambda value, put: put(encode_long(value)),
    "long": lambda value, put: put(encode_long(value)),
    "float": lambda value, put: put(_pack_float(value)),
    "double": lambda value, put: put(_pack_double(value)),
    "bytes": _write_bytes,
    "string": lambda value, put: _write_bytes(value.encode(), put),
}


def compile_writer(schema: dict[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """Return a function that encodes a record; missing nullable fields are encoded as null.

    Raises ValueError if the schema contains a type that this module does not support.
    """
    write = _compile(schema, {}, "")

    def encode(record: dict[str, Any]) -> bytes:
        pieces: list[bytes] = []
        write(record, pieces.append)
        return b"".join(pieces)

    return encode


def _compile(schema: Any, named: dict[str, Write], namespace: str) -> Write:
    match schema:
        case str() if schema in _PRIMITIVES:
            return _PRIMITIVES[schema]
        case str():
            return named[schema if "." in schema else f"{namespace}.{schema}"]
        case {"type": "array", "items": items}:
            return _array(_compile(items, named, namespace))
        case {"type": "record", "name": name, "fields": fields}:
            namespace = schema.get("namespace", namespace)
            write = _record([_compile_field(field, named, namespace) for field in fields])
            named[f"{namespace}.{name}"] = write
            return write
        case {"type": str() as primitive} if primitive in _PRIMITIVES:  # a logical type
            return _PRIMITIVES[primitive]
    raise ValueError(f"the writer of simulated alerts does not support this Avro type: {schema}")


def _compile_field(field: dict[str, Any], named: dict[str, Write], namespace: str) -> tuple[str, bool, Write]:
    """Return the name of a field, whether it may be null, and the function that writes its value."""
    match field["type"]:
        case ["null", branch]:
            return field["name"], True, _compile(branch, named, namespace)
        case other:
            return field["name"], False, _compile(other, named, namespace)


def _array(write_item: Write) -> Write:
    def write(items: Any, put: Put) -> None:
        if items:
            put(encode_long(len(items)))
            for item in items:
                write_item(item, put)
        put(b"\0")

    return write


def _record(fields: list[tuple[str, bool, Write]]) -> Write:
    def write(record: Any, put: Put) -> None:
        for name, may_be_null, write_value in fields:
            value = record.get(name)
            if may_be_null:
                if value is None:
                    put(b"\0")
                    continue
                put(b"\2")
            write_value(value, put)

    return write
