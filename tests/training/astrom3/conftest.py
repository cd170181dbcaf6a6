"""A small set of simulated variable stars, in the layout of AstroM3Dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.astrom3.simulate import write_stars
from training.astrom3.stars import Split
from training.recipe import Hardware

SEED = 7
COUNTS: dict[Split, int] = {"train": 60, "validation": 20, "test": 30}
ONE_CORE = Hardware(accelerator="cpu", devices=1, threads=1)
SMALL = {
    "seq_len": 40,
    "p_d_model": 8,
    "p_n_heads": 2,
    "p_d_ff": 16,
    "p_e_layers": 1,
    "hidden_dim": 16,
    "s_conv_channels": (3, 4, 4, 4, 4),
    "m_hidden_dim": 16,
}
"""Arguments of a network that trains in seconds."""


@pytest.fixture(scope="session")
def stars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `full_7`."""
    directory = tmp_path_factory.mktemp("stars")
    write_stars(directory, SEED, COUNTS)
    return directory
