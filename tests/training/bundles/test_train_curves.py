"""The types of supernovae: every object counts once, held-out objects stay unseen, and the bundle serves what was
trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from broker_filter.config import Runtime
from broker_filter.scoring.scorer import open_model
from training.__main__ import main
from training.bundles import train_curves
from training.bundles.train_curves import (
    ALERTS_OF_OBJECT,
    CLASSES,
    DETECTIONS,
    LEAST_DETECTIONS,
    at_detections,
    choose,
    cross_validate,
    statistics,
)
from training.bundles.train_default import TEST_FRACTION
from training.data.typed_transients import Transients, read_transients

OBJECTS = 60
POINTS = 24


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Light curves of OBJECTS objects, which fade at a rate that depends on their type."""
    folder, rng = tmp_path_factory.mktemp("curves"), np.random.default_rng(4)
    types = [list(CLASSES.values())[i % len(CLASSES)][0] for i in range(OBJECTS)]
    rate = np.repeat([i % len(CLASSES) for i in range(OBJECTS)], POINTS) / 20 - 0.05
    day = np.tile(np.arange(POINTS), OBJECTS)
    names = [f"ZTF{i}" for i in range(OBJECTS)]
    curves, objects = folder / "curves.parquet", folder / "objects.parquet"
    pq.write_table(pa.table({"ZTFID": names, "type": types}), objects)
    columns = {
        "ZTFID": np.repeat(names, POINTS),
        "mjd": 58000.0 + day,
        "band": np.where(day % 2, "g", "R"),
        "mag": 18 + rate * day + rng.normal(0, 0.02, len(day)),
        "magerr": np.full(len(day), 0.02),
    }
    pq.write_table(pa.table(columns), curves)
    return curves, objects


@pytest.fixture(scope="module")
def transients(tables: tuple[Path, Path]) -> Transients:
    return read_transients(*tables, CLASSES)


def test_alerts_of_the_training_have_enough_detections_and_few_are_of_one_object(transients: Transients) -> None:
    rows = choose(transients)
    assert transients.detections[rows].min() >= LEAST_DETECTIONS
    assert np.bincount(transients.owner[rows]).tolist() == [ALERTS_OF_OBJECT] * OBJECTS
    assert len(np.unique(rows)) == len(rows)
    for n, first in at_detections(transients).items():
        assert (transients.detections[first] == n).all()
        assert np.array_equal(np.unique(transients.owner[first]), np.arange(OBJECTS))


def test_cross_validated_scores_are_of_objects_that_the_network_did_not_see(
    transients: Transients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_curves, "STEPS", 100)
    rows = choose(transients)
    seen = statistics(transients, rows)
    unseen = np.arange(OBJECTS) < 12
    own = transients.owner[rows]
    scores = cross_validate(seen, transients, rows, unseen)
    assert np.array_equal(np.isnan(scores).all(axis=1), unseen[own])
    assert (scores[~unseen[own]].argmax(axis=1) == transients.label[own[~unseen[own]]]).mean() > 0.8
    other = transients.label.copy()
    other[~unseen] = np.random.default_rng(1).permutation(other[~unseen])  # nothing can be learnt from these labels
    shuffled = Transients(transients.object_id, other, transients.points, transients.owner, transients.begin)
    guessed = cross_validate(seen, shuffled, rows, unseen)[~unseen[own]].argmax(axis=1)
    assert (guessed == other[own[~unseen[own]]]).mean() < 0.5


def test_the_command_writes_a_bundle_that_gives_the_types_of_held_out_objects(
    tables: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("STEPS", 60), ("TREES", 10)):
        monkeypatch.setattr(train_curves, name, value)
    monkeypatch.setattr("training.evaluation.bootstrap.RESAMPLES", 50)
    curves, objects = map(str, tables)
    assert main(["train-curves", curves, "--objects", objects, "--out", str(tmp_path / "curves")]) == 0
    [part] = open_model(str(tmp_path / "curves"), Runtime(device="cpu")).bundle.parts
    figures = part.card.training.evaluation
    assert float(figures[f"at_{DETECTIONS[-1]}_macro_roc_auc"]) > 0.9
    assert figures["at_3_objects"] == round(OBJECTS * TEST_FRACTION)
    distribution = part.distribution()
    assert distribution
    recorded = distribution.surveys["ztf"]
    assert set(recorded.outputs) == set(part.card.outputs.labels)
    assert all(sum(bins.counts) == recorded.alerts for bins in recorded.outputs.values())
    assert main(["train-curves", curves, "--objects", objects, "--out", str(tmp_path / "curves")]) == 1


def test_a_class_without_objects_is_named(
    tables: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves, objects = tables
    some = pq.read_table(objects).slice(0, 3)  # the first objects of three classes
    pq.write_table(some, tmp_path / "some.parquet")
    arguments = ["train-curves", str(curves), "--objects", str(tmp_path / "some.parquet"), "--out", str(tmp_path / "b")]
    assert main(arguments) == 1
    assert "class SN_" in capsys.readouterr().err
