"""The study of a site: losses, effects, and the whole on a small network with made light curves."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from broker_filter.errors import FAILED
from broker_filter.packets.batch import LightCurves, Measurement, Survey
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from broker_filter.simulate import simulate_night
from training.__main__ import main
from training.interpretability.sites.open_site import Attention, open_site
from training.interpretability.study import study as study_module
from training.interpretability.study.effects import ablate, active_alerts, read
from training.interpretability.study.losses import Attended, contrastive_loss, cross_entropy
from training.interpretability.study.study import (
    FEATURE_TABLE,
    MEASURES,
    Feature,
    Subject,
    attend,
    study,
    suggested_name,
)
from training.interpretability.study.study_run import of_simulated_images

N, SIDE = 160, 63
"""Alerts: half are real; half of these are held out."""
SITE = "light_curve.0"
RNG = np.random.default_rng(7)


class SumSite:
    """A site whose network adds z over the queries: the logits are the first dimension, the embedding is the rest."""

    name, heads, d_head = "sum", 2, 2
    output = nn.Linear(4, 4)

    def resume(self, rest: dict[str, torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = z.sum(1) + rest["added"]
        return total[:, :1], total[:, 1:]


def summed(n: int = 6) -> Attended:
    """n alerts with two source tokens and one query that attends to them equally."""
    torch.manual_seed(3)
    pattern, values = torch.full((n, 2, 1, 2), 0.5), torch.randn(n, 2, 2, 2)
    z = (pattern @ values).transpose(1, 2).flatten(2)
    there = torch.ones(n, 1, dtype=torch.bool)
    return Attended(
        SumSite(),  # type: ignore[arg-type]
        Attention(z, pattern, values, there, torch.ones(n, 2, dtype=torch.bool), {"added": torch.zeros(n, 4)}),
    )


def along(*directions: int) -> SparseDictionary:
    """A dictionary of features along the axes, with thresholds low enough that all are active."""
    w_dec = np.eye(4, dtype=np.float32)[list(directions)]
    n = len(directions)
    zeros = np.zeros(n, np.float32)
    return SparseDictionary(w_dec.T.copy(), zeros + 10, w_dec, np.zeros(4, np.float32), zeros)


def test_attribution_of_sources_sums_to_the_projection_of_z() -> None:
    attended, dictionary = summed(), along(0, 3)
    activations, _ = active_alerts(attended, dictionary)
    alert = np.arange(6)
    for feature in range(2):
        reading = read(attended, dictionary, activations, feature, alert)
        expected = attended.attention.z[:, 0].numpy() @ dictionary.w_enc[:, feature]
        np.testing.assert_allclose(reading.attribution.sum(axis=(1, 2)), expected, atol=1e-6)
    assert np.abs(read(attended, dictionary, activations, 0, alert).attribution[:, 1]).sum() == 0  # the other head


def test_ablation_moves_only_what_the_feature_writes() -> None:
    attended, dictionary = summed(), along(0, 3)
    activations, _ = active_alerts(attended, dictionary)
    of_logits = ablate(attended, dictionary, 0, np.arange(6))
    assert of_logits.ablated["logits"] == pytest.approx(float(activations[:, 0, 0].mean()), rel=1e-5)
    assert of_logits.ablated["embedding"] == pytest.approx(0, abs=1e-6)
    assert 0 < of_logits.random["logits"] < of_logits.ablated["logits"]
    of_embedding = ablate(attended, dictionary, 1, np.arange(6))
    assert of_embedding.ablated["logits"] == pytest.approx(0, abs=1e-6)
    assert of_embedding.ablated["embedding"] > 0.1


def test_ablation_of_an_embedder_moves_what_is_computed_from_the_embedding() -> None:
    """Figures of alerts without them do not count."""
    attended, dictionary = summed(), along(0, 3)

    def figures(embedding: np.ndarray[Any, Any], alert: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        return {"last": np.where(alert < 3, embedding[:, 2], np.nan), "none": np.full(len(alert), np.nan)}

    activations, _ = active_alerts(attended, dictionary)
    moved = ablate(attended, dictionary, 1, np.arange(6), figures)
    assert moved.ablated["last"] == pytest.approx(float(activations[:3, 0, 1].mean()), rel=1e-5)
    assert 0 < moved.random["last"] < moved.ablated["last"]
    assert moved.ablated["none"] == 0
    assert ablate(attended, dictionary, 0, np.arange(6), figures).ablated["last"] == pytest.approx(0, abs=1e-6)


def test_cross_entropy_ignores_alerts_without_a_label() -> None:
    logits = torch.tensor([[100.0], [-100.0], [5.0]])
    loss = cross_entropy(np.array([1.0, 0.0, np.nan]))
    assert loss([logits]) == pytest.approx(0)
    assert loss([-logits]) == pytest.approx(100)


def test_contrastive_loss_compares_alerts_of_one_survey() -> None:
    survey = np.repeat([Survey.ZTF, Survey.LSST], 4)
    axes = torch.eye(4)[:, None].expand(4, 2, 4)
    alike = torch.cat([axes, axes])  # each alert of ZTF equals one of LSST, which must not matter
    loss = contrastive_loss(survey)
    apart = loss([alike, alike, alike])
    equal = torch.ones(8, 2, 4) / 2
    assert apart < 0.01
    assert loss([equal, equal, equal]) == pytest.approx(2 * np.log(4), rel=1e-5)


def made_alerts() -> RawAlerts:
    """N alerts with 1 to 6 detections; the metadata are those of the bundle `embedder`."""
    points = RNG.integers(1, 7, N)
    total = int(points.sum())
    mjd = np.full(N, 60000.0)
    offsets = np.concatenate([[0], np.cumsum(points)])
    days = np.concatenate([np.arange(n - 1, -1, -1.0) for n in points])
    curves = LightCurves(
        offsets,
        60000 - days,
        RNG.integers(1, 3, total).astype(np.uint8),
        (1000 * RNG.standard_normal(total)).astype(np.float32),
        np.full(total, 50, np.float32),
        np.full(total, Measurement.DETECTION, np.uint8),
    )
    columns = tuple(column.name for column in card().inputs.metadata)
    return RawAlerts(
        RNG.random((N, 3, SIDE, SIDE)).astype(np.float32),
        np.tile(np.array([0, 0, SIDE, SIDE], np.int16), (N, 3, 1)),
        RNG.random((N, len(columns))),
        columns,
        mjd,
        curves,
        survey=np.zeros(N, np.uint8),
    )


def card() -> Any:
    return open_bundle("embedder").part("ztf").card


def dictionary_of(z: np.ndarray[Any, Any], seed: int) -> SparseDictionary:
    """Six features along differences of rows, so that the dictionaries of two seeds differ."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(len(z), size=(2, 6))
    w_dec = z[pairs[0]] - z[pairs[1]]
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    zeros = np.zeros(6, np.float32)
    return SparseDictionary(w_dec.T.copy(), zeros, w_dec, z.mean(axis=0), zeros)


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(5)
    network = build_network(card().architecture).eval()
    alerts = made_alerts()

    def read_rows(rows: np.ndarray[Any, Any]) -> RawAlerts:
        return alerts[np.isin(np.arange(N), rows)]

    site = open_site(network, SITE)
    attended = attend(site, card().inputs, read_rows, np.arange(N))
    z = attended.rows
    real = np.arange(N) < N // 2
    dictionaries = [dictionary_of(z, seed) for seed in (0, 0, 1)]
    return Subject(
        site=site,
        card=card(),
        network=network,
        dictionaries=dictionaries,
        z=z,
        alert=attended.alert,
        real=real,
        held=np.arange(N) % 2 == 0,
        survey=np.zeros(N, np.uint8),
        label=np.where(np.arange(N) % 4 < 2, "VS", "bogus"),
        object_id=np.arange(N).astype(np.str_),
        read=read_rows,
        retrain=lambda rows: dictionary_of(rows, 0),
    )


