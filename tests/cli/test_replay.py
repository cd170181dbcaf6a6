"""`broker-filter replay` reports an address where no broker answers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_filter.cli import main, replay


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """The command replaces signal handlers; this restores them for later tests."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, action in kept.items():
        signal.signal(number, action)


def test_wrong_broker_address_gives_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "PATIENCE_S", 2.0)
    night = tmp_path / "night"
    night.write_bytes(b"x")
    address = "127.0.0.1:1"  # no broker listens there
    assert main(["replay", str(night), "--bootstrap-servers", address, "--topic", "rehearsal"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"broker-filter: brokers {address}: ")
    assert last.endswith("no answer within 2 s: is the address right, and do the brokers run?")
