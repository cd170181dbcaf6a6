"""Reads annotations out of output records: the field `broker_filter`, of alerts and of records of `payload: scores`.

Records are untrusted. A schema is used only if each record that it describes takes time and memory in proportion to its
bytes. Values of unexpected types are dropped, so that what is returned can be shown without further checks.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fastavro
from fastavro.types import Schema

from broker_filter.packets.batch import BANDS, AlertIdentity, Survey
from broker_filter.packets.framing.ocf import read_container
from broker_filter.packets.framing.wire import is_wire_message, unframe
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import SchemaRegistry, UnknownSchemaId
from broker_filter.packets.schemas.writer_schema import (
    PRIMITIVES,
    BySchema,
    SchemaError,
    WriterSchema,
    record_fields,
)

ANNOTATION = re.compile(r"broker_filter(?:_([0-9]{1,3}))?")
"""Names of the added field: `broker_filter`, then `broker_filter_2` and so on; the highest number is the newest."""
SCORES_RECORD = "broker_filter.ScoredAlert"
"""The full name of the record of `payload: scores`."""
MAX_TEXT = 300
"""Longest text that is kept of a record, in characters: a name or a sentence."""
MAX_ITEMS = 100
"""The most entries that are kept of an array or a map of a record."""
MAX_EMPTY = 64
"""The most parts of a record that may take no bytes. Schemas of surveys have none."""

_FASTAVRO_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError)
"""What fastavro raises for a body that does not fit its schema, or for a schema that it does not take."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the annotation of a schema's records is read: the writer's schema, and the schema of the wanted field."""

    field: str
    writer: Schema
    wanted: Schema


def read_annotation(body: bytes | memoryview, schema: WriterSchema) -> dict[str, Any]:
    """Return the newest annotation of an encoded record; empty if the record has none or it cannot be read."""
    reading = _annotation_reading(schema)
    if reading is None:
        return {}
    try:
        record = fastavro.schemaless_reader(io.BytesIO(body), reading.writer, reading.wanted)
    except _FASTAVRO_ERRORS:
        return {}
    annotation = record.get(reading.field) if isinstance(record, dict) else None
    return bounded(annotation) if isinstance(annotation, dict) else {}


def read_scores_record(packet: Packet, registry: SchemaRegistry) -> tuple[AlertIdentity, dict[str, Any]] | None:
    """Return the identity and the annotation of a record of `payload: scores`; None if the packet is no such record.

    Raises RegistryUnavailable if the schema of a packet in wire format is needed and the registry does not answer.
    """
    schema: WriterSchema | None
    if is_wire_message(packet.data):
        message = unframe(packet.data)
        body = message.body
        try:
            schema = registry.get(message.schema_id)
        except (UnknownSchemaId, SchemaError):
            return None
    else:
        container = read_container(packet.data)
        schema = container.schema
        if not container.blocks:
            return None
        body = container.blocks[0].body
    if schema is None or schema.canonical["name"] != SCORES_RECORD or (parsed := _whole_reading(schema)) is None:
        return None
    try:
        record = fastavro.schemaless_reader(io.BytesIO(body), parsed, None)
    except _FASTAVRO_ERRORS:
        return None
    if not isinstance(record, dict) or (identity := _identity(record)) is None:
        return None
    annotation = record.get("broker_filter")
    return identity, bounded(annotation) if isinstance(annotation, dict) else {}


def _identity(record: Mapping[str, Any]) -> AlertIdentity | None:
    survey = next((one for one in Survey if str(one) == record.get("survey")), None)
    alert_id, mjd, ra, dec = (record.get(name) for name in ("alert_id", "mjd", "ra", "dec"))
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (mjd, ra, dec))
    if survey is None or not isinstance(alert_id, int) or not numbers:
        return None
    band = record.get("band")
    return AlertIdentity(
        alert_id=alert_id,
        object_id=str(record.get("object_id", ""))[:MAX_TEXT],
        survey=survey,
        schema_version=str(record.get("schema_version", ""))[:MAX_TEXT],
        mjd=mjd,
        ra=ra,
        dec=dec,
        band=band if band in BANDS else None,
    )


