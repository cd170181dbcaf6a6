"""A lens is what the torch network computes, and is written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import WEIGHTS, Part, open_bundle
from broker_filter.scoring.lens import Lens
from broker_filter.scoring.lens_files import open_files
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.preprocess import prepare
from broker_filter.scoring.sparse_dictionary import SparseDictionary
from training.errors import LensError, TrainingError
from training.interpretability.export_lens import OrdinaryRows, write_lens
from training.interpretability.sites import open_site

D, F = 48, 12


def dictionary() -> SparseDictionary:
    """Return twelve random features with a low threshold, so that about a half of them is active."""
    rng = np.random.default_rng(3)
    w_enc = rng.standard_normal((D, F)).astype(np.float32)
    w_dec = w_enc.T / np.linalg.norm(w_enc.T, axis=1, keepdims=True)
    zeros = np.zeros(F, np.float32)
    return SparseDictionary(
        w_enc, zeros, np.ascontiguousarray(w_dec), np.zeros(D, np.float32), zeros + np.float32(0.01)
    )


def write(directory: Path, part: Part, site: str) -> None:
    rng = np.random.default_rng(4)
    rows = OrdinaryRows(rng.standard_normal((60, D)).astype(np.float32), np.repeat(np.arange(20), 3), "drawn at random")
    features = [{"id": str(f), "name": "rising" if f == 2 else "", "note": "", "stable": "true"} for f in range(F)]
    write_lens(
        directory,
        part,
        site,
        dictionary(),
        {"ztf": rows, "lsst": rows},
        features,
        name="random",
        version="1",
        split="none",
        worth="It is worth nothing.",
        measures={"explained_variance": 0.1},
    )


@pytest.fixture
def part() -> Part:
    return open_bundle("embedder").parts[0]


def test_lens_computes_what_the_network_computes(part: Part, tmp_path: Path) -> None:
    """At the first layer, whose queries are all points; the shipped lens is of the last layer."""
    site = "light_curve.0"
    write(tmp_path / "lens", part, site)
    lens, alerts = Lens(open_files(tmp_path / "lens"), part), part.test_vector()
    inputs = prepare(alerts, part.card.inputs)
    seen = lens.see(inputs)
    network = load_network(part.card.architecture, load_file(part.directory / WEIGHTS))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        opened = open_site(network, site)
        attention = opened.attend(tensors)
        changed = attention.z + 0.1
        _, _, modalities = opened.splice(tensors, changed)
    queries = attention.queries.numpy()
    np.testing.assert_array_equal(seen.queries, queries)
    np.testing.assert_array_equal(seen.sources, attention.sources.numpy())
    np.testing.assert_allclose(seen.z[queries], attention.z.numpy()[queries], atol=1e-5)
    one = {name: array[1:2] for name, array in inputs.items()}
    moved = torch.from_numpy(lens._moved(changed[1:2].numpy(), one))
    np.testing.assert_allclose(moved, normalize(modalities[1:2, 1], dim=1), atol=1e-5)

    found = lens.explain(alerts, [Survey.ZTF, Survey.LSST, Survey.ZTF, Survey.ZTF], lambda _, v: 2.0 + v[:, 0])
    named = {feature.name for explanation in found for feature in explanation.features}
    assert named <= {None, "rising"}
    assert all(one.pre_activation_error is None or one.pre_activation_error < 1e-5 for one in found)
    assert lens.card.worth == "It is worth nothing."
    assert {survey: alerts.alerts for survey, alerts in lens.card.ordinary.items()} == {"ztf": 20, "lsst": 20}
    with pytest.raises(TrainingError, match="lens: exists already"):
        write(tmp_path / "lens", part, site)


def test_bundle_without_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="has no attention layer"):
        write(tmp_path / "lens", open_bundle("default").part("ztf"), "light_curve.1")
    assert list(tmp_path.iterdir()) == []
