"""Which alerts are chosen to be labelled next."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from broker_filter.anomalies.neighbours import normalise
from training.__main__ import main
from training.errors import DatasetError
from training.labelling.choose import DISAGREEING, STRANGE, UNCERTAIN, choose, entropy, measure
from training.labelling.embedded import EmbeddedAlerts

NONE = np.zeros(100, np.bool_)


def spread(n: int = 100, seed: int = 1) -> np.ndarray:
    return normalise(np.random.default_rng(seed).normal(0, 1, (n, 16)))


def test_entropy_is_highest_for_equal_probabilities_and_zero_without_a_score() -> None:
    values = entropy(np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [np.nan, np.nan]]))
    np.testing.assert_allclose(values, [np.log(2), 0.3251, 0, 0], atol=1e-4)


def test_each_measure_takes_its_share_and_only_from_its_highest_alerts() -> None:
    a, b = np.arange(100.0), np.arange(100.0)[::-1].copy()
    choice = choose(spread(), {"a": a, "b": b}, 10, NONE)
    assert choice.reasons == ["a", "b"] * 5
    assert set(choice.rows[::2]) <= set(range(80, 100))
    assert set(choice.rows[1::2]) <= set(range(20))
    assert len(set(choice.rows)) == 10


def test_of_alike_alerts_one_is_taken_and_none_like_a_labelled_one() -> None:
    embedding = spread(4).repeat(25, axis=0)  # four kinds, 25 equal alerts of each
    labelled = NONE.copy()
    labelled[0] = True  # of the first kind
    choice = choose(embedding, {"a": np.ones(100)}, 25, labelled)
    assert set((choice.rows[:3] // 25).tolist()) == {1, 2, 3}


def test_labelled_alerts_are_never_chosen_and_all_others_at_most_once() -> None:
    labelled = np.arange(100) < 95
    choice = choose(spread(), {"a": np.arange(100.0), "b": np.arange(100.0)}, 50, labelled)
    assert sorted(choice.rows.tolist()) == [95, 96, 97, 98, 99]
    with pytest.raises(DatasetError, match="every alert has a label already"):
        choose(spread(), {"a": np.arange(100.0)}, 5, ~NONE)


def test_models_are_compared_where_they_have_the_same_label() -> None:
    outputs = {
        "old.real": np.array([0.9, 0.5, 0.1], np.float32),
        "new.real": np.array([0.1, 0.5, np.nan], np.float32),
        "new.other": np.array([0.0, 0.0, 1.0], np.float32),
    }
    alerts = EmbeddedAlerts(np.arange(3), np.array(["a", "b", "c"]), "ztf", spread(3), outputs)
    measures = measure(alerts, {"old": ("real",), "new": ("real", "other")})
    assert list(measures) == [UNCERTAIN, DISAGREEING, STRANGE]
    np.testing.assert_allclose(measures[DISAGREEING], [0.8, 0, 0], atol=1e-6)
    assert measures[UNCERTAIN].argmax() == 1
    assert DISAGREEING not in measure(alerts, {"old": ("real",)})


def test_list_names_unlabelled_alerts_of_the_night_with_reasons(
    night_packets: Path, night_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(night_table.read_text().splitlines()))
    labels = tmp_path / "labels.csv"
    labels.write_text("candid,label\n" + "".join(f"{row['candid']},{row['truth']}\n" for row in rows[:20]))
    out = tmp_path / "list.csv"
    options = ["--model", "default", "--model", "attention", "--labels", str(labels), "--alerts", "12"]
    assert main(["active", str(night_packets), *options, "--out", str(out)]) == 0
    assert "12 of 60 alerts (uncertain 4, disagreeing 4, strange 4)" in capsys.readouterr().out
    chosen = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["rank"] for row in chosen] == [str(rank) for rank in range(1, 13)]
    assert {row["alert_id"] for row in chosen} <= {row["candid"] for row in rows[20:]}
    assert {row["reason"] for row in chosen} == {UNCERTAIN, DISAGREEING, STRANGE}
    assert {row["survey"] for row in chosen} == {"ztf"}
