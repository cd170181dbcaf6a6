"""Simulated alerts as the rows of tables, in the layouts that engines hold, and their scores by `score_archive`."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fastavro
import pyarrow as pa
import pytest

from broker_filter import score_archive
from broker_filter.packets.framing import wire
from broker_filter.simulate import SCHEMAS, simulate_night

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ALERTS = 12
SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Options of Java: the tests end before its optimising compiler has paid off."""


@pytest.fixture(scope="session")
def ztf() -> list[bytes]:
    """Simulated packets of ZTF: Avro containers."""
    return [alert.packet for alert in simulate_night(ALERTS, seed=3)]


@pytest.fixture(scope="session")
def lsst() -> list[bytes]:
    """Simulated packets of LSST: Confluent wire format."""
    return [alert.packet for alert in simulate_night(ALERTS, seed=3, survey="lsst")]


@pytest.fixture(scope="session")
def fink_ztf(ztf: list[bytes]) -> pa.Table:
    """The alerts of `ztf` in the columns of their schema, as Fink stores them."""
    return pa.Table.from_pylist([next(iter(fastavro.reader(io.BytesIO(packet)))) for packet in ztf])


@pytest.fixture(scope="session")
def fink_lsst(lsst: list[bytes]) -> pa.Table:
    """The alerts of `lsst` in the columns of their schema, as Fink stores them."""
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "lsst.v10_0.alert.avsc").read_text()))
    bodies = [io.BytesIO(wire.unframe(packet).body) for packet in lsst]
    return pa.Table.from_pylist([fastavro.schemaless_reader(body, schema) for body in bodies])


@pytest.fixture(scope="session")
def expected(ztf: list[bytes], lsst: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """The rows that `score_archive` gives for the alerts of each survey, in their order."""
    tables = {}
    for survey, packets in (("ztf", ztf), ("lsst", lsst)):
        folder = tmp_path_factory.mktemp(survey)
        for i, packet in enumerate(packets):
            (folder / f"{i:03}.avro").write_bytes(packet)
        tables[survey] = score_archive(folder, schema_registry=SCHEMAS).read_all()
    return tables


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A cluster of two executors on this machine, each a process with one core."""
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17 or newer")
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.driver.extraJavaOptions", SHORT_LIVED)
        .config("spark.executor.extraJavaOptions", SHORT_LIVED)
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()
