"""Distillation: no object in two splits, images as in serving, and a result that does not depend on interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from broker_filter.config import Runtime
from broker_filter.importers.braai import read_weights
from broker_filter.scoring.bundle import WEIGHTS, Architecture, open_bundle
from broker_filter.scoring.networks import build_network, load_network
from broker_filter.scoring.preprocess import prepare_images
from broker_filter.scoring.scorer import open_model
from training.__main__ import main
from training.bundles.augment import LEAST_SHIFT, augment, move
from training.bundles.distil import Hint, Labelled, Recipe, distil, make_images, run_over
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION, check_rated, figures, published_score
from training.data.datasets import Alerts, held_out, load_alerts
from training.errors import DatasetError, TrainingError

INPUTS = open_bundle("default").part("ztf").card.inputs.images
MAP, EMBEDDING = (Hint(student=f"features.{n}", teacher=f"features.{n}") for n in (10, 17))
"""A hint of StampNet for StampNet."""


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    bundle = open_bundle("default").part("ztf")
    return load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))


@pytest.fixture(scope="module")
def alerts() -> Alerts:
    """Alerts made from the synthetic ones of the bundle `default`, with pixels of NaN and FLT_MAX."""
    answers = open_bundle("default").part("ztf").test_vector()
    rows = np.arange(12) % 4
    return Alerts(
        alert_id=np.arange(12),
        object_id=np.array([f"ZTF{i // 2}" for i in range(12)]),
        cutouts=answers.cutouts[rows],
        cutout_box=answers.cutout_box[rows],
        metadata=np.empty((12, 0)),
        columns=(),
    )


def test_images_in_units_of_their_noise_are_made_as_they_are_served(alerts: Alerts) -> None:
    snr = INPUTS.model_copy(update={"normalisation": "snr"})
    made = make_images(snr, alerts, np.full(12, 1 / 12), 48, np.random.default_rng(1))
    served = prepare_images(alerts.cutouts, alerts.cutout_box, snr, alerts.raw.variance)
    assert np.isfinite(made).all()
    for channel in range(3):
        spreads = [np.median(np.std(images[:, channel], axis=(1, 2))) for images in (made, served)]
        assert spreads[0] == pytest.approx(spreads[1], rel=0.5)


def student() -> nn.Module:
    torch.manual_seed(0)
    return build_network(Architecture(name="stampnet"))


def test_no_object_is_in_both_splits() -> None:
    object_id = np.array([f"ZTF{i % 37}" for i in range(400)])
    unseen = held_out(object_id, 0.25, seed=3)
    assert not set(object_id[unseen]) & set(object_id[~unseen])
    assert len(set(object_id[unseen])) == 9
    assert np.array_equal(unseen, held_out(object_id, 0.25, seed=3))
    assert not np.array_equal(unseen, held_out(object_id, 0.25, seed=4))


def test_the_split_does_not_depend_on_the_order_of_alerts() -> None:
    object_id = np.array([f"ZTF{i % 37}" for i in range(400)])
    assert np.array_equal(held_out(object_id, 0.25, seed=3)[::-1], held_out(object_id[::-1], 0.25, seed=3))


def test_training_approaches_the_teacher(teacher: nn.Module, alerts: Alerts) -> None:
    images = torch.from_numpy(make_images(INPUTS, alerts, np.full(12, 1 / 12), 64, np.random.default_rng(99)))

    def distance(network: nn.Module) -> float:
        with torch.inference_mode():
            logits, truth = network.eval()(images)[0], teacher(images)[0]
        return float((logits.sigmoid() - truth.sigmoid()).abs().mean())

    trained = distil(student(), teacher, INPUTS, alerts, Recipe(steps=60, seed=1, batch=8))
    assert distance(trained) < 0.6 * distance(student())


def test_a_hint_transfers_a_layer_of_the_teacher(teacher: nn.Module, alerts: Alerts) -> None:
    """With the hint, a linear map from the student's layer predicts the teacher's layer with a smaller residual."""
    images = torch.from_numpy(make_images(INPUTS, alerts, np.full(12, 1 / 12), 256, np.random.default_rng(99)))

    def told(network: nn.Module, layer: str) -> Tensor:
        features = network.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        with torch.inference_mode():
            output: Tensor = features[: int(layer.removeprefix("features.")) + 1](images)
        return output.movedim(1, -1).flatten(0, -2)

    def left_over(network: nn.Module) -> float:
        known, wanted = told(network, MAP.student), told(teacher, MAP.teacher)
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        return float((known @ torch.linalg.lstsq(known, wanted, driver="gelsd").solution - wanted).square().mean())

    with_hint, without = (
        distil(student(), teacher, INPUTS, alerts, Recipe(steps=60, seed=1, batch=8, hints=hints))
        for hints in ((MAP,), ())
    )
    assert left_over(with_hint) < left_over(without)


class Stopping(nn.Module):
    """A network that raises KeyboardInterrupt in its n-th run."""

    def __init__(self, network: nn.Module, runs: int) -> None:
        super().__init__()
        self.network = network
        self.features = network.features
        self.left = runs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        logits, embedding = self.network(images)
        return logits, embedding


def test_an_interrupted_run_gives_the_same_result(
    teacher: nn.Module, alerts: Alerts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.bundles.distil.CHECKPOINT_EVERY", 3)
    recipe = Recipe(steps=8, seed=1, batch=4, hints=(MAP, EMBEDDING))
    whole = distil(student(), teacher, INPUTS, alerts, recipe).state_dict()
    with pytest.raises(KeyboardInterrupt):
        distil(student(), Stopping(teacher, runs=6), INPUTS, alerts, recipe, tmp_path / "checkpoint.pt")
    resumed = distil(student(), teacher, INPUTS, alerts, recipe, tmp_path / "checkpoint.pt").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def labelled(alerts: Alerts) -> Labelled:
    """Four alerts with labels that do not depend on the teacher's answers."""
    return Labelled(alerts.cutouts[:4], np.array([0.02, 0.98, 0.02, 0.98], np.float32), np.full(4, 0.25, np.float64))


