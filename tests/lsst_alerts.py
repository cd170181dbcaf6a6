"""LSST alerts of any schema version: the simulator's alerts with other fields, written with fastavro."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fastavro

from broker_filter.packets.framing import wire
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import SCHEMAS, simulate_night

Definition = dict[str, Any]
Record = dict[str, Any]

NEW_IN_11_1: dict[str, str] = {
    "exposureTime": "float",
    "trailAlgorithm": "int",
    "trail_flag": "boolean",
    "reliabilityVersion": "string",
}
"""The fields of diaSource that schema 11.1 added, with their types; each may be null."""


def base_schema(schemas: Path = SCHEMAS, schema_id: int = 1000) -> Definition:
    """Return the definition of a schema with all its types; by default the simulator's schema 10.0."""
    return copy.deepcopy(open_registry(schemas).get(schema_id).definition)


def extended(definition: Definition, version: str, fields: Mapping[str, str] = NEW_IN_11_1) -> Definition:
    """Return a copy of the alert schema, named `version` ("11_1"), with nullable fields added to diaSource."""
    text = json.dumps(definition).replace(f'"{namespace(definition)}', f'"lsst.v{version}')
    new: Definition = json.loads(text)
    [source] = [entry["type"] for entry in new["fields"] if entry["name"] == "diaSource"]
    source["fields"][4:4] = [{"name": name, "type": ["null", type_], "default": None} for name, type_ in fields.items()]
    return new


def namespace(definition: Definition) -> str:
    """Return the namespace of a schema, such as lsst.v10_0."""
    return str(definition.get("namespace") or definition["name"].rpartition(".")[0])


@cache
def _simulated(n: int) -> list[Record]:
    schema = fastavro.parse_schema(base_schema())
    packets = [alert.packet for alert in simulate_night(n, 5, "lsst")]
    return [fastavro.schemaless_reader(io.BytesIO(packet[5:]), schema, None) for packet in packets]


def simulated_records(n: int = 40) -> list[Record]:
    """Return simulated alerts, as fastavro reads them."""
    return copy.deepcopy(_simulated(n))


def wire_packet(record: Record, definition: Definition, schema_id: int) -> bytes:
    """Return the record in Confluent wire format. An absent field is null, or zero if it cannot be null."""
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(definition), _filled(record, definition, {}))
    return wire.frame(schema_id, stream.getvalue())


def _filled(value: Any, type_: Any, named: dict[str, Any]) -> Any:
    """Return the value; absent fields of the records of `type_` are null, or zero if they cannot be null."""
    if isinstance(type_, list):
        if value is None and "null" in type_:
            return None
        return _filled(value, next(branch for branch in type_ if branch != "null"), named)
    if isinstance(type_, str):
        if type_ in named:
            return _filled(value, named[type_], named)
        zero = {"string": "", "bytes": b"", "boolean": False, "float": 0.0, "double": 0.0}.get(type_, 0)
        return zero if value is None else value
    match type_["type"]:
        case "record":
            named[type_["name"]] = type_
            named[f"{type_.get('namespace', '')}.{type_['name']}"] = type_
            value = value or {}
            return {entry["name"]: _filled(value.get(entry["name"]), entry["type"], named) for entry in type_["fields"]}
        case "array":
            return [_filled(item, type_["items"], named) for item in value or []]
        case _:
            return _filled(value, type_["type"], named)
