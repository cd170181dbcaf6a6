"""The study of pre-training: every run once, both variants on the same stars, and a summary over the seeds."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from training.__main__ import main
from training.astrom3.study import MODES, Study, summarise

from .conftest import ONE_CORE, SMALL

QUICK = {"epochs": 1, "warm_up_epochs": 0, "batch": 16}
PUBLISHED_STUDY = Path(__file__).parents[3] / "training" / "astrom3" / "study.yaml"


def test_a_study_runs_all_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study.model_validate(
        {
            "out": tmp_path / "out",
            "stars": {"train": 40, "validation": 20, "test": 20},
            "subset": "sub50",
            "seeds": (1, 2),
            "arguments": SMALL,
            "pretraining": QUICK,
            "recipe": QUICK,
            "learning_rate": {mode: {"scratch": 0.01, "clip": 0.01} for mode in MODES},
            "hardware": ONE_CORE,
        }
    )
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    assert main(["astrom3-study", str(tmp_path / "study.yaml")]) == 0
    with (tmp_path / "out" / "study.csv").open(newline="") as file:
        rows = [(row["seed"], row["mode"], row["beginning"]) for row in csv.DictReader(file)]
    assert rows == [(seed, mode, beginning) for seed in "12" for mode in MODES for beginning in ("scratch", "clip")]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert all(f"| {mode} | accuracy |" in summary for mode in MODES)
    changed = re.search(r"\| class changed, all keys to random keys \| ([\d.e-]+) ±", summary)
    assert changed
    assert 0 <= float(changed[1]) < 0.5


def test_means_and_differences_are_over_the_seeds() -> None:
    accuracy = {("scratch", 1): 0.5, ("scratch", 2): 0.6, ("clip", 1): 0.7, ("clip", 2): 0.6}
    rows = [
        {"seed": seed, "mode": "photo", "beginning": beginning, "accuracy": value, "balanced_accuracy": value}
        for (beginning, seed), value in accuracy.items()
    ]
    assert "| photo | accuracy | 55.0 ± 7.1 | 65.0 ± 7.1 | +10.0 ± 14.1 | 1 of 2 |" in summarise(rows)


def test_the_committed_study_can_be_read() -> None:
    study = Study.model_validate(yaml.safe_load(PUBLISHED_STUDY.read_text()))
    assert len(study.seeds) >= 3
    assert study.subset == "sub10"


def test_a_study_without_a_learning_rate_is_refused() -> None:
    values = yaml.safe_load(PUBLISHED_STUDY.read_text())
    del values["learning_rate"]["photo"]
    with pytest.raises(ValidationError, match="learning_rate: must have photo, spectra, meta, all, not spectra"):
        Study.model_validate(values)
