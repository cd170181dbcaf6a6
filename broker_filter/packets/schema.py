"""A writer's Avro schema: what a packet's bytes were written by. Parsed once, compared by identity of its source bytes.

Must never trust a schema: it comes with the packet, so its size and its nesting are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from fastavro.schema import fingerprint

MAX_SCHEMA_BYTES = 2 << 20
"""An embedded LSST schema with all its documentation is 0.2 MB."""
MAX_SCHEMA_DEPTH = 64
"""Nested types; the surveys' own schemas nest 5 deep."""
MAX_JSON_DEPTH = 4 * MAX_SCHEMA_DEPTH
"""Nested JSON, defaults and documentation included: what writes an output schema recurses as deep. A nested type takes
three levels (its record, the list of fields, the field)."""

MAX_REMEMBERED_SCHEMAS = 256
MAX_REMEMBERED_BYTES = 4 << 20
"""Of the JSON of schemas that a cache holds: as Python values they take some twenty times as much. A night has a few
schemas; whoever sends others cannot make memory grow with them."""

PRIMITIVES = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})


class SchemaError(ValueError):
    """A schema that is not valid Avro, or beyond the bounds."""


@dataclass(frozen=True, slots=True, eq=False)
class WriterSchema:
    """A record's Avro schema; `parse_schema` makes it.

    `definition`: the JSON as Python values, as the writer published it. `canonical`: its parsing canonical form,
    checked: types are primitives' names, full names of types defined within, lists (unions), or dicts whose type is
    record, enum, fixed, array or map. `fingerprint`: CRC-64-AVRO of the canonical form, 16 hex digits. `n_bytes`: the
    length of the JSON. `registry_id`: the Confluent schema id, None for a schema embedded in a container file.
    `cached`: the file of an earlier run in which a registry's schema was found, None where it was fetched by this
    process. Compared and hashed by identity: the caches in `ocf` and `registry` hand out one object per schema.
    """

    definition: dict[str, Any]
    canonical: dict[str, Any]
    fingerprint: str
    n_bytes: int
    registry_id: int | None = None
    cached: Path | None = None


_T = TypeVar("_T")


class BySchema(Generic[_T]):
    """What `make` makes of each schema, made once and remembered; the oldest is forgotten when they are too many."""

    def __init__(self, make: Callable[[WriterSchema], _T]) -> None:
        self._make = make
        self._made: dict[WriterSchema, _T] = {}
        self._n_bytes = 0
        self._lock = Lock()

    def __call__(self, schema: WriterSchema) -> _T:
        """What is made of `schema`. Raises what `make` raises."""
        if (made := self._made.get(schema)) is not None:
            return made
        with self._lock:
            if (made := self._made.get(schema)) is None:
                made = self._made[schema] = self._make(schema)
                self._n_bytes += schema.n_bytes
                while len(self._made) > MAX_REMEMBERED_SCHEMAS or self._n_bytes > MAX_REMEMBERED_BYTES:
                    oldest = next(iter(self._made))
                    del self._made[oldest]
                    self._n_bytes -= oldest.n_bytes
            return made


def parse_schema(text: bytes | str, registry_id: int | None = None) -> WriterSchema:
    """The schema that `text` (JSON) defines, which must be of a record.

    Default values are not looked at: they say nothing about a writer's bytes, and some surveys publish invalid ones.
    Raises SchemaError.
    """
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"a schema of {len(text)} bytes, more than {MAX_SCHEMA_BYTES}")
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is not JSON: {error}") from error
    return writer_schema(definition, registry_id)


def writer_schema(definition: Any, registry_id: int | None = None) -> WriterSchema:
    """As `parse_schema`, of JSON already read."""
    if _is_deeper(definition, MAX_JSON_DEPTH):
        raise SchemaError(f"the schema's JSON nests deeper than {MAX_JSON_DEPTH}")
    if not isinstance(definition, dict) or definition.get("type") != "record":
        raise SchemaError("the schema's top level is not a record")
    canonical = _canonical(definition, "", set(), 0)
    try:
        text = json.dumps(canonical, separators=(",", ":"), ensure_ascii=False)
        n_bytes = len(json.dumps(definition, separators=(",", ":")))
        return WriterSchema(definition, canonical, fingerprint(text, "CRC-64-AVRO"), n_bytes, registry_id)
    except UnicodeEncodeError as error:
        raise SchemaError("the schema's names are not Unicode text") from error


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether a JSON value has lists and mappings more than `depth` deep in each other."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def full_name(definition: dict[str, Any], namespace: str) -> str:
    """The full name of a named type's definition inside `namespace` (Avro 1.11, "Names"). Raises SchemaError."""
    name, own = definition.get("name"), definition.get("namespace")
    if not isinstance(name, str) or not name or not isinstance(own, str | None):
        raise SchemaError(f"a {definition.get('type')} without a name")
    if "." in name:
        return name
    space = namespace if own is None else own
    return f"{space}.{name}" if space else name


