"""One torch thread, and a network with light curves for the tests of attribution and ablation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from broker_filter.scoring.bundle import LIGHT_CURVE_FEATURES
from broker_filter.scoring.networks.alert_embedder import AlertEmbedder
from broker_filter.scoring.sparse_dictionary import SparseDictionary

HEADS, WIDTH, FEATURES, LAYERS = 4, 32, 40, 3
EXISTING = (7, 3, 1, 0, 5)
"""Number of points in the light curve of each alert."""


@dataclass(frozen=True)
class Embedded:
    """An embedder with large random weights, its inputs, and a dictionary for each layer of its transformer."""

    network: AlertEmbedder
    inputs: Mapping[str, Tensor]
    dictionaries: Mapping[int, SparseDictionary]


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    """Five alerts with light curves of EXISTING points in seven columns."""
    draws = torch.Generator().manual_seed(7)
    network = AlertEmbedder("stampnet", metadata=2, width=WIDTH, layers=LAYERS, heads=HEADS).eval()
    for parameter in network.light_curve.parameters():
        scale = 1.0 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
        nn.init.normal_(parameter, std=scale, generator=draws)
    mask = (torch.arange(max(EXISTING)) < torch.tensor(EXISTING)[:, None]).float()
    inputs = {
        "images": torch.randn(len(EXISTING), 3, 63, 63, generator=draws),
        "metadata": torch.randn(len(EXISTING), 2, generator=draws),
        "light_curve": torch.randn(*mask.shape, LIGHT_CURVE_FEATURES, generator=draws),
        "light_curve_mask": mask,
    }
    return Embedded(network, inputs, {layer: random_dictionary(layer) for layer in range(LAYERS)})


def random_dictionary(seed: int) -> SparseDictionary:
    """Return a dictionary with FEATURES random features, of which about a third are active at a time."""
    draws = np.random.default_rng(seed)
    w_enc, w_dec = draws.normal(size=(WIDTH, FEATURES)), draws.normal(size=(FEATURES, WIDTH))
    b_enc, b_dec, threshold = draws.normal(size=FEATURES), draws.normal(size=WIDTH), draws.uniform(1, 3, FEATURES)
    return SparseDictionary(*(each.astype(np.float32) for each in (w_enc, b_enc, w_dec, b_dec, threshold)))
