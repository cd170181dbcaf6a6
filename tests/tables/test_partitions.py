"""A directory of Parquet files by night holds every row, under the night of its survey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from broker_filter.cli import main
from broker_filter.simulate import simulate_night
from broker_filter.tables.partitions import MOST_OPEN_FILES, NO_NIGHT, nights, open_partitions
from broker_filter.tables.rows import TableError, table_schema

SCHEMA = table_schema(["default.real"])


def rows(mjd: list[float | None], survey: str | None = "ztf") -> pa.RecordBatch:
    values = [{"mjd": each, "survey": survey, "alert_id": i} for i, each in enumerate(mjd)]
    return pa.RecordBatch.from_pylist(values, schema=SCHEMA)


def read(directory: Path) -> pa.Table:
    return ds.dataset(
        directory, partitioning=ds.partitioning(pa.schema({"night": pa.string()}), flavor="hive")
    ).to_table()


def test_nights_have_the_dates_of_their_surveys() -> None:
    assert nights(rows([61096.2, 61096.99, 61097.0])) == ["20260225", "20260225", "20260226"]
    # A night of Chile from 2026-02-25 23:30 to 2026-02-26 09:00.
    assert nights(rows([61096.98, 61097.375], "lsst")) == ["20260225", "20260225"]
    assert nights(rows([None, float("nan"), float("inf"), -1.0, 1e300])) == [NO_NIGHT] * 5
    assert nights(rows([2_973_483.5, 2_973_484.5], None)) == ["99991231", NO_NIGHT]


def test_every_row_is_in_the_files_of_its_night(tmp_path: Path) -> None:
    times = [61000.5 + day for day in range(2 * MOST_OPEN_FILES)]
    out = tmp_path / "nights"
    with open_partitions(out, SCHEMA) as table:
        table.write(rows([*times, None]))
        table.write(rows(times))  # most nights were closed in between and get a second file
    found = read(out)
    assert found.num_rows == 4 * MOST_OPEN_FILES + 1
    by_row = zip(found["mjd"].to_pylist(), found["night"].to_pylist(), strict=True)
    assert all(night == (None if mjd is None else nights(rows([mjd]))[0]) for mjd, night in by_row)
    assert not list(out.rglob("*.partial*"))


def test_a_directory_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    with pytest.raises(TableError, match="not an empty directory"), open_partitions(tmp_path, SCHEMA):
        pass


def test_rows_that_were_written_before_an_error_stay_in_partial_files(tmp_path: Path) -> None:
    out = tmp_path / "nights"

    def fail() -> None:
        with open_partitions(out, SCHEMA) as table:
            table.write(rows([61000.5, 61001.5]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    names = sorted(path.name for path in out.rglob("*.parquet"))
    assert names == ["scores.partial.parquet"] * 2
    assert read(out).num_rows == 2


@pytest.fixture
def alerts(tmp_path: Path) -> Path:
    """A folder with six simulated alerts of each survey, and a file that is no alert."""
    folder = tmp_path / "alerts"
    folder.mkdir()
    for survey in ("ztf", "lsst"):
        for alert in simulate_night(6, seed=4, survey=survey):
            (folder / f"{survey}-{alert.alert_id}").write_bytes(alert.packet)
    (folder / "notes.txt").write_text("clouds")
    return folder


def test_score_writes_nights_that_hold_the_rows_of_one_table(alerts: Path, tmp_path: Path) -> None:
    by_night, one = tmp_path / "nights", tmp_path / "one.parquet"
    assert main(["score", str(alerts), "--quiet", "--partition-by", "mjd", "--out", str(by_night)]) == 0
    assert main(["score", str(alerts), "--quiet", "--out", str(one)]) == 0
    found, expected = read(by_night), ds.dataset(one).to_table()
    order = [("source", "ascending")]
    assert found.drop_columns(["night"]).sort_by(order).to_pylist() == expected.sort_by(order).to_pylist()
    assert None in found["night"].to_pylist()
    assert np.unique([night for night in found["night"].to_pylist() if night]).size >= 1


def test_rejects_may_have_a_table_of_their_own(alerts: Path, tmp_path: Path) -> None:
    by_night, rejects = tmp_path / "nights", tmp_path / "rejects.csv"
    command = ["score", str(alerts), "--quiet", "--partition-by", "mjd", "--out", str(by_night)]
    assert main([*command, "--rejects", str(rejects)]) == 0
    assert read(by_night)["night"].null_count == 0
    assert rejects.exists()


@pytest.mark.parametrize(
    "options",
    [["--out", "-"], ["--out", "nights", "--format", "csv"], ["--out", "alerts/nights"]],
    ids=["standard output", "another format", "inside an input"],
)
def test_an_impossible_directory_is_a_usage_error(
    alerts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["score", str(alerts), "--partition-by", "mjd", *options]) == 2
