"""The classes: a softmax beside the real/bogus score, fitted so that every object counts once, at every age."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from broker_filter.config import Runtime
from broker_filter.packets.packet import Packet
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.labels import UNLABELLED, Labels, parse_rule, read_labels
from broker_filter.scoring.networks.stampnet_classes import StampNetClasses
from broker_filter.scoring.scorer import LoadedPart, open_model
from broker_filter.streaming.archives import read_packets
from training.bundles.train_classes import (
    ASTEROIDS_KEPT,
    CLASSES,
    COLUMN,
    FEWEST,
    METADATA,
    Adjustment,
    Examples,
    adjust,
    check_sides,
    classes_of,
    cut_history,
    fit_member,
    merge,
    weights_of,
)
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.data.datasets import Alerts, decode_alerts, held_out, load_alerts
from training.errors import DatasetError
from training.evaluation.metrics import rank


def names(objects: Iterable[int]) -> NDArray[np.str_]:
    return np.array([f"ZTF{i}" for i in objects])


def test_class_probabilities_are_a_softmax_beside_real() -> None:
    torch.manual_seed(5)
    network = StampNetClasses(metadata=2, classes=4, hidden=3, distances=[1], star=0).eval()
    images, metadata = torch.rand(3, 3, 63, 63), torch.tensor([[0.0, 1.0], [-5.0, 2e4], [-999.0, 0.0]])
    with torch.inference_mode():
        logits, embedding = network(images, metadata)
        real, alone = network.trunk.network(images)
        _, features = network.trunk(images)
        evidence = network.evidence(real, features, metadata)
        expected = network.classes(network.standardise(evidence)).softmax(dim=1)
    torch.testing.assert_close(logits[:, :1], real)
    torch.testing.assert_close(embedding, alone)
    torch.testing.assert_close(logits[:, 1:].sigmoid(), expected)


def test_the_proximity_of_a_source_is_one_at_the_alert_and_vanishes_far_away() -> None:
    network = StampNetClasses(metadata=2, classes=4, hidden=3, distances=[1], star=0)
    metadata = torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, 30.0]])
    evidence = network.evidence(torch.zeros(3, 1), torch.zeros(3, 128), metadata)
    torch.testing.assert_close(evidence[:, -2:], torch.tensor([[1.0, 1.0], [0.5, 0.25], [1 / 901, 1 / 901]]))


def test_merged_members_give_the_adjusted_mean_of_their_scores() -> None:
    torch.manual_seed(6)
    evidence, label = torch.randn(2, 40, 7), np.arange(40) % 5
    members = [fit_member(evidence, label, np.full(40, 1 / 40), seed) for seed in range(3)]
    adjustment = Adjustment(1.5, np.array([0.0, 0.0, 0.0, 0.7, 0.0]))
    with torch.inference_mode():
        mean = torch.stack([member(evidence[0]) for member in members]).mean(0).double().numpy()
        merged = merge(members, adjustment)(evidence[0]).numpy()
    np.testing.assert_allclose(merged, adjustment(mean), atol=1e-5)


def examples(object_id: Sequence[str], label: Sequence[int], simulated: Sequence[bool]) -> Examples:
    n = len(label)
    return Examples(
        torch.zeros(1, n, 1), torch.zeros(1, n, 1), np.array(object_id), np.array(label), np.array(simulated)
    )


def test_classes_and_objects_have_equal_weight_and_simulated_alerts_half_of_their_class() -> None:
    weight = weights_of(
        examples(["a", "a", "b", "s", "t", "u", "c"], [3, 3, 3, 3, 3, 3, 1], [False] * 3 + [True] * 3 + [False])
    )
    sixteenth, twelfth = 1 / 16, 1 / 12
    np.testing.assert_allclose(weight, [sixteenth, sixteenth, 2 * sixteenth, twelfth, twelfth, twelfth, 0.5])


def test_a_cut_history_changes_the_number_of_detections_alone() -> None:
    metadata = np.random.default_rng(1).random((3, len(METADATA)))
    column = METADATA.index("ndethist")
    metadata[:, column] = [1, 40, np.nan]
    cut = cut_history(metadata, 2)
    np.testing.assert_array_equal(cut[:, column], [1, 2, np.nan])
    np.testing.assert_array_equal(np.delete(cut, column, 1), np.delete(metadata, column, 1))


def test_supernovae_are_favoured_until_a_tenth_of_the_asteroids_is_lost() -> None:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 5, 4000)
    logits = rng.normal(size=(4000, 5)) + 3 * np.eye(5)[label]
    # The softmax of 3 * logits gives the probability of each class for equally common classes with this distribution.
    adjustment = adjust(np.stack([logits, logits]), label)
    assert adjustment.scale == pytest.approx(3, rel=0.1)
    kept = adjustment(logits[label == 1]).argmax(axis=1) == 1
    before = logits[label == 1].argmax(axis=1) == 1
    assert before.mean() > ASTEROIDS_KEPT
    assert ASTEROIDS_KEPT <= kept.mean() < ASTEROIDS_KEPT + 0.01


def test_labels_that_match_no_alert_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("candid,weak_class\n1,VS\n2,SN\n")
    alerts = Alerts(
        np.array([3]), names([3]), np.empty((1, 3, 1, 1), "f4"), np.empty((1, 3, 4), "i2"), np.empty((1, 0)), ()
    )
    with pytest.raises(DatasetError, match="none of its 2 labels matches an alert of the inputs by candid"):
        classes_of(alerts, read_labels(table, COLUMN))


def test_a_class_with_one_source_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("candid,weak_class\n1,VS\n2,SN\n3,VS\n")
    labels = read_labels(table, COLUMN)
    label = np.array([labels.label_of[candid] for candid in "123"])
    with pytest.raises(DatasetError, match="no test object is of class SN: add alerts of more objects"):
        check_sides(labels, label, np.array([False, False, True]))


NO_PAN_STARRS: tuple[dict[str, float], ...] = (
    {"distpsnr1": np.nan, "sgscore1": np.nan, "nmtchps": 0},
    {"distpsnr1": np.nan, "sgscore1": np.nan, "nmtchps": np.nan},
)
"""Metadata of a packet without a Pan-STARRS source nearby, and of a packet without these columns."""


@pytest.fixture(scope="module")
def model() -> LoadedPart:
    return open_model("classes", Runtime(engine="onnxruntime", device="cpu")).parts[0]


@pytest.fixture(scope="module")
def labelled(shared_data: Path) -> tuple[Alerts, NDArray[np.int64], Labels]:
    """The labelled alerts with the class index of each, and the labels."""
    alerts = load_alerts([shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"], 63, METADATA)
    labels = read_labels(shared_data / "ztf" / "labels.parquet", COLUMN, [parse_rule(rule) for rule in CLASSES])
    label = classes_of(alerts, labels)
    return alerts, label, labels


def said(model: LoadedPart, alerts: Alerts, metadata: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the probabilities of `real` and the classes for alerts with other metadata."""
    raw = RawAlerts(alerts.cutouts, alerts.cutout_box, metadata, METADATA)
    probabilities: NDArray[np.float32] = model.run(raw)["probabilities"]
    return probabilities


