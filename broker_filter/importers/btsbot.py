"""Importer of BTSbot: the networks that find transients for ZTF's Bright Transient Survey.

It reads a folder as its authors publish it (https://huggingface.co/nabeelr): `pytorch_model.bin` and
`train_config.json`, with or without metadata. Every name and shape is checked; any other network is refused. Needs the
`train` extra.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import nn

from broker_filter.importers.encoders import backbone_name
from broker_filter.importers.published import MISSING, TRIPLET, checked_name
from broker_filter.importers.weights import load_weights, read_weights
from broker_filter.importers.write_bundle import write_bundle
from broker_filter.packets.surveys import select_columns
from broker_filter.scoring.bundle import (
    Architecture,
    BundleError,
    Description,
    Inputs,
    MetadataColumn,
    Outputs,
    Training,
    describe_problems,
)
from broker_filter.scoring.networks import build_network

WEIGHTS = "pytorch_model.bin"
CONFIG = "train_config.json"
MAX_CONFIG_BYTES = 2**20
FILLS = {"new_drb": 0.5}
"""new_drb was never missing in training. Alerts from before the survey had a drb get 0.5, which stands for unknown."""
LABEL = "bts"
LEGACY_SURVEY = "LS"
"""Substring of the version of a training set that uses Legacy Surveys images, as in btsbot's code."""

PARTS: dict[str, dict[str, str]] = {
    "ConvNeXt": {
        "encoder.backbone.head.norm.": "convnext.head.1.",
        "encoder.backbone.": "convnext.",
        "head.0.": "convnext.head.3.",
        "head.2.": "convnext.head.5.",
        "head.5.": "convnext.head.8.",
    },
    "MaxViT": {
        "encoder.backbone.": "maxvit.",
        "head.0.": "maxvit.head.1.",
        "head.2.": "maxvit.head.3.",
        "head.5.": "maxvit.head.6.",
    },
    "um_cnn": {"encoder.layers.": "conv_layers."},
    "mm_ConvNeXt": {"encoder.backbone.": "convnext_backbone.", "head.": "combined_head."},
    "mm_MaxViT": {"encoder.backbone.": "maxvit_backbone.", "head.": "combined_head."},
    "mm_cnn": {"encoder.layers.": "conv_layers.", "head.": "combined_head."},
}
"""For each class of btsbot: prefix of parameter names in our network -> prefix in btsbot, where the two differ. The
first matching prefix is used."""

Width = Annotated[int, Field(gt=0, le=2**16)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(BaseModel):
    """The keys of `train_config.json` that define the network. Each class of btsbot needs some of them."""

    model_name: Literal["ConvNeXt", "MaxViT", "um_cnn", "um_nn", "mm_ConvNeXt", "mm_MaxViT", "mm_cnn", "frozen_fusion"]
    model_kind: str | None = None
    conv1_channels: Width | None = None
    conv2_channels: Width | None = None
    conv_kernel: Width | None = None
    fc1_neurons: Width | None = None
    fc2_neurons: Width | None = None
    dropout: Rate | None = None
    metadata_cols: tuple[str, ...] | None = None
    meta_fc1_neurons: Width | None = None
    meta_fc2_neurons: Width | None = None
    meta_dropout: Rate | None = None
    comb_fc1_neurons: Width | None = None
    comb_fc2_neurons: Width | None = None
    comb_dropout: Rate | None = None
    image_model_config: TrainConfig | None = None
    meta_model_config: TrainConfig | None = None
    pretrained: bool = True
    train_data_version: str = ""

    def get(self, *names: str) -> Any:
        """Return the values of the keys `names`. Raises BundleError if one is absent."""
        if absent := [name for name in names if getattr(self, name) is None]:
            raise BundleError(f"{CONFIG}: the keys {', '.join(absent)}, which {self.model_name} needs, are missing")
        return tuple(getattr(self, name) for name in names)


def import_btsbot(folder: Path, name: str, out: Path) -> None:
    """Write the bundle `name` into the new directory `out`. Raises as `read_btsbot` does."""
    config, network = read_btsbot(folder)
    image, _ = _branches(config)
    started = f"from {image.model_kind}" if image.model_kind and image.pretrained else "from random weights"
    columns = tuple(MetadataColumn(name=column, fill=FILLS.get(column, MISSING)) for column in _columns(config))
    with checked_name(name):
        description = Description(
            name=name,
            version=folder.resolve().name,
            task="bright transient or not",
            surveys=("ztf",),
            inputs=Inputs(images=TRIPLET, metadata=columns),
            outputs=Outputs(labels=(LABEL,), activation="sigmoid", thresholds={LABEL: 0.5}),
            architecture=_architecture(config),
            licence="MIT",
            source="https://github.com/nabeelre/BTSbot",
            citation="Rehemtulla et al. 2024, ApJ 972, 7 (arXiv:2401.15167); Rehemtulla et al. 2025 (arXiv:2512.11957)",
            training=Training(
                method=f"by its authors, {started}; see the citation",
                data="ZTF alerts of sources that the Bright Transient Survey has vetted; see the citation",
            ),
        )
    write_bundle(out, description, network)


def read_btsbot(folder: Path) -> tuple[TrainConfig, nn.Module]:
    """Return the configuration in the folder, and its network in evaluation mode.

    Raises BundleError if the configuration is not of a supported network, and WeightsError if the weights do not fit
    it.
    """
    config = _read_config(folder / CONFIG)
    network = build_network(_architecture(config))
    weights, parts = folder / WEIGHTS, _parts(config)

    def their_name(ours: str) -> str:
        fitting = (theirs + ours.removeprefix(part) for part, theirs in parts.items() if ours.startswith(part))
        return next(fitting, ours)

    load_weights(network, read_weights(weights), str(weights), their_name)
    return config, network.eval()


def _read_config(path: Path) -> TrainConfig:
    if not path.is_file():
        raise BundleError(f"{path}: no such file; a BTSbot folder has it beside {WEIGHTS}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BundleError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, the limit for a configuration")
    try:
        config = TrainConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path}: {describe_problems(error)}") from error
    if LEGACY_SURVEY in config.train_data_version:
        raise BundleError(f"{path}: trained on images of the Legacy Surveys, which alerts do not hold")
    return config


