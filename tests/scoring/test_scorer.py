"""The scorer: which model scores which alerts; the rest of the batch has no influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from broker_filter.config import Model, Runtime
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import CARD, BundleError, KnownAnswers
from broker_filter.scoring.runtimes import CHUNK
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from tests.ztf_network import ZTF_NETWORK

CPU = Runtime(engine="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return open_scorer([ZTF_NETWORK], CPU)


def test_scorer_gives_the_scores_of_the_test_vector(
    scorer: Scorer, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers
) -> None:
    scores = scorer.score(make_batch(test_vector.cutouts, test_vector.cutout_box))
    np.testing.assert_allclose(
        scores.columns()["default.real"], test_vector.outputs["probabilities"][:, 0], rtol=0, atol=1e-5
    )
    assert scores.taken.all()


def test_scorer_reports_its_models_and_their_needs(scorer: Scorer) -> None:
    (model,) = scorer.models
    assert (model.name, model.labels, model.surveys) == ("default", ("real",), (Survey.ZTF,))
    assert model.provider == "onnxruntime/CPUExecutionProvider"
    assert (scorer.cutout_size, scorer.columns) == (63, ())


def test_alerts_of_a_survey_that_the_model_was_not_trained_for_have_no_score(
    scorer: Scorer, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers
) -> None:
    surveys = [Survey.ZTF, Survey.LSST, Survey.ZTF, Survey.LSST]
    scores = scorer.score(make_batch(test_vector.cutouts, test_vector.cutout_box, surveys))
    real = scores.columns()["default.real"]
    assert scores.taken.tolist() == [True, False, True, False]
    assert np.isnan(real[[1, 3]]).all()
    np.testing.assert_allclose(real[[0, 2]], test_vector.outputs["probabilities"][[0, 2], 0], rtol=0, atol=1e-5)


def test_the_operator_can_add_a_survey(make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers) -> None:
    scorer = open_scorer([Model(bundle=ZTF_NETWORK, also=["lsst"])], CPU)
    scores = scorer.score(make_batch(test_vector.cutouts, test_vector.cutout_box, Survey.LSST))
    assert scores.taken.all()
    assert np.isfinite(scores.columns()["default.real"]).all()
    assert scorer.models[0].surveys == (Survey.ZTF, Survey.LSST)


@pytest.mark.parametrize("also", [[], ["lsst"]])
def test_an_output_is_null_for_a_survey_that_it_was_not_trained_for(
    own_bundle: Path, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers, also: list[str]
) -> None:
    path = own_bundle / CARD
    card = yaml.safe_load(path.read_text())
    card["surveys"] = ["ztf", "lsst"]
    card["outputs"]["surveys"] = {"real": ["ztf"]}
    path.write_text(yaml.safe_dump(card))
    scorer = open_scorer([Model.model_validate({"bundle": str(own_bundle), "also": also})], CPU)
    surveys = [Survey.ZTF, Survey.LSST, Survey.LSST, Survey.ZTF]
    scores = scorer.score(make_batch(test_vector.cutouts, test_vector.cutout_box, surveys))
    assert scores.taken.all()
    assert np.isfinite(scores.columns()["default.real"]).tolist() == (
        [True] * 4 if also else [True, False, False, True]
    )


def test_an_alert_that_no_model_takes_is_not_taken(
    scorer: Scorer, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers
) -> None:
    assert not scorer.score(make_batch(test_vector.cutouts, survey=Survey.LSST)).taken.any()


def test_an_empty_batch_has_empty_scores(scorer: Scorer, make_batch: Callable[..., AlertBatch]) -> None:
    scores = scorer.score(make_batch(np.zeros((0, 3, 63, 63), np.float32)))
    assert scores.columns()["default.real"].shape == (0,)
    assert scores.taken.shape == (0,)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_scores_do_not_depend_on_the_rest_of_the_batch(
    make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers, engine: str
) -> None:
    runtime = Runtime.model_validate({"engine": engine, "device": "cpu", "inference_threads": 1})
    scorer = open_scorer([ZTF_NETWORK], runtime)
    rows = np.random.default_rng(5).integers(4, size=2 * CHUNK + 5)

    def score(chosen: np.ndarray) -> np.ndarray:
        batch = make_batch(test_vector.cutouts[chosen], test_vector.cutout_box[chosen])
        return scorer.score(batch).columns()["default.real"]

    together = score(rows)
    np.testing.assert_allclose(np.concatenate([score(rows[i : i + 1]) for i in range(len(rows))]), together, atol=1e-6)
    np.testing.assert_allclose(score(rows[::-1])[::-1], together, atol=1e-6)


def test_larger_slots_give_the_same_scores(
    scorer: Scorer, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers
) -> None:
    """If another model needs larger cutouts, the stamps of ZTF are at the top left of larger arrays."""
    slots = np.zeros((4, 3, 80, 80), np.float32)
    slots[..., :63, :63] = test_vector.cutouts
    scores = scorer.score(make_batch(slots, test_vector.cutout_box)).columns()["default.real"]
    np.testing.assert_allclose(scores, test_vector.outputs["probabilities"][:, 0], rtol=0, atol=1e-5)


def test_several_models_have_separate_columns(
    own_bundle: Path, make_batch: Callable[..., AlertBatch], test_vector: KnownAnswers
) -> None:
    card = yaml.safe_load((own_bundle / CARD).read_text()) | {"name": "mine", "surveys": ["lsst"]}
    (own_bundle / CARD).write_text(yaml.safe_dump(card))
    scorer = open_scorer([ZTF_NETWORK, str(own_bundle)], CPU)
    scores = scorer.score(make_batch(test_vector.cutouts, survey=[Survey.ZTF, Survey.LSST, Survey.ZTF, Survey.LSST]))
    assert list(scores.columns()) == ["default.real", "mine.real"]
    assert scores.taken.all()
    assert [model.taken.tolist() for model in scores.models] == [
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_two_models_of_one_name_are_refused(own_bundle: Path) -> None:
    with pytest.raises(BundleError, match=f"{ZTF_NETWORK} and {own_bundle} are both called 'default'"):
        open_scorer([ZTF_NETWORK, str(own_bundle)], CPU)


@pytest.mark.shared
def test_default_scores_every_shared_ztf_alert(scorer: Scorer, ztf_packets: list[tuple[int, bytes]]) -> None:
    alerts, _ = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=("drb",)).decode(
        [Packet(data, FilePosition(str(candid))) for candid, data in ztf_packets]
    )
    real = scorer.score(alerts).columns()["default.real"]
    drb = alerts.column("drb")
    rated = drb > 0  # NaN or 0: before ZTF ran the network
    assert np.isfinite(real).all()
    assert ((real > 0.5) == (drb > 0.5))[rated].mean() > 0.95


def test_columns_that_the_embedder_never_saw_for_lsst_do_not_change_its_embeddings() -> None:
    scorer = open_scorer(["embedder"], CPU)
    nights = [simulate_night(6, 5, "ztf"), simulate_night(6, 5, "lsst")]
    packets = [Packet(alert.packet) for night in nights for alert in night]
    alerts, _ = scorer.decoder(SCHEMAS).decode(packets)
    changed = alerts.metadata.copy()
    changed[:, [alerts.columns.index(name) for name in ("age", "nnotdet")]] += 17
    then, now = (scorer.score(batch).models[0].embedding for batch in (alerts, replace(alerts, metadata=changed)))
    assert then is not None
    assert now is not None
    lsst = alerts.survey == Survey.LSST
    assert np.isfinite(alerts.column("age")[lsst]).all()
    np.testing.assert_array_equal(now[lsst], then[lsst])
    assert (now[~lsst] != then[~lsst]).any(axis=1).all()