def test_study_measures_a_site_and_resumes(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = study(subject, tmp_path)
    assert measures["stable_in"] == [2] * 6  # the dictionaries of the first two seeds are equal
    of_features = measures["reconstruction"]["methods"]["features"]
    assert of_features["explained_variance"] < 1
    assert measures["reconstruction"]["loss"]["clean"] > 0
    moved = {"embedding", "anomaly score", "distance: light_curve", "class VS", "class bogus"}
    assert moved <= measures["effects"].keys()
    assert "logits" not in measures["effects"]  # they come from the image
    assert "class VS" in measures["separation"]["ztf"]["area"]
    assert "negative" in measures["separation"]["ztf"]["area"]
    assert "lsst" not in measures["separation"]
    for table in measures["tables"]:
        assert all(len(row) == len(table["head"]) for row in table["rows"])
    assert json.loads((tmp_path / MEASURES).read_bytes()) == measures

    monkeypatch.setattr(study_module, "describe_features", None)  # a second run must not measure again
    monkeypatch.setattr(study_module, "all_separations", None)
    assert study(subject, tmp_path) == measures


def test_study_keeps_the_names_that_a_person_wrote(subject: Subject, tmp_path: Path) -> None:
    study(subject, tmp_path)
    file = tmp_path / FEATURE_TABLE
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert [row["id"] for row in rows] == [str(i) for i in range(6)]
    rows[2] |= {"name": "fast, red", "note": "my note"}
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    study(subject, tmp_path)
    kept = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))[2]
    assert (kept["name"], kept["note"]) == ("fast, red", "my note")


