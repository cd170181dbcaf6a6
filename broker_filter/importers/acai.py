"""Importer of ACAI: five binary classifiers of ZTF alerts (hosted, nuclear, variable, orphan, bogus).

It reads the Keras .h5 models of November 2020 in https://github.com/dmitryduev/acai (MIT), `acai_h.d1_dnn_20201130.h5`
and its siblings, and checks every name and shape; any other network is refused. A file does not say which of the five
classifiers it is. Needs the `train` extra.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from broker_filter.importers.keras_weights import read_keras_weights
from broker_filter.importers.published import LABELLED_BY_EYE, MISSING, TRIPLET, checked_name
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import Architecture, Description, Inputs, MetadataColumn, Outputs
from broker_filter.scoring.networks import load_network

CLASSES = {"h": "hosted", "n": "nuclear", "v": "variable", "o": "orphan", "b": "bogus"}
"""The label of each of the five classifiers, by the letter in the name of its file."""
COLUMNS = (
    *("drb", "diffmaglim", "ra", "dec", "magpsf", "sigmapsf", "chipsf", "fwhm", "sky", "chinr", "sharpnr"),
    *("sgscore1", "distpsnr1", "sgscore2", "distpsnr2", "sgscore3", "distpsnr3", "ndethist", "ncovhist", "scorr"),
    *("nmtchps", "clrcoeff", "clrcounc", "neargaia", "neargaiabright"),
)
"""The features of version 20201130 in ACAI's configuration: raw values, in order."""
FILLS = {"drb": 0.5}
"""ACAI runs braai on alerts without drb (from before the survey had one). A bundle cannot, so 0.5 stands for
unknown."""

CONVOLUTIONS = {
    "conv_conv_1": ("images.0", 3, 16),
    "conv_conv_2": ("images.1", 16, 16),
    "conv_conv_3": ("images.4", 16, 32),
    "conv_conv_4": ("images.5", 32, 32),
}
"""Keras layer: module in `ACAI`, input channels, output channels."""
DENSE = {
    "dense_fc_1": ("metadata.0", len(COLUMNS), 64),
    "dense_fc_2": ("metadata.3", 64, 32),
    "fc_1": ("joint.0", 32 + 32, 16),
    "score": ("head", 16, 1),
}
"""Keras layer: module in `ACAI`, input units, output units."""


def import_acai(weights: Path, letter: str, name: str, out: Path) -> None:
    """Write the bundle `name` into the new directory `out`. `letter`: key in CLASSES of the file's network.

    Raises BundleError if the file is not such a network.
    """
    label = CLASSES[letter]
    with checked_name(name):
        description = Description(
            name=name,
            version=weights.name.removesuffix(".h5"),
            task=f"{label} or not",
            surveys=("ztf",),
            inputs=Inputs(
                images=TRIPLET,
                metadata=tuple(MetadataColumn(name=column, fill=FILLS.get(column, MISSING)) for column in COLUMNS),
            ),
            outputs=Outputs(labels=(label,), activation="sigmoid", thresholds={label: 0.5}),
            architecture=Architecture(name="acai", arguments={"metadata": len(COLUMNS)}),
            licence="MIT",
            source="https://github.com/dmitryduev/acai",
            citation="Duev & van der Walt 2021 (arXiv:2111.12142)",
            training=LABELLED_BY_EYE,
        )
    write_bundle(out, description, load_network(description.architecture, read_weights(weights)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the .h5 file as the state dict of `ACAI`.

    Raises BundleError if it holds another network.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for layer, (_, channels_in, channels_out) in CONVOLUTIONS.items():
        expected[f"{layer}/depthwise_kernel"] = (3, 3, channels_in, 1)
        expected[f"{layer}/pointwise_kernel"] = (1, 1, channels_in, channels_out)
        expected[f"{layer}/bias"] = (channels_out,)
    for layer, (_, units_in, units_out) in DENSE.items():
        expected[f"{layer}/kernel"] = (units_in, units_out)
        expected[f"{layer}/bias"] = (units_out,)
    arrays = read_keras_weights(path, expected, "ACAI")
    weights = {}
    for layer, (place, *_) in CONVOLUTIONS.items():
        weights[f"{place}.0.weight"] = arrays[f"{layer}/depthwise_kernel"].transpose(2, 3, 0, 1)
        weights[f"{place}.1.weight"] = arrays[f"{layer}/pointwise_kernel"].transpose(3, 2, 0, 1)
        weights[f"{place}.1.bias"] = arrays[f"{layer}/bias"]
    for layer, (place, *_) in DENSE.items():
        weights[f"{place}.weight"] = arrays[f"{layer}/kernel"].T
        weights[f"{place}.bias"] = arrays[f"{layer}/bias"]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()}
