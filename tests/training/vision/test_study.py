"""Studies: the order of runs, a row for each run, and no repetition of finished runs."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import yaml

from training.data.datasets import Dataset
from training.errors import TrainingError
from training.vision.study import REPORT, RUNS, TABLE, Study, configure, plan, run

TINY = {"name": "btsbot_cnn", "arguments": {"channels": [4, 8], "kernel": 3, "hidden": [16, 8]}}


@pytest.fixture
def study(night_dataset: Dataset, tmp_path: Path) -> dict[str, object]:
    """The configuration of a small study."""
    return {
        "out": str(tmp_path / "study"),
        "datasets": {"night": str(night_dataset.directory)},
        "models": {"tiny": {"architecture": TINY}},
        "regimens": {"scratch": {}},
        "seeds": [1],
        "recipe": {"epochs": 2, "warm_up_epochs": 1, "batch": 16, "learning_rate": 3e-3},
        "hardware": {"accelerator": "cpu", "devices": 1, "threads": 1},
    }


def begin(study: dict[str, object], folder: Path) -> list[dict[str, str]]:
    """Run the command on the file, and return the rows of its table."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    run(argparse.Namespace(study=file))
    with (folder / "study" / TABLE).open(newline="") as table:
        return list(csv.DictReader(table))


def test_a_study_resumes_with_unfinished_runs(study: dict[str, object], tmp_path: Path) -> None:
    first = begin(study, tmp_path)
    assert [row["run"] for row in first] == ["night_tiny_scratch_images_100pct_seed1"]
    assert 0 <= float(first[0]["roc_auc"]) <= 1
    predictions = tmp_path / "study" / RUNS / first[0]["run"] / "predictions.parquet"
    written = predictions.stat().st_mtime_ns
    both = begin({**study, "seeds": [1, 2]}, tmp_path)
    assert both[0] == first[0]
    assert [row["seed"] for row in both] == ["1", "2"]
    assert predictions.stat().st_mtime_ns == written
    report = (tmp_path / "study" / REPORT).read_text()
    assert report.startswith("2 of 2 runs.")
    assert "Means over 2 seeds" in report
    assert "| tiny | images | 100% | 0." in report


def test_a_failed_run_is_reported_and_the_others_are_made(study: dict[str, object], tmp_path: Path) -> None:
    study["regimens"] = {"galaxies": {"encoders": {"tiny": str(tmp_path / "absent.safetensors")}}, "scratch": {}}
    with pytest.raises(TrainingError, match="1 of 2 runs failed, see the log: night_tiny_galaxies_images_100pct_seed1"):
        begin(study, tmp_path)
    assert "night_tiny_scratch_images_100pct_seed1" in (tmp_path / "study" / TABLE).read_text()


def test_a_diverged_run_is_a_failed_run(study: dict[str, object], tmp_path: Path) -> None:
    study["regimens"] = {"wild": {"recipe": {"learning_rate": 1e30, "warm_up_epochs": 0}}}
    with pytest.raises(TrainingError, match="1 of 1 runs failed"):
        begin(study, tmp_path)


def test_misspelt_keys_are_refused_before_the_first_run(study: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"regimens\.galaxies: encoders lists models that are not .*: tinny"):
        begin({**study, "regimens": {"scratch": {}, "galaxies": {"encoders": {"tinny": "x"}}}}, tmp_path)
    for changes in (
        {"regimens": {"scratch": {}, "wild": {"recipe": {"epoch": 3}}}},
        {"models": {"a-b": {"architecture": TINY}}},
    ):
        with pytest.raises(TrainingError, match=r"night_(tiny_wild|a-b_scratch)_.*seed1: (recipe.)?(epoch|name)"):
            begin({**study, **changes}, tmp_path)
    assert not (tmp_path / "study" / RUNS).exists()


def test_one_seed_of_everything_comes_before_the_next(study: dict[str, object]) -> None:
    study |= {
        "models": {"plain": {"architecture": TINY, "takes_metadata": False}, "wide": {"architecture": TINY}},
        "regimens": {"scratch": {}, "galaxies": {"encoders": {"wide": "x"}, "recipe": {"learning_rate": 1e-4}}},
        "inputs": {"images": [], "metadata": ["magpsf"]},
        "fractions": [1, 0.1],
        "seeds": [1, 2],
    }
    whole = Study.model_validate(study)
    cells = list(plan(whole))
    assert [cell.name for cell in cells[:6]] == [
        "night_plain_scratch_images_100pct_seed1",
        "night_wide_scratch_images_100pct_seed1",
        "night_wide_galaxies_images_100pct_seed1",
        "night_wide_scratch_metadata_100pct_seed1",
        "night_wide_galaxies_metadata_100pct_seed1",
        "night_plain_scratch_images_10pct_seed1",
    ]
    assert len(cells) == len({cell.name for cell in cells}) == 20
    config = configure(whole, cells[-1])
    assert (config.recipe.seed, config.recipe.fraction, config.recipe.learning_rate) == (2, 0.1, 1e-4)
    assert (config.recipe.epochs, config.recipe.warm_up_epochs) == (
        20,
        10,
    )  # ten times as many epochs with a tenth of the sources
    assert config.metadata == ("magpsf",)
    assert config.encoder is not None
    assert config.encoder.regimen == "galaxies"
