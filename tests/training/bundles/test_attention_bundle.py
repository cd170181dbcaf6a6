"""The shipped bundle `attention`: the statements of its card hold, and its attention can be read out by layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from broker_filter.config import Runtime
from broker_filter.packets.batch import AlertBatch, Survey
from broker_filter.packets.packet import Packet
from broker_filter.scoring.alerts import raw_alerts
from broker_filter.scoring.bundle import WEIGHTS, open_bundle
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.scorer import open_model, open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION, data_sha256, published_score
from training.data.datasets import held_out, load_alerts
from training.evaluation.metrics import rank

MAX_MEGABYTES = 12
"""Largest size of the bundle on disk, in MB: it is a part of the wheel."""
ATTENTION_LAYERS = tuple(
    f"encoder.backbone.stages.{stage}.1.transformer.{block}.attn"
    for stage, blocks in ((2, 2), (3, 4), (4, 3))
    for block in range(blocks)
)
"""The names of the attention layers, in the order in which they run."""
PATCHES = {"2": 4 * 4, "3": 2 * 2, "4": 1}
"""The number of patches of 2 x 2 px of the maps of each stage."""
CARD = open_bundle("attention").parts[0].card


@pytest.fixture(scope="module")
def alerts() -> AlertBatch:
    """Twenty simulated alerts of each survey."""
    packets = [Packet(alert.packet) for survey in ("ztf", "lsst") for alert in simulate_night(20, 3, survey)]
    return open_scorer(["attention"], Runtime(device="cpu")).decoder(SCHEMAS).decode(packets)[0]


def test_it_is_small_enough_for_the_wheel() -> None:
    files = list(open_bundle("attention").directory.iterdir())
    assert sum(file.stat().st_size for file in files) <= MAX_MEGABYTES * 10**6


def test_both_engines_give_the_same_scores_for_both_surveys(alerts: AlertBatch) -> None:
    scores = [
        open_scorer(["attention"], Runtime(engine=engine, device="cpu")).score(alerts).columns()["attention.real"]
        for engine in ("onnxruntime", "torch")
    ]
    for survey in (Survey.ZTF, Survey.LSST):
        of_survey = scores[0][alerts.survey == survey]
        assert ((of_survey >= 0) & (of_survey <= 1)).all()
        assert len(np.unique(of_survey)) == 20
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)


def test_every_attention_layer_has_a_name_and_gives_its_map(alerts: AlertBatch) -> None:
    """Each row of a map holds the weights of all patches, which add up to 1. Where a map has several patches, the
    weights depend on the image."""
    bundle = open_bundle("attention").parts[0]
    network = load_network(bundle.card.architecture, load_file(bundle.directory / WEIGHTS))
    maps: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        maps[name] = given[0]

    for name in ATTENTION_LAYERS:
        layer = network.get_submodule(name)
        layer.fused_attn = False  # type: ignore[assignment]  # the fused kernel never holds the map
        layer.get_submodule("attn_drop").register_forward_hook(partial(keep, name))
    with torch.inference_mode():
        network(torch.from_numpy(prepare(raw_alerts(alerts), bundle.card.inputs)["images"]))
    assert tuple(maps) == ATTENTION_LAYERS
    for name, weights in maps.items():
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert weights.shape[-1] == PATCHES[name.split(".")[3]]
        assert (float(weights.std()) > 0) == (weights.shape[-1] > 1)


def test_the_card_compares_it_with_default() -> None:
    figures = CARD.training.evaluation
    assert figures["compared_with"] == open_bundle("default").part("ztf").card.title
    for name in ("roc_auc", "cpu_microseconds", "peak_megabytes", "megabytes_on_disk"):
        assert float(figures[name]) > 0
        assert float(figures[f"default_{name}"]) > 0
    assert float(figures["default_roc_auc"]) == open_bundle("default").part("ztf").card.training.evaluation["roc_auc"]


@pytest.mark.shared
def test_the_card_states_the_accuracy_on_held_out_alerts(shared_data: Path) -> None:
    alerts = load_alerts([shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"], 63, ("drb",))
    unseen = held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)
    assert data_sha256(alerts[~unseen]) == CARD.training.evaluation["dataset_sha256"]
    test = alerts[unseen]
    drb = published_score(test)
    rated = np.isfinite(drb)
    [network] = open_model("attention", Runtime(engine="onnxruntime", device="cpu")).parts
    real = network.run(test.raw)["probabilities"][rated, 0]
    area = rank(drb[rated] > 0.5, real, np.ones(len(real))).roc_auc
    assert float(area) == pytest.approx(float(CARD.training.evaluation["roc_auc"]), abs=1e-3)
