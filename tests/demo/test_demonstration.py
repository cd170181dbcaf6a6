"""The demonstration runs as a user runs it, and its account is complete."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pyarrow.parquet as pq
import pytest

pytest.importorskip("noida_db", reason="the demonstration needs the extra `demo`")
pytest.importorskip("galsim", reason="the demonstration needs the extra `demo`")

from broker_filter.demo.demonstration import ZTF_PER_LSST
from broker_filter.scoring.bundle import open_bundle

N = 240
PATIENCE_S = 120
"""Seconds to wait for an expected event on a busy machine."""


def processes_of(directory: Path) -> list[str]:
    """Return the command lines of running processes that were started with a file of `directory`."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if str(directory) in line:
            lines.append(line)
    return lines


def test_demo_publishes_every_message_of_a_night_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "broker_filter", "demo", "--out", str(out), "--alerts", str(N), "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    # Two packets of ZTF are damaged, and one alert is sent twice.
    assert "291 consumed = 288 scored + 2 rejected (not_avro 1, truncated 1) + 1 duplicates" in done.stdout
    assert "Each of the 291 messages was published exactly once" in done.stdout
    assert "LSST: scores of the default model by kind of alert" in done.stdout
    assert "young supernova" in done.stdout
    assert "differs in" in done.stdout
    assert re.search(r"Features of \d+ of \d+ anomalies", done.stdout)
    page = (out / "explain.html").read_text()
    assert 0 < page.count("<section>") == int(re.search(r"Anomalies \((\d+)\)", done.stdout)[1])  # type: ignore[index]
    assert "GLIBC" not in done.stdout + done.stderr

    scores = pq.read_table(out / "scores.parquet").to_pylist()
    by_survey = {survey: [row for row in scores if row["survey"] == survey] for survey in ("ztf", "lsst")}
    assert {survey: len(rows) for survey, rows in by_survey.items()} == {"ztf": N + 1, "lsst": N // ZTF_PER_LSST}
    for survey in open_bundle("default").surveys:
        assert all(0 <= row["default__real"] <= 1 for row in by_survey.pop(survey))
    assert all(math.isnan(row["default__real"]) for rows in by_survey.values() for row in rows)
    said = " ".join(done.stdout.split())
    assert ("The default model has no network for LSST: these alerts have no score" in said) == ("lsst" in by_survey)
    assert sum(row["duplicate"] for row in scores) == 1
    height, width, _ = matplotlib.image.imread(out / "contact-sheet.png").shape
    assert width > 1500
    assert height > 600
    assert "broker_filter_consumed_alerts_total 291.0" in (out / "metrics.txt").read_text()
    checked = subprocess.run(
        [sys.executable, "-m", "broker_filter", "config", "check", str(out / "service.yaml")],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_stops_its_broker_and_service(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "broker_filter", "demo", "--out", str(out), "--alerts", "100000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as demo:
        try:
            deadline = time.monotonic() + PATIENCE_S
            log = out / "service.log"
            while not (log.exists() and log.stat().st_size):  # wait until the service writes to its log
                assert demo.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert len(processes_of(tmp_path)) == 3  # the demonstration, its broker and its service
            demo.send_signal(number)
            output, _ = demo.communicate(timeout=PATIENCE_S)
        finally:
            demo.kill()
    assert demo.returncode == 128 + number
    assert b"Traceback" not in output
    assert not processes_of(tmp_path)
