"""Training of AstroM3 in its published modes, from random weights and from pre-trained encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from training.__main__ import main
from training.astrom3.model.checkpoint import load_network
from training.astrom3.model.galspecnet import SpectraClassifier
from training.astrom3.model.informer import PhotometryClassifier
from training.astrom3.model.metadata import MetadataClassifier
from training.astrom3.model.network import AstroM3, AstroM3Classifier
from training.astrom3.recipe import PUBLISHED, AstroM3Run, Mode
from training.astrom3.stars import DIVISORS
from training.astrom3.train import CHECKPOINT, StarLearner, begin_with, build, measure, train
from training.errors import TrainingError
from training.learner import LAST, read_checkpoint

from .conftest import ONE_CORE, SEED, SMALL

TRAIN_PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "variable-stars.md"
QUICK = {"epochs": 3, "warm_up_epochs": 2, "batch": 16, "learning_rate": 0.01, "betas": (0.9, 0.999)}
CLASSIFIERS: dict[Mode, type[torch.nn.Module]] = {
    "photo": PhotometryClassifier,
    "spectra": SpectraClassifier,
    "meta": MetadataClassifier,
    "all": AstroM3Classifier,
}


def configured(stars: Path, out: Path, mode: Mode, **others: Any) -> AstroM3Run:
    others["recipe"] = {**QUICK, **others.get("recipe", {})}
    others["arguments"] = {**SMALL, **others.get("arguments", {})}
    return AstroM3Run(mode=mode, stars=stars, out=out, seed=SEED, hardware=ONE_CORE, logs=(), **others)


@pytest.fixture(scope="module")
def pretrained(stars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of mode clip."""
    out = tmp_path_factory.mktemp("clip")
    train(configured(stars, out, "clip"))
    return out / CHECKPOINT


def test_every_published_training_can_be_named() -> None:
    beginnings = dict.fromkeys(CLASSIFIERS, ("", "-clip"))
    expected = {f"{mode}-{subset}{end}" for mode, ends in beginnings.items() for subset in DIVISORS for end in ends}
    assert PUBLISHED.keys() == expected | {"clip-full"}
    for name in PUBLISHED:
        mode, subset, *clip = name.split("-")
        values = {"mode": mode, "subset": subset, "pretrained": Path("x") if clip else None}
        run = AstroM3Run.model_validate({**values, "stars": Path("stars"), "out": Path("out")})
        assert run.published == name
        assert run.plan.batch == 512
        assert run.plan.epochs == (100 if mode == "clip" else 50)
        assert (run.plan.warm_up_epochs, run.plan.patience, run.plan.plateau_patience) == (10, 6, 3)
        assert run.network.classification == (mode != "clip")
        assert run.network.photometry.features == 200 * 128


def test_the_configuration_of_astrom3_in_the_documentation_is_valid() -> None:
    text = TRAIN_PAGE.read_text()
    block = text[text.index("mode: photo") :]
    run = AstroM3Run.model_validate(yaml.safe_load(block[: block.index("```")]))
    assert run.published == "photo-sub10-clip"


def test_hyper_parameters_are_the_published_ones() -> None:
    run = AstroM3Run(mode="photo", subset="sub10", pretrained=Path("x"), stars=Path("stars"), out=Path("out"))
    assert run.plan.learning_rate == pytest.approx(0.00032096870443854236)
    assert run.plan.betas[0] == pytest.approx(0.7384973431605952)
    assert run.plan.max_gradient_norm == 5
    assert run.network.p_dropout == pytest.approx(0.19592857206605097)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"mode": "clip", "subset": "sub10"}, "clip-sub10 is not a published training"),
        ({"mode": "photo", "recipe": {"learning_rat": 1}}, "learning_rat"),
        ({"mode": "photo", "arguments": {"p_d_model": 7}}, "d_model 7 is odd"),
        ({"mode": "light"}, "mode"),
    ],
)
def test_an_invalid_configuration_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        AstroM3Run.model_validate({**values, "stars": "stars", "out": "out"})


def test_pre_training_matches_the_modalities_of_a_star(stars: Path, tmp_path: Path) -> None:
    recipe = {"epochs": 16, "learning_rate": 0.003, "plateau_factor": 0.9, "weight_decay": 0.0}
    wider = {"hidden_dim": 64, "m_hidden_dim": 64, "s_conv_channels": (3, 8, 8, 8, 8), "s_dropout": 0.0}
    figures = train(configured(stars, tmp_path, "clip", recipe=recipe, arguments=wider))
    batches = (16, 4)  # of the 20 validation stars
    by_chance = 6 * np.average(np.log(batches), weights=batches)
    assert figures["validation_loss"] < 0.9 * by_chance
    assert type(load_network(tmp_path / CHECKPOINT)) is AstroM3