@pytest.mark.shared
@pytest.mark.parametrize("lacking", NO_PAN_STARRS)
def test_a_supernova_without_a_known_host_is_recognised(
    model: LoadedPart, labelled: tuple[Alerts, NDArray[np.int64], Labels], lacking: dict[str, float]
) -> None:
    """With medians for missing values it would be a variable star, because the median is a star at 0.69 arcsec."""
    alerts, label, labels = labelled
    supernova = labels.classes.index("SN")
    supernovae = alerts[label == supernova]
    hostless = supernovae.metadata.copy()
    for name, value in lacking.items():
        hostless[:, METADATA.index(name)] = value
    kept = [
        said(model, supernovae, metadata)[:, 1:].argmax(axis=1) == supernova
        for metadata in (supernovae.metadata, hostless)
    ]
    assert kept[0].sum() > 20
    assert (kept[0] & kept[1]).sum() > 0.7 * kept[0].sum()


@pytest.mark.shared
def test_the_card_of_classes_states_the_figures_of_the_bundle(
    model: LoadedPart, labelled: tuple[Alerts, NDArray[np.int64], Labels]
) -> None:
    """Measured on the labelled alerts of held-out objects, as published and with cut histories; the output `real` is
    that of `default`."""
    card = model.bundle.card.training.evaluation
    alerts, label, labels = labelled
    test = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED) & (label != UNLABELLED)
    alerts, label = alerts[test], label[test]
    assert model.bundle.card.outputs.labels == ("real", *labels.classes)
    assert len(alerts) == card["alerts"]
    for prefix, metadata in {
        "": alerts.metadata,
        **{f"at_{n}_": cut_history(alerts.metadata, n) for n in FEWEST},
    }.items():
        probabilities = said(model, alerts, metadata)
        found = probabilities[:, 1:].argmax(axis=1)
        auc = [rank(label == c, probabilities[:, 1 + c], np.ones(len(label))).roc_auc for c in range(5)]
        recall = [(found[label == c] == c).mean() for c in range(5)]
        assert np.mean(auc) == pytest.approx(card[f"{prefix}macro_roc_auc"], abs=1e-3)
        assert np.mean(recall) == pytest.approx(card[f"{prefix}balanced_accuracy"], abs=0.01)
        for c, name in enumerate(labels.classes):
            assert auc[c] == pytest.approx(card[f"{prefix}roc_auc_{name}"], abs=1e-3), name
            assert recall[c] == pytest.approx(card[f"{prefix}recall_{name}"], abs=0.03), name
    default = open_model("default", Runtime(engine="onnxruntime", device="cpu")).parts[0]
    alone = default.run(RawAlerts(alerts.cutouts, alerts.cutout_box, np.empty((len(alerts), 0)), ()))["probabilities"]
    np.testing.assert_allclose(probabilities[:, :1], alone, atol=1e-6)


