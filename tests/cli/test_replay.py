"""Replay as a command: what it says where no broker is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_filter.cli import main, replay


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """The command takes signals for itself; the tests after it want theirs."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, action in kept.items():
        signal.signal(number, action)


def test_a_wrong_address_is_given_up_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "PATIENCE_S", 2.0)
    night = tmp_path / "night"
    night.write_bytes(b"x")
    address = "127.0.0.1:1"  # where nobody listens
    assert main(["replay", str(night), "--bootstrap-servers", address, "--topic", "rehearsal"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"broker-filter: brokers {address}: ")
    assert last.endswith("no answer within 2 s: is the address right, and do the brokers run?")
