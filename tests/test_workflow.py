"""The continuous integration tests everything that the project claims to support."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    workflow = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "ci.yaml").read_text())
    found: dict[str, dict[str, Any]] = workflow["jobs"]
    return found


@pytest.mark.parametrize("job", ["tests", "demo"])
def test_every_python_that_the_package_names_is_tested(jobs: dict[str, dict[str, Any]], job: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    named = [one.removeprefix(prefix) for one in project["classifiers"] if one.startswith(prefix)]
    assert jobs[job]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"


def test_every_action_is_pinned_to_one_version(jobs: dict[str, dict[str, Any]]) -> None:
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", action)] == []


def test_every_target_of_make_that_a_job_runs_exists(jobs: dict[str, dict[str, Any]]) -> None:
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {target for command in commands for target in re.findall(r"^make (\S+)", command, re.MULTILINE)}
    assert {"lint", "suite", "docs"} <= targets
    makefile = (CHECKOUT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
