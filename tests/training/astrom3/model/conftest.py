"""Inputs and outputs of the published AstroM3 code, with the synthetic weights that they were computed with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.astrom3.model.network import AstroM3Arguments, AstroM3Classifier, Stars

Golden = dict[str, NDArray[Any]]


@pytest.fixture(scope="session")
def golden_folder(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> Golden:
    with np.load(golden_folder / "astrom3_golden.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden_card(golden_folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((golden_folder / "astrom3_golden.json").read_text())
    return card


def synthetic_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if name.startswith("logit_scale"):
        return np.full(shape, np.log(20), np.float32)
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
        return (1 + 0.1 * values).astype(np.float32)
    return (0.05 * values).astype(np.float32)


@pytest.fixture(scope="session")
def golden_network(golden_card: dict[str, Any]) -> AstroM3Classifier:
    network = AstroM3Classifier(AstroM3Arguments(classification=True, **golden_card["kwargs"]))
    weights = {
        name: torch.from_numpy(synthetic_weight(name, tuple(shape)))
        for name, shape in golden_card["params"].items()
        if not name.endswith(".pe")
    }
    network.load_state_dict(weights, strict=False)
    return network.eval()


@pytest.fixture(scope="session")
def golden_stars(golden: Golden) -> Stars:
    return Stars(*(torch.from_numpy(golden[name]) for name in Stars._fields))
