"""Rows of Parquet as Avro containers of one record, so that there is one decoder: Fink's ZTF and LSST alerts.

Field names stay, types follow the Arrow schema, every field may be null. Reads some rows at a time, never a file whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq

from broker_filter.packets import ocf

MAGIC = b"PAR1"
ROWS_AT_A_TIME = 32
"""A few megabytes of LSST alerts."""

_AVRO_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PRIMITIVES: dict[pa.DataType, str | dict[str, Any]] = {
    pa.bool_(): "boolean",
    **dict.fromkeys((pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()), "int"),
    **dict.fromkeys((pa.int64(), pa.uint32(), pa.uint64()), "long"),
    **dict.fromkeys((pa.float16(), pa.float32()), "float"),
    pa.float64(): "double",
    **dict.fromkeys((pa.string(), pa.large_string()), "string"),
    **dict.fromkeys((pa.binary(), pa.large_binary()), "bytes"),
    pa.date32(): {"type": "int", "logicalType": "date"},
}

log = logging.getLogger(__name__)


class ParquetError(Exception):
    """Bytes that cannot be read as Parquet, or not further."""


def read_rows(file: IO[bytes]) -> Iterator[bytes]:
    """Yields each row of a seekable Parquet file as an Avro container file of one record, null codec.

    Structs become records, maps Avro maps, timestamps and dates Avro's logical types. A column whose type or name Avro
    cannot express is left out, and a warning in the log names it. Raises `ParquetError` where the file is damaged.
    """
    try:
        parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
        schema = _record(parquet.schema_arrow, "alert")
        schema_json = json.dumps(schema).encode()
        sync = hashlib.md5(schema_json, usedforsecurity=False).digest()
        header = ocf.container_header(schema_json, sync)
        encodable = fastavro.parse_schema(schema)
        columns = [field["name"] for field in schema["fields"]]
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=columns, use_threads=False):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                body = io.BytesIO()
                fastavro.schemaless_writer(body, encodable, row)
                yield header + ocf.encode_block(1, body.getvalue(), sync)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ParquetError(f"{type(error).__name__}: {error}") from error


def _record(fields: Iterable[pa.Field], name: str) -> dict[str, Any]:
    """An Avro record of those fields that Avro can express. `name` is unique by the path of fields that leads to it."""
    known = []
    for field in fields:
        schema = _schema(field.type, f"{name}.{field.name}")
        if schema is None or not _AVRO_NAME.fullmatch(field.name):
            log.warning(
                "Parquet column %s (%s) is left out: Avro cannot express it", f"{name}.{field.name}", field.type
            )
        else:
            known.append({"name": field.name, "type": ["null", schema], "default": None})
    return {"type": "record", "name": name, "fields": known}


def _schema(kind: pa.DataType, path: str) -> str | dict[str, Any] | None:
    """The Avro schema of an Arrow type's non-null values; None where Avro has no such type."""
    if pa.types.is_struct(kind):
        return _record(kind, path)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = _schema(kind.value_type, path)
        return {"type": "array", "items": ["null", items]} if items else None
    if pa.types.is_map(kind) and pa.types.is_string(kind.key_type):
        values = _schema(kind.item_type, path)
        return {"type": "map", "values": ["null", values]} if values else None
    if pa.types.is_timestamp(kind) and kind.unit != "ns":  # which Python's datetime has no room for
        return {"type": "long", "logicalType": "timestamp-micros" if kind.tz else "local-timestamp-micros"}
    if pa.types.is_dictionary(kind):
        return _schema(kind.value_type, path)
    return _PRIMITIVES.get(kind)
