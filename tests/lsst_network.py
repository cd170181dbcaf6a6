"""A small network for LSST alerts, with random weights: pixels in units of their noise, and two labels."""

from __future__ import annotations

from pathlib import Path

import torch

from broker_filter.importers.write_bundle import write_bundle
from broker_filter.scoring.bundle import Architecture, ImageInput, Inputs, Outputs
from broker_filter.scoring.networks.stampnet import StampNet
from tests.network_description import describe


def write_lsst_network(directory: Path) -> Path:
    """Write a bundle for LSST with the labels `asteroid` and `real`, and return its directory."""
    images = ImageInput(size=63, order=("science", "template", "difference"), normalisation="snr", padding=0)
    description = describe(
        name="deep",
        task="real/bogus classification of LSST alerts",
        surveys=("lsst",),
        inputs=Inputs(images=images),
        outputs=Outputs(
            labels=("asteroid", "real"), activation="sigmoid", thresholds={"real": 0.4, "asteroid": 0.9}, embedding=64
        ),
        architecture=Architecture(name="stampnet", arguments={"labels": 2}),
    )
    torch.manual_seed(8)
    write_bundle(directory, description, StampNet(labels=2).eval())
    return directory
