"""The command `train-embedder`: it resumes after a kill, and reports errors in one line."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from broker_filter.scoring.bundle import open_bundle
from broker_filter.simulate import SimulatedAlert
from training.__main__ import main
from training.bundles.train_classes import COLUMN
from training.embedding import embedder, train_embedder
from training.embedding.train_embedder import CLASSES

CHECKOUT = Path(__file__).parents[3]
STEPS = 16
SMALL = {"SIMULATED": 12, "UNTRAINED": 1}
CHILD = f"""
import sys
from training.__main__ import main
from training.embedding import embedder, train_embedder
from training.embedding.train_embedder import CLASSES
embedder.CHECKPOINT_EVERY = 2
for name, value in {SMALL!r}.items():
    setattr(train_embedder, name, value)
sys.exit(main(sys.argv[1:]))
"""
LONGEST_WAIT = 120
"""Seconds within which a child process makes its first steps on a busy machine."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few simulated alerts, and checkpoints after every second step."""
    for name, value in SMALL.items():
        monkeypatch.setattr(train_embedder, name, value)
    monkeypatch.setattr(embedder, "CHECKPOINT_EVERY", 2)


@pytest.fixture
def arguments(night_packets: Path, alerts_of_the_night: list[SimulatedAlert], tmp_path: Path) -> list[str]:
    """The arguments of the command without `--out`."""
    names = [rule.partition("=")[0] for rule in CLASSES]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["candid", COLUMN])
        table.writerows((alert.alert_id, names[i % len(names)]) for i, alert in enumerate(alerts_of_the_night))
    labels = str(tmp_path / "labels.csv")
    return ["train-embedder", str(night_packets), "--labels", labels, "--steps", str(STEPS)]


def test_a_killed_training_resumes(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, *arguments, "--out", str(killed)]
    child = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "killed.ckpt", time.monotonic() + LONGEST_WAIT
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < STEPS
    assert not killed.exists()
    assert main([*arguments, "--out", str(killed)]) == 0
    assert f"killed.ckpt after step {step}" in capsys.readouterr().err
    assert open_bundle(killed).card.name == "embedder"
    assert not list(tmp_path.glob("*.ckpt*"))


def test_unusable_input_is_reported_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for change, message in (
        ({1: str(empty)}, "no alert was read from the inputs"),
        ({1: str(tmp_path / "absent")}, "absent: no such file or folder"),
        ({3: str(tmp_path / "absent.csv")}, "absent.csv: no such file"),
    ):
        changed = [change.get(i, argument) for i, argument in enumerate(arguments)]
        assert main([*changed, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
