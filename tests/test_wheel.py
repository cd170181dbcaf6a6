"""The wheel is all a user needs: installed by pip in an empty environment outside the checkout, it does the work."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.version import Version

CHECKOUT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.timeout(900)  # builds, and installs every dependency


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """The output of a command that knows nothing of this environment; a failure shows what it said."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: made from the source archive, not from the checkout."""
    dist = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", dist, CHECKOUT], cwd=dist)
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment of the wheel and its dependencies alone, in the versions that the suite runs with."""
    outside = tmp_path_factory.mktemp("environment")
    constraints = outside / "constraints.txt"
    constraints.write_text(
        "".join(
            f"{distribution.name}=={Version(distribution.version).public}\n"
            for distribution in distributions()
            if distribution.name != "broker-filter"
        )
    )
    venv.create(outside / "venv", with_pip=True)
    binaries = outside / "venv" / "bin"
    pip: list[str | Path] = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--constraint", constraints, f"broker-filter[demo] @ {wheel.as_uri()}"], cwd=outside)
    return binaries


def test_one_wheel_serves_every_python_from_3_11_on(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_everything_that_is_tracked_travels_in_the_wheel(wheel: Path) -> None:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    tracked = run(["git", "ls-files", "broker_filter", "schemas"], cwd=CHECKOUT).split()
    expected = {
        name.replace("schemas/", "broker_filter/schemas/", 1) if name.startswith("schemas/") else name
        for name in tracked
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected - set(archive.namelist()) == set()


def test_the_package_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    report = "import broker_filter, broker_filter.packets._walk as walk; print(broker_filter.__file__, walk.__file__)"
    for path in run([installed / "python", "-c", report], cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_the_wheel_scores_real_packets(installed: Path, ztf_packets: list[tuple[int, bytes]], tmp_path: Path) -> None:
    night = tmp_path / "night"
    night.mkdir()
    chosen = ztf_packets[:: len(ztf_packets) // 50]
    for candid, packet in chosen:
        (night / f"{candid}.avro").write_bytes(packet)

    run([installed / "broker-filter", "score", night, "--out", tmp_path / "scores.parquet"], cwd=tmp_path)

    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert {row["alert_id"] for row in rows} == {candid for candid, _ in chosen}
    scored = [row["default__real"] for row in rows if row["status"] == "scored"]
    assert len(scored) > 0.9 * len(chosen)
    assert all(0 <= score <= 1 for score in scored)


def test_the_wheel_runs_the_demonstration(installed: Path, tmp_path: Path) -> None:
    run([installed / "broker-filter", "demo", "--out", tmp_path / "demo"], cwd=tmp_path)

    (sheet,) = (tmp_path / "demo").glob("*.png")
    assert sheet.read_bytes().startswith(b"\x89PNG")
