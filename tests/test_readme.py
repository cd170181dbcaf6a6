"""The README's tables are complete: what it documents is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from broker_filter.metrics import Metrics
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.surveys import COLUMNS
from broker_filter.streaming.tables import FIXED_COLUMNS

README = Path(__file__).parents[1] / "README.md"


def rows(head: str) -> set[str]:
    """The first column of the table whose first heading is `head`."""
    _, _, table = README.read_text().partition(f"\n| {head} |")
    cells = re.findall(r"^\| (`[^|]+`) \|", table.partition("\n\n")[0], re.MULTILINE)
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("reason", {reason.value for reason in RejectReason}),
        ("column", {column.name for column in COLUMNS}),
        ("in a row", {*FIXED_COLUMNS.names, "<model>__<label>", "<model>__embedding", "<policy>"}),
    ],
)
def test_every_reason_and_column_is_documented_and_no_other(head: str, expected: set[str]) -> None:
    assert rows(head) == expected


def test_every_metric_is_documented_and_no_other() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    ours = {metric for metric in registry._names_to_collectors if metric.startswith("broker_filter_")}
    documented = rows("metric")
    assert documented <= ours
    derived = re.compile(r"_(bucket|count|sum|created|total)$")
    assert {derived.sub("", metric) for metric in ours} == {derived.sub("", metric) for metric in documented}
