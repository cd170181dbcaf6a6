"""Checks at full size that MaxViT-tiny networks, as BTSbot's, become bundles, and damaged ones are refused: `make
deep`.

The suite has the same test for a small network with equally large rounding errors, in `importers/test_write_bundle.py`;
exporting a network of full size takes a minute.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from torch import nn

from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.importers.btsbot import CONFIG, PARTS, WEIGHTS
from broker_filter.importers.write_bundle import _test_alerts
from broker_filter.scoring.bundle import CARD, Architecture, BundleError, open_bundle
from broker_filter.scoring.bundle import WEIGHTS as BUNDLED_WEIGHTS
from broker_filter.scoring.networks import build_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_model

BACKBONE = "maxvit_tiny_rw_224"
HEAD = {"fc1_neurons": 32, "fc2_neurons": 8, "dropout": 0.7}
SEEDS = range(4)
DAMAGE = 1.05
"""Factor by which a tensor is damaged."""
LAYERS = (
    "encoder.backbone.stem.conv1.weight",
    "encoder.backbone.stages.2.blocks.3.attn_grid.mlp.fc1.weight",
    "head.5.weight",
)


def random_network(seed: int) -> nn.Module:
    """Return a network with random weights whose scores differ between the test alerts, as trained networks do."""
    torch.manual_seed(seed)
    arguments = {"backbone": BACKBONE, "hidden": (32, 8), "dropout": 0.7}
    network = build_network(Architecture(name="timm", arguments=arguments)).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    inputs = open_bundle("default").part("ztf").card.inputs
    images = torch.from_numpy(prepare(_test_alerts(inputs), inputs)["images"])
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.inference_mode():
        logits, _ = network(images)
        last.bias -= logits.mean()
        for parameter in last.parameters():
            parameter /= logits.std()
    return network


def publish(network: nn.Module, folder: Path) -> Path:
    """Write the folder in the layout in which BTSbot's authors publish their networks."""

    def their_name(ours: str) -> str:
        part = next(part for part in PARTS["MaxViT"] if ours.startswith(part))
        return PARTS["MaxViT"][part] + ours.removeprefix(part)

    folder.mkdir()
    torch.save({their_name(name): tensor for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    config = {"model_name": "MaxViT", "model_kind": f"{BACKBONE}.sw_in1k", "pretrained": False, **HEAD}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_maxvit_of_full_size_is_imported_and_a_damaged_one_is_refused(seed: int, tmp_path: Path) -> None:
    folder = publish(random_network(seed), tmp_path / "BTSbot")
    bundle = tmp_path / "bts"
    assert main(["models", "import", "btsbot", str(folder), "--name", "bts", "--out", str(bundle)]) == 0
    print("tolerances", open_bundle(bundle).parts[0].card.tolerances)  # noqa: T201 -- the output of the make target
    weights, card = load_file(bundle / BUNDLED_WEIGHTS), yaml.safe_load((bundle / CARD).read_text())
    for name in LAYERS:
        damaged = save(weights | {name: weights[name] * DAMAGE})
        (bundle / BUNDLED_WEIGHTS).write_bytes(damaged)
        card["files"][BUNDLED_WEIGHTS] = hashlib.sha256(damaged).hexdigest()
        (bundle / CARD).write_text(yaml.safe_dump(card))
        with pytest.raises(BundleError, match="does not reproduce it"):
            open_model(str(bundle), Runtime(engine="torch", device="cpu"))
