"""Scored and rejected alerts as rows of a table, in a file of one of the formats in `formats.py` or on stdout.

The rows are written to `NAME.partial.SUFFIX`, which is renamed to the requested file only when it is complete. If the
work ends early, the partial file is closed properly and stays, so that its rows can be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.packet import FilePosition, Position
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.tables.formats import FORMATS, Table

STDOUT = Path("-")
"""The path that stands for standard output instead of a file."""
STDOUT_FORMAT = "jsonl"
"""Default format of standard output: the one that a person can read line by line."""
SCORED, REJECTED = "scored", "rejected"


def _column(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"description": description, "unit": unit})


FIXED_COLUMNS = pa.schema(
    [
        _column("alert_id", pa.int64(), "id of the alert: candid (ZTF) or diaSourceId (LSST)"),
        _column("object_id", pa.string(), "id of the object: objectId (ZTF); diaObjectId, else ssObjectId (LSST)"),
        _column("survey", pa.string(), "survey: ztf or lsst"),
        _column("schema_version", pa.string(), "version of the alert's schema, as given in the packet"),
        _column("mjd", pa.float64(), "time: start of the exposure, UTC (ZTF); middle of the exposure, TAI (LSST)", "d"),
        _column("ra", pa.float64(), "right ascension (ICRS)", "deg"),
        _column("dec", pa.float64(), "declination (ICRS)", "deg"),
        _column("band", pa.string(), "band: u, g, r, i, z or y"),
        _column("status", pa.string(), f"outcome of the alert: {SCORED} or {REJECTED}"),
        _column("reject_reason", pa.string(), "reason for the rejection, one of a fixed list"),
        _column("reject_detail", pa.string(), "explanation of the rejection, as text"),
        _column("duplicate", pa.bool_(), "whether an earlier row has the same alert_id"),
        _column("source", pa.string(), "file that the alert was read from: FILE::MEMBER#RECORD"),
    ]
)
"""The first columns of every table. They are followed by a float32 column `<model>__<label>` for each model output, a
column for each requested policy, and a column `<model>__embedding` (lists of float32) for each model with an
embedding."""
REJECT_COLUMNS = ("reject_reason", "reject_detail")
"""The columns that only rejected rows fill."""

IDENTITY = ("alert_id", "object_id", "survey", "schema_version", "mjd", "ra", "dec", "band")
UNREAD = AlertIdentity(None, None, None, None, None, None, None, None)


class TableError(BrokerFilterError, ValueError):
    """The table cannot be written.

    Its file name has no known format, or two of its columns would have the same name.
    """

    exit_status = USAGE


def column_name(output: str) -> str:
    """Return the column name of a model output `<model>.<label>`: without a dot, which is a nested field in Spark."""
    return output.replace(".", "__")


def embedding_column(model: str) -> str:
    """Return the column name of a model's embeddings."""
    return f"{model}__embedding"


def table_schema(outputs: Sequence[str], policies: Sequence[str] = (), embeddings: Sequence[str] = ()) -> pa.Schema:
    """Return the columns of a table. `outputs`: `<model>.<label>`. `embeddings`: models whose embeddings are written.

    Every column may be null. Raises TableError if two columns would have the same name.
    """
    scores = (_column(column_name(output), pa.float32(), f"output {output}") for output in outputs)
    passed = (
        _column(policy, pa.bool_(), f"whether the object has passed the policy {policy} up to this alert")
        for policy in policies
    )
    vectors = (
        _column(embedding_column(model), pa.list_(pa.float32()), f"embedding by {model}") for model in embeddings
    )
    columns = [*FIXED_COLUMNS, *scores, *passed, *vectors]
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TableError(f"two columns would have the name {', '.join(twice)}: give a bundle another name")
    return pa.schema(columns)


