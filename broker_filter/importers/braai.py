"""Importer of braai: the real/bogus networks whose scores ZTF publishes in its alerts (`drb`).

It reads the Keras .h5 weights of https://github.com/dmitryduev/braai (MIT), and checks every name and shape; any other
network is refused. Needs the `train` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from broker_filter.importers.keras_weights import read_keras_weights
from broker_filter.importers.published import LABELLED_BY_EYE, TRIPLET, checked_name
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import Architecture, Description, Inputs, Outputs
from broker_filter.scoring.networks import load_network

LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv1": ("features.0", (3, 3, 3, 16)),
    "conv2": ("features.2", (3, 3, 16, 16)),
    "conv3": ("features.6", (3, 3, 16, 32)),
    "conv4": ("features.8", (3, 3, 32, 32)),
    "fc_1": ("features.13", (6 * 6 * 32, 256)),
    "fc_out": ("head.1", (256, 1)),
}
"""Keras layer: module in `VGG6`, and shape of its kernel (height, width, in, out; or in, out)."""


def import_braai(weights: Path, normalisation: Literal["row", "image"], name: str, out: Path) -> None:
    """Write the bundle `name` into the new directory `out`.

    `normalisation`: what was divided by its L2 norm in training: each image row (d6_m7 and earlier) or the whole image
    (d6_m9). Raises BundleError if the file is not such a network.
    """
    images = TRIPLET.model_copy(update={"normalisation": "l2_row"}) if normalisation == "row" else TRIPLET
    with checked_name(name):
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
            training=LABELLED_BY_EYE,
        )
    network = load_network(description.architecture, read_weights(weights))
    write_bundle(out, description, network)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the .h5 file as the state dict of `VGG6`.

    Raises BundleError if it holds another network.
    """
    expected = {
        f"{layer}/{name}": size for layer, (_, shape) in LAYERS.items() for name, size in _of_a_layer(shape).items()
    }
    arrays = read_keras_weights(path, expected, "braai")
    weights = {}
    for layer, (place, shape) in LAYERS.items():
        kernel = arrays[f"{layer}/kernel"]
        if len(shape) == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif layer == "fc_1":  # Keras flattens height, width, channel; torch channel, height, width
            kernel = kernel.reshape(6, 6, 32, 256).transpose(3, 2, 0, 1).reshape(256, -1)
        else:
            kernel = kernel.T
        weights[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        weights[f"{place}.bias"] = torch.from_numpy(arrays[f"{layer}/bias"])
    return weights


def _of_a_layer(kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"kernel": kernel, "bias": kernel[-1:]}
