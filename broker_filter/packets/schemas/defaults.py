"""Removes invalid default values from an Avro schema (Avro 1.11, "Complex Types").

Surveys publish defaults that do not fit the type of the field, for example null for the union `["float", "null"]`: a
default must fit the first branch. Avro's Java library refuses such a schema. Removing a default does not change how
records are encoded, because only a reader with another schema uses it.
"""

from __future__ import annotations

import math
from typing import Any

from broker_filter.packets.schemas.writer_schema import PRIMITIVES, full_name

INT_BITS, LONG_BITS = 32, 64
_MISSING = object()
"""Stands for a field without a value; it fits no type."""


def without_invalid_defaults(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a record's schema without the defaults that do not fit their types.

    `definition`: a schema as `schema.self_contained` returns it.
    """
    cleaned: dict[str, Any] = _cleaned(definition, "", {})
    return cleaned


def _cleaned(type_: Any, namespace: str, named: dict[str, dict[str, Any]]) -> Any:
    """Return a copy of `type_` without invalid defaults.

    `named`: the types defined so far, by full name; the types that `type_` defines are added to it.
    """
    if isinstance(type_, list):
        return [_cleaned(branch, namespace, named) for branch in type_]
    if not isinstance(type_, dict):
        return type_
    copy = dict(type_)
    if copy["type"] in ("record", "enum", "fixed"):
        name = full_name(copy, namespace)
        if copy["type"] == "record":
            inner = name.rpartition(".")[0]
            copy["fields"] = [
                _cleaned_field({**field, "type": _cleaned(field["type"], inner, named)}, named)
                for field in copy["fields"]
            ]
        elif copy.get("default") not in copy.get("symbols", ()):
            copy.pop("default", None)
        named[name] = copy
        return copy
    for inside in ("items", "values", "type"):
        if inside in copy:
            copy[inside] = _cleaned(copy[inside], namespace, named)
    return copy


def _cleaned_field(field: dict[str, Any], named: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if "default" in field and not _fits(field["type"], field["default"], named):
        del field["default"]
    return field


def _fits(type_: Any, value: Any, named: dict[str, dict[str, Any]]) -> bool:
    """Return whether the JSON `value` is a valid default for `type_`.

    A recursive type is not in `named` while its own fields are checked, so no value fits it there.
    """
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
        case "bytes":  # each character of the JSON string stands for one byte
            return isinstance(value, str) and all(ord(character) < 256 for character in value)
        case _:
            return isinstance(value, str)
