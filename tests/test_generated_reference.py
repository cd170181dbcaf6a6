"""The generated reference is complete: its pages name what the code has, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastavro import parse_schema
from prometheus_client import CollectorRegistry

from broker_filter.cli import COMMANDS
from broker_filter.config import Service
from broker_filter.metrics import Metrics
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.surveys import COLUMNS, DESIGNATION
from broker_filter.tables.rows import FIXED_COLUMNS
from docs.generated_reference import GENERATED, MARKER

DOCS = Path(__file__).parents[1] / "docs"
DERIVED_SERIES = re.compile(r"_(bucket|count|sum|created|total)$")
"""Endings that Prometheus adds to the name of a metric."""


def first_column(name: str) -> list[str]:
    """Return the code in the first cells of the generated tables."""
    return re.findall(r"^\| `([^`]+)` \|", GENERATED[name](), re.MULTILINE)


def keys(schema: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Return the paths of a JSON schema's properties, without those of named secrets."""
    for name, key in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        for branch in (key, *key.get("anyOf", ())):
            many = branch.get("type") == "array"
            reference = (branch["items"] if many else branch).get("$ref", "").rpartition("/")[2]
            if reference and not reference.startswith("Secret"):
                yield from keys(definitions[reference], definitions, f"{prefix}{name}{'[]' if many else ''}.")


def test_each_generated_text_has_one_place() -> None:
    pages = "\n".join(page.read_text() for page in DOCS.glob("reference/*.md"))
    assert sorted(MARKER.findall(pages)) == sorted(GENERATED)


def test_every_configuration_key_is_in_the_reference() -> None:
    schema = Service.model_json_schema()
    assert set(first_column("configuration_keys")) == set(keys(schema, schema["$defs"]))


def test_every_metric_is_in_the_reference() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    exported = {name for name in registry._names_to_collectors if name.startswith("broker_filter_")}
    documented = set(first_column("metrics"))
    assert documented <= exported
    assert {DERIVED_SERIES.sub("", name) for name in documented} == {DERIVED_SERIES.sub("", name) for name in exported}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reject_reasons", list(RejectReason)),
        ("metadata_columns", [*(column.name for column in COLUMNS), DESIGNATION.name]),
        ("table_columns", [*FIXED_COLUMNS.names, "<model>__<label>", "<policy>", "<model>__embedding"]),
    ],
)
def test_every_reason_and_column_is_in_the_reference(name: str, expected: list[str]) -> None:
    assert first_column(name) == expected


def test_every_command_is_in_the_reference() -> None:
    sections = re.findall(r"^## broker-filter ([\w-]+)$", GENERATED["command_line"](), re.MULTILINE)
    assert sections == list(COMMANDS)


def test_every_field_of_the_output_schema_is_in_the_reference() -> None:
    records: dict[str, dict[str, Any]] = {}
    parse_schema(json.loads((files("broker_filter.schemas") / "scored_alert.avsc").read_text()), records)
    fields = [field["name"] for record in records.values() for field in record["fields"]]
    assert sorted(first_column("output_schema")) == sorted(fields)


def test_no_cell_of_the_reference_lacks_a_meaning() -> None:
    for name in (
        "configuration_keys",
        "metrics",
        "reject_reasons",
        "metadata_columns",
        "table_columns",
        "output_schema",
    ):
        lines = [line for line in GENERATED[name]().splitlines() if line.startswith("| `")]
        assert lines
        for line in lines:
            cells = re.split(r"(?<!\\)\|", line)
            meaning = cells[3] if name in ("configuration_keys", "metadata_columns") else cells[-2]
            assert meaning.strip() not in ("", "None"), line
