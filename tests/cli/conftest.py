"""A night of real packets with a reference set, and logging as it was before each test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_filter.cli import main

ALERTS = 200
"""The size of the night."""


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command sets up logging for the whole process; later tests must not be affected."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session")
def night(ztf_packets: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real ZTF packets."""
    folder = tmp_path_factory.mktemp("night")
    for candid, data in ztf_packets[:ALERTS]:
        (folder / f"{candid}.avro").write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def reference(night: Path, embedding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference set of the night, made with `embedding_bundle`."""
    file = tmp_path_factory.mktemp("references") / "ordinary.safetensors"
    assert main(["reference", "build", str(night), "--model", str(embedding_bundle), "--out", str(file)]) == 0
    return file
