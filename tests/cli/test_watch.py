"""`watch` serves a page until it is ended, and refuses a wrong command line before it reads anything."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `watch`")
pytest.importorskip("galsim", reason="simulated packets need the extra `demo`")

from broker_filter.cli import main
from broker_filter.simulate import simulate_night

PATIENCE_S = 60.0


def test_the_page_is_served_until_the_command_is_ended(tmp_path: Path) -> None:
    night = tmp_path / "night"
    night.mkdir()
    ids = []
    for alert in simulate_night(3, seed=1):
        (night / f"{alert.alert_id}.avro").write_bytes(alert.packet)
        ids.append(alert.alert_id)
    chosen = tmp_path / "next.csv"
    chosen.write_text(f"alert_id,rank\n{ids[2]},1\n{ids[0]},2\n")
    options = ["--port", "0", "--list", str(chosen), "--labels", str(tmp_path / "labels.csv")]
    command = [sys.executable, "-m", "broker_filter", "watch", str(night), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        deadline = time.monotonic() + PATIENCE_S
        listed: list[int] = []
        while len(listed) < 2 and time.monotonic() < deadline:
            with urllib.request.urlopen(f"{address}api/alerts?sort=listed") as answer:
                listed = [int(row["id"]) for row in json.load(answer)["alerts"]]
            time.sleep(0.05)
        assert listed == [ids[2], ids[0]]
        with urllib.request.urlopen(address) as page:
            assert 'src="page.js"' in page.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 143


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name files, or topics with --topic"),
        (["--topic", "me.scored"], "--topic needs --bootstrap-servers"),
        (["no-such-night.tar"], "no-such-night.tar: no such file or folder"),
        ([".", "--reference", "ordinary.safetensors"], "--reference needs --model"),
        ([".", "--list", "none.csv"], "none.csv: no such file or folder"),
        ([".", "--classes", "SN Ia"], "'SN Ia' cannot be a class"),
    ],
)
def test_a_wrong_command_line_is_refused(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--port", "70000"], ["--keep", "0"], ["--since", "noon"], ["--rate", "2"]])
def test_a_wrong_option_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["watch", ".", *option])
    assert option[0] in capsys.readouterr().err
