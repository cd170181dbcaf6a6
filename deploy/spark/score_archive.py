"""Scores an archive of alerts with Apache Spark: `spark-submit score_archive.py INPUT OUTPUT [OPTIONS]`.

INPUT is a Parquet file, a folder that is searched for files named `*.parquet`, or with `--table` a table of the
catalogue. Paths may be of any file system that Spark reads, for example hdfs:// or s3a://.

The work is divided into units: each input file is a unit, and of a table each of its partitions. The scores of a unit
are a directory of Parquet files, `OUTPUT/input=UNIT`, so that `spark.read.parquet(OUTPUT)` gives them all with a
column `input`. Spark writes the files of a unit into a hidden directory, moves them into place when all of its tasks
are done, and writes the marker `_SUCCESS` last. A unit whose directory has the marker is complete, and is not scored
again. A unit without it was interrupted: its directory is replaced. So the script can be run again at any time, after
a failure or when there are new input files, and each alert of the input has one row in the output. Run it once at a
time.

`OUTPUT/_models.json` records the models and options of the first run. A run with others is refused, so that one output
never holds scores of different models.

The exit status is 0 if all units are complete, 1 if some failed (the others are complete), and 2 if the command line,
an input or a model is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any
from urllib.parse import quote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import col, lit

from broker_filter import BrokerFilterError, open_bundle
from broker_filter.engines.spark import score
from broker_filter.errors import FAILED, USAGE

MARKER = "_SUCCESS"
"""The name of the file that Spark writes into a directory when everything else in it is complete."""
MODELS = "_models.json"
"""The record of models and options. Spark ignores files whose names begin with an underscore."""
INPUT_COLUMN = "input"
"""The column of the output that names the unit: the directories of units are partitions by it."""
PARQUET = ".parquet"
HIDDEN = ("_", ".")
"""First characters of the names of files and folders that are not data, for example of an interrupted job."""
MOST_NAME_BYTES = 255
"""The longest name of a directory in the usual file systems."""
MOST_FAILURES = 10
"""After this many failed units the script starts no other: all of them probably fail for the same reason."""
MOST_MESSAGE_LINES = 30


class ArchiveError(BrokerFilterError):
    """The archive cannot be scored as the command line says."""

    exit_status = USAGE


@dataclass(frozen=True)
class Unit:
    """A part of the input whose scores are written together. `name`: names its directory in the output."""

    name: str
    read: Callable[[], DataFrame]

    @property
    def directory(self) -> str:
        """The name of the directory of its scores, in the form that Spark reads as a column INPUT_COLUMN."""
        return f"{INPUT_COLUMN}={quote(self.name, safe=' ')}"


class Files:
    """The file systems that Spark reads and writes, through its own Java classes."""

    def __init__(self, spark: SparkSession) -> None:
        self._java: Any = spark.sparkContext._jvm
        self._settings: Any = spark.sparkContext._jsc.hadoopConfiguration()

    def path(self, *parts: str) -> Any:
        """Return the path of `parts`, each below the one before it."""
        return reduce(self._java.org.apache.hadoop.fs.Path, parts[1:], self._java.org.apache.hadoop.fs.Path(parts[0]))

    def exists(self, *parts: str) -> bool:
        """Return whether there is a file or folder."""
        path = self.path(*parts)
        return bool(path.getFileSystem(self._settings).exists(path))

    def below(self, root: str) -> list[tuple[str, str]]:
        """Return the files named `*.parquet` in a folder, or the file `root` itself: relative name and full path."""
        top = self.path(root)
        system = top.getFileSystem(self._settings)
        if not system.exists(top):
            raise ArchiveError(f"{root}: no such file or folder; a table of the catalogue needs --table")
        top = system.makeQualified(top)
        found, listed = [], system.listFiles(top, True)
        while listed.hasNext():
            path = listed.next().getPath()
            name = path.toString().removeprefix(top.toString()).lstrip("/") or path.getName()
            if name.endswith(PARQUET) and not any(part.startswith(HIDDEN) for part in name.split("/")):
                found.append((name, path.toString()))
        return sorted(found)

    def read(self, *parts: str) -> str | None:
        """Return the text of a small file; None if there is no such file."""
        if not self.exists(*parts):
            return None
        path = self.path(*parts)
        stream = path.getFileSystem(self._settings).open(path)
        try:
            return bytes(self._java.org.apache.commons.io.IOUtils.toByteArray(stream)).decode()
        finally:
            stream.close()

    def write(self, text: str, *parts: str) -> None:
        """Write a small file that does not exist yet."""
        path = self.path(*parts)
        stream = path.getFileSystem(self._settings).create(path, False)
        try:
            stream.write(bytearray(text.encode()))
        finally:
            stream.close()


def files_as_units(spark: SparkSession, root: str, files: Files) -> list[Unit]:
    """Return a unit for each Parquet file. Columns that Hive's folder names state (`year=2026/`) are read too."""
    found = files.below(root)
    if not found:
        raise ArchiveError(f"{root}: holds no file whose name ends in {PARQUET}")

    def reader(name: str, full: str) -> Callable[[], DataFrame]:
        return lambda: spark.read.option("basePath", full.removesuffix(name)).parquet(full)

    return [Unit(name, reader(name, full)) for name, full in found]


