"""Rows of scored and rejected alerts in a file: Parquet, Avro or JSON lines. Holds no more than a row group in memory.

The rows grow in `NAME.partial.SUFFIX` beside the file that was asked for, which appears only when all of them are
there. If the work ends early, the partial file is closed properly and stays: what it has can be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fastavro.write import Writer as ContainerWriter

from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.packet import FilePosition, Position
from broker_filter.streaming.filtering import ScoredBatch

ROW_GROUP = 8_192
"""Rows of a Parquet row group. They wait in memory, 2 kB each with embeddings; of far fewer, readers would spend their
time on metadata."""

FIXED_COLUMNS = pa.schema(
    [
        ("alert_id", pa.int64()),
        ("object_id", pa.string()),
        ("survey", pa.string()),
        ("schema_version", pa.string()),
        ("mjd", pa.float64()),
        ("ra", pa.float64()),
        ("dec", pa.float64()),
        ("band", pa.string()),
        ("status", pa.string()),
        ("reject_reason", pa.string()),
        ("reject_detail", pa.string()),
        ("duplicate", pa.bool_()),
        ("source", pa.string()),
    ]
)
"""What every table has; a float32 column `<model>.<label>` for each model output follows, a column for each policy that
was asked for, and lists of float32 `<model>.embedding` for each model that gives one. All may be null."""

IDENTITY = ("alert_id", "object_id", "survey", "schema_version", "mjd", "ra", "dec", "band")
UNREAD = AlertIdentity(None, None, None, None, None, None, None, None)


class TableError(ValueError):
    """A file name that says no format that is known."""

    exit_status = 2


class Table(Protocol):
    """A file that rows are put into."""

    def write(self, rows: pa.RecordBatch) -> None:
        """Appends rows of `table_schema`."""
        ...

    def close(self) -> None:
        """Completes the file with the rows that it has."""
        ...


def table_schema(outputs: Sequence[str], policies: Sequence[str] = (), embeddings: Sequence[str] = ()) -> pa.Schema:
    """The columns of a table with these model outputs, `<model>.<label>`, policies, and embeddings of these models."""
    scores, passed = ((output, pa.float32()) for output in outputs), ((policy, pa.bool_()) for policy in policies)
    vectors = ((embedding_column(model), pa.list_(pa.float32())) for model in embeddings)
    return pa.schema([*FIXED_COLUMNS, *scores, *passed, *vectors])


def embedding_column(model: str) -> str:
    """What the column of a model's embeddings is called."""
    return f"{model}.embedding"


def to_rows(
    scored: ScoredBatch, schema: pa.Schema, passed: Mapping[str, Sequence[bool | None]] = MappingProxyType({})
) -> pa.RecordBatch:
    """A row for every alert and every reject of the batch, in the order in which they stood in its packets.

    `passed`: of each policy whether the object of each of the batch's N alerts had passed by then.
    """
    alerts = scored.alerts
    place = {id(packet): index for index, packet in enumerate(scored.packets)}
    outputs = {name: values.tolist() for name, values in scored.scores.columns().items()}
    vectors = {
        embedding_column(scores.model): [
            vector.tolist() if taken else None for vector, taken in zip(scores.embedding, scores.taken, strict=True)
        ]
        for scores in scored.scores.models
        if scores.embedding is not None
    }
    rows: list[tuple[tuple[int, int], dict[str, Any]]] = []
    for i in scored.scored.tolist():
        packet, record = int(alerts.packet_index[i]), int(alerts.record_index[i])
        row = _row(alerts.identity(i), scored.packets[packet].position, record, status="scored")
        row["duplicate"] = bool(scored.duplicate[i])
        row |= {name: None if np.isnan(values[i]) else values[i] for name, values in outputs.items()}
        row |= {name: values[i] for name, values in (*passed.items(), *vectors.items())}
        rows.append(((packet, record), row))
    for reject in scored.rejects:
        row = _row(reject.alert or UNREAD, reject.packet.position, reject.record, status="rejected")
        row |= {"reject_reason": reject.reason.value, "reject_detail": reject.detail}
        rows.append(((place[id(reject.packet)], reject.record), row))
    rows.sort(key=lambda placed: placed[0])
    return pa.RecordBatch.from_pylist([row for _, row in rows], schema=schema)


def _row(alert: AlertIdentity, position: Position, record: int, status: str) -> dict[str, Any]:
    if isinstance(position, FilePosition):
        position = replace(position, record=position.record + record)
    row: dict[str, Any] = {name: getattr(alert, name) for name in IDENTITY}
    row["survey"] = None if alert.survey is None else str(alert.survey)
    return row | {"status": status, "source": str(position)}


@contextmanager
def open_table(path: Path, schema: pa.Schema) -> Iterator[Table]:
    """A table at `path`, its format by the suffix: .parquet, .avro or .jsonl.

    In Avro, whose names hold no dots, the column `<model>.<label>` is the field `<model>__<label>`. Raises TableError
    for another suffix, and OSError where the file cannot be written: both at once, before any work.
    """
    if path.suffix not in _FORMATS:
        raise TableError(f"{path}: the name should end in {', '.join(_FORMATS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    partial = partial_path(path)
    with partial.open("wb") as stream:
        table = _FORMATS[path.suffix](stream, schema)
        try:
            yield table
        finally:
            table.close()
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Where rows grow before the table is whole."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class _Parquet:
    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(stream, schema, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def write(self, rows: pa.RecordBatch) -> None:
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=self._rows)
        self._waiting, self._rows = [], 0


class _Avro:
    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:
        self._names = [name.replace(".", "__") for name in schema.names]
        self._writer = ContainerWriter(stream, _avro_schema(schema), codec="deflate")

    def write(self, rows: pa.RecordBatch) -> None:
        for row in rows.rename_columns(self._names).to_pylist():
            self._writer.write(row)

    def close(self) -> None:
        self._writer.flush()


class _JsonLines:
    def __init__(self, stream: IO[bytes], schema: pa.Schema) -> None:  # noqa: ARG002 -- every line names its columns
        self._stream = stream

    def write(self, rows: pa.RecordBatch) -> None:
        self._stream.writelines(json.dumps(row).encode() + b"\n" for row in rows.to_pylist())

    def close(self) -> None:
        pass


_FORMATS: dict[str, Callable[[IO[bytes], pa.Schema], Table]] = {
    ".parquet": _Parquet,
    ".avro": _Avro,
    ".jsonl": _JsonLines,
}


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
        {
            "name": column.name.replace(".", "__"),
            "type": ["null", types[column.type]],
            "default": None,
            "doc": column.name,
        }
        for column in schema
    ]
    return {"type": "record", "name": "Row", "namespace": "broker_filter", "fields": fields}