def resolve_name(reference: str, namespace: str, known: Container[str]) -> str:
    """The full name that `reference` means inside `namespace`, among the `known` names. Raises SchemaError."""
    for name in (reference if "." in reference else f"{namespace}.{reference}", reference):
        if name in known:
            return name
    raise SchemaError(f"the schema names a type {reference!r} that it does not define")


def record_fields(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a record's definition, each with a name and a type. Raises SchemaError."""
    fields = definition.get("fields")
    if not isinstance(fields, list) or not all(
        isinstance(field, dict) and isinstance(field.get("name"), str) and "type" in field for field in fields
    ):
        raise SchemaError(f"record {definition.get('name')!r} has no valid list of fields")
    return fields


def self_contained(type_: Any, namespace: str, definitions: Mapping[str, dict[str, Any]], defined: set[str]) -> Any:
    """A copy of a schema in which every named type is defined where it is first used.

    `definitions`: of the types that `type_` names and may not define, by full name. `defined`: what is defined before
    it; grows. Drops fastavro's own marks, by which a reader would take the schema for one that needs no parsing. Raises
    SchemaError.
    """
    if isinstance(type_, list):
        return [self_contained(branch, namespace, definitions, defined) for branch in type_]
    if isinstance(type_, str):
        if type_ in PRIMITIVES:
            return type_
        name = resolve_name(type_, namespace, definitions.keys() | defined)
        if name in defined:
            return name
        space, _, short = name.rpartition(".")
        return self_contained({**definitions[name], "name": short, "namespace": space}, "", definitions, defined)
    if not isinstance(type_, dict):
        raise SchemaError(f"{type_!r} stands where a type should be")
    copy = {key: value for key, value in type_.items() if not key.startswith("__")}
    kind = copy.get("type")
    if kind in ("record", "enum", "fixed"):
        name = full_name(copy, namespace)
        if name in defined:
            return name
        defined.add(name)
        if kind == "record":
            inner = name.rpartition(".")[0]
            copy["fields"] = [
                {**field, "type": self_contained(field["type"], inner, definitions, defined)}
                for field in record_fields(copy)
            ]
        return copy
    inside = {"array": "items", "map": "values"}.get(kind, "type") if isinstance(kind, str) else "type"
    copy[inside] = self_contained(copy.get(inside), namespace, definitions, defined)
    return copy


def moved_to(new: str, old: str, type_: Any, namespace: str = "") -> Any:
    """A copy of what `self_contained` returned, in which all types of the namespace `old` are in `new`."""
    if isinstance(type_, list):
        return [moved_to(new, old, branch, namespace) for branch in type_]
    if isinstance(type_, str):
        space, _, short = type_.rpartition(".")
        return f"{new}.{short}" if space == old and type_ not in PRIMITIVES else type_
    copy = dict(type_)
    if copy["type"] in ("record", "enum", "fixed"):
        space, _, short = full_name(copy, namespace).rpartition(".")
        copy |= {"name": short, "namespace": new if space == old else space}
        if "fields" in copy:
            copy["fields"] = [{**field, "type": moved_to(new, old, field["type"], space)} for field in copy["fields"]]
        return copy
    inside = {"array": "items", "map": "values"}.get(copy["type"], "type") if isinstance(copy["type"], str) else "type"
    copy[inside] = moved_to(new, old, copy[inside], namespace)
    return copy


def _canonical(type_: Any, namespace: str, known: set[str], depth: int) -> Any:
    """The parsing canonical form (Avro 1.11, "Transforming into Parsing Canonical Form") of a type."""
    if depth > MAX_SCHEMA_DEPTH:
        raise SchemaError(f"the schema nests deeper than {MAX_SCHEMA_DEPTH}")
    if isinstance(type_, str):
        return type_ if type_ in PRIMITIVES else resolve_name(type_, namespace, known)
    if isinstance(type_, list):
        return [_canonical(branch, namespace, known, depth + 1) for branch in type_]
    if not isinstance(type_, dict):
        raise SchemaError(f"the schema has {type_!r} where a type should be")
    match type_.get("type"):
        case "array":
            return {"type": "array", "items": _canonical(type_.get("items"), namespace, known, depth + 1)}
        case "map":
            return {"type": "map", "values": _canonical(type_.get("values"), namespace, known, depth + 1)}
        case "record":
            name = full_name(type_, namespace)
            known.add(name)
            inner = name.rpartition(".")[0]
            fields = [
                {"name": field["name"], "type": _canonical(field["type"], inner, known, depth + 1)}
                for field in record_fields(type_)
            ]
            return {"name": name, "type": "record", "fields": fields}
        case "enum":
            name, symbols = full_name(type_, namespace), type_.get("symbols")
            if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
                raise SchemaError(f"enum {name!r} has no valid list of symbols")
            known.add(name)
            return {"name": name, "type": "enum", "symbols": symbols}
        case "fixed":
            name, size = full_name(type_, namespace), type_.get("size")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 31:
                raise SchemaError(f"fixed {name!r} has no valid size")
            known.add(name)
            return {"name": name, "type": "fixed", "size": size}
        case inner:
            return _canonical(inner, namespace, known, depth + 1)
