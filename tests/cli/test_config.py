"""`broker-filter config check` lists every error and ends with status 2, or prints what would run, without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_filter.cli import main
from broker_filter.config_file import document_keys, load_service

SOUND = """\
input:
  bootstrap_servers: survey:9092
  group_id: me-filter
  topics: [ztf_%Y%m%d_programid1]
  start: earliest
  sasl: {username: me, password: {env: SURVEY_PASSWORD}}
output: {prefix: me, bootstrap_servers: "ours:9092"}
filters: [{name: bright, where: real > 0.65 and magpsf < 18.5, max_rate: 0.01, over_rate: pause}]
"""


def test_valid_file_prints_what_will_run_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reference_file: Path
) -> None:
    monkeypatch.setenv("SURVEY_PASSWORD", "hunter2")
    file = tmp_path / "service.yaml"
    (tmp_path / "targets.csv").write_text("name,ra,dec\nM31,10.68,41.27\nM33,23.46,30.66\n")
    (tmp_path / "field.txt").write_text("0/0-5")
    where = 'magpsf < 18.5 and near("targets.csv", 2) and in_moc("field.txt")'
    listed = SOUND.replace("real > 0.65 and magpsf < 18.5", f"'{where}'")
    file.write_text(f"{listed}anomalies: {{reference: {reference_file}, rate: 0.002}}\n")
    assert main(["config", "check", str(file)]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "ztf_%Y%m%d_programid1 from survey:9092" in output
    assert "me.scored, me.anomalies, me.bright, me.dead-letter to ours:9092" in output
    assert "model: default" in output
    service = load_service(file)
    [(_, expression)] = service.filters
    said = f"filter: bright {expression.revision} ({where}); pause above 1 % in 10 minutes"
    assert said in output.splitlines()
    assert f"revision: {service.revision}" in output.splitlines()
    assert f"anomalies: 0.002 of the alerts, by {reference_file}" in output
    assert f"file {tmp_path / 'targets.csv'}: 2 targets" in output
    assert f"file {tmp_path / 'field.txt'}: 50.000% of the sky" in output
    assert "hunter2" not in output


def test_every_error_is_listed_and_the_status_is_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SURVEY_PASSWORD", raising=False)
    file = tmp_path / "service.yaml"
    file.write_text(SOUND.replace("magpsf", "magps").replace("group_id", "groupid"))
    assert main(["config", "check", str(file)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.splitlines() == [
        f"broker-filter: {file} cannot be used:",
        "  input.group_id: is required",
        "  input.sasl.password.env: the environment variable SURVEY_PASSWORD is not set",
        "  input.groupid: unknown key; did you mean 'group_id'?",
        "  filters[0].where: character 17: unknown name 'magps'; did you mean 'magpsf'?",
    ]


def test_missing_file_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(tmp_path / "none.yaml")]) == 2
    complaint = capsys.readouterr().err
    assert str(tmp_path / "none.yaml") in complaint
    assert "No such file" in complaint


def test_keys_are_listed_as_a_markdown_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert (head, rule) == ("| key | default | meaning |", "|---|---|---|")
    assert len(rows) == len(list(document_keys()))
    assert "| `http.port` | `9108` | Port to listen on; 0 takes a free port. |" in rows
