"""The frame that all commands share."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from broker_filter import __version__
from broker_filter.cli import COMMANDS, UNREAD, console, describe_error, main


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    heavy = ("numpy", "torch", "onnxruntime", "pyarrow", "fastavro", "pydantic", "confluent_kafka", "astropy", "rich")
    program = f"""
import sys
from broker_filter.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print("imported:", *(name for name in {heavy!r} if name in sys.modules))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    *text, imported = output.splitlines()
    assert imported == "imported:"
    assert all(any(line.split()[:1] == [command] for line in text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"broker-filter {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["scoer"], ["score"], ["score", "x"], ["config", "check"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: broker-filter" in capsys.readouterr().err


def test_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"broker-filter {__version__}\n"


def test_an_error_of_the_system_is_told_as_it_is_and_a_bug_as_one() -> None:
    assert describe_error(FileNotFoundError(2, "No such file or directory", "x")) == (
        "[Errno 2] No such file or directory: 'x'"
    )
    assert describe_error(KeyError("x")).startswith("unexpected KeyError: 'x'")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "broker_filter", "config", "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == UNREAD


def test_progress_without_a_terminal_is_a_log_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), console.progress("Scoring", total=3000) as advance:
        for _ in range(30):
            now += 1.0
            advance(100)
    assert [record.message for record in caplog.records] == [
        "Scoring: 1,000 of 3,000 alerts, 100/s",
        "Scoring: 2,000 of 3,000 alerts, 100/s",
        "Scoring: 3,000 of 3,000 alerts, 100/s",
    ]
