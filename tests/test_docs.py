"""The contents of README.md and docs/ are valid: service files load, commands parse, and links lead to files."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import ReferenceAlerts, SurveyCounts, SurveyReference, make_reference
from broker_filter.bench.targets import Expected
from broker_filter.cli import main
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import CARD, open_bundle
from broker_filter.scoring.labels import UNLABELLED

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "deploy" / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
REQUIRED_KEYS = {"input", "output"}
"""Keys that every service file has; a block of YAML without them is not a whole service file."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Return the fenced blocks of a language in all pages: the position and the text of each."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            yield f"{page.relative_to(CHECKOUT)}:{line}", block[1]


def service_files() -> list[Any]:
    """Return the blocks of YAML that are whole service files."""
    found = [(place, text) for place, text in blocks("yaml") if yaml.safe_load(text).keys() >= REQUIRED_KEYS]
    return [pytest.param(text, id=place) for place, text in found]


def commands(program: str) -> list[Any]:
    """Return the arguments of each command line of a program; lines may continue after a backslash."""
    pattern = re.compile(rf"(?:[A-Z_]+=\S+ )*{program} (.*)")
    return [
        pytest.param(shlex.split(match[1]), id=f"{place} {match[1]}")
        for place, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        for command in re.split(r"\s(?:\||&&)\s", line.partition(" #")[0])
        if (match := pattern.match(command.strip()))
    ]


def named_values(document: Any, key: str) -> set[str]:
    """Return the texts that a key has anywhere in a document."""
    if isinstance(document, list):
        return {text for value in document for text in named_values(value, key)}
    if not isinstance(document, dict):
        return set()
    own = {document[key]} if isinstance(document.get(key), str) else set()
    return own | {text for value in document.values() for text in named_values(value, key)}


def write_reference(file: Path) -> None:
    """Write a reference set of random embeddings for the bundle `embedder`."""
    rng = np.random.default_rng(0)
    bundle = open_bundle("embedder")
    assert bundle.embedding is not None
    embedding = normalise(rng.standard_normal((100, bundle.embedding)))
    names = np.array([f"ZTF26a{i}" for i in range(100)])
    alerts = ReferenceAlerts(embedding, np.arange(100), names, np.full(100, Survey.ZTF, np.uint8))
    modalities = len(bundle.modalities)
    usual, apart = np.full((1 + modalities, 2), 0.2, np.float32), np.full((modalities, 2), 0.2, np.float32)
    scores = np.sort(rng.gamma(3, 0.1, 50).astype(np.float32))
    part = SurveyReference(alerts, scores, usual, apart, np.full(100, UNLABELLED))
    counts = SurveyCounts(read=200, passed=150, kept=100, held_out=50)
    make_reference(bundle, None, {Survey.ZTF: part}, {Survey.ZTF: counts}, "mahalanobis").write(file)


def write_certificate(file: Path) -> None:
    """Write a self-signed certificate."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key = file.with_suffix(".key")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        file,
        "-subj",
        "/CN=ours",
    ]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("text", service_files())
def test_a_service_file_in_the_documentation_loads(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files that it names are created first: a reference, a certificate, and a bundle named like its folder."""
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load(text)
    for variable in named_values(document, "env"):
        monkeypatch.setenv(variable, "secret")
    for reference in named_values(document, "reference"):
        write_reference(Path(reference))
    for authority in named_values(document, "ca"):
        write_certificate(Path(authority))
    for bundle in (Path(model) for model in document.get("models", []) if str(model).startswith("./")):
        shutil.copytree(open_bundle("default").part("ztf").directory, bundle)
        card = (bundle / CARD).read_text()
        (bundle / CARD).write_text(card.replace("name: default", f"name: {bundle.name}", 1))
    Path("service.yaml").write_text(text)
    assert main(["config", "check", "service.yaml"]) == 0, capsys.readouterr().err


def test_the_documentation_shows_service_files() -> None:
    assert len(service_files()) >= 5


class ParsedError(BaseException):
    """The command line is valid; the command itself is not run."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every command raise ParsedError after its arguments are parsed; wrong arguments still end in argparse."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*arguments: Any, **options: Any) -> NoReturn:
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)


@pytest.mark.parametrize("arguments", commands("broker-filter"))
def test_a_command_line_in_the_documentation_is_valid(arguments: list[str], only_parse: None) -> None:
    with pytest.raises(ParsedError):
        main(arguments)


@pytest.mark.parametrize("arguments", commands("python -m training"))
def test_a_training_command_in_the_documentation_is_valid(arguments: list[str], only_parse: None) -> None:
    pytest.importorskip("lightning", reason="the training commands need the extra `train`")
    from training.__main__ import main as training

    with pytest.raises(ParsedError):
        training(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_a_heading_skips_no_level(page: Path) -> None:
    prose = re.sub(r"^(`{3,})[^\n]*\n.*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    assert all(below <= above + 1 for above, below in pairwise(levels))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_a_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


MAX_README_LINES = 150
RATIOS = CHECKOUT / "broker_filter" / "bench" / "ratios.json"


@pytest.mark.parametrize("page", ["docs/explanation/performance.md"])
def test_the_ratios_in_the_documentation_are_the_recorded_ones(page: str) -> None:
    recorded = TypeAdapter(dict[str, Expected]).validate_json(RATIOS.read_bytes())
    shown = dict(re.findall(r"^\| `([^`]+)` \| ([\d.]+) \|", (CHECKOUT / page).read_text(), re.MULTILINE))
    assert shown
    assert shown == {name: f"{recorded[name].ratio:.2f}" for name in shown}


def test_every_recorded_ratio_is_in_the_documentation() -> None:
    text = (CHECKOUT / "docs" / "explanation" / "performance.md").read_text()
    assert all(f"| `{name}` |" in text for name in json.loads(RATIOS.read_bytes()))


@pytest.mark.parametrize(
    "room", ["packets", "scoring", "anomalies", "importers", "streaming", "tables", "engines", "kafka"]
)
def test_the_architecture_names_every_module_of_a_room(room: str) -> None:
    """Of the networks, it says that there is one file for each architecture."""
    text = (CHECKOUT / "ARCHITECTURE.md").read_text()
    modules = {
        path.name
        for path in (CHECKOUT / "broker_filter" / room).rglob("*.[pc]*")
        if path.suffix in (".py", ".c") and path.name != "__init__.py" and path.parent.name != "networks"
    }
    assert modules
    assert {name for name in modules if not re.search(rf"\b{name}\b", text)} == set()


def test_every_module_that_the_architecture_names_exists() -> None:
    named = set(re.findall(r"\b\w+\.(?:py|[ch])\b", (CHECKOUT / "ARCHITECTURE.md").read_text()))
    folders = [CHECKOUT / name for name in ("broker_filter", "training", "docs", "tests")]
    existing = {path.name for folder in folders for path in folder.rglob("*.*")}
    assert named
    assert named - existing == set()


def test_the_readme_is_short() -> None:
    """Details belong on the pages in docs/."""
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_contributing_names_the_coverage_that_is_required() -> None:
    tools = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]
    required = tools["coverage"]["report"]["fail_under"]
    assert f"less than {required} % of the lines and branches" in (CHECKOUT / "CONTRIBUTING.md").read_text()
