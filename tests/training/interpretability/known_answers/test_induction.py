"""Ground truth: an autoencoder finds the induction features of a transformer that must have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

from training.__main__ import main
from training.interpretability.known_answers.induction import Induction, copiers, measure, study
from training.interpretability.known_answers.toy_transformer import LENGTH, ToyTransformer, draw_sequences
from training.interpretability.train_autoencoder import Recipe, train

SMALL = Recipe(features=64, active=1, steps=1200, batch=512)


@pytest.fixture(scope="module")
def figures() -> Induction:
    """The figures of a transformer and an autoencoder that are trained for about ten seconds."""
    torch.set_num_threads(1)
    return study(steps=300, recipe=SMALL, sequences=600, seed=1)


def test_the_transformer_copies(figures: Induction) -> None:
    assert figures.accuracy > 0.99


def test_induction_features_are_found_without_being_told(figures: Induction) -> None:
    assert figures.tokens_found > 0.9
    assert figures.tokens_found_at_random < 0.1


def test_attribution_points_at_the_token_after_the_previous_occurrence(figures: Induction) -> None:
    assert figures.pointed > 0.95
    assert figures.pointed_by_chance < 0.2


def test_ablation_removes_the_copying_and_a_random_direction_does_not(figures: Induction) -> None:
    assert figures.probability > 0.95
    assert figures.probability_ablated < 0.2
    assert figures.probability_at_random > 0.7


def test_a_transformer_that_does_not_copy_has_no_induction_features() -> None:
    torch.manual_seed(1)
    network, sequences = ToyTransformer().eval(), draw_sequences(100, Generator().manual_seed(2))
    rows = torch.randn(2000, 32, generator=Generator().manual_seed(3)).numpy()
    figures = measure(network, train(rows, Recipe(features=64, active=1, steps=50, batch=512), 0), sequences, 0)
    assert figures.accuracy < 0.2
    assert figures.tokens_found == 0


def test_a_feature_is_of_the_token_that_is_copied_where_it_is_active() -> None:
    sequences = draw_sequences(50, Generator().manual_seed(4))
    copied = np.where(sequences.predictable.numpy(), sequences.next.numpy(), -1)
    everywhere = sequences.next.numpy() == 5  # also where the token is not copied, but comes for the first time
    elsewhere = np.ones((50, LENGTH), bool)
    active = np.stack([elsewhere, copied == 7, everywhere], axis=2)
    best = copiers(active, sequences)
    assert best.found.nonzero()[0].tolist() == [7]
    assert (best.feature[7], best.recall[7], best.precision[7]) == (1, 1.0, 1.0)
    assert best.feature[5] == 2
    assert best.recall[5] == 1.0
    assert best.precision[5] < 0.9


def test_the_command_writes_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    small = {"steps": 5, "sequences": 20, "features": 8, "autoencoder-steps": 5, "seeds": 1}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    assert main(["sae", "induction", *options, "--out", str(out)]) == 0
    (written,) = json.loads(out.read_text())
    assert written["tokens_found"] == 0
    assert "| accuracy |" in capsys.readouterr().out
