"""The shipped embedder: the statements of its card hold for ZTF and LSST packets, real and simulated."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from broker_filter.config import Model, Runtime
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.scoring.labels import UNLABELLED, parse_rule, read_labels
from broker_filter.scoring.networks.alert_embedder import MODALITIES
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.scoring.scores import ModelScores
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.archives import read_packets
from training.bundles.train_classes import COLUMN
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.data.datasets import held_out
from training.embedding.probes import balanced_accuracy, nearest
from training.embedding.train_embedder import CLASSES


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return open_scorer(["default", "embedder"], Runtime(engine="onnxruntime", device="cpu"))


def decode(scorer: Scorer, packets: list[Packet], schemas: Path = SCHEMAS) -> AlertBatch:
    return scorer.decoder(schemas).decode(packets)[0]


def embedded(scorer: Scorer, alerts: AlertBatch) -> ModelScores:
    """Return the embedder's scores, after checking that every alert has a valid embedding."""
    scores = scorer.score(alerts).models[1]
    assert scores.taken.all()
    assert scores.embedding is not None
    assert scores.modalities is not None
    assert scores.embedding.shape == (len(alerts), 96)
    assert scores.modalities.shape == (len(alerts), len(MODALITIES), 32)
    np.testing.assert_allclose(np.linalg.norm(scores.embedding, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scores.modalities, axis=2), 1, rtol=1e-5)
    trained_for = alerts.survey == Survey.ZTF
    real = scores.probabilities[:, 0]
    assert ((real >= 0) & (real <= 1))[trained_for].all()
    assert np.isnan(real[~trained_for]).all()
    return scores


@pytest.mark.parametrize("survey", ["ztf", "lsst"])
def test_simulated_alerts_of_both_surveys_are_embedded(scorer: Scorer, survey: str) -> None:
    made = list(simulate_night(40, 3, "lsst" if survey == "lsst" else "ztf"))
    alerts = decode(scorer, [Packet(alert.packet, FilePosition(str(alert.alert_id))) for alert in made])
    scores = embedded(scorer, alerts)
    assert scores.embedding is not None
    assert len(np.unique(scores.embedding, axis=0)) == 40


@pytest.mark.shared
def test_real_lsst_alerts_are_embedded_including_first_detections(
    scorer: Scorer, shared_data: Path, lsst_schemas: Path
) -> None:
    packets = [
        packet for folder in ("wire", "ocf", "parquet") for packet in read_packets([shared_data / "lsst" / folder])
    ]
    alerts = decode(scorer, packets, lsst_schemas)
    points = np.diff(alerts.light_curves.offsets)
    assert (alerts.survey == Survey.LSST).all()
    assert (points == 1).sum() > 10
    assert points.max() > 1000
    embedded(scorer, alerts)


def test_real_is_given_for_lsst_if_the_operator_adds_the_survey() -> None:
    asked = open_scorer([Model(bundle="embedder", also=["lsst"])], Runtime(engine="onnxruntime", device="cpu"))
    alerts = decode(asked, [Packet(one.packet, FilePosition("")) for one in simulate_night(5, 3, "lsst")])
    assert np.isfinite(asked.score(alerts).columns()["embedder.real"]).all()


@pytest.mark.shared
def test_real_is_the_output_of_the_default_bundle(scorer: Scorer, shared_data: Path) -> None:
    alerts = decode(scorer, list(islice(read_packets([shared_data / "ztf" / "ztf_alerts.tar"]), 300)))
    default, embedder = scorer.score(alerts).models
    np.testing.assert_allclose(embedder.probabilities, default.probabilities, atol=1e-5)
    assert len(np.unique(embedded(scorer, alerts).probabilities)) > 250


@pytest.mark.shared
def test_the_card_states_how_well_classes_can_be_read(scorer: Scorer, shared_data: Path) -> None:
    """Nearest neighbours on held-out objects, in the embedding and in each modality."""
    alerts = decode(
        scorer, list(read_packets([shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"]))
    )
    labels = read_labels(shared_data / "ztf" / "labels.parquet", COLUMN, [parse_rule(rule) for rule in CLASSES])
    label = np.array([labels.label_of.get(str(alert), UNLABELLED) for alert in alerts.alert_id.tolist()])
    unseen = held_out(np.array(alerts.object_id, np.str_), TEST_FRACTION, SPLIT_SEED)
    _, first = np.unique(alerts.alert_id, return_index=True)
    rows = first[label[first] != UNLABELLED]
    scores = embedded(scorer, alerts)
    assert scores.embedding is not None
    assert scores.modalities is not None
    objects, label, unseen = np.array(alerts.object_id, np.str_)[rows], label[rows], unseen[rows]
    card = scorer.models[1].parts[0].bundle.card.training.evaluation
    assert unseen.sum() == card["alerts"]
    vectors = {"": scores.embedding} | {f"_{name}": scores.modalities[:, m] for m, name in enumerate(MODALITIES)}
    for name, values in vectors.items():
        of_rows = values[rows]
        said = nearest(of_rows[~unseen], label[~unseen], objects[~unseen], of_rows[unseen])
        accuracy = balanced_accuracy(said == label[unseen], label[unseen], np.ones(int(unseen.sum())))
        assert accuracy == pytest.approx(card[f"neighbours{name}"], abs=0.02), name