def test_other_dictionaries_are_measured_again(subject: Subject, tmp_path: Path) -> None:
    first = study(subject, tmp_path)
    other = replace(subject, dictionaries=subject.dictionaries[::-1])
    assert study(other, tmp_path)["stable_in"] != first["stable_in"]


def test_command_studies_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packets, run = tmp_path / "night", tmp_path / "run"
    packets.mkdir()
    for alert in simulate_night(24, seed=7):
        (packets / f"{alert.alert_id}.avro").write_bytes(alert.packet)
    assert (
        main(["sae", "collect", "embedder", "light_curve.1", str(packets), "--simulated", "2", "--out", str(run)]) == 0
    )
    assert main(["sae", "study", str(run)]) == FAILED
    assert "no dictionary yet" in capsys.readouterr().err
    training = ["--features", "6", "--active", "2", "--steps", "20", "--batch", "16", "--seeds", "2"]
    assert main(["sae", "train", str(run), *training]) == 0
    assert main(["sae", "study", str(run)]) == 0
    assert "Reconstruction of z on 12 real held-out alerts" in capsys.readouterr().out
    measures = json.loads((run / MEASURES).read_bytes())
    assert measures["features"] == len(measures["stable_in"]) == 6
    assert measures["worth"]["figures"]["features"] == 6
    assert len((run / FEATURE_TABLE).read_text(encoding="utf-8").splitlines()) == 7


def test_lsst_alerts_with_simulated_images_are_known_by_their_visit() -> None:
    visits = {Survey.LSST: [2026040700123, 7026040700123, 12345, 730000], Survey.ZTF: [np.nan]}
    found = [bool(one) for survey, values in visits.items() for one in of_simulated_images(survey, np.array(values))]
    assert found == [False, True, False, True, False]


def feature(**values: float | str | None) -> Feature:
    none = dict.fromkeys(Feature._fields, 0) | {"enriched": "SN", "lift_low": 1.2, "best_area": 0.6}
    return Feature(**(none | values))  # type: ignore[arg-type]


def test_names_are_suggested_for_clear_properties_only() -> None:
    assert suggested_name(feature(best_property="class VS", best_area=0.95)) == "VS"
    assert suggested_name(feature(best_property="single_detection", best_area=0.05)) == "not single detection"
    assert suggested_name(feature(best_property="rising")) == ""
    assert suggested_name(feature(best_property="rising", lift_low=2.5)) == "SN"
    assert suggested_name(feature(best_property="rising", lift_low=None)) == ""
