"""The commands that make the bundle `attention`, with few steps: pre-training, distillation, fine-tuning, bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import training.bundles.train_attention as train_attention
from broker_filter.cli import main as broker_filter
from broker_filter.scoring.bundle import open_bundle
from training.__main__ import main
from training.recipe import read_configuration
from training.vision.pretrain import Pretraining

RECIPE = Path(train_attention.__file__).with_name("attention_encoder.yaml")
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.mark.shared
def test_the_commands_make_a_bundle(shared_data: Path, shared_models: Path, tmp_path: Path) -> None:
    weights, teacher = shared_models / "braai" / "d6_m7.weights.h5", tmp_path / "d6_m7"
    importing = f"models import braai {weights} --normalisation row --name d6_m7 --out {teacher}"
    assert broker_filter(importing.split()) == 0
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["architecture"]["arguments"] |= SMALL
    recipe |= {
        "out": str(tmp_path / "encoder"),
        "galaxies": [{"kind": "simulated_alerts", "alerts": 24, "survey": "ztf"}],
        "recipe": {"epochs": 2, "warm_up_epochs": 1, "batch": 8},
        "hardware": {"accelerator": "cpu", "devices": 1, "threads": 1},
    }
    small = tmp_path / "encoder.yaml"
    small.write_text(yaml.safe_dump(recipe))
    assert main(["pretrain", str(small)]) == 0
    alerts, out = shared_data / "ztf" / "ztf_alerts.tar", tmp_path / "attention"
    command = f"train-attention {alerts} --teacher {teacher} --encoder {tmp_path / 'encoder'} --out {out} --steps 2"
    assert main(command.split()) == 0
    card = open_bundle(str(out)).part("ztf").card
    assert card.architecture.arguments["embed_dim"] == SMALL["embed_dim"]
    assert "24 simulated alerts of ZTF, labelled by truth" in card.training.method
    assert 0 <= float(card.training.evaluation["roc_auc"]) <= 1
    assert sorted(path.name for path in tmp_path.glob("attention*")) == ["attention"]


def test_the_recipe_of_the_encoder_is_valid() -> None:
    config = read_configuration(Pretraining, RECIPE)
    teacher = open_bundle("default").part("ztf").card.inputs.images
    assert config.images == teacher


def test_an_encoder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(train_attention.TrainingError, match=r"encoder\.yaml: not the card of an encoder"):
        train_attention._read_card(tmp_path / "encoder.yaml")
