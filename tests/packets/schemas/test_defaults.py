"""Output schemas never have a default that the Avro specification forbids, also if the survey published one."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from broker_filter.packets.framing.ocf import MAX_CONTAINER_BYTES, read_container
from broker_filter.packets.schemas.defaults import without_invalid_defaults
from broker_filter.packets.schemas.registry import DirectoryRegistry
from broker_filter.packets.schemas.writer_schema import WriterSchema, parse_schema
from broker_filter.streaming.encoding import annotated_schema

PRIMITIVE_DEFAULTS = {
    "null": lambda value: value is None,
    "boolean": lambda value: value is True or value is False,
    "int": lambda value: type(value) is int and -(2**31) <= value < 2**31,
    "long": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "float": lambda value: type(value) in (int, float) and abs(value) < float("inf"),
    "double": lambda value: type(value) in (int, float) and abs(value) < float("inf"),
    "string": lambda value: type(value) is str,
    "bytes": lambda value: type(value) is str and max(value, default="") < "\u0100",
}


def problems(type_: Any, space: str = "", names: dict[str, Any] | None = None, where: str = "") -> Iterator[str]:
    """Yield the names and defaults that Avro 1.11 forbids in a schema, in the order of a strict parser."""
    names = {} if names is None else names
    if isinstance(type_, list):
        for branch in type_:
            yield from problems(branch, space, names, where)
    elif isinstance(type_, str):
        if type_ not in PRIMITIVE_DEFAULTS and resolve(type_, space, names) is None:
            yield f"{where}: {type_} is not defined"
    elif type_["type"] in ("record", "enum", "fixed"):
        name = type_["name"] if "." in type_["name"] else f"{type_.get('namespace', space)}.{type_['name']}".lstrip(".")
        if name in names:
            yield f"{where}: {name} is defined twice"
        names[name] = (name.rpartition(".")[0], type_)
        for field in type_.get("fields", ()):
            inside = f"{where}.{field['name']}"
            yield from problems(field["type"], names[name][0], names, inside)
            if "default" in field and not valid(field["type"], field["default"], names[name][0], names):
                yield f"{inside}: {field['default']!r} is no default of {str(field['type'])[:60]}"
        if type_["type"] == "enum" and "default" in type_ and type_["default"] not in type_["symbols"]:
            yield f"{where}: {type_['default']!r} is no symbol"
    else:
        inside = {"array": "items", "map": "values"}.get(str(type_["type"]), "type")
        yield from problems(type_[inside], space, names, where)


def resolve(name: str, space: str, names: Mapping[str, Any]) -> Any:
    return names.get(name if "." in name or not space else f"{space}.{name}", names.get(name))


def valid(type_: Any, value: Any, space: str, names: Mapping[str, Any]) -> bool:
    if isinstance(type_, list):
        return valid(type_[0], value, space, names)
    if isinstance(type_, str) and type_ in PRIMITIVE_DEFAULTS:
        return bool(PRIMITIVE_DEFAULTS[type_](value))
    if isinstance(type_, str):
        inner, definition = resolve(type_, space, names)
        return valid(definition, value, inner, names)
    if type_["type"] == "array":
        return type(value) is list and all(valid(type_["items"], item, space, names) for item in value)
    if type_["type"] == "map":
        return type(value) is dict and all(valid(type_["values"], item, space, names) for item in value.values())
    if type_["type"] == "enum":
        return value in type_["symbols"]
    if type_["type"] == "fixed":
        return bool(PRIMITIVE_DEFAULTS["bytes"](value)) and len(value) == type_["size"]
    if type_["type"] == "record":
        inner = type_.get("namespace", space)
        return type(value) is dict and all(
            valid(field["type"], value.get(field["name"], field.get("default", ...)), inner, names)
            for field in type_["fields"]
        )
    return valid(type_["type"], value, space, names)


@pytest.fixture(scope="module")
def published_schemas(shared_data: Path, lsst_schemas: Path) -> list[WriterSchema]:
    """All distinct schemas of the shared data: those in container files, and those of LSST."""
    found: dict[str, WriterSchema] = {}

    def take(data: bytes) -> None:
        if data.startswith(b"Obj\1") and (schema := read_container(data, MAX_CONTAINER_BYTES).schema):
            found.setdefault(json.dumps(schema.definition), schema)

    for path in sorted(shared_data.rglob("*")):
        if path.name.endswith((".tar", ".tar.gz")):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and (stream := archive.extractfile(member)):
                        take(stream.read())
        elif path.suffix == ".avro":
            take(path.read_bytes())
    lsst = DirectoryRegistry(lsst_schemas)
    return [*found.values(), *(lsst.get(i) for i in (700, 701, 702, 703, 704, 800, 900, 1000, 1100))]


def test_no_output_schema_has_an_invalid_default(published_schemas: list[WriterSchema]) -> None:
    published = [list(problems(schema.definition)) for schema in published_schemas]
    assert len(published) > 25
    assert sum(bool(found) for found in published) > 10  # the published schemas have invalid defaults
    for schema in published_schemas:
        for cutouts in (True, False):
            output = json.loads(annotated_schema(schema, cutouts).text)
            assert list(problems(output)) == []
            assert output["fields"][-1]["type"]["fields"][3]["default"] is None


def test_removing_defaults_does_not_change_encoded_records(published_schemas: list[WriterSchema]) -> None:
    for schema in published_schemas:
        output = json.loads(annotated_schema(schema, True).text)
        output["fields"].pop()
        assert parse_schema(json.dumps(output)).fingerprint == schema.fingerprint


E = {"type": "enum", "name": "E", "symbols": ["a", "b"]}
R = {
    "type": "record",
    "name": "R",
    "fields": [{"name": "x", "type": "int"}, {"name": "y", "type": "long", "default": 7}],
}


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [
        ("null", [None], [0, "null"]),
        ("boolean", [True], [1, None]),
        ("int", [-1, 2**31 - 1], [2**31, 1.0, True, "1", None]),
        ("long", [2**63 - 1], [2**63, 0.5]),
        ("float", [1, 0.5], ["NaN", None, True, float("nan")]),
        ("double", [1, -0.5], [float("inf")]),
        ("string", ["", "é"], [None, 1]),
        ("bytes", ["\u00ff"], ["\u0100", None]),
        (["float", "null"], [0.0], [None]),
        (["null", "float"], [None], [0.0]),
        ({"type": "long", "logicalType": "timestamp-millis"}, [0], [None]),
        ({"type": "array", "items": ["int", "null"]}, [[], [1]], [[None], None, {}]),
        ({"type": "map", "values": "int"}, [{}, {"a": 1}], [{"a": None}, []]),
        (E, ["a"], ["c", None]),
        ({"type": "fixed", "name": "F", "size": 2}, ["ab"], ["a", "abc"]),
        (R, [{"x": 1}, {"x": 1, "y": 2}], [{}, {"x": None}, {"x": 1, "y": "2"}, None]),
        (["null", R], [None], [{"x": 1}]),
    ],
    ids=str,
)
def test_a_default_that_does_not_fit_its_type_is_removed(type_: Any, good: list[Any], bad: list[Any]) -> None:
    for value, fits in [*((value, True) for value in good), *((value, False) for value in bad)]:
        field = {"name": "f", "type": type_, "default": value}
        inner = {"type": "record", "name": "Inner", "fields": [field]}
        outer = {
            "type": "record",
            "name": "Outer",
            "fields": [{"name": "inner", "type": {"type": "array", "items": inner}}],
        }
        kept = without_invalid_defaults(outer)["fields"][0]["type"]["items"]["fields"][0]
        assert kept == (field if fits else {"name": "f", "type": type_})
        assert ("default" in field) is True  # the original definition is unchanged


def test_a_recursive_record_has_no_valid_default() -> None:
    loop = {"type": "record", "name": "A", "fields": [{"name": "a", "type": "A", "default": {}}]}
    assert "default" not in without_invalid_defaults(loop)["fields"][0]


def test_a_default_that_is_not_a_symbol_is_removed() -> None:
    enums = [{**E, "name": name, "default": symbol} for name, symbol in (("One", "a"), ("Two", "c"))]
    fields = [{"name": f"f{i}", "type": enum} for i, enum in enumerate(enums)]
    one, two = without_invalid_defaults({"type": "record", "name": "A", "fields": fields})["fields"]
    assert (one["type"]["default"], "default" in two["type"]) == ("a", False)
