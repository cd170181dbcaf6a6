"""Leaving a class of LSST alerts out: what is learnt, and what is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.embedding import anomalies_lsst
from training.embedding.anomalies_lsst import Case, as_markdown, by_embedding_of_view, judge, real_case, simulated_case
from training.embedding.embedder import Recipe, Shown
from training.embedding.lsst_alerts import CLASSES
from training.embedding.train_embedder_lsst import Data, open_trunk
from training.evaluation import bootstrap

RECIPE = Recipe(steps=1, lost_columns=0)


def test_distant_alerts_score_higher_and_judged_views_are_not_in_the_reference() -> None:
    rng = np.random.default_rng(1)
    usual = rng.normal(0, 0.1, (60, 12)).astype(np.float32) + np.eye(12, dtype=np.float32)[0]
    judged = usual.copy()
    judged[:10] = -judged[:10]
    rows = np.arange(60)
    scores = by_embedding_of_view(usual, judged, rows >= 30, (rows >= 15) & (rows < 30))
    for found in scores.values():
        assert found.shape == (60,)
        assert found[:10].min() > found[10:].max()


def test_a_left_out_class_is_judged_but_not_learnt(
    lsst_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    learnt: list[dict[str, int]] = []

    def count(network: object, groups: dict[str, Shown], recipe: Recipe) -> None:
        learnt.append({name: len(group) for name, group in groups.items()})

    monkeypatch.setattr(anomalies_lsst, "learn", count)
    trunk, sky = open_trunk("rubin"), lsst_data.lsstcam
    real = real_case("asteroid", lsst_data, trunk, RECIPE, tmp_path, "these")
    n_asteroids = int((sky.label == CLASSES.index("asteroid")).sum())
    assert real.anomalous.sum() == n_asteroids
    assert all(np.isfinite(scores).all() for scores in real.scores.values())
    assert len(learnt) == anomalies_lsst.FOLDS
    assert sum(one["lsstcam"] for one in learnt) == (anomalies_lsst.FOLDS - 1) * (len(sky) - n_asteroids)
    assert {one["simulated"] for one in learnt} == {int((lsst_data.kind != "asteroid").sum())}

    simulated = simulated_case("asteroid", lsst_data, trunk, RECIPE, tmp_path, "these")
    assert learnt[-1]["lsstcam"] == len(sky) - n_asteroids
    assert simulated.ordinary == learnt[-1]["simulated"]  # this simulation has no artefacts
    assert len(simulated.anomalous) == len(sky) / 2
    again = simulated_case("asteroid", lsst_data, trunk, RECIPE, tmp_path, "these")
    assert len(learnt) == anomalies_lsst.FOLDS + 1
    np.testing.assert_array_equal(
        again.scores[f"/{anomalies_lsst.SERVED}"], simulated.scores[f"/{anomalies_lsst.SERVED}"]
    )

    page = as_markdown([real, simulated], {case.name: judge(case) for case in (real, simulated)})
    assert "| left out | asteroid | simulated asteroid |" in page
    assert page.count("\n| ") > 2 * len(simulated.scores)


def test_a_perfect_method_is_ahead_of_a_random_one() -> None:
    rng = np.random.default_rng(3)
    anomalous = np.arange(40) < 10
    scores = {f"/{anomalies_lsst.SERVED}": anomalous + rng.random(40) / 2, "/random": rng.random(40)}
    found = judge(Case("asteroid", anomalous, np.arange(40).astype(np.str_), 5, scores))
    assert found[f"/{anomalies_lsst.SERVED}"].value == pytest.approx(1)
    ahead = found["/ahead of random"]
    assert ahead.value is not None
    assert found["/random"].value == pytest.approx(1 - ahead.value)
