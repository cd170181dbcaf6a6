"""The formats of tables: Parquet, Avro, JSON lines, CSV, ECSV and FITS.

Each format is written in row groups, and at most one row group is in memory. The header of FITS contains the number of
rows and the width of texts, so its rows are kept in a temporary file until all rows are known. The unit and description
of a column are the metadata `unit` and `description` of the schema's field.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import yaml
from fastavro.write import Writer as ContainerWriter
from numpy.typing import NDArray

ROW_GROUP = 8_192
"""Rows of a Parquet row group. They are kept in memory, 2 kB each with embeddings. With much smaller groups, readers
would spend their time on metadata."""
IDS = ("alert_id",)
"""Columns with integers above 2^53, which readers with doubles only (jq, JavaScript, Excel) would round."""
NULL_TEXT = "None"
"""The text that astropy writes for a null. A text column must be wide enough for it."""
FITS_BLOCK = 2880
"""Block size in bytes: each part of a FITS file is padded to a multiple of it (FITS standard 4.0, section 3.1)."""
FITS_COMMENT = 70
"""Number of characters that astropy writes in a COMMENT card."""
FITS_NULL = np.iinfo(np.int64).min
"""The integer that stands for null in FITS (TNULLn)."""
_YAML_WIDTH = 1 << 16
"""Line width for the YAML writer, so large that it never breaks a line: astropy reads a column's header from one
line."""


class Table(Protocol):
    """A table to which rows are written."""

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows, which have the schema with which the table was opened."""
        ...

    def close(self) -> None:
        """Complete the file with the rows that were written. The stream stays open."""
        ...


class _Parquet:
    """Parquet with additional metadata for pandas and astropy.

    From the metadata, they restore nullable integers and booleans, text lengths and units.

    pandas reads dtypes from the file's metadata; astropy reads units, descriptions and lengths. The Arrow schema is not
    stored, because readers would then use only its metadata, which cannot contain the lengths.
    """

    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(stream, schema, compression="zstd", store_schema=False)
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0
        self._widths = _Widths(schema)

    def write(self, rows: pa.RecordBatch) -> None:
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        lengths = {f"table::len::{name}": str(width) for name, width in self._widths.of_texts(NULL_TEXT).items()}
        described = {"pandas": _pandas_metadata(self._schema), "table_meta_yaml": _astropy_header(self._schema)}
        self._writer.add_key_value_metadata(described | lengths)
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            rows = pa.Table.from_batches(self._waiting)
            self._widths.add(rows)
            self._writer.write_table(rows, row_group_size=self._rows)
        self._waiting, self._rows = [], 0


class _Avro:
    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._writer = ContainerWriter(stream, _avro_schema(schema), codec="deflate")

    def write(self, rows: pa.RecordBatch) -> None:
        for row in rows.to_pylist():
            self._writer.write(row)

    def close(self) -> None:
        self._writer.flush()


class _JsonLines:
    """JSON as in RFC 8259, one object per line. Ids are strings, and a number that is not finite is null."""

    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:  # noqa: ARG002 -- every line names its columns
        self._stream = stream

    def write(self, rows: pa.RecordBatch) -> None:
        columns = [
            column.cast(pa.string()) if name in IDS else _finite(column)
            for name, column in zip(rows.schema.names, rows.columns, strict=True)
        ]
        plain = pa.RecordBatch.from_arrays(columns, names=rows.schema.names).to_pylist()
        self._stream.writelines(json.dumps(row, allow_nan=False).encode() + b"\n" for row in plain)

    def close(self) -> None:
        pass