def partitions_as_units(spark: SparkSession, table: str) -> list[Unit]:
    """Return a unit for each partition of a table of the catalogue; one unit if the table has no partitions."""
    if not spark.catalog.tableExists(table):
        raise ArchiveError(f"{table}: the catalogue has no such table")
    keys = [column.name for column in spark.catalog.listColumns(table) if column.isPartition]
    if not keys:
        return [Unit(table, lambda: spark.table(table))]

    def reader(values: dict[str, Any]) -> Callable[[], DataFrame]:
        chosen = reduce(and_, (col(key).eqNullSafe(lit(value)) for key, value in values.items()))
        return lambda: spark.table(table).where(chosen)

    parts = sorted(
        (row.asDict() for row in spark.table(table).select(keys).distinct().collect()),
        key=lambda values: [str(value) for value in values.values()],
    )
    return [Unit("/".join(f"{key}={value}" for key, value in part.items()), reader(part)) for part in parts]


def described(options: argparse.Namespace) -> str:
    """Return what decides the scores, as JSON: the models with the sha256 of their cards, and the options."""
    bundles = [open_bundle(model) for model in options.models]
    models = [
        {
            "name": bundle.card.name,
            "version": bundle.card.version,
            "card_sha256": hashlib.sha256((bundle.directory / "bundle.yaml").read_bytes()).hexdigest(),
        }
        for bundle in bundles
    ]
    return json.dumps({"models": models, "also": options.also, "columns": options.columns}, indent=2)


def check_models(options: argparse.Namespace, files: Files) -> None:
    """Record the models and options of the output, or raise ArchiveError if the recorded ones are others."""
    wanted = described(options)
    recorded = files.read(options.output, MODELS)
    if recorded is None:
        files.write(wanted, options.output, MODELS)
    elif recorded != wanted:
        raise ArchiveError(
            f"{options.output}: its scores were made with other models or options ({MODELS} in it says which): choose "
            "another output"
        )


def score_units(spark: SparkSession, options: argparse.Namespace, units: list[Unit]) -> int:
    """Score units, several at a time, and return how many failed. The message of a failure goes to stderr."""
    failed = done = 0

    def score_one(unit: Unit) -> None:
        scores = score(
            unit.read(),
            options.models,
            also=options.also,
            schema_registry=options.schema_registry,
            columns=options.columns,
        )
        scores.write.mode("overwrite").parquet(f"{options.output}/{unit.directory}")

    with ThreadPoolExecutor(options.jobs or spark.sparkContext.defaultParallelism) as pool:
        running = {pool.submit(score_one, unit): unit for unit in units}
        for future in as_completed(running):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                done += 1
                say(f"{running[future].name}: scored ({done} of {len(units)})")
                continue
            if not isinstance(error, BrokerFilterError | PySparkException | Py4JJavaError):
                raise error
            failed += 1
            lines = str(error.java_exception if isinstance(error, Py4JJavaError) else error).splitlines()
            say(f"{running[future].name}: failed: " + "\n".join(lines[:MOST_MESSAGE_LINES]))
            if failed == MOST_FAILURES:
                say(f"{failed} inputs failed: no other is started")
                pool.shutdown(wait=False, cancel_futures=True)
    return failed


def say(message: str) -> None:
    """Print a line on stderr."""
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Scores an archive of alerts. What was scored before is not scored again."
    )
    parser.add_argument("input", help="a Parquet file, a folder of Parquet files, or with --table a table")
    parser.add_argument("output", help="the folder of the scores, as Parquet")
    parser.add_argument("--table", action="store_true", help="INPUT is the name of a table of the catalogue")
    parser.add_argument("--model", action="append", dest="models", help="bundle that scores; repeat it for several")
    parser.add_argument("--also", action="append", default=[], help="survey that is scored although not trained for")
    parser.add_argument("--schema-registry", help="URL or directory of the schemas of packets in wire format")
    parser.add_argument("--column", action="append", default=[], dest="columns", help="input column to copy")
    parser.add_argument("--jobs", type=int, help="number of units at a time (default: Spark's parallelism)")
    options = parser.parse_args(arguments)
    options.models = options.models or ["default"]
    if INPUT_COLUMN in options.columns:
        parser.error(f"--column {INPUT_COLUMN}: the output has a column of this name: rename that of the input")
    return options


def run(spark: SparkSession, options: argparse.Namespace) -> int:
    """Score what the options name, and return the exit status."""
    files = Files(spark)
    try:
        if options.table:
            units = partitions_as_units(spark, options.input)
        else:
            units = files_as_units(spark, options.input, files)
        for unit in units:
            if len(unit.directory.encode()) > MOST_NAME_BYTES:
                raise ArchiveError(f"{unit.name}: the path is too long to name a directory of the output: shorten it")
        check_models(options, files)
        waiting = [unit for unit in units if not files.exists(options.output, unit.directory, MARKER)]
        say(f"{len(units)} inputs, {len(units) - len(waiting)} of them scored before")
        return FAILED if score_units(spark, options, waiting) else 0
    except BrokerFilterError as error:
        say(f"error: {error}")
        return error.exit_status
    except Py4JJavaError as error:
        say(f"error: {error.java_exception}")
        return FAILED


def main() -> int:
    """Run the script, and return its exit status."""
    options = parse()
    spark = SparkSession.builder.appName("score_archive").getOrCreate()
    try:
        return run(spark, options)
    finally:
        spark.stop()


if __name__ == "__main__":
    sys.exit(main())
