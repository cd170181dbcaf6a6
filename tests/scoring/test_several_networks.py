"""Bundles of several networks: each alert is scored by the network of its survey, and no network can be exchanged."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from broker_filter.config import Model, Runtime
from broker_filter.importers.combine import combine_bundles
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.packet import Packet
from broker_filter.scoring.bundle import CARD, ONNX, WEIGHTS, Bundle, BundleError, open_bundle
from broker_filter.scoring.scorer import Scorer, open_model, open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night

CPU = Runtime(engine="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def mixed(both_surveys: Path) -> AlertBatch:
    """Forty simulated alerts of both surveys, in turn, decoded for the bundle of both surveys."""
    nights = (simulate_night(20, seed=3), simulate_night(20, seed=3, survey="lsst"))
    packets = [Packet(alert.packet) for pair in zip(*nights, strict=True) for alert in pair]
    alerts, rejects = Scorer.open(both_surveys, device="cpu").decoder(SCHEMAS).decode(packets)
    assert len(alerts) == 40
    assert not rejects
    return alerts


@pytest.fixture
def copy(both_surveys: Path, tmp_path: Path) -> Path:
    """A copy of the bundle of both surveys, for tests that damage it."""
    return shutil.copytree(both_surveys, tmp_path / "copy")


def edit_card(bundle: Path, change: Callable[[Any], Any]) -> None:
    card = yaml.safe_load((bundle / CARD).read_text())
    change(card)
    (bundle / CARD).write_text(yaml.safe_dump(card))


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_each_alert_is_scored_by_the_network_of_its_survey(
    mixed: AlertBatch, both_surveys: Path, lsst_network: Path, engine: str
) -> None:
    runtime = Runtime.model_validate({"engine": engine, "device": "cpu"})
    ztf = str(open_bundle("default").part("ztf").directory)
    scores = open_scorer([str(both_surveys), ztf, str(lsst_network)], runtime).score(mixed).columns()
    assert scores.keys() == {"both.real", "default.real", "deep.asteroid", "deep.real"}
    is_lsst = mixed.survey == Survey.LSST
    assert np.isfinite(scores["both.real"]).all()
    alone = np.where(is_lsst, scores["deep.real"], scores["default.real"])
    np.testing.assert_allclose(scores["both.real"], alone, rtol=0, atol=1e-6)
    assert np.ptp(scores["deep.real"][is_lsst]) > 0


def test_a_decoder_gets_what_any_of_the_networks_needs(lsst_network: Path, tmp_path: Path) -> None:
    combine_bundles(tmp_path / "both", "both", "1", {"ztf": "classes", "lsst": lsst_network})
    scorer = Scorer.open(tmp_path / "both", device="cpu")
    assert scorer.outputs == ("both.real", "both.asteroid")  # the labels that both have
    assert scorer.planes == ("variance",)
    assert scorer.cutout_size == 63
    assert scorer.columns == Scorer.open("classes", device="cpu").columns != ()


def test_a_batch_of_one_survey_needs_only_its_network(mixed: AlertBatch, both_surveys: Path) -> None:
    [model] = Scorer.open(both_surveys, device="cpu").models
    whole = model.score(mixed).probabilities
    for survey in Survey:
        own = np.flatnonzero(mixed.survey == survey)
        packets = [mixed.packets[mixed.packet_index[i]] for i in own]
        alerts, _ = Scorer((model,)).decoder(SCHEMAS).decode(packets)
        np.testing.assert_allclose(model.score(alerts).probabilities, whole[own], rtol=0, atol=1e-6)


def test_the_model_gives_an_embedding_only_if_the_networks_agree_on_it(both_surveys: Path, lsst_network: Path) -> None:
    assert open_bundle(lsst_network).embedding == 64
    bundle = open_bundle(both_surveys)  # the network for ZTF gives none
    assert (bundle.embedding, bundle.modalities) == (None, ())
    assert bundle.output_shapes() == {"probabilities": (1,)}


def test_networks_that_agree_on_an_embedding_give_it(
    embedding_bundle: Path, make_batch: Callable[..., AlertBatch], tmp_path: Path
) -> None:
    other = shutil.copytree(embedding_bundle, tmp_path / "other")
    edit_card(other, lambda card: card.update(surveys=["lsst"]))
    combine_bundles(tmp_path / "both", "both", "1", {"ztf": embedding_bundle, "lsst": other})
    model, alone = (open_model(str(bundle), CPU) for bundle in (tmp_path / "both", embedding_bundle))
    assert model.bundle.modalities == alone.bundle.modalities
    cutouts = np.random.default_rng(1).normal(size=(4, 3, 63, 63)).astype(np.float32)
    survey = [Survey.ZTF, Survey.LSST, Survey.LSST, Survey.ZTF]
    given, expected = model.score(make_batch(cutouts, survey=survey)), alone.score(make_batch(cutouts))
    assert given.embedding is not None
    assert expected.embedding is not None
    np.testing.assert_allclose(given.embedding, expected.embedding, rtol=0, atol=1e-6)
    assert given.modalities is not None


def test_asking_for_a_survey_that_the_bundle_has_changes_nothing(both_surveys: Path, mixed: AlertBatch) -> None:
    asked = open_scorer([Model(bundle=str(both_surveys), also=["ztf", "lsst"])], CPU)
    usual = open_scorer([str(both_surveys)], CPU)
    assert asked.models[0].surveys == usual.models[0].surveys == (Survey.ZTF, Survey.LSST)
    np.testing.assert_array_equal(asked.score(mixed).columns()["both.real"], usual.score(mixed).columns()["both.real"])


def test_a_bundle_without_a_network_for_a_survey_says_which_surveys_it_has(lsst_network: Path) -> None:
    with pytest.raises(BundleError, match=r"deep has no network for ztf, only for lsst; choose a bundle"):
        open_bundle(lsst_network).part("ztf")
    with pytest.raises(BundleError, match=r"no alerts of ztf, only of lsst; choose .* with also: \[ztf\]"):
        open_model(str(lsst_network), CPU).part(Survey.ZTF)


def test_thresholds_are_those_of_each_network(both_surveys: Path) -> None:
    assert open_bundle(both_surveys).thresholds_of("real") == {"ztf": 0.5, "lsst": 0.4}


def test_the_identity_covers_the_weights_of_every_network(both_surveys: Path, lsst_network: Path) -> None:
    bundle = open_bundle(both_surveys)
    ztf, lsst = bundle.parts
    assert ztf.card.files[WEIGHTS] != bundle.weights_sha256 != lsst.card.files[WEIGHTS]
    other = Bundle(bundle.directory, bundle.card, (ztf, open_bundle(lsst_network).parts[0]))
    assert other.weights_sha256 == bundle.weights_sha256
    exchanged = Bundle(bundle.directory, bundle.card, (ztf, Scorer.open("classes").models[0].bundle.parts[0]))
    assert exchanged.weights_sha256 != bundle.weights_sha256


@pytest.mark.parametrize("file", [CARD, WEIGHTS])
@pytest.mark.parametrize("folder", ["ztf", "lsst"])
def test_a_changed_file_of_a_network_is_found_and_named(copy: Path, folder: str, file: str) -> None:
    path = copy / folder / file
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(BundleError, match=f"{path}: .*sha256"):
        open_bundle(copy)


def test_a_network_cannot_be_exchanged_for_another_complete_one(copy: Path) -> None:
    shutil.rmtree(copy / "lsst")
    shutil.copytree(copy / "ztf", copy / "lsst")
    with pytest.raises(BundleError, match=f"{copy / 'lsst' / CARD}: not the card of this bundle: its sha256 is"):
        open_bundle(copy)


def test_no_folder_outside_the_bundle_is_read(copy: Path, lsst_network: Path) -> None:
    shutil.rmtree(copy / "lsst")
    with pytest.raises(BundleError, match="lsst: not a folder"):
        open_bundle(copy)
    (copy / "lsst").symlink_to(lsst_network)
    with pytest.raises(BundleError, match="lsst: not a folder"):
        open_bundle(copy)
    for folder in ("../deep", "/deep", "..", ".hidden", "a/b"):
        edit_card(copy, lambda card, folder=folder: card["networks"]["lsst"].update(folder=folder))
        with pytest.raises(BundleError, match=r"networks\.lsst\.folder: String should match pattern"):
            open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda card: card["outputs"].update(labels=["real", "asteroid"]), r"default 2\.0 has no label asteroid"),
        (lambda card: card["networks"].update(lsst=card["networks"]["ztf"]), r"was not trained for lsst, only for ztf"),
        (lambda card: card["networks"].clear(), "networks: Dictionary should have at least 1 item"),
        (lambda card: card["networks"]["lsst"].update(folder="ztf"), "one folder is listed with two values of card_"),
        (lambda card: card.update(inputs={}), "inputs: Extra inputs are not permitted"),
        (lambda card: card.update(format=3), "of format 3, .* install a later version"),
        (lambda card: card.update(format=1), "networks: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_card_says_what_is_wrong(copy: Path, change: Callable[[Any], Any], problem: str) -> None:
    edit_card(copy, change)
    with pytest.raises(BundleError, match=problem):
        open_bundle(copy)


def test_a_network_of_a_bundle_is_a_single_one(copy: Path, both_surveys: Path) -> None:
    shutil.rmtree(copy / "lsst")
    shutil.copytree(both_surveys, copy / "lsst")
    edit_card(copy, lambda card: card["networks"]["lsst"].update(card_sha256=sha256_of(copy / "lsst" / CARD)))
    with pytest.raises(BundleError, match=r"lsst.*: has several networks itself"):
        open_bundle(copy)


def test_a_network_that_does_not_reproduce_its_test_vector_is_refused(copy: Path) -> None:
    lsst = copy / "lsst"
    (lsst / ONNX).write_bytes((copy / "ztf" / ONNX).read_bytes())
    edit_card(lsst, lambda card: card["files"].update({ONNX: sha256_of(lsst / ONNX)}))
    edit_card(copy, lambda card: card["networks"]["lsst"].update(card_sha256=sha256_of(lsst / CARD)))
    with pytest.raises(BundleError, match=str(lsst / ONNX)):
        open_model(str(copy), CPU)
