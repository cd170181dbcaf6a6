"""Training of autoencoders: a known dictionary is recovered, seeds decide, and an interruption changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.__main__ import main
from training.errors import TrainingError
from training.interpretability import train_autoencoder
from training.interpretability.known_answers.planted import measure, plant, recovered
from training.interpretability.train_autoencoder import Recipe, rate, train

RECIPES = [
    Recipe(kind="batch_top_k", features=48, active=2, steps=800, batch=512),
    Recipe(kind="published", features=48, sparsity=2.0, steps=1600, batch=512),
]
KINDS = [recipe.kind for recipe in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=KINDS)
def test_recovers_the_dictionary_that_rows_were_made_of(recipe: Recipe) -> None:
    planted = plant(20_000, d=20, features=32, active=2, seed=1)
    dictionary = train(planted.rows, recipe, seed=2)
    assert recovered(planted, dictionary).mean() >= 0.95
    untrained = train(planted.rows, recipe.model_copy(update={"steps": 1}), seed=2)
    assert recovered(planted, untrained).mean() < 0.8
    assert measure(planted, dictionary)["explained variance"] > 0.75  # the L1 penalty shrinks activations


@pytest.mark.parametrize("recipe", RECIPES, ids=KINDS)
def test_an_interrupted_training_gives_the_same_dictionary(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = plant(2000, d=8, features=12, active=2, seed=1).rows
    recipe = recipe.model_copy(update={"steps": 40, "batch": 64})
    monkeypatch.setattr(train_autoencoder, "CHECKPOINT_EVERY", 10)
    whole = train(rows, recipe, seed=1)
    file = tmp_path / "1.ckpt"
    schedule = train_autoencoder.rate

    def interrupted(step: int, recipe: Recipe, restarts: list[int]) -> float:
        if step == 25:
            raise KeyboardInterrupt
        return schedule(step, recipe, restarts)

    monkeypatch.setattr(train_autoencoder, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(rows, recipe, seed=1, checkpoint=file)
    monkeypatch.setattr(train_autoencoder, "rate", schedule)
    assert file.exists()
    with pytest.raises(TrainingError, match="belongs to a training with other arguments"):
        train(rows, recipe, seed=2, checkpoint=file)
    resumed = train(rows, recipe, seed=1, checkpoint=file)
    assert not file.exists()
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert (train(rows, recipe, seed=2).w_dec != whole.w_dec).any()


def test_the_learning_rate_rises_after_resampling_and_falls_at_the_end() -> None:
    recipe = Recipe(features=1, steps=1000, warm_up=0.05)
    rates = [rate(step, recipe, [125, 250]) for step in range(1000)]
    assert rates[0] == rates[125] == rates[250] == pytest.approx(1 / 50)
    assert rates[49] == rates[124] == rates[800] == 1
    assert rates[900] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01


def test_the_command_prints_what_both_autoencoders_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "2000", "--dimensions", "8", "--planted", "10", "--features", "16", "--active", "2"]
    out = tmp_path / "recovered.json"
    assert main(["sae", "recover", *sizes, "--steps", "50", "--seeds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| autoencoder | mean max cosine |" in printed
    assert "| batch_top_k | 0." in printed
    assert "| published | 0." in printed
    assert out.exists()