def _architecture(config: TrainConfig) -> Architecture:
    """Return the architecture of this package with the same layers."""
    arguments: dict[str, Any] = {}
    image, metadata = _branches(config)
    if image.model_name in {"um_cnn", "mm_cnn"}:
        *channels, kernel = image.get("conv1_channels", "conv2_channels", "conv_kernel")
        arguments |= {"channels": channels, "kernel": kernel}
    else:
        arguments |= {"backbone": backbone_name(*image.get("model_kind"))}
    if metadata is None:
        *hidden, dropout = config.get("fc1_neurons", "fc2_neurons", "dropout")
    else:
        *hidden, dropout = config.get("comb_fc1_neurons", "comb_fc2_neurons", "comb_dropout")
        *widths, rate = metadata.get("meta_fc1_neurons", "meta_fc2_neurons", "meta_dropout")
        arguments |= {"metadata": len(_columns(config)), "metadata_hidden": widths, "metadata_dropout": rate}
    arguments |= {"hidden": hidden, "dropout": dropout}
    if config.model_name == "frozen_fusion":
        arguments |= {"fusion": "frozen", "activation": "relu"}
    if config.model_name == "mm_ConvNeXt":
        arguments |= {"last_norm": "removed"}
    return Architecture(name="btsbot_cnn" if "kernel" in arguments else "timm", arguments=arguments)


def _branches(config: TrainConfig) -> tuple[TrainConfig, TrainConfig | None]:
    """Return the configuration of the image branch, and of the metadata branch or None."""
    image, metadata = config, config if config.model_name.startswith("mm_") else None
    if config.model_name == "frozen_fusion":
        image, metadata = config.get("image_model_config", "meta_model_config")
    if image.model_name not in PARTS or (image is not config and image.model_name.startswith("mm_")):
        raise BundleError(f"{CONFIG}: {image.model_name} is not an image network")
    return image, metadata


def _columns(config: TrainConfig) -> tuple[str, ...]:
    """Return the metadata columns in the order in which the network takes them.

    Raises BundleError if alerts do not have a column, if a column is repeated, or if the branch was trained with
    another order.
    """
    _, metadata = _branches(config)
    if metadata is None:
        return ()
    columns: tuple[str, ...]
    (columns,), (trained,) = config.get("metadata_cols"), metadata.get("metadata_cols")
    if columns != trained:
        raise BundleError(
            f"{CONFIG}: metadata_cols has another order than in meta_model_config, with which the branch was trained"
        )
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise BundleError(f"{CONFIG}: metadata_cols names {', '.join(twice)} more than once")
    try:
        select_columns(columns)
    except ValueError as error:
        raise BundleError(f"{CONFIG}: metadata_cols: {error}") from error
    return columns


def _parts(config: TrainConfig) -> dict[str, str]:
    """Return the prefixes of parameter names; see PARTS."""
    image, _ = _branches(config)
    parts = PARTS[image.model_name]
    if config.model_name != "frozen_fusion":
        return parts
    encoder = {ours: f"image_branch.{theirs}" for ours, theirs in parts.items() if ours.startswith("encoder.")}
    return {**encoder, "metadata_branch.": "meta_branch.network.", "head.": "combined_head."}
