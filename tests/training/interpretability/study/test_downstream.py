"""Figures of embeddings: distances from ordinary alerts and class probes, fitted once and then fixed."""

from __future__ import annotations

import numpy as np

from broker_filter.packets.batch import Survey
from training.interpretability.study.downstream import Downstream

N, MODALITIES = 200, ("stamps", "light_curve")


def test_figures_follow_the_embedding() -> None:
    rng = np.random.default_rng(1)
    label = np.arange(N) % 3 - 1  # a third has none
    embedding = rng.normal(size=(N, 8)).astype(np.float32) + np.float32(3)
    embedding[:, 0] += 4 * (label == 1)
    survey = np.where(np.arange(N) < N - 10, Survey.ZTF, Survey.LSST).astype(np.uint8)
    objects = np.arange(N).astype(np.str_)
    downstream = Downstream(embedding, survey, objects, label, MODALITIES, ("VS", "bogus"))
    few = slice(N - 12, N)
    figures = downstream.figures(embedding[few], survey[few])
    assert figures.keys() == {"anomaly score", "distance: stamps", "distance: light_curve", "class VS", "class bogus"}
    assert np.isfinite(figures["anomaly score"]).tolist() == [True] * 2 + [False] * 10  # too few alerts of LSST
    np.testing.assert_allclose(figures["class VS"] + figures["class bogus"], 1)
    known = label[few] >= 0
    assert ((figures["class bogus"] > 0.5) == (label[few] == 1))[known].mean() > 0.8

    strange = embedding[:1].copy()
    strange[:, 4:] *= -1
    (usual, odd) = (downstream.figures(one, survey[:1]) for one in (embedding[:1], strange))
    assert odd["anomaly score"] > usual["anomaly score"]
    assert odd["distance: light_curve"] > usual["distance: light_curve"]
    np.testing.assert_allclose(odd["distance: stamps"], usual["distance: stamps"], atol=1e-5)
    lacking = embedding[:1].copy()
    lacking[:, 4:] = 0
    assert np.isnan(downstream.figures(lacking, survey[:1])["distance: light_curve"]).all()
