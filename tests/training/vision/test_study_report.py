"""Reports on studies: means over seeds, and differences between runs that differ in one choice."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.predictions import Predictions
from training.vision.study_report import COMPARED, Cell, Choice, as_markdown

TRUTH = np.arange(40) % 2


def predictions(noise: float, seed: int) -> Predictions:
    """Return binary predictions for 40 objects: the truth plus noise."""
    score = 1 / (1 + np.exp(-(2.0 * TRUTH - 1 + noise * np.random.default_rng(seed).normal(size=40))))
    return Predictions(
        ("bogus", "real"),
        np.arange(40),
        np.array([f"ZTF{i}" for i in range(40)]),
        np.full(40, 18.0),
        TRUTH,
        score[:, None].astype(np.float32),
        threshold=0.5,
    )


def test_a_cell_is_the_mean_over_its_seeds() -> None:
    cell = Cell.of([predictions(2, 1), predictions(2, 2)])
    one, other = Cell.of([predictions(2, 1)]), Cell.of([predictions(2, 2)])
    assert cell.roc_auc == (*one.roc_auc, *other.roc_auc)
    assert cell.figures["f1"] == pytest.approx((one.figures["f1"] + other.figures["f1"]) / 2)
    assert cell.resampled["roc_auc"] == pytest.approx((one.resampled["roc_auc"] + other.resampled["roc_auc"]) / 2)


def test_only_runs_that_differ_in_one_choice_are_compared() -> None:
    good, poor = predictions(0.1, 1), predictions(4, 2)
    report = as_markdown(
        {
            Choice("night", "vgg6", "scratch", "images", 1): [poor],
            Choice("night", "pico", "scratch", "images", 1): [poor],
            Choice("night", "pico", "galaxies", "images", 1): [good],
            Choice("night", "pico", "galaxies", "images", 0.1): [poor],
        },
        planned=9,
    )
    assert report.startswith("4 of 9 runs.")
    rows = [line.split(" | ") for line in report.splitlines() if " minus " in line]
    assert [row[:2] for row in rows] == [
        ["| pico, images, 100%", "galaxies minus scratch"],
        ["| scratch, images, 100%", "pico minus vgg6"],
    ]
    better, same = rows
    assert all(cell.rstrip(" |").endswith("*") for cell in better[2:])
    assert [cell.rstrip(" |") for cell in same[2:]] == ["0.0000 (0.0000 to 0.0000)"] * len(COMPARED)
