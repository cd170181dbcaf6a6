"""The science modules for Fink, tested as Fink tests its own: each module's doctest, by fink-science, in Spark.

`make spark` runs these tests: they need the extra `spark`, Java, and fink-science.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ..engines.conftest import fink_lsst, fink_ztf, lsst, ztf

pytest.importorskip("pyspark", reason="needs the extra `spark`: run `make spark`")
fink_science = pytest.importorskip("fink_science", reason="needs fink-science: run `make spark`")

__all__ = ["fink_lsst", "fink_ztf", "lsst", "ztf"]
MODULES = Path(__file__).parents[2] / "deploy" / "fink" / "fink_science"
SECONDS = 600
"""How long Spark may take to start and to run a doctest, on a busy machine."""
SAMPLES = {"ztf": "datatest", "rubin": "rubin_sample"}


@pytest.fixture
def package(tmp_path: Path, fink_ztf: pa.Table, fink_lsst: pa.Table) -> Path:
    """A directory with fink-science, our modules in their places, and samples of alerts."""
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17 or newer")
    package = tmp_path / "fink_science"
    package.mkdir()
    for file in Path(fink_science.__file__).parent.glob("*.py"):
        shutil.copy(file, package)
    shutil.copytree(MODULES, package, dirs_exist_ok=True)
    for survey, table in (("ztf", fink_ztf), ("rubin", fink_lsst)):
        sample = package / "data" / "alerts" / SAMPLES[survey]
        sample.mkdir(parents=True)
        pq.write_table(table, sample / "part-0.parquet")
    return tmp_path


def run(package: Path, survey: str) -> subprocess.CompletedProcess[str]:
    """Run a module as a program, as Fink's test suite does."""
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    module = package / "fink_science" / survey / "broker_filter" / "processor.py"
    return subprocess.run(
        [sys.executable, module], env=environment, cwd=package, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("survey", ["ztf", "rubin"])
def test_the_doctest_of_a_science_module_passes(survey: str, package: Path) -> None:
    done = run(package, survey)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.timeout(SECONDS)
def test_a_failing_doctest_is_noticed(package: Path) -> None:
    module = package / "fink_science" / "ztf" / "broker_filter" / "processor.py"
    module.write_text(module.read_text().replace('"real is not null").count() > 0', '"real is not null").count() < 0'))
    done = run(package, "ztf")
    assert done.returncode == 1
    assert "1 of " in done.stdout or "Test Failed" in done.stdout
