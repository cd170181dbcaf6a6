"""Measures the scoring of archives of Parquet, compared with archives of the same alerts as packets. No Kafka."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq

from broker_filter.bench.measure import BenchmarkError, Contest, Run, compete, timed
from broker_filter.bench.options import Device
from broker_filter.bench.sample import write_night
from broker_filter.config import Runtime
from broker_filter.packets.batch import Survey
from broker_filter.packets.framing import wire
from broker_filter.packets.framing.ocf import MAGIC
from broker_filter.packets.schemas.registry import SchemaRegistry, open_registry
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_stream

PACKETS, ROWS = "packets", "rows of Parquet"
ROW_GROUP = 128
"""Rows that a file stores together. Fink's files have hundreds; a reader holds some of their columns in memory."""
PRIMITIVES: Mapping[str, pa.DataType] = {
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "bytes": pa.binary(),
    "boolean": pa.bool_(),
}
"""The Arrow types that Spark writes for the primitive types of Avro."""


def rows_contest(survey: Survey) -> str:
    """Return the name of the contest between packets and rows for the alerts of a survey."""
    return f"archive of {survey.name} -> scores, by format"


def measure_rows(
    packets: Mapping[Survey, Sequence[bytes]],
    schema_registry: str,
    models: Sequence[str],
    device: Device,
    repetitions: int,
    directory: Path,
) -> dict[str, Contest]:
    """Return a contest for each survey: its packets in a tar archive, and the same alerts in a Parquet file.

    Each run scores a whole archive on one thread and writes no table. `schema_registry`: where the schemas of packets
    in wire format are. Both archives hold only packets of one schema; see `as_rows`.
    """
    registry = open_registry(schema_registry)
    scorer = open_scorer(models, Runtime(device=device, inference_threads=1))
    decoder = scorer.decoder(registry)

    def score(archive: Path, alerts: int) -> Run:
        def work() -> None:
            night = read_packets([archive], wanted=decoder.fields)
            for _ in score_stream(night, decoder, scorer, DuplicateWindow(0), threads=1):
                pass

        return timed(work, alerts)

    contests = {}
    for survey, of_survey in packets.items():
        night, table = directory / f"{survey.name}.tar", directory / f"{survey.name}.parquet"
        alike, rows = as_rows(of_survey, registry)
        write_night(night, alike)
        pq.write_table(rows, table, row_group_size=ROW_GROUP)
        competitors = {PACKETS: partial(score, night, len(alike)), ROWS: partial(score, table, len(alike))}
        contests[rows_contest(survey)] = compete(competitors, repetitions)
    return contests


def as_rows(packets: Sequence[bytes], registry: SchemaRegistry) -> tuple[list[bytes], pa.Table]:
    """Return the packets of the most frequent schema that a table can express, and their alerts as its rows.

    Each packet holds one alert. Raises BenchmarkError if no table can hold the alerts of a schema.
    """
    groups: dict[str, tuple[Any, list[bytes], list[Any]]] = {}
    for packet in packets:
        schema, alert = read_alert(packet, registry)
        _, alike, alerts = groups.setdefault(repr(schema), (schema, [], []))
        alike.append(packet)
        alerts.append(alert)
    for schema, alike, alerts in sorted(groups.values(), key=lambda group: -len(group[1])):
        with suppress(KeyError, ValueError):
            return alike, pa.Table.from_pylist(alerts, schema=pa.schema(arrow_type(schema, dict(PRIMITIVES)).fields))
    raise BenchmarkError("no packet has a schema that Parquet can express; leave the part `rows` out")


def read_alert(packet: bytes, registry: SchemaRegistry) -> tuple[Any, Any]:
    """Return the writer's schema and the alert of a packet."""
    if packet.startswith(MAGIC):
        reader = fastavro.reader(BytesIO(packet))
        return reader.writer_schema, next(reader)
    message = wire.unframe(packet)
    schema = fastavro.parse_schema(registry.get(message.schema_id).definition)
    return schema, fastavro.schemaless_reader(BytesIO(message.body), schema, None)


def arrow_type(avro: Any, named: dict[str, pa.DataType]) -> pa.DataType:
    """Return the Arrow type that Spark writes for an Avro type.

    `named`: the primitive types, and the records found so far, by name; the records of `avro` are added.

    Raises KeyError for a type that is neither, and ValueError for a union of several types.
    """
    if isinstance(avro, list):
        (avro,) = (branch for branch in avro if branch != "null")
    if isinstance(avro, str):
        return named[avro]
    if avro["type"] == "array":
        return pa.list_(arrow_type(avro["items"], named))
    if avro["type"] == "record":
        named[avro["name"]] = pa.struct({f["name"]: arrow_type(f["type"], named) for f in avro["fields"]})
        return named[avro["name"]]
    return arrow_type(avro["type"], named)