def test_labels_are_learned_beside_the_teachers_answers(teacher: nn.Module, alerts: Alerts, labelled: Labelled) -> None:
    images, real = labelled.draw(64, INPUTS, np.random.default_rng(99))
    assert set(np.unique(real).tolist()) == set(np.unique(labelled.real).tolist())

    def error(labels: Labelled | None) -> float:
        recipe = Recipe(steps=60, seed=1, batch=4, labelled_batch=12)
        trained = distil(student(), teacher, INPUTS, alerts[4:8], recipe, labelled=labels)
        with torch.inference_mode():
            said = trained(torch.from_numpy(images))[0][:, 0].sigmoid()
        return float((said - torch.from_numpy(real)).abs().mean())

    assert error(labelled) < 0.6 * error(None)


def test_an_interrupted_run_with_labels_gives_the_same_result(
    teacher: nn.Module, alerts: Alerts, labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.bundles.distil.CHECKPOINT_EVERY", 3)
    recipe = Recipe(steps=6, seed=1, batch=4, labelled_batch=2, hints=(MAP, EMBEDDING))
    checkpoint = tmp_path / "checkpoint.pt"
    whole = distil(student(), teacher, INPUTS, alerts, recipe, labelled=labelled).state_dict()
    with pytest.raises(KeyboardInterrupt):
        distil(student(), Stopping(teacher, runs=6), INPUTS, alerts, recipe, checkpoint, labelled)
    resumed = distil(student(), teacher, INPUTS, alerts, recipe, checkpoint, labelled).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_labelled_image_is_only_turned_flipped_and_shifted() -> None:
    cutouts = np.arange(3 * 63 * 63, dtype=np.float32).reshape(3, 63, 63)
    before, rng = cutouts.copy(), np.random.default_rng(4)
    seen = set()
    for _ in range(60):
        moved = move(cutouts, rng)
        np.testing.assert_array_equal(np.sort(moved, axis=None), before.ravel())
        y, x = np.argwhere(moved[0] == before[0, 31, 31])[0] - 31
        assert max(abs(y), abs(x)) <= LEAST_SHIFT
        seen.add((int(moved[0, 0, 0]), int(moved[0, 0, 1])))
    assert len(seen) > 20
    np.testing.assert_array_equal(cutouts, before)


def test_a_checkpoint_that_does_not_fit_is_refused(teacher: nn.Module, alerts: Alerts, tmp_path: Path) -> None:
    recipe, checkpoint = Recipe(steps=1, seed=1, batch=4), tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"PK")
    with pytest.raises(TrainingError, match="not a complete checkpoint"):
        distil(student(), teacher, INPUTS, alerts, recipe, checkpoint)
    torch.save({"recipe": "another"}, checkpoint)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: belongs to a training with other arguments"):
        distil(student(), teacher, INPUTS, alerts, recipe, checkpoint)


