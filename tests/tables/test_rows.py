"""Tables: each alert and each reject has a row in every format, and a file appears only when it is complete."""

from __future__ import annotations

import csv
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
from astropy.io import fits
from astropy.table import Table

from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.streaming.scored import ScoredBatch
from broker_filter.tables.formats import FORMATS, ROW_GROUP
from broker_filter.tables.rows import (
    FIXED_COLUMNS,
    TableError,
    open_table,
    partial_path,
    rejected_rows,
    scored_rows,
    scored_schema,
    table_schema,
    to_rows,
)

NAN = float("nan")
SUFFIXES = [f".{name}" for name in FORMATS]
SCHEMA = table_schema(["default.real", "d6_m7.real"])


@pytest.fixture
def scored(make_alerts: Callable[..., AlertBatch], make_scored: Callable[..., ScoredBatch]) -> ScoredBatch:
    """Two packets of a tar: one with two alerts and a reject between them, and one that cannot be read."""
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
        Reject(second, 1, RejectReason.TRUNCATED, "ends"),
        Reject(first, 0, RejectReason.BLANK_CUTOUT, "all NaN", record=1, alert=alerts.identity(1)),
    ]
    return replace(batch, rejects=rejects, duplicate=np.array([False, True]))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows as read by a standard reader of the format, with None for null."""
    match path.suffix:
        case ".parquet":
            return list(pq.read_table(path).to_pylist())
        case ".avro":
            with path.open("rb") as stream:
                return [row for row in fastavro.reader(stream) if isinstance(row, dict)]
        case ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            return [row | {"alert_id": None if row["alert_id"] is None else int(row["alert_id"])} for row in rows]
        case ".csv":
            with path.open(newline="") as file:
                text = list(csv.DictReader(file))
            return [{name: typed(name, cell) for name, cell in row.items()} for row in text]
        case _:
            table = Table.read(path)
            return [{name: plain(row[name]) for name in table.colnames} for row in table]


def typed(name: str, cell: str) -> Any:
    """Return the value of a CSV cell, which has no type."""
    if cell == "":
        return None
    kind = SCHEMA.field(name).type
    if pa.types.is_boolean(kind):
        return cell == "true"
    return int(cell) if pa.types.is_integer(kind) else float(cell) if pa.types.is_floating(kind) else cell


def plain(value: Any) -> Any:
    """Return the value of a cell of an astropy table."""
    return None if np.ma.is_masked(value) else value.item() if isinstance(value, np.generic) else value


def nothing(**known: Any) -> dict[str, Any]:
    """Return a row with these values and null in all other columns."""
    return dict.fromkeys(SCHEMA.names) | known


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_input_has_a_row_in_the_order_of_its_packet(tmp_path: Path, scored: ScoredBatch, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    place = {"survey": "ztf", "schema_version": "4.02", "mjd": 61096.25, "ra": 150.0, "dec": -5.5}
    expected = [
        nothing(
            alert_id=3224182880115015010,
            object_id="ZTF26aaé",
            band="r",
            status="scored",
            duplicate=False,
            source="night.tar::a.avro#10",
            **place,
            default__real=0.25,
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
            default__real=0.5,
            d6_m7__real=0.75,
        ),
        nothing(status="rejected", reject_reason="truncated", reject_detail="ends", source="night.tar::b.avro"),
    ]
    if suffix == ".fits":  # its texts are ASCII; astropy reads an undefined flag as False, with a warning
        expected[0]["object_id"] = "ZTF26aa?"
        expected = [row | {"duplicate": bool(row["duplicate"])} for row in expected]
    assert read(path) == expected
    assert list(tmp_path.iterdir()) == [path]


def test_scores_are_float32_columns_named_by_model_and_label(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.parquet"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    schema = pq.read_schema(path)
    assert schema.field("d6_m7__real").type == pa.float32()
    assert schema.field("alert_id").type == pa.int64()


def test_parquet_rows_are_collected_into_row_groups(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.parquet"
    rows = to_rows(scored, SCHEMA)
    with open_table(path, SCHEMA) as table:
        for _ in range(ROW_GROUP // len(rows) + 1):
            table.write(rows)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP, len(rows)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_table_without_rows_is_valid(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    with open_table(path, SCHEMA):
        pass
    assert read(path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_work_that_ends_early_leaves_a_readable_partial_file(tmp_path: Path, scored: ScoredBatch, suffix: str) -> None:
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
        ("scores.xlsx", TableError),
        ("scores", TableError),
        ("not/there/scores.avro", FileNotFoundError),
        ("folder.parquet", IsADirectoryError),
    ],
)
def test_errors_of_the_file_name_are_raised_before_any_row(tmp_path: Path, name: str, error: type[Exception]) -> None:
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(error, match=str(tmp_path)), open_table(tmp_path / name, SCHEMA):
        raise AssertionError("work began")


@pytest.mark.parametrize("suffix", [".parquet", ".avro", ".jsonl"])
def test_embedding_is_a_list_and_null_if_the_model_does_not_take_the_alert(
    tmp_path: Path, scored: ScoredBatch, suffix: str
) -> None:
    embedding = np.array([[0.5, -0.25, 1], [NAN, NAN, NAN]], np.float32)
    default, other = scored.scores.models
    models = (default, replace(other, embedding=embedding[::-1]))
    path = tmp_path / f"table{suffix}"
    schema = table_schema(["default.real", "d6_m7.real"], embeddings=["d6_m7"])
    with open_table(path, schema) as table:
        table.write(to_rows(replace(scored, scores=replace(scored.scores, models=models)), schema))
    assert [row["d6_m7__embedding"] for row in read(path)] == [None, None, [0.5, -0.25, 1.0], None]


@pytest.fixture
def clean(tmp_path: Path, scored: ScoredBatch) -> Callable[[str], Path]:
    """The scored rows alone, as `--rejects` leaves them, in a file with the given suffix."""

    def write(suffix: str) -> Path:
        path = tmp_path / f"clean{suffix}"
        schema = scored_schema(SCHEMA)
        with open_table(path, schema) as table:
            table.write(scored_rows(to_rows(scored, SCHEMA), schema))
        return path

    return write


IDS = [3224182880115015010, 2]


def test_pandas_keeps_all_digits_of_ids_in_a_column_with_null(tmp_path: Path, scored: ScoredBatch) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "scores.parquet"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    frame = pandas.read_parquet(path)
    assert (str(frame["alert_id"].dtype), str(frame["duplicate"].dtype)) == ("Int64", "boolean")
    assert frame["alert_id"].tolist() == [IDS[0], 2, 2, pandas.NA]


def test_table_without_rejects_has_nulls_only_in_columns_of_models(
    clean: Callable[[str], Path], scored: ScoredBatch
) -> None:
    pandas = pytest.importorskip("pandas")
    path = clean(".parquet")
    table = pq.read_table(path)
    assert {name for name in table.column_names if table[name].null_count} == {"d6_m7__real"}
    assert table["band"].to_pylist() == ["r", ""]
    assert not {"reject_reason", "reject_detail"} & set(table.column_names)
    frame = pandas.read_parquet(path)
    assert (str(frame["alert_id"].dtype), frame["alert_id"].tolist()) == ("int64", IDS)
    rejects = rejected_rows(to_rows(scored, SCHEMA))
    assert rejects.schema == FIXED_COLUMNS
    assert rejects["reject_reason"].to_pylist() == ["blank_cutout", "truncated"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".parquet", ".ecsv", ".fits"])
def test_astropy_reads_ids_units_and_descriptions(clean: Callable[[str], Path], suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pandas", reason="astropy's reader of Parquet needs pandas")
    table = Table.read(clean(suffix))
    assert table["alert_id"].dtype.kind == "i"
    assert list(table["alert_id"]) == IDS
    assert [str(table[name].unit) for name in ("mjd", "ra", "dec")] == ["d", "deg", "deg"]
    assert [str(name) for name in table["status"]] == ["scored", "scored"]
    assert list(table["duplicate"]) == [False, True]
    assert table["ra"].description == "right ascension (ICRS)"
    assert table["mjd"].description.startswith("time: start of the exposure, UTC (ZTF); middle of the exposure, TAI")


def test_astropy_opens_a_table_with_rejects(tmp_path: Path, scored: ScoredBatch) -> None:
    pytest.importorskip("pandas", reason="astropy's reader of Parquet needs pandas")
    path = tmp_path / "scores.parquet"
    with open_table(path, SCHEMA) as table:
        table.write(to_rows(scored, SCHEMA))
    found = Table.read(path)
    assert list(found["reject_reason"]) == ["None", "blank_cutout", "None", "truncated"]
    assert list(found["band"]) == ["r", "None", "None", "None"]  # not truncated to one letter


def test_json_has_ids_as_strings_and_null_for_numbers_that_are_not_finite(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.jsonl"
    schema = table_schema(["default.real"], embeddings=["looks"])
    rows = [
        {"alert_id": IDS[0], "mjd": float("inf"), "ra": -float("inf"), "default__real": NAN},
        {"looks__embedding": [1.0, float("inf"), NAN]},
    ]
    with open_table(path, schema) as table:
        table.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert first == dict.fromkeys(schema.names) | {"alert_id": str(IDS[0])}
    assert second == dict.fromkeys(schema.names) | {"looks__embedding": [1.0, None, None]}


def test_fits_file_is_complete_for_any_number_of_rows(tmp_path: Path, scored: ScoredBatch) -> None:
    path = tmp_path / "scores.fits"
    rows = to_rows(scored, SCHEMA)
    with open_table(path, SCHEMA) as table:
        for _ in range(100):
            table.write(rows)
    with fits.open(path) as opened:
        opened.verify("exception")
        assert opened[1].header["NAXIS2"] == len(opened[1].data) == 100 * len(rows)
        assert opened[1].data["source"][-1] == "night.tar::b.avro"


def test_two_outputs_cannot_share_a_column() -> None:
    with pytest.raises(TableError, match="a__b__c: give a bundle another name"):
        table_schema(["a.b__c", "a__b.c"])
