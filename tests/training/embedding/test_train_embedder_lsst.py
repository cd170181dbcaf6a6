"""The command `train-embedder-lsst`: what is learnt, what is held out, and what its figures say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from broker_filter.scoring.preprocess import prepare
from training.embedding import train_embedder_lsst
from training.embedding.embedder import Recipe, embed, train
from training.embedding.train_embedder import PROBES
from training.embedding.train_embedder_lsst import (
    INPUTS,
    METHODS,
    Data,
    Probed,
    at_first_detection,
    embedded_without,
    evaluate,
    new_network,
    open_trunk,
    show,
    table,
)
from training.evaluation import bootstrap


def test_what_is_held_out_is_in_no_group(lsst_data: Data) -> None:
    rows = lsst_data.lsstcam.visit > lsst_data.lsstcam.visit.min() + 2
    groups = lsst_data.groups(rows)
    assert len(groups["lsstcam"]) == rows.sum()
    assert len(groups["histories"]) == rows.sum()  # one earlier detection of each object
    sharing_a_visit = replace(lsst_data, histories=replace(lsst_data.histories, visit=lsst_data.lsstcam.visit[::-1]))
    assert len(sharing_a_visit.groups(rows)["histories"]) < rows.sum()
    assert "histories" not in lsst_data.groups(rows, histories=False)
    asteroids = lsst_data.kind == "asteroid"
    assert len(lsst_data.groups(rows, simulated=~asteroids)["simulated"]) == (~asteroids).sum()


def test_at_its_first_detection_an_alert_has_its_own_point_only(lsst_data: Data) -> None:
    raw = lsst_data.lsstcam.named.raw
    first = at_first_detection(raw)
    assert first.light_curves is not None
    np.testing.assert_array_equal(first.light_curves.mjd, raw.mjd)
    flux = raw.metadata[:, raw.columns.index("psfFlux")]
    np.testing.assert_allclose(first.light_curves.flux, flux, rtol=1e-5)
    shown = show(new_network(open_trunk("rubin"), 1), first)
    assert (shown.light_curve_mask.sum(1) == 1).all()
    torch.testing.assert_close(shown.features, lsst_data.shown.features)


def test_what_is_shown_in_training_is_what_is_served(lsst_data: Data) -> None:
    network = new_network(open_trunk("rubin"), 1)
    inputs = [torch.from_numpy(array) for array in prepare(lsst_data.lsstcam.named.raw, INPUTS).values()]
    with torch.inference_mode():
        _, _, expected = network(*inputs)
    torch.testing.assert_close(embed(network, lsst_data.shown), expected)


def test_alerts_without_images_teach_the_other_modalities_only(lsst_data: Data) -> None:
    trunk = open_trunk("rubin")
    network = new_network(trunk, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train(network, [(lsst_data.shown_histories, 1.0)], Recipe(steps=2, weight_decay=0, lost_columns=0))
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("light_curve.") for name in changed)
    assert any(name.startswith("projections.metadata.") for name in changed)
    assert not any(name.startswith(("trunk.", "projections.image.")) for name in changed)


def test_figures_are_given_for_every_method_and_view(lsst_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_embedder_lsst, "UNTRAINED", 1)
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    trunk = open_trunk("rubin")
    sets = [Probed.of_real(lsst_data.lsstcam), Probed.of_simulated(lsst_data.simulated, lsst_data.kind)]
    modalities = embedded_without(lsst_data, trunk, Recipe(steps=2, lost_columns=0), sets)
    card = evaluate(lsst_data, trunk, sets, modalities)
    for prefix in modalities:
        for probe in PROBES:
            for method in ("", *(f"_{name}" for name in METHODS)):
                assert 0 <= float(card[f"{prefix}{probe}{method}"]) <= 1
    assert table(card).count("\n") == 1 + 1 + 2 * len(METHODS)
    labelled = (lsst_data.lsstcam.label >= 0).sum()
    assert card["alerts"] == card["objects"] == labelled
    assert len(modalities["simulated_"]) == len(lsst_data.simulated.raw) // 2