def scored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a table without rejected rows: without REJECT_COLUMNS; no fixed column may be null."""
    fixed = [column.with_nullable(False) for column in FIXED_COLUMNS if column.name not in REJECT_COLUMNS]
    return pa.schema([*fixed, *list(schema)[len(FIXED_COLUMNS) :]])


def scored_rows(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the scored rows, with the columns of a `scored_schema`. An unknown text becomes an empty text.

    `rows`: the result of `to_rows`.
    """
    kept = rows.filter(pc.equal(rows.column("status"), SCORED))
    columns = [
        kept.column(column.name)
        if column.nullable or not pa.types.is_string(column.type)
        else kept.column(column.name).fill_null("")
        for column in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def rejected_rows(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return the rejected rows, with FIXED_COLUMNS only. `rows`: the result of `to_rows`."""
    kept = rows.filter(pc.equal(rows.column("status"), REJECTED))
    return pa.RecordBatch.from_arrays(kept.columns[: len(FIXED_COLUMNS)], schema=FIXED_COLUMNS)


def to_rows(
    scored: ScoredBatch,
    schema: pa.Schema,
    passed: Mapping[str, Sequence[bool | None]] = MappingProxyType({}),
    chosen: NDArray[np.bool_] | None = None,
) -> pa.RecordBatch:
    """Return a row for each alert and each reject of the batch, in the order of the packets and their records.

    `passed`: by policy, for each of the batch's N alerts, whether its object has passed the policy by then, or None.
    `chosen`: the alerts that get a row, bool[N]; None for all alerts. Every reject has a row.
    """
    alerts = scored.alerts
    outputs = {column_name(name): values.tolist() for name, values in scored.scores.columns().items()}
    vectors = {
        embedding_column(scores.model): [
            vector.tolist() if taken else None for vector, taken in zip(scores.embedding, scores.taken, strict=True)
        ]
        for scores in scored.scores.models
        if scores.embedding is not None
    }
    rows: list[tuple[tuple[int, int], dict[str, Any]]] = []
    written = scored.scored if chosen is None else scored.scored[chosen[scored.scored]]
    for i in written.tolist():
        packet, record = int(alerts.packet_index[i]), int(alerts.record_index[i])
        row = _row(alerts.identity(i), scored.packets[packet].position, record, status=SCORED)
        row["duplicate"] = bool(scored.duplicate[i])
        row |= {name: None if np.isnan(values[i]) else values[i] for name, values in outputs.items()}
        row |= {name: values[i] for name, values in (*passed.items(), *vectors.items())}
        rows.append(((packet, record), row))
    for reject in scored.rejects:
        row = _row(reject.alert or UNREAD, reject.packet.position, reject.record, status=REJECTED)
        row |= {"reject_reason": reject.reason.value, "reject_detail": reject.detail}
        rows.append(((reject.packet_index, reject.record), row))
    rows.sort(key=lambda placed: placed[0])
    return pa.RecordBatch.from_pylist([row for _, row in rows], schema=schema)


def _row(alert: AlertIdentity, position: Position, record: int, status: str) -> dict[str, Any]:
    if isinstance(position, FilePosition):
        position = replace(position, record=position.record + record)
    row: dict[str, Any] = {name: getattr(alert, name) for name in IDENTITY}
    row["survey"] = None if alert.survey is None else str(alert.survey)
    return row | {"status": status, "source": str(position)}


@contextmanager
def open_table(path: Path, schema: pa.Schema, kind: str | None = None) -> Iterator[Table]:
    """Open a table at `path`, or on standard output if `path` is STDOUT.

    `kind`: one of FORMATS; by default the suffix of the name decides. Raises TableError for an unknown format and
    OSError if the file cannot be written, both before any row is written.
    """
    open_format = FORMATS[check_format(path, kind)]
    if path == STDOUT:
        table = open_format(sys.stdout.buffer, schema)
        yield table
        table.close()
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    partial = partial_path(path)
    with partial.open("wb") as stream:
        table = open_format(stream, schema)
        try:
            yield table
        finally:
            table.close()
    partial.replace(path)


def check_format(path: Path, kind: str | None = None) -> str:
    """Return the format of a table: `kind` or, if it is None, the suffix of `path`. Raises TableError if unknown."""
    kind = kind or (STDOUT_FORMAT if path == STDOUT else path.suffix.removeprefix("."))
    if kind not in FORMATS:
        raise TableError(f"{path}: the name should end in {', '.join(f'.{name}' for name in FORMATS)}")
    return kind


def partial_path(path: Path) -> Path:
    """Return the path of the partial file, to which rows are written until the table is complete."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")
