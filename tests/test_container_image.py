"""The container image: the files that it is built from, and that it always contains the compiled parts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from broker_filter.kill_with_parent import KillWithParent
from broker_filter.local_kafka import free_ports

CHECKOUT = Path(__file__).resolve().parents[1]
COMPILED = {"packets/_walk", "packets/_stamps", "scoring/_normalise"}
REQUIRE, PURE_PYTHON = "BROKER_FILTER_REQUIRE_COMPILED", "BROKER_FILTER_PURE_PYTHON"


def tracked() -> list[str]:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout, so the tracked files are unknown")
    listed = subprocess.run(["git", "ls-files", "-c", "-o", "--exclude-standard"], cwd=CHECKOUT, capture_output=True)
    return [name for name in listed.stdout.decode().splitlines() if (CHECKOUT / name).is_file()]


def passes_ignore_file(path: str) -> bool:
    """Return whether .dockerignore lets a file into the build; the last pattern that matches it or a parent folder
    decides.
    """
    parts = path.split("/")
    candidates = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for line in (CHECKOUT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        depth = 1 + pattern.count("/")
        named = parts if pattern.startswith("**/") else [one for one in candidates if one.count("/") + 1 == depth]
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in named):
            ignored = not line.startswith("!")
    return not ignored


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkout that the image is built from."""
    directory = tmp_path_factory.mktemp("context")
    for name in filter(passes_ignore_file, tracked()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKOUT / name, directory / name)
    return directory


def build(context: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the wheel from a copy of these files only, as the first stage of the image does."""
    source = shutil.copytree(context, out / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", out, source]
    return subprocess.run(command, env={**os.environ, REQUIRE: "1", **environment}, capture_output=True, text=True)


def test_ignore_file_passes_only_the_files_of_the_package(context: Path) -> None:
    assert {path.name for path in context.iterdir()} == {
        "broker_filter",
        "schemas",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    assert not passes_ignore_file("broker_filter/packets/_walk.abi3.so")
    assert not passes_ignore_file("broker_filter/packets/__pycache__/walk.cpython-311.pyc")
    assert passes_ignore_file("broker_filter/packets/_walk.c")


def test_wheel_of_the_image_has_the_compiled_parts(context: Path, tmp_path: Path) -> None:
    built = build(context, tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {m[1] for name in names if (m := re.fullmatch(r"broker_filter/(.*)\.abi3\.so", name))} == COMPILED


def test_build_fails_without_a_compiler_if_compiled_parts_are_required(context: Path, tmp_path: Path) -> None:
    refused = build(context, tmp_path, CC="false")
    assert refused.returncode != 0
    assert "packets._walk" in refused.stdout + refused.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_image_requires_the_compiled_parts_at_build_and_at_run_time() -> None:
    first, second = (CHECKOUT / "deploy" / "Containerfile").read_text().split("\nFROM ")[1:]
    assert re.search(rf"RUN {REQUIRE}=1 \\\n +\S+/pip install", first)
    assert re.search(rf"ENV [^\n]*\\\n(?:.*\\\n)* +{REQUIRE}=1\n", second)
    assert 'RUN ["python", "-c", "import broker_filter.packets.compiled"]' in second


def command_line(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker_filter", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_score_warns_of_decoding_in_python_and_refuses_it_if_forbidden(tmp_path: Path) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "no.avro").write_bytes(b"")
    score = ("score", tmp_path / "night", "--out", tmp_path / "scores.parquet")
    assert "packets are decoded in Python" in command_line(*score, **{PURE_PYTHON: "1"}).stderr
    refused = command_line(*score, **{PURE_PYTHON: "1", REQUIRE: "1"})
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"broker-filter: {REQUIRE}=1 is set, but packets are decoded in Python")


def test_service_warns_of_decoding_in_python(tmp_path: Path) -> None:
    config, (nobody, http) = tmp_path / "service.yaml", free_ports(2)
    config.write_text(
        yaml.safe_dump(
            {
                "input": {"bootstrap_servers": f"127.0.0.1:{nobody}", "group_id": "g", "topics": ["t"]},
                "output": {"prefix": "p"},
                "http": {"port": http},
            }
        )
    )
    command = [sys.executable, "-m", "broker_filter", "run", "--config", str(config)]
    environment = {**os.environ, PURE_PYTHON: "1"}
    service = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    guard = KillWithParent(service)
    assert service.stderr is not None
    lines = []
    for line in service.stderr:
        lines.append(line)
        if "metrics and health on" in line:
            break
    service.terminate()
    guard.release()
    service.communicate()
    assert any("packets are decoded in Python" in line for line in lines), lines