@pytest.mark.parametrize("mode", CLASSIFIERS)
def test_a_classifier_starts_from_the_pre_trained_encoders(
    mode: Mode, stars: Path, pretrained: Path, tmp_path: Path
) -> None:
    standing = {"learning_rate": 1e-12, "weight_decay": 0.0}
    config = configured(stars, tmp_path / "out", mode, pretrained=pretrained, recipe=standing)
    figures = train(config)
    network = load_network(tmp_path / "out" / CHECKPOINT)
    assert type(network) is CLASSIFIERS[mode]
    encoders = {name: t for name, t in network.state_dict().items() if not name.startswith("fc.")}
    before = load_network(pretrained).state_dict()
    prefix = {"photo": "photometry_encoder.", "spectra": "spectra_encoder.", "meta": "metadata_encoder.", "all": ""}[
        mode
    ]
    assert encoders
    for name, tensor in encoders.items():
        torch.testing.assert_close(tensor, before[prefix + name], rtol=0, atol=1e-6)
    assert 0 <= figures["accuracy"] <= 1
    assert figures == yaml.safe_load((tmp_path / "out" / "figures.yaml").read_text())
    assert train(config) == figures  # without training again


def test_a_killed_training_gives_the_same_result(
    stars: Path, tmp_path: Path, kill_training: Callable[..., None]
) -> None:
    """Cuts of light curves, random keys and learning rate are those of an uninterrupted training."""
    train(configured(stars, tmp_path / "whole", "photo"))
    killed = configured(stars, tmp_path / "killed", "photo")
    kill_training(StarLearner, lambda learner, i: learner.current_epoch == 1 and i == 1, lambda: train(killed))
    train(killed)
    whole, resumed = (load_network(tmp_path / name / CHECKPOINT) for name in ("whole", "killed"))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert not resumed.training


def test_the_learning_rate_rises_and_falls_on_a_plateau_of_the_loss(stars: Path, tmp_path: Path) -> None:
    def after(epochs: int, **recipe: Any) -> float:
        out = tmp_path / f"{epochs}-{len(recipe)}"
        train(configured(stars, out, "meta", recipe={"epochs": epochs, "patience": 20, **recipe}))
        optimizer = read_checkpoint(out / LAST)["optimizer_states"][0]["param_groups"][0]
        assert optimizer["weight_decay"] == PUBLISHED["meta-full"]["recipe"]["weight_decay"]
        return float(optimizer["lr"])

    assert after(3) == pytest.approx(0.01)
    diverging = {"learning_rate": 30.0, "plateau_patience": 1, "plateau_factor": 0.5}
    assert after(12, **diverging) < 30.0


def test_other_encoders_are_refused(stars: Path, pretrained: Path, tmp_path: Path) -> None:
    wider = configured(stars, tmp_path, "meta").network.model_copy(update={"m_hidden_dim": 24})
    with pytest.raises(TrainingError, match="does not fit this network"):
        begin_with(build("meta", wider), pretrained)
    train(configured(stars, tmp_path / "meta", "meta"))
    with pytest.raises(TrainingError, match="holds a MetadataClassifier, not a pre-trained AstroM3"):
        begin_with(build("meta", wider), tmp_path / "meta" / CHECKPOINT)


def test_a_directory_of_another_training_is_refused(stars: Path, tmp_path: Path) -> None:
    train(configured(stars, tmp_path, "meta"))
    with pytest.raises(TrainingError, match="was started with another configuration"):
        train(configured(stars, tmp_path, "meta", recipe={"learning_rate": 0.02}))


def test_balanced_accuracy_weights_all_classes_equally() -> None:
    label = np.array([0, 0, 0, 1])
    figures = measure(label, np.array([0, 0, 0, 2]))
    assert (figures["accuracy"], figures["balanced_accuracy"]) == (0.75, 0.5)
    assert (figures["recall_DSCT"], figures["recall_EA"]) == (1, 0)
    assert "recall_EB" not in figures


def test_the_command_trains_the_network_of_its_file(
    stars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(stars, tmp_path / "out", "meta")
    (tmp_path / "meta.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    assert main(["astrom3", str(tmp_path / "meta.yaml")]) == 0
    assert "balanced_accuracy" in capsys.readouterr().out
