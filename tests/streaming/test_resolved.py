"""A service file is resolved once: its bundles are hashed, and its filters parsed, once per start."""

from __future__ import annotations

import ast
import hashlib
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from broker_filter.cli.config import summary
from broker_filter.config import Service
from broker_filter.config_file import ConfigError, load_service
from broker_filter.scoring.bundle import NoBundleError, open_bundle
from broker_filter.service import FilterService
from broker_filter.streaming.expressions import ExpressionError
from broker_filter.streaming.resolved import resolve

FILTERS = {"bright": "magpsf < 18.5", "likely": "default.real > 0.9", "likely-too": "default.real > 0.9"}


def service_file(tmp_path: Path, **keys: str) -> Path:
    filters = ", ".join(f"{{name: {name}, where: {where}}}" for name, where in FILTERS.items())
    sections = {
        "input": "{bootstrap_servers: 'survey:9092', group_id: me, topics: [ztf], start: earliest}",
        "output": "{prefix: me}",
        "filters": f"[{filters}]",
        "http": "{port: 0}",
        **keys,
    }
    file = tmp_path / "service.yaml"
    file.write_text("\n".join(f"{key}: {value}" for key, value in sections.items()))
    return file


def test_a_start_hashes_each_file_of_a_bundle_once_and_compiles_each_filter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_file: Path
) -> None:
    hashed: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    digest, parse = hashlib.file_digest, ast.parse

    def counted_digest(file: Any, algorithm: str) -> Any:
        hashed[file.name] += 1
        return digest(file, algorithm)

    def counted_parse(source: Any, *arguments: Any, **options: Any) -> Any:
        parsed[source] += source in expressions
        return parse(source, *arguments, **options)

    expressions = {*FILTERS.values(), "default.real > 0.5"}
    monkeypatch.setattr(hashlib, "file_digest", counted_digest)
    monkeypatch.setattr(ast, "parse", counted_parse)
    anomalies = f"{{reference: {reference_file}, where: default.real > 0.5}}"
    service = load_service(service_file(tmp_path, models="[default, classes]", anomalies=anomalies))
    assert "model: classes" in summary(service)
    FilterService(service, threading.Event())
    bundles = [open_bundle(name) for name in ("default", "classes")]  # hashes each file for the second time
    assert hashed == {
        str(part.directory / file): 2 for one in bundles for part in one.parts for file in part.card.files
    }
    assert +parsed == dict.fromkeys(expressions, 1)


def test_a_resolved_service_has_bundles_and_filters_in_the_order_of_the_file(tmp_path: Path) -> None:
    service = load_service(service_file(tmp_path, models="[classes, default]"))
    assert [bundle.card.name for bundle in service.bundles] == ["classes", "default"]
    assert {name: expression.text for name, expression in service.filters} == FILTERS
    assert service.judged is None


def test_each_error_of_a_file_is_listed_even_if_a_bundle_is_missing(tmp_path: Path) -> None:
    file = service_file(tmp_path, models="[defualt]", filters="[{name: a, where: bogus > 1}, {name: b, where: 1 +}]")
    with pytest.raises(ConfigError) as refused:
        load_service(file)
    assert [problem.path for problem in refused.value.problems] == ["models[0]", "filters[1].where"]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"models": ["defualt"]}, NoBundleError),
        ({"filters": [{"name": "a", "where": "magps < 18"}]}, ExpressionError),
    ],
)
def test_a_configuration_that_was_not_checked_is_refused(keys: dict[str, Any], error: type[Exception]) -> None:
    source = {"bootstrap_servers": "a:1", "group_id": "g", "topics": ["ztf"]}
    config = Service.model_validate({"input": source, "output": {"prefix": "me"}, **keys})
    with pytest.raises(error):
        resolve(config)


def test_the_revision_changes_with_what_decides_a_record_and_with_nothing_else(
    tmp_path: Path, reference_file: Path
) -> None:
    def revision(**keys: str) -> str:
        return load_service(service_file(tmp_path, **keys)).revision

    first = revision()
    elsewhere = "{bootstrap_servers: 'other:9092', group_id: you, topics: [lsst], start: latest}"
    same = {
        revision(input=elsewhere),
        revision(output="{prefix: you, bootstrap_servers: 'ours:9092', partitions: 9}"),
        revision(http="{port: 9}", batch="{max_size: 7}", transaction="{max_ms: 9}"),
        revision(filters="[" + ", ".join(f"{{name: {n}, where: ' {w} '}}" for n, w in FILTERS.items()) + "]"),
    }
    assert same == {first}
    copied = tmp_path / "copied"
    shutil.copytree(open_bundle("default").directory, copied)
    anomalies = {
        f"{{reference: {reference_file}}}",
        f"{{reference: {reference_file}, rate: 0.01}}",
        f"{{reference: {reference_file}, where: default.real > 0.5}}",
    }
    assert revision(models=f"[{copied}]") == first
    card = copied / "bundle.yaml"
    card.write_text(f"{card.read_text()}\n# another card\n")
    others = [
        revision(models=f"[{copied}]"),
        revision(models="[default, classes]"),
        revision(models="[{bundle: default, also: [lsst]}]", filters="[]"),
        revision(filters="[]"),
        revision(filters="[{name: bright, where: magpsf < 18.4}]"),
        revision(output="{prefix: me, payload: scores}"),
        revision(duplicate_window="5"),
        revision(duplicates="drop"),
        *(revision(anomalies=one) for one in anomalies),
    ]
    assert len({first, *others}) == 1 + len(others)
