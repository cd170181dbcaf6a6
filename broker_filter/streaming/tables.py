"""Scored and rejected alerts as rows of a table, in a file of one of the formats of `table_formats` or on stdout.

The rows grow in `NAME.partial.SUFFIX` beside the file that was asked for, which appears only when all of them are
there. If the work ends early, the partial file is closed properly and stays: what it has can be read.
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

from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.batch import AlertIdentity
from broker_filter.packets.packet import FilePosition, Position
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.streaming.table_formats import FORMATS, Table

STDOUT = Path("-")
"""In the place of a file: the table goes to standard output."""
STDOUT_FORMAT = "jsonl"
"""What is written there unless another format is asked for: the one format that a person can read as it comes."""
SCORED, REJECTED = "scored", "rejected"


def _column(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"description": description, "unit": unit})


FIXED_COLUMNS = pa.schema(
    [
        _column("alert_id", pa.int64(), "id of the alert: candid (ZTF) or diaSourceId (LSST)"),
        _column("object_id", pa.string(), "id of the object: objectId (ZTF); diaObjectId, else ssObjectId (LSST)"),
        _column("survey", pa.string(), "survey: ztf or lsst"),
        _column("schema_version", pa.string(), "version of the alert's schema, as the packet says it"),
        _column("mjd", pa.float64(), "time: start of the exposure, UTC (ZTF); middle of the exposure, TAI (LSST)", "d"),
        _column("ra", pa.float64(), "right ascension (ICRS)", "deg"),
        _column("dec", pa.float64(), "declination (ICRS)", "deg"),
        _column("band", pa.string(), "band: u, g, r, i, z or y"),
        _column("status", pa.string(), f"what became of the alert: {SCORED} or {REJECTED}"),
        _column("reject_reason", pa.string(), "why the alert was rejected, one word of a closed list"),
        _column("reject_detail", pa.string(), "why the alert was rejected, in words"),
        _column("duplicate", pa.bool_(), "whether an earlier row has the same alert_id"),
        _column("source", pa.string(), "where the alert was read: FILE::MEMBER#RECORD"),
    ]
)
"""The columns of every table. A float32 column `<model>__<label>` for each model output follows, a column for each
policy that was asked for, and lists of float32 `<model>__embedding` for each model that gives one."""
REJECT_COLUMNS = ("reject_reason", "reject_detail")
"""The columns that only rejected rows fill."""

IDENTITY = ("alert_id", "object_id", "survey", "schema_version", "mjd", "ra", "dec", "band")
UNREAD = AlertIdentity(None, None, None, None, None, None, None, None)


class TableError(BrokerFilterError, ValueError):
    """A table that cannot be: its name says no format that is known, or two of its columns would have one name."""

    exit_status = USAGE


def column_name(output: str) -> str:
    """The column of a model's output `<model>.<label>`. A dot in a name would mean a nested field to Spark and SQL."""
    return output.replace(".", "__")


def embedding_column(model: str) -> str:
    """The column of a model's embeddings."""
    return f"{model}__embedding"


def table_schema(outputs: Sequence[str], policies: Sequence[str] = (), embeddings: Sequence[str] = ()) -> pa.Schema:
    """The columns of a table with these model outputs `<model>.<label>`, policies, and embeddings of these models.

    Every column may be null. Raises TableError where two columns would have one name.
    """
    scores = (_column(column_name(output), pa.float32(), f"output {output}") for output in outputs)
    passed = (_column(policy, pa.bool_(), f"the object had passed the policy {policy} by then") for policy in policies)
    vectors = (
        _column(embedding_column(model), pa.list_(pa.float32()), f"embedding by {model}") for model in embeddings
    )
    columns = [*FIXED_COLUMNS, *scores, *passed, *vectors]
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TableError(f"two columns would be called {', '.join(twice)}: give a bundle another name")
    return pa.schema(columns)


def scored_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a table without rejected rows: of FIXED_COLUMNS, none is null and REJECT_COLUMNS are not there."""
    fixed = [column.with_nullable(False) for column in FIXED_COLUMNS if column.name not in REJECT_COLUMNS]
    return pa.schema([*fixed, *list(schema)[len(FIXED_COLUMNS) :]])


def scored_rows(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The scored ones of `to_rows`, with the columns of a `scored_schema`; a text that is not known is empty."""
    kept = rows.filter(pc.equal(rows.column("status"), SCORED))
    columns = [
        kept.column(column.name)
        if column.nullable or not pa.types.is_string(column.type)
        else kept.column(column.name).fill_null("")
        for column in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def rejected_rows(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The rejected ones of `to_rows`, with FIXED_COLUMNS alone."""
    kept = rows.filter(pc.equal(rows.column("status"), REJECTED))
    return pa.RecordBatch.from_arrays(kept.columns[: len(FIXED_COLUMNS)], schema=FIXED_COLUMNS)


def to_rows(
    scored: ScoredBatch, schema: pa.Schema, passed: Mapping[str, Sequence[bool | None]] = MappingProxyType({})
) -> pa.RecordBatch:
    """A row for every alert and every reject of the batch, in the order in which they stood in its packets.

    `passed`: of each policy whether the object of each of the batch's N alerts had passed by then.
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
    for i in scored.scored.tolist():
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
    """A table at `path`, or on stdout where it is STDOUT; `kind`: one of FORMATS, in the place of the name's suffix.

    Raises TableError for another kind or suffix, and OSError where the file cannot be written: both at once, before any
    work.
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
    """The format of the table at `path`: `kind`, else what the name's suffix says. Raises TableError."""
    kind = kind or (STDOUT_FORMAT if path == STDOUT else path.suffix.removeprefix("."))
    if kind not in FORMATS:
        raise TableError(f"{path}: the name should end in {', '.join(f'.{name}' for name in FORMATS)}")
    return kind


def partial_path(path: Path) -> Path:
    """Where rows grow before the table is whole."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")
