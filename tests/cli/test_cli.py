"""The behaviour that all commands share: help, usage errors, exit statuses and progress."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from broker_filter import __version__, console
from broker_filter.cli import COMMANDS, UNREAD, describe_error, main
from broker_filter.errors import BrokerFilterError
from broker_filter.kafka.client import KafkaSetupError
from broker_filter.kafka.sink import UnaccountedError
from broker_filter.streaming.archives import NoInputError


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


def test_the_service_imports_nothing_that_only_tables_and_training_need() -> None:
    heavy = ("pandas", "pyarrow", "torch", "astropy", "rich")
    program = f"import sys, broker_filter.service; print(*(name for name in {heavy!r} if name in sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (["scoer", "x"], "broker-filter [", "did you mean 'score'?"),
        (["score", "x", "--out", "y", "--modle", "z"], "broker-filter score [", "did you mean '--model'?"),
        (["models", "shw"], "broker-filter models [", "did you mean 'show'?"),
        (["reference", "build", "x", "--out", "y", "--measure", "neighbour"], "build [", "did you mean 'neighbours'?"),
        (["replay", "x", "--topic", "t"], "broker-filter replay [", "--bootstrap-servers"),
        (
            ["score", "x", "--out", "s3://bucket/night.parquet"],
            "broker-filter score [",
            "tables are written to files, not to URLs",
        ),
    ],
)
def test_wrong_arguments_show_the_usage_of_the_command_and_a_suggestion(
    arguments: list[str], usage: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert usage in error
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "https://me:secret@example.org/night.tar.gz", "--out", "x.csv"],
        ["score", "x", "--out", "s3://me:secret@bucket/night.parquet"],
        ["inspect", "x", "--schema-registry", "htps://me:secret@registry"],
        ["inspect", "x", "--schema-registry", "https://me:secret/too@registry"],
        ["inspect", "kafka://me:secret@host:9092"],
    ],
)
def test_credentials_in_a_url_are_not_shown(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").touch()
    with suppress(SystemExit):  # argparse ends the process itself
        assert main(arguments) != 0
    error = capsys.readouterr().err
    assert "***@" in error
    assert "secret" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "https://example.org/night.tar.gz", "--out", "x.csv"], "curl -L https://example.org/night.tar.gz |"),
        (["inspect", "s3://bucket/night.tar.gz"], "aws s3 cp s3://bucket/night.tar.gz - |"),
        (["score", "kafka://localhost:9092/topic", "--out", "x.csv"], "`run`, `inspect` and `replay`"),
        (["score", "-", "-", "--out", "x.csv"], "only be read once"),
        (["models", "show", "defualt"], "did you mean 'default'?"),
        (["inspect", "/no/such/night"], "no such file or folder"),
        (["inspect", "htp//me:secret@host/night.tar"], "broker-filter: ***@host/night.tar: no such file or folder"),
        (["reference", "show", "http://me:secret@host/x"], "broker-filter: http:/***@host/x: no such file or folder"),
        (["score", "/no/such/night", "--out", "x.csv"], "no such file or folder"),
        (["replay", "/no/such", "--topic", "t", "--bootstrap-servers", "localhost:1"], "no such file or folder"),
        (["reference", "build", "/no/such", "--out", "x"], "no such file or folder"),
        (["reference", "show", "/no/such/file"], "no such file or folder"),
        (["similar", "x.avro", "--reference", "/no/such/file"], "no such file or folder"),
        (["inspect", "kafka://localhost:1/t", "--kafka-file", "/no/such/file"], "no such file or folder"),
        (["models", "list", "/no/such/folder"], "no such file or folder"),
        (["models", "import", "btsbot", "/no/such/folder", "--name", "x", "--out", "y"], "no such file or folder"),
        (["replay", "-", "--repeat", "--topic", "t", "--bootstrap-servers", "localhost:1"], "read only once"),
    ],
)
def test_missing_files_and_unknown_names_give_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_are_valid_command_lines(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = [part for line in examples.splitlines() for part in re.findall(r"broker-filter [^|&]*", line)]
    assert lines
    for line in lines:
        names = shlex.split(line)[1:]
        with pytest.raises(SystemExit) as end:
            main([*names, "--help"])
        assert end.value.code == 0


def test_quiet_is_accepted_before_and_after_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packet = tmp_path / "night"
    packet.write_bytes(b"clouds")
    for arguments in (["-q", "score"], ["score", "--quiet"]):
        assert main([*arguments, str(packet), "--out", str(tmp_path / "x.csv")]) == 1
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.splitlines()[-1] == "broker-filter: no alert could be read"
        assert not logging.getLogger().isEnabledFor(logging.INFO)
        assert logging.getLogger().isEnabledFor(logging.WARNING)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"broker-filter {__version__}\n"


def test_an_error_of_the_system_names_the_file_first() -> None:
    assert describe_error(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"


def raise_on_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("broker_filter.cli.config._keys", run)


@pytest.mark.parametrize("fault", [KeyError("x"), UnaccountedError("packet 3 has no outcome")])
def test_a_fault_of_the_program_logs_a_traceback(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_on_run(fault, monkeypatch)
    assert main(["config", "keys"]) == 1
    said = capsys.readouterr().err
    assert "fault of the program" in said
    assert "Traceback (most recent call last)" in said
    assert str(fault) in said


@pytest.mark.parametrize(
    ("error", "status"), [(NoInputError("night.tar: no such file"), 2), (KafkaSetupError("no broker answers"), 1)]
)
def test_an_error_that_a_user_can_mend_is_one_line(
    error: BrokerFilterError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_on_run(error, monkeypatch)
    assert main(["config", "keys"]) == status
    assert capsys.readouterr().err == f"broker-filter: {error}\n"


def test_closed_output_pipe_is_not_an_error() -> None:
    command = [sys.executable, "-m", "broker_filter", "config", "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == UNREAD


def test_progress_without_a_terminal_is_logged_at_intervals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), console.progress("Scoring", total=3000) as advance:
        for _ in range(30):
            now += 1.0
            advance(100)
    assert [record.message for record in caplog.records] == [
        "Scoring: 1,000 of 3,000 alerts, 100/s, 0:00:20 left",
        "Scoring: 2,000 of 3,000 alerts, 100/s, 0:00:10 left",
        "Scoring: 3,000 of 3,000 alerts, 100/s, 0:00:00 left",
    ]


def test_progress_without_a_total_shows_the_share_of_bytes_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    shares = iter([0.25, 0.5, None])
    with caplog.at_level(logging.INFO), console.progress("Scoring", share=lambda: next(shares)) as advance:
        for _ in range(30):
            now += 1.0
            advance(100)
    assert [record.message for record in caplog.records] == [
        "Scoring: 1,000 alerts (25%), 100/s, 0:00:30 left",
        "Scoring: 2,000 alerts (50%), 100/s, 0:00:20 left",
        "Scoring: 3,000 alerts, 100/s",
    ]
