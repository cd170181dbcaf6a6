"""Tables have a row for every alert and every reject, in all three formats, and appear only when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.streaming.filtering import ScoredBatch
from broker_filter.streaming.tables import ROW_GROUP, TableError, open_table, partial_path, table_schema, to_rows

NAN = float("nan")
SCHEMA = table_schema(["default.real", "d6_m7.real"])


@pytest.fixture
def scored(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    """Two packets of a tar: one with two alerts and a reject between them, one with nothing readable."""
    alerts = make_alerts([3224182880115015010, 2], object_id=["ZTF26aaé", "ZTF26b"], band=[2, 255])
    first = Packet(b"", FilePosition("night.tar", "a.avro", 10))
    second = Packet(b"", FilePosition("night.tar", "b.avro"))
    alerts = replace(
        alerts,
        packets=[first, second],
        packet_index=np.zeros(2, dtype=np.int32),
        record_index=np.array([0, 2], dtype=np.int32),
    )
    batch = make_scored(alerts, {"default": [0.25, 0.5], "d6_m7": [NAN, 0.75]})
    rejects = [
        Reject(second, RejectReason.TRUNCATED, "ends"),
        Reject(first, RejectReason.BLANK_CUTOUT, "all NaN", record=1, alert=alerts.identity(1)),
    ]
    return replace(batch, rejects=rejects, duplicate=np.array([False, True]))


def read(path: Path) -> list[dict[str, Any]]:
    match path.suffix:
        case ".parquet":
            rows = pq.read_table(path).to_pylist()
        case ".avro":
            with path.open("rb") as stream:
                rows = [
                    {str(name).replace("__", "."): value for name, value in row.items()}
                    for row in fastavro.reader(stream)
                    if isinstance(row, dict)
                ]
        case _:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def nothing(**known: Any) -> dict[str, Any]:
    """A row with these values and null in all other columns."""
    return dict.fromkeys(SCHEMA.names) | known


@pytest.mark.parametrize("suffix", [".parquet", ".avro", ".jsonl"])
def test_each_input_has_a_row_in_the_order_of_its_packet(tmp_path: Path, scored: ScoredBatch, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    place = {"survey": "ztf", "schema_version": "4.02", "mjd": 61096.25, "ra": 150.0, "dec": -5.5}
    assert read(path) == [
        nothing(
            alert_id=3224182880115015010,
            object_id="ZTF26aaé",
            band="r",
            status="scored",
            duplicate=False,
            source="night.tar::a.avro#10",
            **place,
            **{"default.real": 0.25},
        ),
        nothing(
            alert_id=2,
            object_id="ZTF26b",
            status="rejected",
            reject_reason="blank_cutout",
            reject_detail="all NaN",
            source="night.tar::a.avro#11",
            **place,
        ),
        nothing(
            alert_id=2,
            object_id="ZTF26b",
            status="scored",
            duplicate=True,
            source="night.tar::a.avro#12",
            **place,
            **{"default.real": 0.5, "d6_m7.real": 0.75},
        ),
        nothing(status="rejected", reject_reason="truncated", reject_detail="ends", source="night.tar::b.avro"),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_scores_are_float32_columns_named_by_model_and_label(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.parquet"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    schema = pq.read_schema(path)
    assert schema.field("d6_m7.real").type == pa.float32()
    assert schema.field("alert_id").type == pa.int64()


def test_parquet_rows_are_gathered_into_groups(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.parquet"
    rows = to_rows(scored, SCHEMA)
    with open_table(path, SCHEMA) as table:
        for _ in range(ROW_GROUP // len(rows) + 1):
            table.write(rows)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP, len(rows)]


@pytest.mark.parametrize("suffix", [".parquet", ".avro", ".jsonl"])
def test_an_empty_table_is_a_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    with open_table(path, SCHEMA):
        pass
    assert read(path) == []


@pytest.mark.parametrize("suffix", [".parquet", ".avro", ".jsonl"])
def test_work_that_ends_early_leaves_its_rows_readable_beside_the_name(
    tmp_path: Path, scored: ScoredBatch, suffix: str
) -> None:
    path = tmp_path / f"scores{suffix}"
    path.write_text("last night's")
    with suppress(KeyboardInterrupt), open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
        raise KeyboardInterrupt
    assert path.read_text() == "last night's"
    assert len(read(partial_path(path))) == 4


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("scores.csv", TableError),
        ("scores", TableError),
        ("not/there/scores.avro", FileNotFoundError),
        ("folder.parquet", IsADirectoryError),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_row(tmp_path: Path, name: str, error: type[Exception]) -> None:
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(error, match=str(tmp_path)), open_table(tmp_path / name, SCHEMA):
        raise AssertionError("work began")


@pytest.mark.parametrize("suffix", [".parquet", ".avro", ".jsonl"])
def test_an_embedding_is_a_list_and_null_where_the_model_did_not_look(
    tmp_path: Path, scored: ScoredBatch, suffix: str
) -> None:
    embedding = np.array([[0.5, -0.25, 1], [NAN, NAN, NAN]], np.float32)
    default, other = scored.scores.models
    models = (default, replace(other, embedding=embedding[::-1]))
    path = tmp_path / f"table{suffix}"
    schema = table_schema(["default.real", "d6_m7.real"], embeddings=["d6_m7"])
    with open_table(path, schema) as table:
        table.write(to_rows(replace(scored, scores=replace(scored.scores, models=models)), schema))
    assert [row["d6_m7.embedding"] for row in read(path)] == [None, None, [0.5, -0.25, 1.0], None]
