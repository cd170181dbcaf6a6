"""The wheel is complete: installed with pip in an empty environment outside the checkout, it works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.version import Version

from broker_filter.cli import main
from broker_filter.scoring.bundle import shipped_bundles
from broker_filter.simulate import SCHEMAS, simulate_night

CHECKOUT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.timeout(900)  # builds the wheel and installs every dependency


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command without the variables of this environment and return its output; a failure shows the output."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: built from the source archive, not from the checkout."""
    dist = tmp_path_factory.mktemp("dist")
    output = run([sys.executable, "-m", "build", "--outdir", dist, CHECKOUT], cwd=dist)
    assert "Package would be ignored" not in output  # setuptools warns of a folder that `packages` does not list
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and its dependencies, without any extra."""
    outside = tmp_path_factory.mktemp("environment")
    (outside / "constraints.txt").write_text(  # the versions of this environment
        "".join(
            f"{distribution.name}=={Version(distribution.version).public}\n"
            for distribution in distributions()
            if distribution.name != "broker-filter"
        )
    )
    venv.create(outside / "venv")
    install(outside, f"broker-filter @ {wheel.as_uri()}")
    return outside / "venv" / "bin"


@pytest.fixture(scope="module")
def installed_for_demo(installed: Path, wheel: Path) -> Path:
    """The same environment with the extra `demo` added, for the last tests."""
    install(installed.parents[1], f"broker-filter[demo] @ {wheel.as_uri()}")
    return installed


def install(outside: Path, requirement: str) -> None:
    """Install into `outside / "venv"` with the pip of this environment, so that `outside` needs no pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", outside / "venv" / "bin" / "python"]
    constraints = ["--constraint", outside / "constraints.txt"]
    run([*pip, "install", "--quiet", "--no-compile", *constraints, requirement], cwd=outside)  # imports compile anyway


def test_one_wheel_serves_every_python_from_3_11_on(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_everything_that_is_tracked_travels_in_the_wheel(wheel: Path) -> None:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are unknown")
    tracked = run(["git", "ls-files", "broker_filter", "schemas"], cwd=CHECKOUT).split()
    expected = {
        name.replace("schemas/", "broker_filter/schemas/", 1) if name.startswith("schemas/") else name
        for name in tracked
    }
    with zipfile.ZipFile(wheel) as archive:
        assert expected - set(archive.namelist()) == set()


def test_no_file_of_an_earlier_build_gets_into_the_wheel(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(
        CHECKOUT / "broker_filter", checkout / "broker_filter", ignore=shutil.ignore_patterns("*.so", "*.c")
    )
    shutil.copytree(CHECKOUT / "schemas", checkout / "schemas")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, checkout)
    earlier = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "broker_filter"
    earlier.mkdir(parents=True)
    (earlier / "removed.py").touch()
    run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, checkout], cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "broker_filter/service.py" in names
    assert "broker_filter/removed.py" not in names


def test_the_package_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    report = "import broker_filter, broker_filter.packets._walk as walk; print(broker_filter.__file__, walk.__file__)"
    for path in run([installed / "python", "-c", report], cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_the_wheel_holds_every_file_of_the_page_of_alerts(wheel: Path) -> None:
    page = CHECKOUT / "broker_filter" / "watch" / "page"
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name).name for name in archive.namelist() if name.startswith("broker_filter/watch/page/")}
    assert held == {file.name for file in page.iterdir()}


HEAVY = {"torch", "triton", "matplotlib", "pandas", "scipy", "scikit-learn", "onnx"}
"""Distributions that the base installation must not bring: serving on the CPU needs none of them."""


def test_the_base_installation_is_light(installed: Path) -> None:
    (site,) = installed.parent.glob("lib/python3*/site-packages")
    names = {distribution.name.lower() for distribution in distributions(path=[str(site)])}
    assert "onnxruntime" in names
    assert not names & HEAVY
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_the_base_installation_scores_a_simulated_night_with_every_bundle(installed: Path, tmp_path: Path) -> None:
    night = tmp_path / "night"
    night.mkdir()
    for alert in (*simulate_night(20, seed=4, survey="ztf"), *simulate_night(20, seed=4, survey="lsst")):
        (night / f"{alert.survey}_{alert.alert_id}.avro").write_bytes(alert.packet)
    models = [option for bundle in shipped_bundles() for option in ("--model", bundle)]
    command = ["score", str(night), *models, "--schema-registry", str(SCHEMAS), "--out"]

    run([installed / "broker-filter", *command, tmp_path / "base.parquet"], cwd=tmp_path)

    assert main([*command, str(tmp_path / "here.parquet")]) == 0
    base, here = (pq.read_table(tmp_path / f"{where}.parquet") for where in ("base", "here"))
    assert base.equals(here)
    assert base["status"].to_pylist() == ["scored"] * 40
    for column in ("default__real", "classes__SN", "embedder__real"):
        assert base[column].null_count < 40


@pytest.mark.parametrize(
    ("runtime", "asked"),
    [("engine: torch", "engine torch on device auto"), ("device: cuda", "engine auto on device cuda")],
)
def test_the_base_installation_names_the_extra_that_a_runtime_needs(
    runtime: str, asked: str, installed: Path, tmp_path: Path
) -> None:
    service = tmp_path / "service.yaml"
    service.write_text(
        "input: {bootstrap_servers: '127.0.0.1:1', group_id: wheel, topics: [none], start: earliest}\n"
        "output: {prefix: wheel}\n"
        f"runtime: {{{runtime}}}\n"
    )
    command = [installed / "broker-filter", "run", "--config", service]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1
    said = f"broker-filter: {asked} needs PyTorch, which is not installed: pip install 'broker-filter[gpu]'\n"
    assert done.stderr.endswith(said)


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


def test_the_wheel_runs_the_demonstration(installed_for_demo: Path, tmp_path: Path) -> None:
    run([installed_for_demo / "broker-filter", "demo", "--alerts", "60", "--out", tmp_path / "demo"], cwd=tmp_path)

    (sheet,) = (tmp_path / "demo").glob("*.png")
    assert sheet.read_bytes().startswith(b"\x89PNG")
