"""Scores in Spark are those of `score`, on two executors in processes of their own, whatever rows and executors do.

`make spark` runs these tests. They need the extra `spark` and Java.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter import BrokerFilterError, open_bundle, read_packets, score_archive
from broker_filter.engines.partitions import UNKNOWN_IN_ENGINES
from broker_filter.simulate import SCHEMAS

pytest.importorskip("pyspark", reason="needs the extra `spark`: run `make spark`")

from pyspark.errors import PythonException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import col

from broker_filter.engines.spark import ROWS_OF_A_BATCH, real_bogus, score

# py4j leaves its sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)

EXECUTOR = b"CoarseGrainedExecutorBackend"
"""The main class of an executor's process."""
START_SECONDS = 240
"""How long Spark may take to start its executors, and a job to end, on a busy machine."""
CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


Frame = Callable[..., DataFrame]


@pytest.fixture
def frame(spark: SparkSession, tmp_path: Path) -> Frame:
    """A function that returns the rows of an Arrow table as a DataFrame with `partitions` partitions."""

    def from_table(table: pa.Table, partitions: int = 2) -> DataFrame:
        file = tmp_path / f"{uuid.uuid4()}.parquet"
        pq.write_table(table, file)
        return spark.read.parquet(str(file)).repartition(partitions)

    return from_table


