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


def cell_of(*seeds: int) -> Cell:
    """Return the cell of runs with these seeds."""
    return Cell.of([predictions(2, seed) for seed in seeds])


def test_a_cell_is_the_mean_over_its_seeds() -> None:
    cell, one, other = cell_of(1, 2), cell_of(1), cell_of(2)
    assert cell.roc_auc == (*one.roc_auc, *other.roc_auc)
    assert cell.figures["f1"] == pytest.approx((one.figures["f1"] + other.figures["f1"]) / 2)


def test_each_resample_draws_objects_and_seeds() -> None:
    cell, one, other = (cell_of(*seeds).resampled["roc_auc"] for seeds in ((1, 2), (1,), (2,)))
    possible = np.stack([one, (one + other) / 2, other])
    distance = np.abs(possible - cell)
    assert distance.min(axis=0) == pytest.approx(0)
    different = one != other
    shares = np.bincount(distance.argmin(axis=0)[different], minlength=3) / different.sum()
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_differences_are_paired_by_seed() -> None:
    difference = cell_of(1, 2).ahead_of(cell_of(1, 2), "roc_auc")
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


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


def test_a_table_has_a_column_for_each_regimen_and_says_where_seeds_are_missing() -> None:
    runs = [predictions(2, 1), predictions(2, 2)]
    report = as_markdown(
        {
            Choice("night", "vgg6", "scratch", "images", 1): runs,
            Choice("night", "pico", "scratch", "images", 1): runs,
            Choice("night", "pico", "galaxies", "images", 1): runs[:1],
        },
        planned=6,
    )
    title, _, table = report.partition("## night: ROC AUC\n")[2].partition("\n\n|")
    assert title == "\nMeans over 2 seeds, or over the number in brackets. Share: fraction of the training sources."
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.partition("\n\n")[0].splitlines()]
    whole, part = (Cell.of(seeds).estimate("roc_auc") for seeds in (runs, runs[:1]))
    assert rows[0] == ["network", "inputs", "share", "scratch", "galaxies"]
    assert rows[2:] == [
        ["vgg6", "images", "100%", str(whole), ""],
        ["pico", "images", "100%", str(whole), f"{part} [1]"],
    ]
