"""Reads weights that Keras wrote (.h5), for networks whose layers are known. Nothing in a file is executed.

Every name and shape is checked; a file of another network is refused. Needs the `train` extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from broker_filter.scoring.bundle import BundleError

MAX_WEIGHTS_BYTES = 16 * 2**20
"""braai's published files have 1.3 MB, or 3.8 MB with the optimizer's state; ACAI's are smaller."""


def read_keras_weights(
    path: Path, expected: Mapping[str, tuple[int, ...]], network: str
) -> dict[str, NDArray[np.float32]]:
    """Return arrays by name `<layer>/<weight>`, such as `fc_1/kernel`, with the shapes in `expected`.

    The file holds the weights alone or a whole saved model. Raises BundleError if it is neither, or not of the
    `network` (a name for messages).
    """
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise BundleError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, the limit for weights of {network}")
    try:
        with h5py.File(path) as file:
            # A saved model keeps its weights in a group, a weights file at the top.
            layers = file.get("model_weights", file)
            return {name: _read(path, layers, name, shape, network) for name, shape in expected.items()}
    except OSError as error:
        raise BundleError(f"{path}: not a complete HDF5 file: {error}") from error


def _read(path: Path, layers: h5py.Group, name: str, shape: tuple[int, ...], network: str) -> NDArray[np.float32]:
    layer, _, weight = name.partition("/")
    stored = f"{layer}/{layer}/{weight}:0"
    dataset = layers.get(stored)
    found = getattr(dataset, "shape", "absent")
    if found != shape:
        raise BundleError(f"{path}: not weights of {network}: {stored} is {found}, expected {shape}")
    array: NDArray[np.float32] = dataset[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise BundleError(f"{path}: {stored} holds NaN or infinite weights")
    return array
