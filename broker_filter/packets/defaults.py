"""Default values of fields in an Avro schema, by the specification (Avro 1.11, "Complex Types").

Surveys publish defaults that do not fit their fields' types: `["float", "null"]` with the default null, where a default
must fit the first branch. Avro's Java library refuses such a schema. A default is only for readers with another
schema, so bodies do not depend on it.
"""

from __future__ import annotations

import math
from typing import Any

from broker_filter.packets.schema import PRIMITIVES, full_name

INT_BITS, LONG_BITS = 32, 64
_MISSING = object()
"""Fits no type."""


def without_invalid_defaults(definition: dict[str, Any]) -> dict[str, Any]:
    """A copy of a record's schema, as `self_contained` returns it, less every default that does not fit its type."""
    sound: dict[str, Any] = _sound(definition, "", {})
    return sound


def _sound(type_: Any, namespace: str, named: dict[str, dict[str, Any]]) -> Any:
    """`named`: the types that were defined before this one, by full name; grows."""
    if isinstance(type_, list):
        return [_sound(branch, namespace, named) for branch in type_]
    if not isinstance(type_, dict):
        return type_
    copy = dict(type_)
    if copy["type"] in ("record", "enum", "fixed"):
        name = full_name(copy, namespace)
        if copy["type"] == "record":
            inner = name.rpartition(".")[0]
            copy["fields"] = [
                _sound_field({**field, "type": _sound(field["type"], inner, named)}, named) for field in copy["fields"]
            ]
        elif copy.get("default") not in copy.get("symbols", ()):
            copy.pop("default", None)
        named[name] = copy
        return copy
    for inside in ("items", "values", "type"):
        if inside in copy:
            copy[inside] = _sound(copy[inside], namespace, named)
    return copy


def _sound_field(field: dict[str, Any], named: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if "default" in field and not _fits(field["type"], field["default"], named):
        del field["default"]
    return field


def _fits(type_: Any, value: Any, named: dict[str, dict[str, Any]]) -> bool:
    """Whether JSON's `value` is a default of a type. A type within itself is not in `named` yet: nothing fits it."""
    if isinstance(type_, list):
        return bool(type_) and _fits(type_[0], value, named)
    if isinstance(type_, str):
        return _fits_primitive(type_, value) if type_ in PRIMITIVES else _fits(named.get(type_, []), value, named)
    match type_["type"]:
        case "array":
            return isinstance(value, list) and all(_fits(type_["items"], item, named) for item in value)
        case "map":
            return isinstance(value, dict) and all(_fits(type_["values"], item, named) for item in value.values())
        case "record":
            return isinstance(value, dict) and all(
                _fits(field["type"], value.get(field["name"], field.get("default", _MISSING)), named)
                for field in type_["fields"]
            )
        case "enum":
            return isinstance(value, str) and value in type_["symbols"]
        case "fixed":
            return _fits_primitive("bytes", value) and len(value) == type_["size"]
        case inner:
            return _fits(inner, value, named)


def _fits_primitive(kind: str, value: Any) -> bool:
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "int" | "long":
            half = 1 << ((INT_BITS if kind == "int" else LONG_BITS) - 1)
            return isinstance(value, int) and not isinstance(value, bool) and -half <= value < half
        case "float" | "double":
            return (isinstance(value, int) and not isinstance(value, bool)) or (
                isinstance(value, float) and math.isfinite(value)
            )
        case "bytes":  # a character stands for a byte
            return isinstance(value, str) and all(ord(character) < 256 for character in value)
        case _:
            return isinstance(value, str)