@pytest.mark.shared
def test_packets_without_their_history_are_classified_as_at_the_first_detection(
    model: LoadedPart, labelled: tuple[Alerts, NDArray[np.int64], Labels], shared_data: Path
) -> None:
    """Packets are rewritten without previous candidates; nothing of the history but ndethist reaches the classes."""
    alerts, label, labels = labelled
    supernova, asteroid = (labels.classes.index(name) for name in ("SN", "asteroid"))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    wanted = alerts[unseen & np.isin(label, [supernova, asteroid])]
    truth = label[unseen & np.isin(label, [supernova, asteroid])]
    ids = set(wanted.alert_id.tolist())
    packets: list[Packet] = []
    for packet in read_packets([shared_data / "ztf" / "ztf_alerts.tar"]):
        reader = fastavro.reader(io.BytesIO(packet.data))
        records: list[Any] = list(reader)
        packets += [
            Packet(without_history(record, reader.writer_schema), packet.position)
            for record in records
            if record.get("candid") in ids
        ]
    first = decode_alerts(iter(packets), "the rewritten packets", 63, METADATA)
    rows = np.isin(wanted.alert_id, first.alert_id)
    assert rows.sum() > 60
    probabilities = said(model, first, first.metadata)
    np.testing.assert_array_equal(probabilities, said(model, wanted[rows], cut_history(wanted[rows].metadata, 1)))
    found, truth = probabilities[:, 1:].argmax(axis=1), truth[rows]
    assert (found[truth == supernova] == supernova).mean() >= 0.6
    assert (found[truth == asteroid] == asteroid).mean() >= 0.85


def without_history(record: Any, schema: Any) -> bytes:
    """Return the packet of a first detection: one detection, and no previous candidates."""
    first = {"ndethist": 1, "ncovhist": 1, "jdstarthist": record["candidate"]["jd"]}
    record["candidate"] |= {name: value for name, value in first.items() if name in record["candidate"]}
    record["prv_candidates"] = None
    written = io.BytesIO()
    fastavro.writer(written, schema, [record])
    return written.getvalue()
