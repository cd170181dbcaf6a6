"""The command `train-embedder`: it resumes after an interruption, and reports errors in one line."""

from __future__ import annotations

import csv
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from broker_filter.scoring.bundle import open_bundle
from broker_filter.simulate import SimulatedAlert
from training.__main__ import main
from training.bundles.train_classes import COLUMN
from training.embedding import embedder, train_embedder
from training.embedding.contrast import Contrast
from training.embedding.train_embedder import CLASSES

STEPS, STOP = 6, 5
"""Number of training steps, and the step at which the first training ends."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few simulated alerts, and checkpoints after every second step."""
    monkeypatch.setattr(train_embedder, "SIMULATED", 12)
    monkeypatch.setattr(train_embedder, "UNTRAINED", 1)
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


def test_an_interrupted_training_resumes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "out.ckpt"
    loss, steps = Contrast.forward, count(1)

    def stopping(contrast: Contrast, vectors: Tensor) -> Tensor:
        if next(steps) == STOP:
            raise SystemExit
        return loss(contrast, vectors)

    monkeypatch.setattr(Contrast, "forward", stopping)
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(out)])
    assert torch.load(checkpoint, weights_only=True)["step"] == STOP - 1
    assert not out.exists()
    assert main([*arguments, "--out", str(out)]) == 0
    assert f"out.ckpt after step {STOP - 1}" in capsys.readouterr().err
    assert next(steps) == STOP + 1 + STEPS - (STOP - 1)
    assert open_bundle(out).card.name == "embedder"
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
