"""Suspects: wrong labels are found from the embedding."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.score import centroids
from training.__main__ import main
from training.embedding.suspects import find_suspects


def test_planted_wrong_labels_come_first() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=300)
    embedding = normalise(np.eye(3, 16)[truth] + 0.15 * rng.standard_normal((300, 16)))
    label, wrong = truth.copy(), np.array([5, 50, 250])
    label[wrong] = (truth[wrong] + 1) % 3
    suspects = find_suspects(embedding, label, np.arange(300), np.arange(300).astype(np.str_))
    assert set(suspects.alert_id[:3].tolist()) == set(wrong.tolist())
    np.testing.assert_array_equal(suspects.nearest[:3], truth[suspects.alert_id[:3]])
    np.testing.assert_array_equal(suspects.label, label[suspects.alert_id])
    assert (np.diff(suspects.distance) <= 0).all()


def test_a_class_without_alerts_has_no_centroid() -> None:
    middle = centroids(normalise(np.eye(2, 4)), np.array([0, 2]))
    np.testing.assert_array_equal(middle, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


def test_command_lists_the_labelled_alerts_of_a_night(
    night_packets: Path, night_table: Path, embedding_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suspects.csv"
    arguments = ["suspects", str(night_packets), "--labels", str(night_table), "--label", "truth"]
    assert main([*arguments, "--model", str(embedding_bundle), "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert {row["label"] for row in rows} == {"sky", "detector"}
    assert capsys.readouterr().out.splitlines()[1].split()[1] == rows[0]["alert_id"]
    distances = [float(row["distance"]) for row in rows]
    assert distances == sorted(distances, reverse=True)