@pytest.mark.parametrize(
    "command",
    [
        "train-default --teacher x",
        "train-classes --labels x",
        "train-rubin --ztf x --detections x --schemas x",
        "train-embedder --labels x",
        "train-attention --lsst x --teacher x --encoder x",
    ],
)
def test_a_bundle_that_exists_is_refused_before_training(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "x", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "exists already; choose another directory" in capsys.readouterr().err.splitlines()[-1]


def test_unusable_input_is_reported_before_training(
    alerts: Alerts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-default", str(tmp_path), "--teacher", "x", "--out", str(tmp_path)]
    for option in (["--share", "0"], ["--share", "1.5"], ["--steps", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *option])
        assert f"error: argument {option[0]}: " in capsys.readouterr().err.splitlines()[-1]
    unrated = replace(alerts, columns=("drb",), metadata=np.full((len(alerts), 1), np.nan))
    with pytest.raises(DatasetError, match=r"none of the \d+ test alerts has a drb"):
        check_rated(unrated)


def test_augmentation_makes_new_images_and_does_not_modify_alerts(alerts: Alerts) -> None:
    before = alerts.cutouts.copy()
    rng = np.random.default_rng(8)
    with np.errstate(all="ignore"):
        made = [augment(alerts.cutouts[i], alerts.cutouts[(i + 1) % 12], rng) for i in range(12)]
    assert np.array_equal(alerts.cutouts, before, equal_nan=True)
    assert all(image.shape == (3, 63, 63) and image.dtype == np.float32 for image in made)
    assert sum(np.array_equal(image, cutouts, equal_nan=True) for image, cutouts in zip(made, before, strict=True)) < 4


@pytest.fixture(scope="module")
def real_alerts(shared_data: Path) -> Alerts:
    """Every shared ZTF alert, with some repeated."""
    archives = shared_data / "ztf" / "archives"
    return load_alerts([shared_data / "ztf" / "ztf_alerts.tar", archives, archives], INPUTS.size, ("drb",))


@pytest.mark.shared
def test_each_alert_is_loaded_once(real_alerts: Alerts) -> None:
    assert len(real_alerts) == len(np.unique(real_alerts.alert_id)) > 1900
    rated = np.isfinite(published_score(real_alerts))
    assert 1300 < rated.sum() < len(real_alerts)
    assert (published_score(real_alerts)[rated] > 0).all()


@pytest.mark.shared
def test_the_card_of_default_states_the_figures_of_the_bundle(real_alerts: Alerts, shared_models: Path) -> None:
    """Measured on the alerts of held-out objects, as for the card."""
    model = open_model("default", Runtime(engine="onnxruntime", device="cpu"))
    card = model.parts[0].bundle.card.training.evaluation
    braai = load_network(Architecture(name="vgg6"), read_weights(shared_models / "braai" / "d6_m7.weights.h5"))
    unseen = real_alerts[held_out(real_alerts.object_id, TEST_FRACTION, SPLIT_SEED)]
    rated = unseen[np.isfinite(published_score(unseen))]
    of_braai = run_over(braai, INPUTS, unseen)[0][:, 0].sigmoid().numpy()
    for prefix, alerts, truth in (("", rated, published_score(rated)), ("all_", unseen, of_braai)):
        score = model.parts[0].run(alerts.raw)["probabilities"][:, 0]
        with np.errstate(divide="ignore"):
            logit = np.log(score) - np.log1p(-score)
        assert (len(alerts), int((truth <= 0.5).sum())) == (card[f"{prefix}alerts"], card[f"{prefix}bogus"])
        for name, figure in figures(truth, logit, np.ones(len(alerts))).items():
            assert figure == pytest.approx(card[prefix + name], abs=1e-4), prefix + name
