"""Importer of braai, the real/bogus networks that ZTF publishes with its alerts (`drb`).

Reads the Keras .h5 weights of https://github.com/dmitryduev/braai (MIT), checking every name and shape; any other
network is refused. Needs the `train` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from broker_filter.scoring.bundle import (
    Architecture,
    BundleError,
    Description,
    ImageInput,
    Inputs,
    Outputs,
    Training,
    describe_problems,
)
from broker_filter.scoring.export import write_bundle
from broker_filter.scoring.networks import load_network

MAX_WEIGHTS_BYTES = 16 * 2**20
"""The published files have 1.3 MB, 3.8 MB with the optimizer's state."""
PADDING = 1e-9
"""What short stamps were padded with when the network was trained (`make_triplet` in braai's repository)."""

LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv1": ("features.0", (3, 3, 3, 16)),
    "conv2": ("features.2", (3, 3, 16, 16)),
    "conv3": ("features.6", (3, 3, 16, 32)),
    "conv4": ("features.8", (3, 3, 32, 32)),
    "fc_1": ("features.13", (6 * 6 * 32, 256)),
    "fc_out": ("head.1", (256, 1)),
}
"""Keras layer: its place in `VGG6`, and the shape of its kernel (height, width, in, out; or in, out)."""


def import_braai(weights: Path, normalisation: Literal["row", "image"], name: str, out: Path) -> None:
    """Writes the bundle `name` into the new directory `out`.

    `normalisation`: what of the images was divided by its L2 norm when the network was trained: each row (d6_m7 and
    before) or the whole image (d6_m9). Raises BundleError where the file is not such a network.
    """
    images = ImageInput(
        size=63,
        order=("science", "template", "difference"),
        normalisation="l2_row" if normalisation == "row" else "l2_image",
        padding=PADDING,
    )
    try:
        description = Description(
            name=name,
            version=weights.name.removesuffix(".h5").removesuffix(".weights"),
            task="real/bogus classification",
            surveys=("ztf",),
            inputs=Inputs(images=images),
            outputs=Outputs(labels=("real",), activation="sigmoid", thresholds={"real": 0.5}),
            architecture=Architecture(name="vgg6"),
            licence="MIT",
            source="https://github.com/dmitryduev/braai",
            citation="Duev et al. 2019, MNRAS 489, 3582 (arXiv:1907.11259)",
            training=Training(
                method="by its authors; see the citation", data="ZTF alerts labelled by eye; see the citation"
            ),
        )
    except ValidationError as error:
        raise BundleError(f"no bundle can be called {name!r}: {describe_problems(error)}") from error
    network = load_network(description.architecture, read_weights(weights))
    write_bundle(out, description, network)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The .h5 file's weights as `VGG6` names and orders them. Raises BundleError where it holds another network."""
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise BundleError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, which no braai network is")
    try:
        with h5py.File(path) as file:
            # A saved model keeps its weights one level down, a file of weights at the top.
            return _convert(path, file.get("model_weights", file))
    except OSError as error:
        raise BundleError(f"{path}: not a whole HDF5 file: {error}") from error


def _convert(path: Path, layers: h5py.Group) -> dict[str, Tensor]:
    weights = {}
    for layer, (place, shape) in LAYERS.items():
        kernel = _read(path, layers, f"{layer}/{layer}/kernel:0", shape)
        if len(shape) == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif layer == "fc_1":  # Keras flattens height, width, channel; torch channel, height, width
            kernel = kernel.reshape(6, 6, 32, 256).transpose(3, 2, 0, 1).reshape(256, -1)
        else:
            kernel = kernel.T
        weights[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        weights[f"{place}.bias"] = torch.from_numpy(_read(path, layers, f"{layer}/{layer}/bias:0", shape[-1:]))
    return weights


def _read(path: Path, layers: h5py.Group, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    dataset = layers.get(name)
    found = getattr(dataset, "shape", "absent")
    if found != shape:
        raise BundleError(f"{path}: not a braai network: {name} is {found}, expected {shape}")
    array: NDArray[np.float32] = dataset[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise BundleError(f"{path}: {name} holds NaN or infinite weights")
    return array
