"""Reads the rows of Parquet files: the columns that hold wanted fields, or whole rows as Avro packets.

Fink distributes ZTF and LSST alerts as Parquet. The Avro schema of a row has the same field names, types that follow
the Arrow schema, and nullable fields. A file is read some rows at a time, never as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import IO, Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq

from broker_filter.packets.arrow import IS_LIST, is_any
from broker_filter.packets.framing import ocf
from broker_filter.packets.schemas.writer_schema import MAX_REMEMBERED_SCHEMAS, WriterSchema, parse_schema

MAGIC = b"PAR1"
ROWS_AT_A_TIME = 32
"""The number of rows that are read at a time as packets: a few megabytes of LSST alerts."""
MOST_ROWS = 128
"""The largest number of rows that are read at a time as columns: the fixed cost of a batch is then small."""
MOST_BATCH_BYTES = 2 << 30
"""The size of a column of a batch, in bytes, if each value were as large as the column of the whole row group.

Parquet stores repeated values once. If a batch would exceed this size, it has fewer rows, at least ROWS_AT_A_TIME.
"""
ALWAYS_ALLOWED_BYTES = 64 << 20
"""The size, in bytes, that the rows of any file may take. A small file may repeat one alert some hundred times."""
LEAST_ROW_BYTES = 4096
"""The minimum size, in bytes, that is counted for a row: decoding and reporting a tiny row also takes time."""
READ_BUFFER_BYTES = 1 << 19
"""The size of a column's buffer, in bytes. Without it, or with pre-buffering, whole row groups are held in memory."""
VALUE_BYTES = 8
"""The minimum size of a value in memory, in bytes."""

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


class ParquetError(Exception):
    """The file is not Parquet, is damaged, or exceeds the bounds."""


