"""What an engine calls on its workers, without an engine: pickled into a child process, fed by record batches."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest

from broker_filter import ArrowScorer
from broker_filter.engines.partitions import UNKNOWN_IN_ENGINES, PartitionError, PartitionScorer

WORKER = """
import pickle, sys
import pyarrow as pa
partition = pickle.load(sys.stdin.buffer)
with pa.ipc.open_stream(sys.stdin.buffer) as batches:
    writer = None
    for scores in partition(iter(batches)):
        writer = writer or pa.ipc.new_stream(sys.stdout.buffer, scores.schema)
        writer.write_batch(scores)
    writer.close()
engines = {"pyspark", "ray", "dask", "torch"} & set(sys.modules)
assert not engines, engines
"""
"""A worker of an engine: takes a function and record batches, and returns record batches."""


def run_worker(partition: PartitionScorer, batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Return what the function gives for `batches` in a process of its own."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    given = pickle.dumps(partition) + sink.getvalue().to_pybytes()
    done = subprocess.run([sys.executable, "-c", WORKER], input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return list(pa.ipc.open_stream(done.stdout))


def scores(table: pa.Table) -> pa.Table:
    """Return a table without the columns that an engine leaves empty, and that differ between packets and columns."""
    return table.drop_columns([*UNKNOWN_IN_ENGINES, "schema_version"])


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_a_worker_gives_the_scores_of_score_archive(
    survey: str, expected: dict[str, pa.Table], request: pytest.FixtureRequest
) -> None:
    table: pa.Table = request.getfixturevalue(f"fink_{survey}")
    partition = PartitionScorer(ArrowScorer(columns=["cutoutScience"]), batch_rows=5)
    batches = run_worker(partition, table.to_batches(max_chunksize=8))
    assert [len(batch) for batch in batches] == [5, 3, 4]
    result = pa.Table.from_batches(batches)
    assert result["cutoutScience"].to_pylist() == table["cutoutScience"].to_pylist()
    assert scores(result).drop_columns(["cutoutScience"]).equals(scores(expected[survey]))
    assert all(result[name].null_count == len(table) for name in UNKNOWN_IN_ENGINES)


def test_a_bad_row_is_a_reject_at_its_place(ztf: list[bytes]) -> None:
    rows = pa.record_batch({"packet": [ztf[0], None, ztf[1][:5000], b"no alert", ztf[1]]})
    (result,) = run_worker(PartitionScorer(ArrowScorer()), [rows])
    assert result["reject_reason"].to_pylist() == [None, "empty", "truncated", "not_avro", None]


def test_an_empty_partition_gives_nothing(ztf: list[bytes]) -> None:
    partition = PartitionScorer(ArrowScorer())
    assert list(partition(iter([]))) == []
    assert list(partition(iter([pa.record_batch({"packet": pa.array([], pa.binary())})]))) == []


def test_an_error_names_the_machine(ztf: list[bytes], tmp_path: Path) -> None:
    partition = PartitionScorer(ArrowScorer(str(tmp_path / "not-on-this-machine")))
    with pytest.raises(PartitionError, match=r"on the machine .*not-on-this-machine"):
        list(partition(iter([pa.record_batch({"packet": ztf})])))


@pytest.mark.parametrize("layout", ["packets", "fink_ztf", "fink_lsst"])
def test_the_columns_that_are_read_suffice(layout: str, ztf: list[bytes], request: pytest.FixtureRequest) -> None:
    table = pa.table({"packet": ztf}) if layout == "packets" else request.getfixturevalue(layout)
    wider = table.append_column("night", pa.array([20260225] * len(table))).append_column(
        "note", pa.array(["large"] * len(table))
    )
    scorer = ArrowScorer(columns=["night"])
    read = scorer.reads(wider.schema)
    assert "note" not in read
    assert len(read) < len(wider.schema)
    assert scorer(wider.select(read)).equals(scorer(wider))
