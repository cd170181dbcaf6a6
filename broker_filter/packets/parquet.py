"""Rows of Parquet as Avro containers of one record, so that there is one decoder: Fink's ZTF and LSST alerts.

Field names stay, types follow the Arrow schema, every field may be null. Reads some rows at a time, never a file whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq

from broker_filter.packets import ocf

MAGIC = b"PAR1"
ROWS_AT_A_TIME = 32
"""A few megabytes of LSST alerts."""
ALWAYS_ALLOWED_BYTES = 64 << 20
"""What the rows of a small file may take, which may well hold an alert some hundred times."""
LEAST_ROW_BYTES = 4096
"""What a row counts as at least: to decode and to report one takes as long, however few bytes it has."""
VALUE_BYTES = 8
"""What a value takes at least when it is read."""

_AVRO_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NULL = "null"
_PRIMITIVES: dict[pa.DataType, str | dict[str, Any]] = {
    pa.null(): _NULL,
    pa.bool_(): "boolean",
    **dict.fromkeys((pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()), "int"),
    **dict.fromkeys((pa.int64(), pa.uint32(), pa.uint64()), "long"),
    **dict.fromkeys((pa.float16(), pa.float32()), "float"),
    pa.float64(): "double",
    **dict.fromkeys((pa.string(), pa.large_string(), pa.string_view()), "string"),
    **dict.fromkeys((pa.binary(), pa.large_binary(), pa.binary_view()), "bytes"),
    pa.date32(): {"type": "int", "logicalType": "date"},
}
_IS_LIST = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


class ParquetError(Exception):
    """Bytes that cannot be read as Parquet, or not further."""


class Rows:
    """The rows of a seekable Parquet file: iterating yields each as an Avro container of one record, null codec.

    Structs become records, lists of every kind Avro arrays, maps Avro maps, timestamps and dates
    Avro's logical types. `left_out`: the columns whose type or name Avro cannot express, by dotted path, with their
    types. Raises `ParquetError` where the file is damaged, when it is opened and while it is read, and where its rows
    take more than `ocf.GREATEST_RATIO` times its bytes and more than ALWAYS_ALLOWED_BYTES: repeated values take hardly
    any bytes in Parquet. The rows of a file of different alerts take less than ten times its bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.left_out: dict[str, pa.DataType] = {}
        self._allowed = max(ALWAYS_ALLOWED_BYTES, ocf.GREATEST_RATIO * file.seek(0, io.SEEK_END))
        file.seek(0)
        with _damage_as_parquet_error():
            self._file = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
            self._check_claims(self._file.metadata)
            self._schema = self._record(self._file.schema_arrow, "alert", "")

    def __iter__(self) -> Iterator[bytes]:
        with _damage_as_parquet_error():
            schema_json = json.dumps(self._schema).encode()
            sync = hashlib.md5(schema_json, usedforsecurity=False).digest()
            header = ocf.container_header(schema_json, sync)
            encodable = fastavro.parse_schema(self._schema)
            columns = [field["name"] for field in self._schema["fields"]]
            left = self._allowed
            for batch in self._file.iter_batches(ROWS_AT_A_TIME, columns=columns, use_threads=False):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    body = io.BytesIO()
                    fastavro.schemaless_writer(body, encodable, row)
                    container = header + ocf.encode_block(1, body.getvalue(), sync)
                    left -= max(len(container), LEAST_ROW_BYTES)
                    if left < 0:
                        raise ParquetError(f"its rows take more than {self._allowed} bytes, too many for its size")
                    yield container

    def _check_claims(self, metadata: pq.FileMetaData) -> None:
        """Raises ParquetError where a column claims to hold more values, or bytes, than are allowed."""
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if max(column.num_values * VALUE_BYTES, column.total_uncompressed_size) > self._allowed:
                    raise ParquetError(f"column {column.path_in_schema} claims more than {self._allowed} bytes")

    def _record(self, fields: Iterable[pa.Field], name: str, path: str) -> dict[str, Any]:
        """An Avro record of those fields that Avro can express. `name` is unique by the fields that lead to it."""
        known = []
        for field in fields:
            where = f"{path}.{field.name}" if path else field.name
            schema = self._type(field.type, f"{name}.{field.name}", where)
            if schema is None or not _AVRO_NAME.fullmatch(field.name):
                self.left_out[where] = field.type
            else:
                known.append({"name": field.name, "type": _nullable(schema), "default": None})
        return {"type": "record", "name": name, "fields": known}

    def _type(self, kind: pa.DataType, name: str, path: str) -> str | dict[str, Any] | None:
        """The Avro schema of an Arrow type's non-null values; None where Avro has no such type."""
        if pa.types.is_struct(kind):
            return self._record(kind, name, path)
        if any(is_list(kind) for is_list in _IS_LIST):
            items = self._type(kind.value_type, name, path)
            return {"type": "array", "items": _nullable(items)} if items else None
        if pa.types.is_map(kind) and self._type(kind.key_type, name, path) == "string":
            values = self._type(kind.item_type, name, path)
            return {"type": "map", "values": _nullable(values)} if values else None
        if pa.types.is_timestamp(kind) and kind.unit != "ns":  # which Python's datetime has no room for
            return {"type": "long", "logicalType": "timestamp-micros" if kind.tz else "local-timestamp-micros"}
        if pa.types.is_dictionary(kind):
            return self._type(kind.value_type, name, path)
        if pa.types.is_fixed_size_binary(kind):
            return "bytes"
        return _PRIMITIVES.get(kind)


def _nullable(schema: str | dict[str, Any]) -> str | dict[str, Any] | list[str | dict[str, Any]]:
    """The schema of values that may also be null; Avro allows a type in a union once."""
    return _NULL if schema == _NULL else [_NULL, schema]


@contextmanager
def _damage_as_parquet_error() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ParquetError(f"{type(error).__name__}: {error}") from error
