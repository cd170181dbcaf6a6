"""Scores tables in memory: the front door for programs that hold alerts in Arrow, such as Spark, Ray and Dask."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa

from broker_filter import config
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.alert_rows import AlertRows
from broker_filter.packets.arrow import IS_BYTES, is_any
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.parquet import AvroRows
from broker_filter.packets.packet import IN_MEMORY, FilePosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.writer_schema import SchemaError
from broker_filter.packets.surveys import LSST, catalogue_of, recognise
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import BATCH_SIZE, DUPLICATE_WINDOW, score_alerts
from broker_filter.tables.rows import table_schema, to_rows

PACKET_COLUMNS = ("packet", "value")
"""The names of a column of packet bytes. Kafka sources of Spark and Flink call it `value`."""
MOST_NAMES_CHARACTERS = 300
"""The maximum length of the column names in an error message."""


class ColumnsError(BrokerFilterError, ValueError):
    """The columns of a table are not those of alerts, or a column to copy is absent or has the name of a result."""

    exit_status = USAGE


class ArrowScorer:
    """Scores the alerts in the rows of Arrow tables. Thread-safe, and picklable by its arguments.

    `models`, `also`: as for `Scorer.open`. `schema_registry`: as for Decoder; packets in Confluent wire format need it.
    `columns`: names of input columns that are copied to the result unchanged, for joins and partitions.

    Calling the scorer with a pyarrow.Table or RecordBatch returns a pyarrow.Table with one row for each row of the
    input, in the same order: the columns of `schema`, then the copied columns. A row that cannot be scored has the
    status `rejected` and a reason. `duplicate` compares a row with earlier rows of the same table only. The columns of
    the input decide how it is read:

    - a column of packet bytes: called `packet` or `value`, or the only column of bytes. A row holds one packet with one
      alert, an Avro container file or Confluent wire format;
    - the fields of alerts, as Fink stores them for ZTF and LSST: `candidate` or `diaSource`, cutouts, history;
    - columns of LSST sources or objects, as in HATS catalogues. They have no cutouts, so every row is rejected
      (`missing_cutout`).

    The models are opened when they are first needed, once in a process for all scorers with equal arguments. They run
    on the CPU, in the calling thread.

    A call raises ColumnsError, which is a BrokerFilterError, if the table is none of these or `columns` do not fit, and
    as `Scorer.open` and `Decoder.decode` do.

    >>> import pyarrow as pa
    >>> from broker_filter import ArrowScorer
    >>> from broker_filter.simulate import simulate_night
    >>> packets = [alert.packet for alert in simulate_night(3, seed=1)]
    >>> scorer = ArrowScorer(["default"], columns=["night"])
    >>> table = scorer(pa.table({"packet": packets, "night": [20260225] * 3}))
    >>> table.select(["survey", "status", "night"]).to_pylist()[0]
    {'survey': 'ztf', 'status': 'scored', 'night': 20260225}
    """

    def __init__(
        self,
        models: str | Path | Sequence[str | Path] = ("default",),
        *,
        also: Sequence[config.SurveyName] = (),
        schema_registry: str | Path | None = None,
        columns: str | Sequence[str] = (),
    ) -> None:
        self.models = tuple(map(str, [models] if isinstance(models, str | Path) else models))
        self.also = tuple(also)
        self.schema_registry = schema_registry
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the result without the copied columns. The bundles are read, and no network is loaded."""
        return _schema(self.models)

    def schema_of(self, table: pa.Schema) -> pa.Schema:
        """Return the columns of the result for a table with the columns `table`. Raises ColumnsError."""
        result = self.schema
        copied = []
        for name in self.columns:
            if len(table.get_all_field_indices(name)) != 1:
                raise ColumnsError(f"`columns` names {name!r}, but the table has {_names(table)}")
            if name in result.names:
                raise ColumnsError(f"`columns` names {name!r}, which is also a column of the result: rename it")
            copied.append(table.field(name))
        try:
            return pa.schema([*result, *copied])
        except pa.ArrowInvalid as error:
            raise ColumnsError(f"the columns of the result are not valid: {error}") from error

    def reads(self, table: pa.Schema) -> list[str]:
        """Return the names of those columns of a table that a call reads or copies, in the order of the table.

        A table with these columns alone gives the same scores. Raises as `Scorer.open` does.
        """
        packet = _packet_column(table)
        _, decoder = _loaded(self.models, self.also, self.schema_registry)
        fields = {name for path in decoder.fields for name in path.split(".")}
        read = fields if packet is None else {table.names[packet]}
        return [name for name in table.names if name in read or name in self.columns]

    def __call__(self, table: pa.Table | pa.RecordBatch) -> pa.Table:
        """Return the scores of `table`; see the class."""
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        schema = self.schema_of(table.schema)
        scorer, decoder = _loaded(self.models, self.also, self.schema_registry)
        window = DuplicateWindow(DUPLICATE_WINDOW)
        rows = []
        for whole in _batches(table):
            batch = whole
            while batch:
                alerts, rejects = _decode_one_each(decoder, batch)
                rows.append(to_rows(score_alerts(alerts, rejects, scorer, window), self.schema))
                batch = batch[len(alerts.packets) :]
        columns = pa.Table.from_batches(rows, self.schema).columns
        return pa.Table.from_arrays([*columns, *(table.column(name) for name in self.columns)], schema=schema)


@lru_cache
def _schema(models: tuple[str, ...]) -> pa.Schema:
    """Return the columns of the scores of bundles. Raises as `open_bundle` and `table_schema` do."""
    bundles = [open_bundle(model) for model in models]
    outputs = [name for bundle in bundles for name in bundle.output_names]
    return table_schema(outputs, embeddings=[bundle.card.name for bundle in bundles if bundle.embedding is not None])