def bounded(value: Any) -> Any:
    """Return a decoded value with only what JSON can hold: texts and lists are cut, numbers are finite or None.

    Values of other types become None. Lists and maps keep their first MAX_ITEMS entries, texts MAX_TEXT characters.
    """
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return [bounded(item) for item in value[:MAX_ITEMS]]
    if isinstance(value, dict):
        return {str(key)[:MAX_TEXT]: bounded(item) for key, item in list(value.items())[:MAX_ITEMS]}
    return _as_milliseconds(value)


def _as_milliseconds(value: Any) -> int | None:
    """Return a time that fastavro decoded (logical type timestamp-millis) in Unix milliseconds, else None."""
    timestamp = getattr(value, "timestamp", None)
    try:
        return round(1000 * timestamp()) if callable(timestamp) else None
    except (ValueError, OverflowError):
        return None


def _read_annotation_schema(schema: WriterSchema) -> tuple[_Reading | None]:
    """Return how to read the annotation, in a tuple because BySchema caches no None."""
    found = [
        (int(match[1] or 1), field)
        for field in record_fields(schema.definition)
        if (match := ANNOTATION.fullmatch(str(field.get("name"))))
    ]
    if not found or (writer := _parsed(schema)) is None:
        return (None,)
    field = max(found, key=lambda one: one[0])[1]
    wanted = {key: schema.definition[key] for key in ("type", "name", "namespace") if key in schema.definition}
    try:
        return (_Reading(field["name"], writer, fastavro.parse_schema({**wanted, "fields": [field]})),)
    except Exception:  # fastavro has many errors for schemas, and this one comes from a packet
        return (None,)


def _parsed(schema: WriterSchema) -> Schema | None:
    """Return the schema as fastavro takes it; None if it refuses the schema, or if reading would have no bounds."""
    if not is_bounded(schema):
        return None
    try:
        return fastavro.parse_schema(schema.definition)
    except Exception:  # fastavro has many errors for schemas, and this one comes from a packet
        return None


_readings = BySchema(_read_annotation_schema)
_wholes = BySchema(lambda schema: (_parsed(schema),))


def _annotation_reading(schema: WriterSchema) -> _Reading | None:
    return _readings(schema)[0]


def _whole_reading(schema: WriterSchema) -> Schema | None:
    return _wholes(schema)[0]


def is_bounded(schema: WriterSchema) -> bool:
    """Return whether a record of the schema takes time and memory in proportion to its bytes, whatever these are.

    That is false for a record that contains itself, because nesting then has no bound, and for a schema in which more
    than MAX_EMPTY values in a row take no bytes, because a few bytes could then claim to hold millions of values.
    """
    try:
        _without_bytes(schema.canonical, {})
    except _UnboundedError:
        return False
    return True


class _UnboundedError(Exception):
    """A value of a type may take any time and memory."""


def _without_bytes(type_: Any, known: dict[str, tuple[int, bool]]) -> tuple[int, bool]:
    """Return how many parts of a value of a canonical type take no bytes, and whether the value takes any.

    `known`: the results of the named types that are complete. Raises _UnboundedError.
    """
    empty, takes = 0, True
    if isinstance(type_, list):
        for branch in type_:  # the number of the branch is a byte, which pays for at most MAX_EMPTY parts
            _without_bytes(branch, known)
    elif isinstance(type_, str) and type_ not in PRIMITIVES:
        if type_ not in known:
            raise _UnboundedError
        empty, takes = known[type_]
    elif isinstance(type_, str):
        takes = type_ != "null"
        empty = 0 if takes else 1
    elif type_["type"] == "record":
        parts = [_without_bytes(field["type"], known) for field in type_["fields"]]
        empty, takes = sum(count for count, _ in parts), any(taking for _, taking in parts)
    elif type_["type"] == "fixed":
        takes = type_["size"] > 0
        empty = 0 if takes else 1
    elif type_["type"] == "map":
        _without_bytes(type_["values"], known)
    elif type_["type"] == "array" and not _without_bytes(type_["items"], known)[1]:
        raise _UnboundedError
    if empty > MAX_EMPTY:
        raise _UnboundedError
    if isinstance(type_, dict) and "name" in type_:
        known[type_["name"]] = empty, takes
    return empty, takes
