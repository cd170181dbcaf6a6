"""AstroM3's networks on disk, in the layout published on Hugging Face: `config.json` and `model.safetensors`.

It reads and writes directories with the layout of `AstroMLCore/AstroM3-CLIP*`. Nothing is downloaded or unpickled; a
file whose tensors do not fit its configuration by name and shape is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from broker_filter.scoring.bundle import BundleError, describe_problems
from training.astrom3.model.galspecnet import GalSpecNet, GalSpecNetArguments, SpectraClassifier
from training.astrom3.model.informer import Informer, InformerArguments, PhotometryClassifier
from training.astrom3.model.metadata import MetadataArguments, MetadataClassifier, MetadataEncoder
from training.astrom3.model.network import AstroM3, AstroM3Arguments, AstroM3Classifier

CONFIGURATION = "config.json"
WEIGHTS = "model.safetensors"
FLOAT32 = "F32"
"""Name of the dtype float32 in the header of a safetensors file."""
MAX_CONFIGURATION_BYTES = 2**20
MAX_WEIGHTS_BYTES = 2**31
"""Largest weights file that is read; the published files have at most 66 MB."""

Network = AstroM3 | Informer | GalSpecNet | MetadataEncoder
NETWORKS: dict[str, tuple[type[Any], type[Network], type[Network]]] = {
    "p_enc_in": (AstroM3Arguments, AstroM3, AstroM3Classifier),
    "enc_in": (InformerArguments, Informer, PhotometryClassifier),
    "conv_channels": (GalSpecNetArguments, GalSpecNet, SpectraClassifier),
    "input_dim": (MetadataArguments, MetadataEncoder, MetadataClassifier),
}
"""The kinds of networks: the classes of the arguments, the encoder and the classifier. The key is the name of a
configuration key that only this kind has. The configuration key `classification` says whether it is a classifier."""


def load_network(directory: Path) -> Network:
    """Return the network of a checkpoint, in evaluation mode on the CPU.

    Raises BundleError if the directory holds no such checkpoint, or if its tensors do not fit.
    """
    configuration = _read_configuration(directory / CONFIGURATION)
    with torch.device("meta"):  # allocate no memory before the shapes are checked
        network = _build(configuration, directory)
    expected = {name: (tuple(tensor.shape), FLOAT32) for name, tensor in network.state_dict().items()}
    path = directory / WEIGHTS
    try:
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise BundleError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, the limit for weights")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            raise BundleError(
                f"{path}: {len(wrong)} tensors do not fit {CONFIGURATION}; the first is {wrong[0]!r}: "
                f"{found.get(wrong[0], 'absent')} instead of {expected.get(wrong[0], 'none')}"
            )
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: not a complete safetensors file: {error}") from error
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise BundleError(f"{path}: {bad[0]} holds NaN or infinite weights")
    network.load_state_dict(weights, assign=True)
    return network.eval()


def write_network(directory: Path, network: Network) -> None:
    """Write a checkpoint that `load_network` and the published code can read.

    Raises OSError if a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, directory / WEIGHTS)
    (directory / CONFIGURATION).write_text(network.arguments.model_dump_json(indent=2))


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIGURATION_BYTES:
            raise BundleError(f"{path}: larger than {MAX_CONFIGURATION_BYTES} bytes, the limit for a configuration")
        configuration = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    if not isinstance(configuration, dict) or not NETWORKS.keys() & configuration.keys():
        raise BundleError(f"{path}: not a configuration of a network: it has none of the keys {', '.join(NETWORKS)}")
    return configuration


def _build(configuration: dict[str, Any], directory: Path) -> Network:
    kind = next(name for name in NETWORKS if name in configuration)
    arguments_type, encoder, classifier = NETWORKS[kind]
    try:
        arguments = arguments_type.model_validate(configuration)
    except ValidationError as error:
        raise BundleError(f"{directory / CONFIGURATION}: {describe_problems(error)}") from error
    return (classifier if arguments.classification else encoder)(arguments)