def by_id(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows by alert id, without the columns that only the order and the place of files give."""
    rows = table.drop_columns([*UNKNOWN_IN_ENGINES, "schema_version"]).to_pylist()
    return sorted(rows, key=lambda row: row["alert_id"] or 0)


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_columns_of_fink_get_the_scores_of_score_archive(
    frame: Frame, survey: str, expected: dict[str, pa.Table], request: pytest.FixtureRequest
) -> None:
    scores = score(frame(request.getfixturevalue(f"fink_{survey}")))
    assert by_id(scores.toArrow()) == by_id(expected[survey])


def test_packets_get_the_scores_of_score_archive(
    frame: Frame, ztf: list[bytes], lsst: list[bytes], expected: dict[str, pa.Table]
) -> None:
    packets = frame(pa.table({"key": range(len(ztf + lsst)), "packet": ztf + lsst}))
    scores = score(packets, schema_registry=SCHEMAS, columns=["key"], batch_rows=5).toArrow()
    assert sorted(scores["key"].to_pylist()) == list(range(len(ztf + lsst)))
    both = pa.concat_tables([expected["ztf"], expected["lsst"]])
    assert by_id(scores.drop_columns(["key"])) == by_id(both)


def test_real_packets_get_the_scores_of_score_archive(frame: Frame, shared_data: Path) -> None:
    archive = shared_data / "ztf" / "archives"
    packets = [packet.data for packet in read_packets(archive)]
    scores = score(frame(pa.table({"packet": packets})), ["default", "embedder"])
    assert by_id(scores.toArrow()) == by_id(score_archive(archive, ["default", "embedder"]).read_all())


def test_real_rows_of_fink_get_the_scores_of_score_archive(spark: SparkSession, shared_data: Path) -> None:
    files = sorted((shared_data / "lsst" / "parquet").glob("*.parquet"))
    scores = pa.concat_tables([score(spark.read.parquet(str(file))).toArrow() for file in files])
    assert by_id(scores) == by_id(score_archive(files).read_all())


def test_a_poisoned_row_is_a_reject_and_fails_no_job(frame: Frame, ztf: list[bytes]) -> None:
    packets = [*ztf[:6], None, b"", b"no alert", ztf[6][:5000], b"Obj\1" + b"\xff" * 100, *ztf[7:]]
    scores = score(frame(pa.table({"key": range(len(packets)), "packet": packets})), columns=["key"]).toArrow()
    reasons = dict(zip(scores["key"].to_pylist(), scores["reject_reason"].to_pylist(), strict=True))
    assert len(scores) == len(packets)
    bad = {key: reason for key, reason in reasons.items() if reason is not None}
    assert bad == {6: "empty", 7: "empty", 8: "not_avro", 9: "truncated", 10: "corrupt"}


def test_nulls_in_every_column_are_rejects(frame: Frame, fink_ztf: pa.Table) -> None:
    nulls = pa.Table.from_arrays([pa.nulls(3, kind.type) for kind in fink_ztf.schema], schema=fink_ztf.schema)
    scores = score(frame(pa.concat_tables([fink_ztf, nulls]))).toArrow()
    assert sorted(scores["status"].to_pylist()) == ["rejected"] * 3 + ["scored"] * len(fink_ztf)
    assert scores["default__real"].null_count == 3


def test_a_frame_without_alerts_is_one_error_before_a_job_starts(
    spark: SparkSession, frame: Frame, ztf: list[bytes]
) -> None:
    with pytest.raises(BrokerFilterError, match="neither a column of packets"):
        score(spark.range(5))
    packets = frame(pa.table({"packet": ztf}))
    with pytest.raises(BrokerFilterError, match="`columns` names 'night', but the table has"):
        score(packets, columns=["night"])
    with pytest.raises(BrokerFilterError, match="did you mean 'default'"):
        score(packets, "defualt")


@pytest.mark.parametrize("wrong", [pa.array([[1.0, 2.0]] * 12), pa.array(["text"] * 12)], ids=["lists", "text"])
def test_cutouts_of_a_wrong_type_are_rejects(frame: Frame, fink_ztf: pa.Table, wrong: pa.Array) -> None:
    column = fink_ztf.schema.get_field_index("cutoutScience")
    stamps = pa.StructArray.from_arrays([wrong], ["stampData"])
    scores = score(frame(fink_ztf.set_column(column, "cutoutScience", stamps))).toArrow()
    assert scores["status"].to_pylist() == ["rejected"] * len(fink_ztf)


@pytest.mark.parametrize("wrong", ["candidate", "prv_candidates"])
def test_a_column_of_lists_in_place_of_records_ends_with_rejects_or_one_error(
    frame: Frame, fink_ztf: pa.Table, wrong: str
) -> None:
    numbers = pa.array([[1.0, 2.0]] * len(fink_ztf))
    table = fink_ztf.set_column(fink_ztf.schema.get_field_index(wrong), wrong, numbers)
    try:
        outcome: Any = score(frame(table)).toArrow()
    except BrokerFilterError as error:
        outcome = error
    assert len(outcome) == len(fink_ztf) if isinstance(outcome, pa.Table) else "the table has" in str(outcome)


def test_a_bundle_that_is_missing_on_a_worker_is_one_error(frame: Frame, ztf: list[bytes], tmp_path: Path) -> None:
    bundle = tmp_path / "only-on-the-driver"
    shutil.copytree(open_bundle("default").directory, bundle)
    scores = score(frame(pa.table({"packet": ztf})), bundle)
    shutil.rmtree(bundle)
    with pytest.raises(PythonException, match=r"PartitionError: on the machine .*only-on-the-driver"):
        scores.toArrow()


def test_spark_hands_over_few_rows_and_only_needed_columns(
    spark: SparkSession, fink_ztf: pa.Table, tmp_path: Path
) -> None:
    pq.write_table(fink_ztf.append_column("notes", pa.array(["n"] * len(fink_ztf))), tmp_path / "alerts.parquet")
    spark.conf.set(ROWS_OF_A_BATCH, "10000")
    scores = score(spark.read.parquet(str(tmp_path)), columns=["objectId"], batch_rows=7)
    assert spark.conf.get(ROWS_OF_A_BATCH) == "7"
    score(spark.read.parquet(str(tmp_path)), batch_rows=64)
    assert spark.conf.get(ROWS_OF_A_BATCH) == "7"
    plan = scores._jdf.queryExecution().executedPlan().toString()
    assert "cutoutScience" in plan
    assert "notes" not in plan


def test_real_bogus_gives_the_scores_of_whole_alerts(frame: Frame, fink_ztf: pa.Table) -> None:
    alerts = frame(fink_ztf)
    whole = score(alerts).select("alert_id", "default__real")
    scores = alerts.select(
        col("candid").alias("alert_id"), real_bogus(*(f"{name}.stampData" for name in CUTOUTS)).alias("default__real")
    )
    assert sorted(scores.collect()) == sorted(whole.collect())
    assert scores.schema["default__real"].dataType.simpleString() == "float"


def test_real_bogus_is_null_for_a_bad_stamp_and_for_lsst(frame: Frame, fink_ztf: pa.Table, fink_lsst: pa.Table) -> None:
    rows = fink_ztf.select(CUTOUTS).to_pylist()
    for i, bad in enumerate((None, b"", b"no FITS")):
        rows[i]["cutoutTemplate"]["stampData"] = bad
    stamps = frame(pa.Table.from_pylist(rows))
    scores = stamps.select(real_bogus(*(f"{name}.stampData" for name in CUTOUTS)).alias("rb"))
    assert scores.where("rb is null").count() == 3
    assert scores.where("rb between 0 and 1").count() == len(rows) - 3
    of_lsst = frame(fink_lsst).select(real_bogus(*CUTOUTS).alias("rb"))
    assert of_lsst.where("rb is null").count() == len(fink_lsst)


def test_an_executor_that_is_killed_loses_and_doubles_nothing(
    spark: SparkSession, frame: Frame, ztf: list[bytes], expected: dict[str, pa.Table], tmp_path: Path
) -> None:
    copies, partitions = 8, 24
    table = pa.table({"key": range(copies * len(ztf)), "packet": ztf * copies})

    def slowly(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            time.sleep(0.5)  # so that an executor can be killed before the job ends
            yield batch

    packets = frame(table, partitions).mapInArrow(slowly, "key long, packet binary")
    scores = score(packets, columns=["key"], batch_rows=4)
    before = executors(spark)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(scores.write.parquet, str(tmp_path / "scores"))
        wait_for(lambda: completed_tasks(spark) >= partitions // 4)
        assert not written.done()
        os.kill(before[0], signal.SIGKILL)
        written.result(START_SECONDS)
    wait_for(lambda: len(set(executors(spark)) - {before[0]}) == 2)
    rows = pq.read_table(tmp_path / "scores").sort_by("key")
    assert rows["key"].to_pylist() == table["key"].to_pylist()
    once = expected["ztf"]["default__real"].to_pylist()
    assert rows["default__real"].to_pylist() == once * copies


def executors(spark: SparkSession) -> list[int]:
    """Return the process ids of the executors, which are children of the driver's Java process."""
    driver = spark.sparkContext._gateway.proc.pid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if EXECUTOR in (folder / "cmdline").read_bytes() and is_below(parent, driver):
                found.append(int(folder.name))
        except OSError:  # the process has ended
            continue
    return sorted(found)


def is_below(process: int, ancestor: int) -> bool:
    """Return whether a process is `ancestor` or one of its descendants."""
    while process not in (ancestor, 0):
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process == ancestor


def completed_tasks(spark: SparkSession) -> int:
    """Return how many tasks of the active stages have ended."""
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
    return sum(stage.numCompletedTasks for stage in stages if stage and stage.numTasks > 3)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < end, "Spark made no progress"
        time.sleep(0.05)


def test_a_stream_scores_each_file_once(
    spark: SparkSession, fink_ztf: pa.Table, expected: dict[str, pa.Table], tmp_path: Path
) -> None:
    night, out = tmp_path / "night", tmp_path / "scores"
    night.mkdir()

    def run() -> None:
        schema = spark.read.parquet(str(night / "a.parquet")).schema
        alerts = spark.readStream.schema(schema).parquet(str(night))
        query = (
            score(alerts)
            .writeStream.option("checkpointLocation", str(tmp_path / "checkpoint"))
            .trigger(availableNow=True)
            .start(str(out), format="parquet")
        )
        assert query.awaitTermination(START_SECONDS)

    pq.write_table(fink_ztf.slice(0, 5), night / "a.parquet")
    run()
    assert by_id(spark.read.parquet(str(out)).toArrow()) == by_id(expected["ztf"].slice(0, 5))
    pq.write_table(fink_ztf.slice(5), night / "b.parquet")
    run()
    run()
    assert by_id(spark.read.parquet(str(out)).toArrow()) == by_id(expected["ztf"])
