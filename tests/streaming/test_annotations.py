"""Annotations are read out of untrusted records: hostile schemas are refused, and values are cut to bounds."""

from __future__ import annotations

import io
from typing import Any

import fastavro
import pytest

from broker_filter.packets.schemas.writer_schema import writer_schema
from broker_filter.streaming.annotations import MAX_TEXT, bounded, is_bounded, read_annotation


def test_an_annotation_of_another_kind_is_not_shown() -> None:
    fields = [{"name": "broker_filter", "type": {"type": "array", "items": "string"}}]
    schema = writer_schema({"type": "record", "name": "alert", "fields": fields})
    file = io.BytesIO()
    fastavro.schemaless_writer(file, fastavro.parse_schema(schema.definition), {"broker_filter": ["real"]})
    assert read_annotation(file.getvalue(), schema) == {}
    assert read_annotation(b"\xff" * 50, schema) == {}


def record_of(*types: Any) -> dict[str, Any]:
    fields = [{"name": f"f{k}", "type": type_} for k, type_ in enumerate(types)]
    return {"type": "record", "name": "r", "namespace": "n", "fields": fields}


NOTHING = {"type": "record", "name": "nothing", "fields": []}


def doubling(times: int) -> dict[str, Any]:
    """Return a record that holds 2^times nulls and takes no bytes."""
    inner: dict[str, Any] | str = "null"
    for k in range(times):
        fields = [{"name": "a", "type": inner}, {"name": "b", "type": f"d{k - 1}" if k else "null"}]
        inner = {"type": "record", "name": f"d{k}", "fields": fields}
    return record_of(inner)


@pytest.mark.parametrize(
    ("definition", "fair"),
    [
        (record_of("int", ["null", "string"], {"type": "array", "items": "double"}), True),
        (record_of({"type": "map", "values": "null"}, *[["null", "int"]] * 100), True),
        (record_of({"type": "array", "items": "null"}), False),
        (record_of({"type": "array", "items": NOTHING}), False),
        (record_of({"type": "array", "items": {"type": "fixed", "name": "f", "size": 0}}), False),
        (record_of(["null", "n.r"]), False),
        (doubling(30), False),
    ],
)
def test_schemas_that_claim_any_size_are_refused(definition: dict[str, Any], fair: bool) -> None:
    assert is_bounded(writer_schema(definition)) == fair


def test_values_are_cut_to_what_a_page_can_hold() -> None:
    assert bounded({"text": "x" * 1000, "nan": float("nan"), "bytes": b"x", "many": [1] * 1000}) == {
        "text": "x" * MAX_TEXT,
        "nan": None,
        "bytes": None,
        "many": [1] * 100,
    }