_opening = Lock()
"""Held while models are opened, so that two threads do not open the same models."""


def _loaded(
    models: tuple[str, ...], also: tuple[config.SurveyName, ...], registry: str | Path | None
) -> tuple[Scorer, Decoder]:
    """Return the scorer of these models, and its decoder, opened once in a process."""
    with _opening:
        return _open(models, also, registry)


@lru_cache
def _open(
    models: tuple[str, ...], also: tuple[config.SurveyName, ...], registry: str | Path | None
) -> tuple[Scorer, Decoder]:
    chosen = [config.Model(bundle=model, also=list(also)) for model in models]
    scorer = open_scorer(chosen, config.Runtime(device="cpu", inference_threads=1))
    return scorer, scorer.decoder(registry)


def _batches(table: pa.Table) -> Iterator[Sequence[Packet]]:
    """Return the rows of a table in batches: packets, or AlertRows. A null packet has no bytes. Raises ColumnsError."""
    column = _packet_column(table.schema)
    if column is not None:
        data = (row.as_py() or b"" for chunk in table.column(column).chunks for row in chunk)
        packets = (Packet(each, FilePosition(IN_MEMORY.path, record=row)) for row, each in enumerate(data))
        return iter(lambda: list(islice(packets, BATCH_SIZE)), [])
    alerts = _as_alerts(table)
    try:
        schema = AvroRows(alerts.schema).schema
    except SchemaError as error:
        raise ColumnsError(f"the columns of the table cannot be read: {error}") from error
    batches = alerts.to_batches(max_chunksize=BATCH_SIZE)
    starts = accumulate(map(len, batches), initial=0)
    return (
        AlertRows(batch, schema, FilePosition(IN_MEMORY.path, record=start))
        for batch, start in zip(batches, starts, strict=False)
        if len(batch)
    )


def _packet_column(schema: pa.Schema) -> int | None:
    """Return the index of the column of packets; None if the table has no such column."""
    binary = [i for i, column in enumerate(schema) if _is_binary(column.type)]
    named = [i for i in binary if schema.names[i] in PACKET_COLUMNS]
    if len(named) == 1:
        return named[0]
    return binary[0] if len(binary) == 1 and not schema.names[binary[0]].startswith("cutout") else None


def _is_binary(kind: pa.DataType) -> bool:
    return is_any(kind.value_type if pa.types.is_dictionary(kind) else kind, IS_BYTES)


def _as_alerts(table: pa.Table) -> pa.Table:
    """Return a table whose columns are the fields of alerts. Raises ColumnsError."""
    paths = {path for column in table.schema for path in _paths(column)}
    if recognise(paths):
        return table
    if record := catalogue_of(table.schema.names):
        return _with_records(table, record)
    raise ColumnsError(
        f"the table has {_names(table.schema)}, but neither a column of packets ({' or '.join(PACKET_COLUMNS)}), nor "
        "the fields of ZTF or LSST alerts (candidate or diaSource), nor those of LSST sources or objects "
        "(diaSourceId or diaObjectId, ra, dec)"
    )


def _with_records(table: pa.Table, record: str) -> pa.Table:
    """Return a table of a catalogue with its columns in the record `record` too, and a record `diaSource` in any case.

    The fields of the survey's signature that the catalogue lacks are null.
    """
    columns = dict(zip(table.schema.names, table.combine_chunks().columns, strict=True))
    needed = {path.partition(".")[2]: pa.nulls(len(table), pa.float64()) for path in LSST.signature}
    records = {"diaSource": needed} | {record: (needed if record == "diaSource" else {}) | columns}
    structs = {
        name: pa.StructArray.from_arrays([_joined(values) for values in fields.values()], list(fields))
        for name, fields in records.items()
    }
    return pa.table({**columns, **structs})


def _joined(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(values, pa.ChunkedArray):
        return values
    return values.chunk(0) if values.num_chunks == 1 else pa.concat_arrays(values.chunks or [pa.array([], values.type)])


def _paths(column: pa.Field) -> list[str]:
    """Return the name of a column and, if it is a struct, the dotted paths of its fields."""
    inner = column.type if pa.types.is_struct(column.type) else ()
    return [column.name, *(f"{column.name}.{each.name}" for each in inner)]


def _decode_one_each(decoder: Decoder, packets: Sequence[Packet]) -> tuple[AlertBatch, list[Reject]]:
    """Decode packets as `Decoder.decode_some` does, and reject each packet that holds several alerts."""
    alerts, rejects = decoder.decode_some(packets)
    if isinstance(packets, AlertRows):
        return alerts, rejects
    taken = alerts.packets
    owners = [*alerts.packet_index.tolist(), *(reject.packet_index for reject in rejects)]
    counts = np.bincount(np.array(owners, np.int64), minlength=len(taken))
    if (counts <= 1).all():
        return alerts, rejects
    alone = [packet if counts[i] <= 1 else replace(packet, data=b"") for i, packet in enumerate(taken)]
    alerts, rejects = decoder.decode(alone)
    detail = "the packet holds {} alerts, and a row of a table must hold one: write each alert into a row of its own"
    return alerts, [
        replace(reject, reason=RejectReason.TOO_LARGE, detail=detail.format(counts[reject.packet_index]))
        if counts[reject.packet_index] > 1
        else reject
        for reject in rejects
    ]


def _names(schema: pa.Schema) -> str:
    """Return the names of the columns, for a message; the names are untrusted text, so they are cut off."""
    return textwrap.shorten(f"the columns {', '.join(schema.names)}", MOST_NAMES_CHARACTERS, placeholder=" ...")
