"""The classes: a softmax beside the real/bogus score, fitted so that every object counts once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from broker_filter.config import Runtime
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.labels import parse_rule, read_labels
from broker_filter.scoring.networks.stampnet import StampNetClasses, evidence
from broker_filter.scoring.scorer import open_model
from training.bundles.train_classes import CLASSES, COLUMN, METADATA, UNLABELLED, check_sides, classes_of, fit_classes
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION
from training.data.datasets import Alerts, held_out, load_alerts
from training.errors import DatasetError
from training.evaluation.metrics import rank


def names(objects: Iterable[int]) -> NDArray[np.str_]:
    return np.array([f"ZTF{i}" for i in objects])


def test_class_probabilities_are_a_softmax_beside_real() -> None:
    torch.manual_seed(5)
    network = StampNetClasses(metadata=2, classes=4).eval()
    images, metadata = torch.rand(3, 3, 63, 63), torch.tensor([[0.0, 1.0], [-5.0, 2e4], [-999.0, 0.0]])
    with torch.inference_mode():
        logits, embedding = network(images, metadata)
        real, alone = network.stampnet(images)
        expected = network.classes(evidence(real, metadata)).softmax(dim=1)
    assert torch.equal(logits[:, :1], real)
    assert torch.equal(embedding, alone)
    torch.testing.assert_close(logits[:, 1:].sigmoid(), expected)


def test_separable_classes_are_separated() -> None:
    told = torch.tensor([[0.0, 0.0], [9.0, 0.1], [0.2, 7.0]]).repeat(8, 1) + torch.rand(24, 2)
    label = np.arange(24) % 3
    layer = nn.Linear(2, 3)
    fit_classes(layer, told, names(range(24)), label)
    with torch.inference_mode():
        assert np.array_equal(layer(told).argmax(dim=1).numpy(), label)


def test_an_object_counts_once_however_many_alerts_it_has() -> None:
    told = torch.from_numpy(np.random.default_rng(6).normal(size=(30, 2)))
    label = np.arange(30) % 2
    once, often = nn.Linear(2, 2), nn.Linear(2, 2)
    # Twelve equal alerts of object 0 change the mean and deviation of every column, but not the classes.
    rows = np.array([*[0] * 12, *range(1, 30)])
    fit_classes(once, told, names(range(30)), label)
    fit_classes(often, told[rows], names(rows), label[rows])
    with torch.inference_mode():
        torch.testing.assert_close(once(told.float()).softmax(1), often(told.float()).softmax(1), atol=0.01, rtol=0)


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


@pytest.mark.shared
@pytest.mark.parametrize("lacking", NO_PAN_STARRS)
def test_a_supernova_without_a_known_host_is_recognised(shared_data: Path, lacking: dict[str, float]) -> None:
    """With medians for missing values it would be a variable star, because the median is a star at 0.69 arcsec."""
    model = open_model("classes", Runtime(engine="onnxruntime", device="cpu"))
    alerts = load_alerts([shared_data / "ztf" / "ztf_alerts.tar"], 63, METADATA)
    labels = read_labels(shared_data / "ztf" / "labels.parquet", COLUMN, [parse_rule(rule) for rule in CLASSES])
    supernovae = alerts[classes_of(alerts, labels) == labels.classes.index("SN")]
    hostless = supernovae.metadata.copy()
    for name, value in lacking.items():
        hostless[:, METADATA.index(name)] = value
    kept = []
    for metadata in (supernovae.metadata, hostless):
        raw = RawAlerts(supernovae.cutouts, supernovae.cutout_box, metadata, METADATA)
        said = model.parts[0].run(raw)["probabilities"][:, 1:]
        kept.append(said.argmax(axis=1) == labels.classes.index("SN"))
    assert kept[0].sum() > 20
    assert (kept[0] & kept[1]).sum() > 0.7 * kept[0].sum()


@pytest.mark.shared
def test_the_card_of_classes_states_the_figures_of_the_bundle(shared_data: Path) -> None:
    """Measured on the labelled alerts of held-out objects; the output `real` is that of `default`."""
    runtime = Runtime(engine="onnxruntime", device="cpu")
    model, default = open_model("classes", runtime), open_model("default", runtime)
    card = model.parts[0].bundle.card.training.evaluation
    inputs = [shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"]
    alerts = load_alerts(inputs, 63, METADATA)
    labels = read_labels(shared_data / "ztf" / "labels.parquet", COLUMN, [parse_rule(rule) for rule in CLASSES])
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    test, label = alerts[unseen], classes_of(alerts[unseen], labels)
    test, label = test[label != UNLABELLED], label[label != UNLABELLED]
    said = model.parts[0].run(RawAlerts(test.cutouts, test.cutout_box, test.metadata, test.columns))["probabilities"]
    assert model.labels == ("real", *labels.classes)
    assert len(test) == card["alerts"]
    auc = [rank(label == c, said[:, 1 + c], np.ones(len(test))).roc_auc for c in range(len(labels.classes))]
    assert np.mean(auc) == pytest.approx(card["macro_roc_auc"], abs=1e-3)
    for name, of_class in zip(labels.classes, auc, strict=True):
        assert of_class == pytest.approx(card[f"roc_auc_{name}"], abs=1e-3), name
    alone = default.parts[0].run(RawAlerts(test.cutouts, test.cutout_box, np.empty((len(test), 0)), ()))[
        "probabilities"
    ]
    np.testing.assert_allclose(said[:, :1], alone, atol=1e-6)
