"""`make spark-cost`: the CPU time of an alert in Spark, beside that of `score` and of ArrowScorer on the same alerts.

    .venv-spark/bin/python tests/spark_cost.py ALERTS... [--first N] [--layout packets] [--executors 1 2]

ALERTS are archives of ZTF packets as for `broker-filter score`; simulated packets without any. Each is scored once to
warm up, and then measured: CPU time of all processes, and wall time, which means little on a busy machine.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from broker_filter import ArrowScorer, Scorer, read_packets, score_archive
from broker_filter.engines.partitions import PartitionScorer
from broker_filter.engines.spark import score
from broker_filter.simulate import simulate_night
from broker_filter.streaming.filtering import BATCH_SIZE

SIMULATED = 512
FILES = 8
"""Input files, each of which Spark reads in a task of its own."""
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Return the CPU time of this process and all of its descendants, and of their children that have ended."""
    stats = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        stats[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while more := {process for process, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return sum(stats[process][1] for process in family if process in stats) / TICKS


def measure(name: str, alerts: int, work: Callable[[], None]) -> float:
    """Run `work` twice, print the cost of the second run, and return its CPU time an alert in milliseconds."""
    work()
    cpu, wall = cpu_seconds(), time.monotonic()
    work()
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
    print(f"{name:40}{1000 * cpu / alerts:8.2f} ms CPU an alert {alerts / wall:9.0f} alerts/s", flush=True)
    return 1000 * cpu / alerts


def write_tables(packets: list[bytes], layout: str, folder: Path) -> None:
    """Write the alerts as FILES Parquet files with row groups of BATCH_SIZE rows."""
    step = -(-len(packets) // FILES)
    for start in range(0, len(packets), step):
        part = packets[start : start + step]
        if layout == "packets":
            table = pa.table({"packet": part})
        else:
            table = pa.Table.from_pylist([next(iter(fastavro.reader(io.BytesIO(packet)))) for packet in part])
        pq.write_table(table, folder / f"{start:06}.parquet", row_group_size=BATCH_SIZE)


def record_batches(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for file in sorted(folder.iterdir()):
        yield from pq.ParquetFile(file).iter_batches(BATCH_SIZE, columns=columns, use_threads=False)


def cluster(executors: int) -> SparkSession:
    """Return a session with this number of executors, each a process with one core."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session: SparkSession = (
        SparkSession.builder.master(f"local-cluster[{executors},1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    return session


def consume(df: DataFrame) -> None:
    df.write.format("noop").mode("overwrite").save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("alerts", nargs="*", type=Path)
    parser.add_argument("--first", type=int, help="number of alerts that are used (default: all)")
    parser.add_argument("--layout", choices=("fink", "packets"), default="fink")
    parser.add_argument("--executors", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    if options.alerts:
        packets = [packet.data for packet in islice(read_packets(options.alerts), options.first)]
    else:
        packets = [alert.packet for alert in simulate_night(SIMULATED, seed=1)]
    with tempfile.TemporaryDirectory() as directory:
        tables, archive = Path(directory, "tables"), Path(directory, "archive")
        tables.mkdir()
        archive.mkdir()
        write_tables(packets, options.layout, tables)
        for i, packet in enumerate(packets):
            (archive / f"{i:06}.avro").write_bytes(packet)
        scorer, partition = Scorer.open(), PartitionScorer(ArrowScorer())
        needed = partition.scorer.reads(pq.read_schema(next(tables.iterdir())))
        source = archive if options.layout == "packets" else tables

        def by_score() -> None:
            score_archive(source, scorer).read_all()

        def by_arrow() -> None:
            for _ in partition(record_batches(tables, needed)):
                pass

        n = len(packets)
        print(f"{n} alerts, {options.layout}")
        base = measure("score", n, by_score)
        arrow = measure("ArrowScorer, one thread", n, by_arrow)
        for executors in options.executors:
            spark = cluster(executors)
            scores = score(spark.read.parquet(str(tables)))
            cost = measure(f"Spark, {executors} executor(s)", n, lambda: consume(scores))  # noqa: B023 - is called at once
            print(f"    {cost / base:.2f} times score, {cost / arrow:.2f} times ArrowScorer", flush=True)
            spark.stop()


if __name__ == "__main__":
    main()