class Rows:
    """The rows of a seekable Parquet file. Iteration yields each row as an Avro container of one record, null codec.

    `batches` yields the rows as columns. `left_out`: see AvroRows.

    Raises ParquetError, when the file is opened or while it is read, if the file is damaged, or if its rows take more
    than `ocf.GREATEST_RATIO` times the size of the file and more than ALWAYS_ALLOWED_BYTES. This limit is needed
    because repeated values take almost no space in Parquet. Rows of distinct alerts take less than ten times the file's
    size.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._allowed = max(ALWAYS_ALLOWED_BYTES, ocf.GREATEST_RATIO * file.seek(0, io.SEEK_END))
        file.seek(0)
        with _damage_as_parquet_error():
            self._file = pq.ParquetFile(
                file, coerce_int96_timestamp_unit="us", buffer_size=READ_BUFFER_BYTES, pre_buffer=False
            )
            self._check_claims(self._file.metadata)
            self._avro = AvroRows(self._file.schema_arrow)
        self.left_out = self._avro.left_out

    def __iter__(self) -> Iterator[bytes]:
        with _damage_as_parquet_error():
            left = self._allowed
            for batch in self._file.iter_batches(ROWS_AT_A_TIME, columns=self._avro.columns, use_threads=False):
                for container in self._avro.containers(batch):
                    left -= max(len(container), LEAST_ROW_BYTES)
                    if left < 0:
                        raise ParquetError(
                            f"the rows take more than {self._allowed} bytes, too many for the file's size"
                        )
                    yield container

    def batches(self, fields: Collection[str]) -> Iterator[tuple[pa.RecordBatch, WriterSchema]]:
        """Yield all rows in order, at most MOST_ROWS at once: their columns, and their schema as Avro records.

        `fields`: the dotted paths of the wanted fields; all if it is empty. Other columns are not read, but the schema
        has them.
        """
        with _damage_as_parquet_error():
            left, columns = self._allowed, self._columns(fields)
            for batch in self._file.iter_batches(self._rows_of(columns), columns=columns, use_threads=False):
                left -= max(batch.nbytes, len(batch) * LEAST_ROW_BYTES)
                if left < 0:
                    raise ParquetError(f"the rows take more than {self._allowed} bytes, too many for the file's size")
                yield batch, self._avro.schema

    def _rows_of(self, columns: Collection[str]) -> int:
        """Return the number of rows of these columns that are read at a time."""
        metadata, wanted = self._file.metadata, set(columns)
        largest = max(
            (
                chunk.total_uncompressed_size
                for group in map(metadata.row_group, range(metadata.num_row_groups))
                for chunk in map(group.column, range(group.num_columns))
                if chunk.path_in_schema in wanted
            ),
            default=0,
        )
        return min(MOST_ROWS, max(ROWS_AT_A_TIME, MOST_BATCH_BYTES // max(1, largest)))

    def _columns(self, fields: Collection[str]) -> list[str]:
        """Return the paths of the file's columns that hold `fields`.

        The path of a column has the names of lists and of their items too, which differ between writers.
        """
        wanted = [field.split(".") for field in fields]
        outer = {names[0] for names in wanted if len(names) == 1}
        inner = {tuple(names) for names in wanted if len(names) == 2}
        paths = [column.path for column in map(self._file.schema.column, range(len(self._file.schema)))]
        return [
            path
            for path, (first, *rest) in ((path, path.split(".")) for path in paths)
            if not fields or first in outer or any((first, name) in inner for name in rest)
        ]

    def _check_claims(self, metadata: pq.FileMetaData) -> None:
        """Raise ParquetError if the metadata of a column claims more bytes, or more values, than are allowed."""
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if max(column.num_values * VALUE_BYTES, column.total_uncompressed_size) > self._allowed:
                    raise ParquetError(f"column {column.path_in_schema} claims more than {self._allowed} bytes")


class AvroRows:
    """The rows of a table with the columns `schema` as records of Avro.

    Structs become records, all kinds of lists become arrays, maps become maps, and timestamps and dates become logical
    types of Avro. `left_out`: the columns that Avro cannot express because of their type or name, and their types, by
    dotted path. `columns`: the names of the other columns.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.left_out: dict[str, pa.DataType] = {}
        self.definition = self._record(schema, "alert", "")
        self.columns: list[str] = [field["name"] for field in self.definition["fields"]]

    @cached_property
    def schema(self) -> WriterSchema:
        """The schema of the records. Equal schemas are the same object. Raises SchemaError."""
        return _parse(json.dumps(self.definition))

    def containers(self, rows: pa.RecordBatch) -> Iterator[bytes]:
        """Yield each row as an Avro container of one record, null codec. `rows`: a batch with the columns `columns`."""
        schema_json = json.dumps(self.definition).encode()
        sync = hashlib.md5(schema_json, usedforsecurity=False).digest()
        header = ocf.container_header(schema_json, sync)
        encodable = fastavro.parse_schema(self.definition)
        for row in rows.to_pylist(maps_as_pydicts="lossy"):
            body = io.BytesIO()
            fastavro.schemaless_writer(body, encodable, row)
            yield header + ocf.encode_block(1, body.getvalue(), sync)

    def _record(self, fields: Iterable[pa.Field], name: str, path: str) -> dict[str, Any]:
        """Return the Avro record of `fields`; a field that Avro cannot express is added to `left_out` instead.

        `name`: the Avro name, unique because it contains the names of the outer fields. `path`: the dotted path.
        """
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
        """Return the Avro schema of the non-null values of an Arrow type; None if Avro has no such type."""
        if pa.types.is_struct(kind):
            return self._record(kind, name, path)
        if is_any(kind, IS_LIST):
            items = self._type(kind.value_type, name, path)
            return {"type": "array", "items": _nullable(items)} if items else None
        if pa.types.is_map(kind) and self._type(kind.key_type, name, path) == "string":
            values = self._type(kind.item_type, name, path)
            return {"type": "map", "values": _nullable(values)} if values else None
        if pa.types.is_timestamp(kind) and kind.unit != "ns":  # Python's datetime cannot represent nanoseconds
            return {"type": "long", "logicalType": "timestamp-micros" if kind.tz else "local-timestamp-micros"}
        if pa.types.is_dictionary(kind):
            return self._type(kind.value_type, name, path)
        if pa.types.is_fixed_size_binary(kind):
            return "bytes"
        return _PRIMITIVES.get(kind)


@lru_cache(MAX_REMEMBERED_SCHEMAS)
def _parse(definition: str) -> WriterSchema:
    return parse_schema(definition)


def _nullable(schema: str | dict[str, Any]) -> str | dict[str, Any] | list[str | dict[str, Any]]:
    """Return the schema of values that may also be null.

    Avro allows each type once in a union, so null stays as it is.
    """
    return _NULL if schema == _NULL else [_NULL, schema]


@contextmanager
def _damage_as_parquet_error() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ParquetError(f"{type(error).__name__}: {error}") from error
