"""Arrow types of columns that hold the values of Avro, for tests that write packets as tables."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

PRIMITIVES = {
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "bytes": pa.binary(),
    "boolean": pa.bool_(),
}
"""The Arrow types that Spark writes for the primitive types of Avro."""


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
