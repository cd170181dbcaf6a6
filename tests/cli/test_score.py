"""`broker-filter score` on real archives: one row for every input, a summary that adds up, and the exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from broker_filter.cli import main
from broker_filter.cli.score import FORMATS
from broker_filter.scoring.runtimes import available_cores
from broker_filter.streaming.filtering import BATCH_SIZE
from broker_filter.tables import formats
from broker_filter.tables.bts_policies import POLICIES
from tests.ztf_network import ZTF_NETWORK


@pytest.fixture
def few(tmp_path: Path, ztf_packets: list[tuple[int, bytes]]) -> Path:
    """A folder with six packets, a second copy of the first packet, and two files that hold no packet."""
    folder = tmp_path / "night"
    (folder / "deeper").mkdir(parents=True)
    for candid, data in ztf_packets[:6]:
        (folder / f"{candid}.avro").write_bytes(data)
    (folder / "deeper" / "again.bin").write_bytes(ztf_packets[0][1])
    (folder / "empty").write_bytes(b"")
    (folder / "notes.txt").write_text("clouds after midnight")
    return folder


def score(*arguments: str | Path) -> int:
    return main(["score", *map(str, arguments)])


def test_table_has_one_row_for_every_input_and_a_summary_is_printed(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.parquet"
    assert score(few, "--out", out) == 0
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 9
    assert Counter(row["status"] for row in rows) == {"scored": 7, "rejected": 2}
    assert [row["duplicate"] for row in rows].count(True) == 1
    assert {row["reject_reason"]: Path(row["source"]).name for row in rows if row["status"] == "rejected"} == {
        "empty": "empty",
        "not_avro": "notes.txt",
    }
    assert all(0 <= row["default__real"] <= 1 for row in rows if row["status"] == "scored")
    [account] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"read 9: scored 6, rejected 2 \(\w+ 1, \w+ 1\), duplicates 1; [\d,]+ alerts/s -> \S+",
        account,
    )


def test_every_alert_of_a_real_night_is_scored(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    [archive] = (shared_data / "ztf" / "archives").glob("ztf_public_*.tar.gz")
    assert score(archive, "--out", out) == 0
    table = pq.read_table(out)
    assert table.num_rows == 30
    assert set(table["status"].to_pylist()) == {"scored"}
    assert all(source.startswith(f"{archive}::") for source in table["source"].to_pylist())


def test_every_damaged_file_has_a_row_with_its_reject_reason(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    damaged = shared_data / "ztf" / "damaged"
    score(damaged, "--out", out)
    rejected = [row for row in pq.read_table(out).to_pylist() if row["status"] == "rejected"]
    assert {row["source"].partition("#")[0] for row in rejected} == {str(path) for path in damaged.iterdir()}
    assert all(row["reject_reason"] and row["reject_detail"] for row in rejected)


def test_rejects_option_writes_rejected_rows_to_their_own_table(few: Path, tmp_path: Path) -> None:
    out, rejects = tmp_path / "scores.parquet", tmp_path / "rejects.csv"
    assert score(few, "--out", out, "--rejects", rejects) == 0
    table = pq.read_table(out)
    assert set(table["status"].to_pylist()) == {"scored"}
    assert {name: table[name].null_count for name in table.column_names} == dict.fromkeys(table.column_names, 0)
    with rejects.open(newline="") as file:
        rejected = list(csv.DictReader(file))
    assert {row["reject_reason"] for row in rejected} == {"empty", "not_avro"}
    assert len(table) + len(rejected) == 9


def test_where_writes_the_alerts_that_pass_and_every_reject(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything, chosen = tmp_path / "all.parquet", tmp_path / "chosen.parquet"
    assert score(few, "--out", everything) == 0
    rows = pq.read_table(everything).to_pylist()
    middle = float(np.median([row["default__real"] for row in rows if row["status"] == "scored"]))
    expected = [row for row in rows if row["status"] == "rejected" or row["default__real"] > middle]
    assert 2 < len(expected) < len(rows)

    capsys.readouterr()
    assert score(few, "--where", f"real > {middle} and magpsf < 30", "--out", chosen) == 0
    assert pq.read_table(chosen).to_pylist() == expected
    assert f"read 9: scored 6 ({len(expected) - 2} pass the filter), rejected 2" in capsys.readouterr().out


def test_where_reads_lists_of_targets_from_the_current_directory(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, chosen = tmp_path / "all.parquet", tmp_path / "chosen.parquet"
    assert score(few, "--out", everything) == 0
    rows = [row for row in pq.read_table(everything).to_pylist() if row["status"] == "scored"]
    (tmp_path / "targets.csv").write_text(f"ra,dec\n{rows[0]['ra']},{rows[0]['dec'] + 1 / 3600}\n")
    monkeypatch.chdir(tmp_path)
    assert score(few, "--where", 'near("targets.csv", 1.5)', "--out", chosen) == 0
    found = [row["object_id"] for row in pq.read_table(chosen).to_pylist() if row["status"] == "scored"]
    assert found == [row["object_id"] for row in rows if row["object_id"] == rows[0]["object_id"]]


def test_table_goes_to_standard_output_and_summary_to_standard_error(few: Path) -> None:
    command = [sys.executable, "-m", "broker_filter", "score", str(few), "--out", "-"]
    lines = subprocess.run(command, check=True, capture_output=True).stdout.splitlines()
    assert [json.loads(line)["status"] for line in lines].count("scored") == 7
    done = subprocess.run([*command, "--format", "fits"], check=True, capture_output=True)
    assert len(Table.read(io.BytesIO(done.stdout), format="fits")) == 9
    assert b"read 9: scored 6" in done.stderr


def test_offered_formats_are_the_supported_formats() -> None:
    assert tuple(formats.FORMATS) == FORMATS


def test_fail_on_reject_ends_with_status_1(few: Path, tmp_path: Path) -> None:
    assert score(few, "--out", tmp_path / "scores.jsonl", "--fail-on-reject") == 1
    assert score(few / "deeper", "--out", tmp_path / "scores.jsonl", "--fail-on-reject") == 0


def test_alerts_of_another_survey_are_scored_only_with_also(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    archive = shared_data / "lsst" / "ocf"
    model = ("--model", ZTF_NETWORK)
    assert score(archive, *model, "--out", out) == 0
    rows = pq.read_table(out).to_pylist()
    unclaimed = [row for row in rows if row["reject_reason"] == "no_model_for_survey"]
    assert unclaimed
    assert all(row["alert_id"] and row["survey"] == "lsst" and row["default__real"] is None for row in unclaimed)
    assert score(archive, *model, "--also", "lsst", "--out", out) == 0
    again = pq.read_table(out).to_pylist()
    assert len(again) == len(rows)
    scored = [row for row in again if row["status"] == "scored"]
    assert {row["alert_id"] for row in scored} == {row["alert_id"] for row in unclaimed}
    assert all(row["default__real"] is not None for row in scored)


def test_wire_format_is_read_with_a_registry(shared_data: Path, lsst_schemas: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    score(shared_data / "lsst" / "wire", "--also", "lsst", "--out", out)
    assert set(pq.read_table(out)["reject_reason"].to_pylist()) == {"unknown_schema_id"}
    assert score(shared_data / "lsst" / "wire", "--also", "lsst", "--schema-registry", lsst_schemas, "--out", out) == 0
    assert "scored" in pq.read_table(out)["status"].to_pylist()


def test_table_may_be_written_into_the_folder_that_is_read(few: Path) -> None:
    out = few / "scores.parquet"
    for _ in range(2):
        assert score(few, "--out", out) == 0
        assert pq.read_table(out).num_rows == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{few}", "--out", "{tmp}/scores.xlsx"], "should end in .parquet, .avro, .jsonl, .csv, .ecsv, .fits"),
        (["{few}", "--out", "{tmp}/scores.fits", "--rejects", "{tmp}/rejects"], "should end in .parquet"),
        (["{few}", "--out", "{tmp}/scores.fits", "--rejects", "{tmp}/scores.fits"], "name two tables"),
        (["{few}", "--out", "{tmp}/none/scores.avro"], "there is no folder"),
        (["{tmp}/none", "--out", "{tmp}/scores.avro"], "none: no such file"),
        (["{few}", "--model", "{tmp}/none", "--out", "{tmp}/scores.avro"], "not a bundle"),
        (["{few}", "--schema-registry", "{tmp}/none", "--out", "{tmp}/scores.avro"], "none"),
        (
            ["{few}", "--where", "ra > 1 and reel > 0.5", "--out", "{tmp}/scores.avro"],
            "--where: character 12: unknown name 'reel'; did you mean 'real'?",
        ),
    ],
)
def test_invalid_arguments_give_one_line_before_work_begins(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert score(*(one.format(few=few, tmp=tmp_path) for one in arguments)) in (1, 2)
    output, errors = capsys.readouterr()
    [line] = errors.splitlines()
    assert line.startswith("broker-filter: ")
    assert message in line
    assert output == ""


def test_inputs_without_any_alert_end_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert score(tmp_path / "empty", "--out", tmp_path / "scores.parquet") == 1
    assert "no alert could be read" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["night.parquet", "night.partial.parquet"])
def test_an_input_is_never_overwritten(written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night = tmp_path / written
    night.write_bytes(b"a night's alerts")
    assert score(night, "--out", tmp_path / "night.parquet") == 2
    assert f"{night} is an input and would be overwritten: choose another --out" in capsys.readouterr().err
    assert night.read_bytes() == b"a night's alerts"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_the_rows_so_far_in_a_partial_file(
    how: signal.Signals, tmp_path: Path, ztf_packets: list[tuple[int, bytes]]
) -> None:
    """The interrupt arrives while the command waits for the rest of a tar archive from a pipe."""
    pipe, out, partial = tmp_path / "night", tmp_path / "scores.jsonl", tmp_path / "scores.partial.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "broker_filter", "score", str(pipe), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with pipe.open("wb") as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
            # Up to cores + 1 batches are read ahead, so that two of cores + 3 batches are scored.
            for candid, data in islice(cycle(ztf_packets), BATCH_SIZE * (available_cores() + 3)):
                member = tarfile.TarInfo(f"{candid}.avro")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            stream.flush()
            while partial.read_text().count("\n") < BATCH_SIZE:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(how)
            _, errors = process.communicate()
            pipe.unlink()
    except BrokenPipeError:  # raised when the archive is closed, because its reader has ended
        pass
    finally:
        process.kill()
    assert process.returncode == 128 + how
    assert not out.exists()
    assert f"the rows so far are in {partial}" in errors
    assert "Traceback" not in errors
    assert len([json.loads(line) for line in partial.read_text().splitlines()]) >= BATCH_SIZE


@pytest.mark.shared
def test_policies_use_earlier_alerts_of_the_same_object(
    shared_data: Path, ztf_packets: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    labels = pq.read_table(shared_data / "ztf" / "labels.parquet", columns=["candid", "objectId", "magpsf"]).to_pylist()
    alerts_of = Counter(row["objectId"] for row in labels)
    magpsf = {row["candid"]: row["magpsf"] for row in labels if alerts_of[row["objectId"]] >= 4}
    folder = tmp_path / "night"
    folder.mkdir()
    for candid, data in ztf_packets:
        if candid in magpsf:
            (folder / f"{candid}.avro").write_bytes(data)
            last = data
    (folder / "seen_before.avro").write_bytes(last)
    asked = [argument for name in POLICIES for argument in ("--policy", f"{name}=default.real")]
    assert score(folder, "--out", tmp_path / "scores.parquet", *asked) == 0
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [[row[name] for name in POLICIES] for row in rows if row["duplicate"]] == [[None] * len(POLICIES)]
    judged = [row for row in rows if not row["duplicate"]]
    for name, policy in POLICIES.items():
        for i, row in enumerate(judged):
            past = [earlier for earlier in judged[: i + 1] if earlier["object_id"] == row["object_id"]]
            scores = np.array([earlier["default__real"] for earlier in past])
            assert row[name] == policy(scores, np.array([magpsf[earlier["alert_id"]] for earlier in past]))
        assert len({row[name] for row in judged}) == 2


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ("bts_p3=default.real", "unknown policy 'bts_p3'; known policies: bts_p1, bts_p2, prod_p1, prod_p2"),
        ("bts_p1=default.reel", "unknown output 'default.reel'; known outputs: default.real"),
        ("bts_p1", "unknown output ''"),
    ],
)
def test_invalid_policy_is_reported_before_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, complaint: str
) -> None:
    assert score(tmp_path, "--out", tmp_path / "scores.parquet", "--policy", policy) == 2
    assert complaint in capsys.readouterr().err
