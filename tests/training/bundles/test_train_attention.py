"""The commands that make the bundle `attention`, with few steps: pre-training, distillation, fine-tuning, bundle."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import training.bundles.train_attention as train_attention
from broker_filter.cli import main as broker_filter
from broker_filter.scoring.bundle import Architecture, open_bundle
from broker_filter.scoring.networks import build_network
from training.__main__ import main
from training.errors import TrainingError
from training.recipe import read_configuration
from training.vision.pretrain import Pretraining

RECIPE = Path(train_attention.__file__).with_name("attention_encoder.yaml")
SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 63,
    "patch_size": 9,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 3,
    "dropout": 0.0,
}
"""A transformer that is faster to train and to export than the network that ships."""
ZTF = 200
"""Number of ZTF alerts to train and evaluate with."""


@pytest.mark.shared
def test_the_commands_make_a_bundle(
    shared_data: Path,
    shared_models: Path,
    ztf_packets: list[tuple[int, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train_attention, "SIMULATED_TEST", 24)
    monkeypatch.setattr(train_attention, "REPETITIONS", 1)
    splits: list[tuple[train_attention.Lsst, train_attention.Lsst]] = []
    split = train_attention._split_lsst

    def recorded(inputs: list[Path], schemas: str | None) -> tuple[train_attention.Lsst, train_attention.Lsst]:
        splits.append(split(inputs, schemas))
        return splits[0]

    monkeypatch.setattr(train_attention, "_split_lsst", recorded)
    weights, teacher = shared_models / "braai" / "d6_m7.weights.h5", tmp_path / "d6_m7"
    importing = f"models import braai {weights} --normalisation row --name d6_m7 --out {teacher}"
    assert broker_filter(importing.split()) == 0
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["architecture"]["arguments"] = SMALL
    recipe |= {
        "out": str(tmp_path / "encoder"),
        "galaxies": [{"kind": "simulated_alerts", "alerts": 24, "survey": "ztf"}],
        "recipe": {"epochs": 2, "warm_up_epochs": 1, "batch": 8},
        "hardware": {"accelerator": "cpu", "devices": 1, "threads": 1},
    }
    small = tmp_path / "encoder.yaml"
    small.write_text(yaml.safe_dump(recipe))
    assert main(["pretrain", str(small)]) == 0
    alerts, out = tmp_path / "alerts", tmp_path / "attention"
    alerts.mkdir()
    for candid, packet in ztf_packets[:ZTF]:
        (alerts / f"{candid}.avro").write_bytes(packet)
    lsst = f"{shared_data / 'lsst' / 'ocf'} {shared_data / 'lsst' / 'more' / 'ocf'}"
    command = (
        f"train-attention {alerts} --lsst {lsst} --teacher {teacher} "
        f"--encoder {tmp_path / 'encoder'} --out {out} --steps 2 --simulated 16"
    )
    assert main(command.split()) == 0
    card = open_bundle(str(out)).part("lsst").card
    assert card == open_bundle(str(out)).part("ztf").card
    assert card.architecture.arguments == SMALL
    assert "24 simulated alerts of ZTF, labelled by truth" in card.training.method
    figures = card.training.evaluation
    for name in ("roc_auc", "default_roc_auc", "lsst_roc_auc", "lsst_snr_roc_auc", "simulated_lsst_roc_auc"):
        assert 0 <= float(figures[name]) <= 1
    for name in ("cpu_microseconds", "peak_megabytes", "megabytes_on_disk"):
        assert float(figures[name]) > 0
        assert float(figures[f"default_{name}"]) > 0
    assert sorted(path.name for path in tmp_path.glob("attention*")) == ["attention"]
    others = command.replace(f"--out {out}", f"--out {tmp_path / 'further'} --begin-with default")
    assert main(others.split()) == 1
    assert "tensors do not fit the network 'timm'" in capsys.readouterr().err
    [(train, test)] = splits
    assert not set(train.seen.visit) & set(test.seen.visit)
    assert not set(train.seen.object_id) & set(test.seen.object_id)
    assert len(test) == figures["lsst_alerts"]


def test_the_recipe_of_the_encoder_is_valid() -> None:
    config = read_configuration(Pretraining, RECIPE)
    teacher = open_bundle("default").part("ztf").card.inputs.images
    assert config.images == teacher


def test_the_hints_compare_maps_of_the_same_sky() -> None:
    """A map of 8 x 8 px predicts one of 6 x 6 px by a convolution of 3 x 3 px; the embedding predicts the embedding."""
    architecture = read_configuration(Pretraining, RECIPE).architecture
    student, teacher = build_network(architecture).eval(), build_network(Architecture(name="vgg6")).eval()
    shapes: dict[str, torch.Size] = {}

    def keep(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        shapes[name] = output.shape

    hints = train_attention.HINTS[str(architecture.arguments["backbone"])]
    for hint in hints:
        student.get_submodule(hint.student).register_forward_hook(partial(keep, hint.student))
        teacher.get_submodule(hint.teacher).register_forward_hook(partial(keep, hint.teacher))
    with torch.inference_mode():
        _, embedding = student(torch.zeros(2, 3, 63, 63))
        _, wanted = teacher(torch.zeros(2, 3, 63, 63))
    of_map, of_embedding = hints
    assert shapes[of_map.student][2:] == (8, 8)
    assert shapes[of_map.teacher][2:] == (6, 6)
    assert shapes[of_embedding.student] == embedding.shape
    assert shapes[of_embedding.teacher] == wanted.shape


def test_an_encoder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"encoder\.yaml: not the card of an encoder"):
        train_attention._read_card(tmp_path / "encoder.yaml")