class _Csv:
    """CSV (RFC 4180) with a header line. A null is an empty field, and a vector is a JSON array."""

    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._schema = pa.schema([pa.field(field.name, self._type(field.type)) for field in schema])
        self._writer = pa_csv.CSVWriter(stream, self._schema)

    def write(self, rows: pa.RecordBatch) -> None:
        columns = [self._column(column) for column in rows.columns]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()

    @staticmethod
    def _type(kind: pa.DataType) -> pa.DataType:
        return pa.string() if pa.types.is_list(kind) else kind

    def _column(self, column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            vectors = _finite(column).to_pylist()
            return pa.array([None if vector is None else json.dumps(vector) for vector in vectors], pa.string())
        return column


class _Ecsv(_Csv):
    """ECSV (astropy's APE 6): CSV below a header with types, units and descriptions."""

    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        header = _astropy_header(schema) + "delimiter: ','\nschema: astropy-2.0\n"
        lines = ["%ECSV 1.0", "---", *header.splitlines()]
        stream.write("".join(f"# {line}\n" for line in lines).encode())
        super().__init__(stream, schema)

    @staticmethod
    def _type(kind: pa.DataType) -> pa.DataType:
        return pa.string() if pa.types.is_boolean(kind) else _Csv._type(kind)

    def _column(self, column: pa.Array) -> pa.Array:
        if pa.types.is_boolean(column.type):  # ECSV writes booleans as Python does
            return pc.if_else(column, "True", "False")
        return super()._column(column)


class _Fits:
    """A FITS binary table (standard 4.0, section 7.3). Texts are ASCII; any other character becomes `?`."""

    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._stream = stream
        self._schema = schema
        self._waiting = tempfile.TemporaryFile()  # noqa: SIM115 -- `close` closes it
        self._writer = pa.ipc.new_stream(self._waiting, schema)
        self._rows = 0
        self._widths = _Widths(schema)

    def write(self, rows: pa.RecordBatch) -> None:
        self._writer.write_batch(rows)
        self._rows += len(rows)
        self._widths.add(rows)

    def close(self) -> None:
        from astropy.io import fits

        self._writer.close()
        formats = [self._format(field) for field in self._schema]
        columns = [
            fits.Column(
                field.name,
                letter,
                unit=_said(field, "unit") or None,
                null=FITS_NULL if field.nullable and pa.types.is_integer(field.type) else None,
            )
            for field, (letter, _) in zip(self._schema, formats, strict=True)
        ]
        header = fits.BinTableHDU.from_columns(columns, nrows=0).header
        header["NAXIS2"] = self._rows
        for number, field in enumerate(self._schema, start=1):
            header[f"TCOMM{number}"] = _said(field, "description").encode("ascii", "replace").decode()  # for TOPCAT
        for comment in _astropy_comments(self._schema):
            header.add_comment(comment)
        self._stream.write(fits.PrimaryHDU().header.tostring().encode() + header.tostring().encode())
        dtype = np.dtype([(field.name, kind) for field, (_, kind) in zip(self._schema, formats, strict=True)])
        with self._waiting:
            self._waiting.seek(0)
            for batch in pa.ipc.open_stream(self._waiting):
                self._stream.write(_fits_rows(batch, dtype).tobytes())
        self._stream.write(bytes(-self._rows * dtype.itemsize % FITS_BLOCK))

    def _format(self, field: pa.Field) -> tuple[str, Any]:
        """Return the column's format in FITS and in numpy."""
        plain = {
            pa.int64(): ("K", ">i8"),
            pa.float64(): ("D", ">f8"),
            pa.float32(): ("E", ">f4"),
            pa.bool_(): ("L", "S1"),
        }
        if field.type in plain:
            return plain[field.type]
        width = self._widths.of[field.name]
        return (f"{width}E", (">f4", (width,))) if pa.types.is_list(field.type) else (f"{width}A", f"S{width}")


FORMATS: dict[str, Callable[[IO[bytes], pa.Schema], Table]] = {
    "parquet": _Parquet,
    "avro": _Avro,
    "jsonl": _JsonLines,
    "csv": _Csv,
    "ecsv": _Ecsv,
    "fits": _Fits,
}
"""The formats, by suffix of the file name."""


class _Widths:
    """The length of the longest text or vector in each column, at least 1, which every reader accepts."""

    def __init__(self, schema: pa.Schema) -> None:
        self.of = {field.name: 1 for field in schema if pa.types.is_string(field.type) or pa.types.is_list(field.type)}
        self._texts = [field.name for field in schema if pa.types.is_string(field.type)]
        self._with_nulls: set[str] = set()

    def add(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Update the widths with these rows."""
        for name in self.of:
            column = rows.column(name)
            lengths = pc.utf8_length(column) if name in self._texts else pc.list_value_length(column)
            self.of[name] = max(self.of[name], pc.max(lengths).as_py() or 0)
            if column.null_count:
                self._with_nulls.add(name)

    def of_texts(self, null: str) -> dict[str, int]:
        """Return the widths of text columns if a null is written as the text `null`."""
        return {
            name: max(self.of[name], len(null)) if name in self._with_nulls else self.of[name] for name in self._texts
        }


def _said(field: pa.Field, key: str) -> str:
    """Return the `unit` or the `description` of a column; empty if it has none."""
    said: dict[bytes, bytes] = field.metadata or {}
    return said.get(key.encode(), b"").decode()


def _finite(column: pa.Array) -> pa.Array:
    """Return the column with null for each number that is not finite, also inside vectors."""
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, None)
    if pa.types.is_list(column.type):
        return pa.ListArray.from_arrays(column.offsets, _finite(column.values), mask=column.is_null())
    return column


def _pandas_metadata(schema: pa.Schema) -> str:
    """Return the metadata that `pandas.read_parquet` uses.

    Without it, an integer or boolean column with a null becomes floats or objects. Reference:
    https://pandas.pydata.org/docs/development/developer.html.
    """
    nullable = {pa.int64(): "Int64", pa.bool_(): "boolean"}
    plain = {pa.int64(): "int64", pa.bool_(): "bool", pa.float64(): "float64", pa.float32(): "float32"}
    names = {pa.string(): "unicode", pa.list_(pa.float32()): "list[float32]"}
    columns = [
        {
            "name": field.name,
            "field_name": field.name,
            "pandas_type": plain.get(field.type) or names[field.type],
            "numpy_type": (field.nullable and nullable.get(field.type)) or plain.get(field.type, "object"),
            "metadata": None,
        }
        for field in schema
    ]
    return json.dumps({"index_columns": [], "column_indexes": [], "columns": columns})


def _astropy_header(schema: pa.Schema) -> str:
    """Return types, units and descriptions as astropy's YAML, for `table_meta_yaml` and for the header of ECSV."""
    types = {pa.bool_(): "bool", pa.int64(): "int64", pa.float64(): "float64", pa.float32(): "float32"}
    entries = []
    for field in schema:
        entry = {"name": field.name, "unit": _said(field, "unit"), "datatype": types.get(field.type, "string")}
        if pa.types.is_list(field.type):
            entry["subtype"] = "float32[null]"
        entry["description"] = _said(field, "description")
        entries.append({key: value for key, value in entry.items() if value})
    return yaml.safe_dump({"datatype": entries}, sort_keys=False, default_flow_style=None, width=_YAML_WIDTH)


def _astropy_comments(schema: pa.Schema) -> Iterator[str]:
    """Yield the same YAML as the text of FITS COMMENT cards, FITS_COMMENT characters each.

    A backslash at the end of a card means that the line continues in the next card.
    """
    header = _astropy_header(schema).encode("ascii", "replace").decode()
    yield "--BEGIN-ASTROPY-SERIALIZED-COLUMNS--"
    for line in [*header.splitlines(), "meta:", "  __serialized_columns__: {}"]:
        pieces = [line[start : start + FITS_COMMENT] for start in range(0, len(line), FITS_COMMENT)]
        yield from (f"{piece}\\" for piece in pieces[:-1])
        yield pieces[-1]
    yield "--END-ASTROPY-SERIALIZED-COLUMNS--"


def _avro_schema(schema: pa.Schema) -> dict[str, Any]:
    types = {
        pa.int64(): "long",
        pa.float64(): "double",
        pa.float32(): "float",
        pa.bool_(): "boolean",
        pa.string(): "string",
        pa.list_(pa.float32()): {"type": "array", "items": "float"},
    }
    fields = [
        {"name": field.name, "type": types[field.type], "doc": _said(field, "description")}
        if not field.nullable
        else {
            "name": field.name,
            "type": ["null", types[field.type]],
            "default": None,
            "doc": _said(field, "description"),
        }
        for field in schema
    ]
    return {"type": "record", "name": "Row", "namespace": "broker_filter", "fields": fields}


def _fits_rows(rows: pa.RecordBatch, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return N rows as they are stored in a FITS file, a structured array [N] of `dtype`."""
    table = np.zeros(len(rows), dtype)
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if pa.types.is_string(column.type):
            table[name] = [(text or "").encode("ascii", "replace") for text in column.to_pylist()]
        elif pa.types.is_boolean(column.type):  # null is a zero byte
            table[name] = [b"" if flag is None else b"T" if flag else b"F" for flag in column.to_pylist()]
        elif pa.types.is_list(column.type):
            table[name] = np.nan
            for row, vector in enumerate(column.to_pylist()):
                if vector is not None:
                    table[name][row, : len(vector)] = vector
        elif pa.types.is_integer(column.type):
            table[name] = column.fill_null(FITS_NULL).to_numpy()
        else:
            table[name] = column.to_numpy(zero_copy_only=False)  # null is NaN
    return table
