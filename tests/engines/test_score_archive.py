"""The script for spark-submit scores each input once, whatever happened before, and says what is wrong.

`make spark` runs these tests. They need the extra `spark` and Java.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("pyspark", reason="needs the extra `spark`: run `make spark`")

from pyspark.sql import SparkSession

# py4j leaves its sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)

SCRIPT = Path(__file__).parents[2] / "deploy" / "spark" / "score_archive.py"
START_SECONDS = 240


def script() -> Any:
    """Return the module of the script."""
    spec = spec_from_file_location("score_archive", SCRIPT)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules["score_archive"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(spark: SparkSession, *arguments: object) -> int:
    """Run the script in this process, and return its exit status."""
    module = script()
    return int(module.run(spark, module.parse(list(map(str, arguments)))))


@pytest.fixture
def night(fink_ztf: pa.Table, tmp_path: Path) -> Path:
    """An archive of three files in folders as Hive names them; the second file has a row that cannot be scored."""
    poisoned = fink_ztf.slice(4, 4).to_pylist()
    poisoned[2]["cutoutScience"] = None
    parts = {
        "year=2026/month=1/a.parquet": fink_ztf.slice(0, 4),
        "year=2026/month=2/b.parquet": pa.Table.from_pylist(poisoned, schema=fink_ztf.schema),
        "year=2026/month=2/c 1.parquet": fink_ztf.slice(8),
    }
    for name, part in parts.items():
        path = tmp_path / "night" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, path)
    (tmp_path / "night" / "_temporary").mkdir()
    (tmp_path / "night" / "_temporary" / "half.parquet").write_bytes(b"PAR1")
    return tmp_path / "night"


def scores(spark: SparkSession, out: Path) -> dict[str, list[Any]]:
    """Return the alert ids, statuses and scores in an output, in the order of the ids, and the names of the inputs."""
    table = spark.read.parquet(str(out)).toArrow().sort_by("alert_id")
    columns = table.select(["alert_id", "status", "default__real"]).to_pydict()
    return columns | {"input": sorted({unquote(name) for name in table["input"].to_pylist()})}


def written(out: Path) -> dict[str, int]:
    """Return when each file of scores was written."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def test_each_input_is_scored_once_and_a_run_goes_on_where_another_ended(
    spark: SparkSession, night: Path, tmp_path: Path, expected: dict[str, pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    assert run(spark, night, out, "--column", "month") == 0
    assert "3 inputs, 0 of them scored before" in capsys.readouterr().err
    first = scores(spark, out)
    ids, real = (expected["ztf"].sort_by("alert_id")[name].to_pylist() for name in ("alert_id", "default__real"))
    poisoned = expected["ztf"]["alert_id"][6].as_py()
    assert first["alert_id"] == ids
    assert [i for i, status in zip(ids, first["status"], strict=True) if status == "rejected"] == [poisoned]
    assert first["default__real"] == [None if i == poisoned else score for i, score in zip(ids, real, strict=True)]
    assert first["input"] == [
        "year=2026/month=1/a.parquet",
        "year=2026/month=2/b.parquet",
        "year=2026/month=2/c 1.parquet",
    ]
    months = spark.read.parquet(str(out)).groupBy("month").count().collect()
    assert {row["month"]: row["count"] for row in months} == {1: 4, 2: 8}

    assert run(spark, night, out, "--column", "month") == 0
    assert "3 inputs, 3 of them scored before" in capsys.readouterr().err
    before = written(out)

    # An interrupted run: the scores of an input are there in part, without the marker.
    interrupted = next(folder for folder in out.glob("input=*") if "a.parquet" in folder.name)
    (interrupted / "_SUCCESS").unlink()
    pq.write_table(pq.read_table(night / "year=2026" / "month=2" / "b.parquet"), night / "d.parquet")
    assert run(spark, night, out, "--column", "month") == 1  # d.parquet lies in no folder that states the month
    messages = capsys.readouterr().err
    assert "4 inputs, 2 of them scored before" in messages
    assert "d.parquet: failed: `columns` names 'month', but the table has" in messages
    (night / "d.parquet").unlink()
    assert scores(spark, out) == first
    kept = {name: time for name, time in written(out).items() if not name.startswith(interrupted.name)}
    assert kept == {name: time for name, time in before.items() if not name.startswith(interrupted.name)}


def test_an_output_holds_the_scores_of_one_set_of_models(
    spark: SparkSession, night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    assert run(spark, night / "year=2026" / "month=1" / "a.parquet", out) == 0
    recorded = json.loads((out / "_models.json").read_text())
    assert [model["name"] for model in recorded["models"]] == ["default"]
    assert run(spark, night, out, "--model", "classes") == 2
    assert "its scores were made with other models or options" in capsys.readouterr().err


def test_the_partitions_of_a_table_are_scored_once(
    spark: SparkSession, night: Path, tmp_path: Path, expected: dict[str, pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    spark.sql(f"create table alerts using parquet location '{night}'")
    try:
        spark.sql("msck repair table alerts")
        assert run(spark, "alerts", out, "--table", "--jobs", "1") == 0
        assert run(spark, "alerts", out, "--table") == 0
    finally:
        spark.sql("drop table alerts")
    assert "2 inputs, 2 of them scored before" in capsys.readouterr().err
    table = scores(spark, out)
    assert table["alert_id"] == sorted(expected["ztf"]["alert_id"].to_pylist())
    assert table["input"] == ["year=2026/month=1", "year=2026/month=2"]


def test_wrong_arguments_and_damaged_files_are_one_message_each(
    spark: SparkSession, night: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    for arguments, message in (
        ((tmp_path / "absent", out), "absent: no such file or folder"),
        ((tmp_path / "empty", out), "empty: holds no file whose name ends in .parquet"),
        (("absent", out, "--table"), "absent: the catalogue has no such table"),
        ((night, out, "--model", "defualt"), "did you mean 'default'?"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert run(spark, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(SystemExit):
        run(spark, night, out, "--column", "input")
    (night / "damaged.parquet").write_bytes(b"PAR1 no footer PAR1")
    assert run(spark, night, out) == 1
    messages = capsys.readouterr().err
    assert "damaged.parquet: failed:" in messages
    assert "Traceback" not in messages
    assert len(scores(spark, out)["alert_id"]) == 12


def test_spark_submit_runs_the_script(night: Path, tmp_path: Path) -> None:
    import pyspark

    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    options = ["--master", "local[2]", "--conf", "spark.ui.enabled=false", "--conf", "spark.driver.host=127.0.0.1"]
    command = [str(submit), *options, str(SCRIPT), str(night), str(tmp_path / "scores")]
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "scored (3 of 3)" in done.stdout  # spark-submit writes what the script writes to either stream there
    assert len(list((tmp_path / "scores").glob("input=*/_SUCCESS"))) == 3
