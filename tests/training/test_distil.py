"""Training: no object on both sides, images that serving would show, and a run that interruption does not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from broker_filter.config import Runtime
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.bundle import Architecture, load_bundle
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.runtimes import LoadedNetwork, Tensors
from broker_filter.scoring.scorer import Model, open_model
from training.augment import augment
from training.datasets import Alerts, held_out, load_alerts
from training.distil import Recipe, distil, make_images
from training.evaluate import agreement, roc_auc
from training.train_default import SPLIT_SEED, TEST_FRACTION


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and lose much where other tests want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher() -> Model:
    return open_model("default", Runtime(engine="onnxruntime", device="cpu", inference_threads=1))


@pytest.fixture(scope="module")
def alerts() -> Alerts:
    """Alerts made of the default bundle's synthetic ones, NaN and FLT_MAX among them."""
    answers = load_bundle("default").test_vector()
    rows = np.arange(12) % 4
    return Alerts(
        alert_id=np.arange(12),
        object_id=np.array([f"ZTF{i // 2}" for i in range(12)]),
        cutouts=answers.cutouts[rows],
        cutout_box=answers.cutout_box[rows],
        drb=np.full(12, np.nan),
    )


def student() -> nn.Module:
    torch.manual_seed(0)
    return build_network(Architecture(name="stampnet"))


def test_no_object_is_on_both_sides_of_the_split() -> None:
    object_id = np.array([f"ZTF{i % 37}" for i in range(400)])
    unseen = held_out(object_id, 0.25, seed=3)
    assert not set(object_id[unseen]) & set(object_id[~unseen])
    assert len(set(object_id[unseen])) == 9
    assert np.array_equal(unseen, held_out(object_id, 0.25, seed=3))
    assert not np.array_equal(unseen, held_out(object_id, 0.25, seed=4))


def test_an_objects_side_does_not_depend_on_the_order_of_its_alerts() -> None:
    object_id = np.array([f"ZTF{i % 37}" for i in range(400)])
    assert np.array_equal(held_out(object_id, 0.25, seed=3)[::-1], held_out(object_id[::-1], 0.25, seed=3))


def test_training_goes_towards_the_teacher(teacher: Model, alerts: Alerts) -> None:
    images = make_images(teacher, alerts, np.full(12, 1 / 12), 64, np.random.default_rng(99))
    labels = torch.from_numpy(teacher.network.run({"images": images})["probabilities"])

    def distance(network: nn.Module) -> float:
        with torch.inference_mode():
            logits, _ = network.eval()(torch.from_numpy(images))
        return float((logits.sigmoid() - labels).abs().mean())

    trained = distil(student(), teacher, alerts, Recipe(steps=60, seed=1, batch=8))
    assert distance(trained) < 0.6 * distance(student())


class Stopping:
    """A network that somebody stops at its nth run."""

    def __init__(self, network: LoadedNetwork, runs: int) -> None:
        self.provider = network.provider
        self._network = network
        self._left = runs

    def run(self, inputs: Tensors) -> Tensors:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._network.run(inputs)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    teacher: Model, alerts: Alerts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.distil.CHECKPOINT_EVERY", 3)
    recipe = Recipe(steps=8, seed=1, batch=4)
    whole = distil(student(), teacher, alerts, recipe).state_dict()
    stopping = Model(teacher.bundle, Stopping(teacher.network, runs=6), teacher.surveys)
    with pytest.raises(KeyboardInterrupt):
        distil(student(), stopping, alerts, recipe, tmp_path / "checkpoint.pt")
    resumed = distil(student(), teacher, alerts, recipe, tmp_path / "checkpoint.pt").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_augmented_images_are_new_and_the_alerts_stay_as_they_are(alerts: Alerts) -> None:
    before = alerts.cutouts.copy()
    rng = np.random.default_rng(8)
    with np.errstate(all="ignore"):
        made = [augment(alerts.cutouts[i], alerts.cutouts[(i + 1) % 12], rng) for i in range(12)]
    assert np.array_equal(alerts.cutouts, before, equal_nan=True)
    assert all(image.shape == (3, 63, 63) and image.dtype == np.float32 for image in made)
    assert sum(np.array_equal(image, cutouts, equal_nan=True) for image, cutouts in zip(made, before, strict=True)) < 4


@pytest.mark.shared
def test_loads_each_alert_of_an_archive_once(shared_data: Path) -> None:
    archive = shared_data / "ztf" / "ztf_alerts.tar"
    alerts = load_alerts([archive, archive], 63)
    assert len(alerts) == len(np.unique(alerts.alert_id)) > 1900
    rated = np.isfinite(alerts.drb)
    assert 1300 < rated.sum() < len(alerts)
    assert (alerts.drb[rated] > 0).all()


@pytest.mark.shared
def test_the_default_bundles_card_says_what_the_bundle_does(shared_data: Path) -> None:
    """The shipped bundle on the alerts of objects that it was not trained on, as its card's figures were taken."""
    model = open_model("default", Runtime(engine="onnxruntime", device="cpu"))
    card = model.bundle.card.training.evaluation
    alerts = load_alerts([shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"], 63)
    test = alerts[held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED) & np.isfinite(alerts.drb)]
    outputs = model.run(RawAlerts(test.cutouts, test.cutout_box, np.empty((len(test), 0)), ()))
    score, real = outputs["probabilities"][:, 0].astype(np.float64), test.drb > 0.5
    assert (len(test), int((~real).sum())) == (card["alerts"], card["bogus"])
    assert roc_auc(real, score) == pytest.approx(card["roc_auc"], abs=1e-4)
    assert agreement(real, score) == pytest.approx(card["agreement"], abs=1e-4)
