"""One set of packets and one broker, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_filter.bench.runs.testbed import Broker
from broker_filter.bench.sample import choose_packets


@pytest.fixture(scope="session")
def packets() -> list[bytes]:
    """Simulated ZTF packets."""
    return choose_packets([], 32)


@pytest.fixture
def broker(kafka_bootstrap: str) -> Broker:
    return Broker("the tests'", kafka_bootstrap)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path
