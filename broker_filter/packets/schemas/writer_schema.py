"""The writer's schema: the Avro schema with which a packet was written. Each distinct schema is parsed once.

A schema comes with the packet and is untrusted input, so its size and its nesting are bounded.
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
"""The maximum size of a schema's JSON. An embedded LSST schema with all its documentation has 0.2 MB."""
MAX_SCHEMA_DEPTH = 64
"""The maximum nesting of types. The surveys' schemas nest 5 deep."""
MAX_JSON_DEPTH = 4 * MAX_SCHEMA_DEPTH
"""The maximum nesting of a schema's JSON, including defaults and documentation. Writing an output schema recurses as
deep. A nested type takes three levels (the record, the list of its fields, the field)."""

MAX_REMEMBERED_SCHEMAS = 256
"""The maximum number of schemas in a cache. A night has a few schemas."""
MAX_REMEMBERED_BYTES = 4 << 20
"""The maximum total size of the JSON of the schemas in a cache; as Python values they take about twenty times as much.
Schemas are untrusted input and must not fill the memory."""

PRIMITIVES = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})


class SchemaError(ValueError):
    """A schema that is not valid Avro, or exceeds the bounds."""


@dataclass(frozen=True, slots=True, eq=False)
class WriterSchema:
    """The Avro schema of a record, made by `parse_schema`.

    `definition`: the published JSON as Python values. `canonical`: the validated parsing canonical form, in which a
    type is the name of a primitive, the full name of a type defined in the schema, a list (union), or a dict whose type
    is record, enum, fixed, array or map. `fingerprint`: the CRC-64-AVRO of the canonical form, 16 hex digits.
    `n_bytes`: the length of the JSON. `registry_id`: the Confluent schema id; None for a schema embedded in a container
    file. `cached`: the file of the disk cache from which the schema was read; None if it was not read from the cache.

    Schemas are compared and hashed by identity, because the caches in `ocf` and `registry` return one object per
    schema.
    """

    definition: dict[str, Any]
    canonical: dict[str, Any]
    fingerprint: str
    n_bytes: int
    registry_id: int | None = None
    cached: Path | None = None


_T = TypeVar("_T")


class BySchema(Generic[_T]):
    """A cache of the results of `make`, one per schema. The oldest results are removed if there are too many.

    Thread-safe.
    """

    def __init__(self, make: Callable[[WriterSchema], _T]) -> None:
        self._make = make
        self._made: dict[WriterSchema, _T] = {}
        self._n_bytes = 0
        self._lock = Lock()

    def __call__(self, schema: WriterSchema) -> _T:
        """Return the result of `make(schema)`. Raises the exceptions of `make`."""
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
    """Parse the JSON of a record's schema.

    Default values are not validated, because they do not affect how a record is encoded, and some surveys publish
    invalid defaults. Raises SchemaError if the JSON is not a valid schema of a record or exceeds the bounds.
    """
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"the schema has {len(text)} bytes, more than {MAX_SCHEMA_BYTES}")
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is not JSON: {error}") from error
    return writer_schema(definition, registry_id)


def writer_schema(definition: Any, registry_id: int | None = None) -> WriterSchema:
    """Return the schema for JSON that is already parsed into Python values. See `parse_schema`."""
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
    """Return whether lists and objects in a JSON value are nested more than `depth` deep."""
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
    """Return the full name of a named type's definition inside `namespace` (Avro 1.11, "Names"). Raises SchemaError."""
    name, own = definition.get("name"), definition.get("namespace")
    if not isinstance(name, str) or not name or not isinstance(own, str | None):
        raise SchemaError(f"the schema has a {definition.get('type')} without a valid name")
    if "." in name:
        return name
    space = namespace if own is None else own
    return f"{space}.{name}" if space else name


def resolve_name(reference: str, namespace: str, known: Container[str]) -> str:
    """Return the full name, one of `known`, to which `reference` refers inside `namespace`. Raises SchemaError."""
    for name in (reference if "." in reference else f"{namespace}.{reference}", reference):
        if name in known:
            return name
    raise SchemaError(f"the schema uses a type {reference!r} that it does not define")


def record_fields(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of a record's definition, each with a name and a type. Raises SchemaError."""
    fields = definition.get("fields")
    if not isinstance(fields, list) or not all(
        isinstance(field, dict) and isinstance(field.get("name"), str) and "type" in field for field in fields
    ):
        raise SchemaError(f"record {definition.get('name')!r} has no valid list of fields")
    return fields


def self_contained(type_: Any, namespace: str, definitions: Mapping[str, dict[str, Any]], defined: set[str]) -> Any:
    """Return a copy of a schema in which each named type is defined at its first use.

    `definitions`: the definitions of types that `type_` may use without defining them, by full name. `defined`: the
    full names of the types defined so far; the names that `type_` defines are added to it. Keys that start with two
    underscores are removed, because fastavro uses them to mark a schema as already parsed. Raises SchemaError.
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
        raise SchemaError(f"the schema has {type_!r} where a type should be")
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
    """Return a copy of a schema with all types of the namespace `old` moved to `new`.

    `type_`: a schema as `self_contained` returns it.
    """
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
    """Return the parsing canonical form (Avro 1.11, "Transforming into Parsing Canonical Form") of a type."""
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
