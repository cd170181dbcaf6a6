"""Training configurations: every value of a training, read from a file. An unknown key is an error.

The defaults are the published ones of Rehemtulla et al. 2025 (arXiv:2512.11957) for fine-tuning ConvNeXt:
`train_configs/convnext.json` and `btsbot/train.py` of https://github.com/nabeelre/BTSbot. Three defaults differ, and
their descriptions give the published value: `least_improvement`, `frozen_branches` and `corrupt`. Other differences,
of which the first three do not apply to BTSbot's published set (`build-dataset --btsbot`):

- Selection of alerts: BTSbot keeps positive differences in g and r with a Pan-STARRS source. Here this needs
  `build-dataset --where 'isdiffpos and band in ("g", "r") and (sgscore1 >= 0 or sgscore2 >= 0)'`.
- Split: BTSbot also splits by source, but not within each class; see `SplitRule`.
- Alerts per source: for variable stars and known junk, BTSbot takes the latest N_max alerts of a source, in every
  split. Here N_max alerts of a source are drawn at random, in training only, as BTSbot does for other sources.
- Frozen fusion: BTSbot has ReLU in the metadata branch and in the joint head, whatever the image network has. Here
  this needs `activation: relu` in the arguments.
- Calibration after training (`vision/calibrate.py`): BTSbot's probabilities keep the shift that class weights cause.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from broker_filter.config import Section
from broker_filter.packets.batch import PSF_SIZE
from broker_filter.scoring.bundle import Architecture, ImageInput, ModelName, PsfInput, describe_problems
from training.atomic_write import write_whole
from training.errors import TrainingError

MAX_FILE_BYTES = 2**20
"""Largest configuration that is read. It has some dozens of lines, so a larger file was named by mistake."""

PUBLISHED_IMAGES = ImageInput(
    size=63, order=("science", "template", "difference"), normalisation="l2_image", padding=1e-9
)
"""The preprocessing in `make_triplet` of BTSbot's `alert_utils.py`."""

CONFIGURATION = "configuration.yaml"
"""File with the configuration with which a directory was started."""
ENCODER_WEIGHTS = "encoder.safetensors"
"""File with the weights of the encoder that `pretrain` trained."""
ENCODER_CARD = "encoder.yaml"
"""File beside the weights that `pretrain` writes, with the origin of these weights."""

Rate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of 32 bits. Learners multiply it by 2^20, and torch takes 64 bits."""
Configuration = TypeVar("Configuration", bound=Section)


class Optimisation(Section):
    """The optimisation: AdamW, linear warm-up and cosine decay of the learning rate, early stopping."""

    epochs: int = Field(default=25, gt=0)
    batch: int = Field(default=64, gt=1, description="Images per step on each device.")
    learning_rate: float = Field(
        default=5e-6, gt=0, description="Peak learning rate; the default suits pre-trained weights."
    )
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.999), description="Decay rates of AdamW's two moments.")
    weight_decay: float = Field(default=0.01, ge=0, description="torch's default, as published.")
    warm_up_epochs: int = Field(default=2, ge=0, description="Epochs of linear warm-up.")
    least: float = Field(
        default=0.01, gt=0, le=1, description="Initial and final learning rate, as a fraction of the peak."
    )
    patience: int = Field(default=5, gt=0, description="Epochs without a lower validation loss before training stops.")
    least_improvement: Rate = Field(
        default=0,
        description="Relative improvement over the lowest validation loss so far that an epoch needs to count as "
        "better; otherwise its weights are not kept and it counts towards `patience`. BTSbot's code has 0.005.",
    )
    augment: bool = Field(
        default=True, description="Flip every image and rotate it by multiples of 90 degrees, at random."
    )
    seed: Seed = 2

    @model_validator(mode="after")
    def _ends_after_warming_up(self) -> Self:
        if self.warm_up_epochs >= self.epochs:
            raise ValueError(f"warm_up_epochs ({self.warm_up_epochs}) must be fewer than epochs ({self.epochs})")
        return self


class Recipe(Optimisation):
    """The training of a classifier, and the selection of a data set's alerts for it."""

    balance: bool = Field(default=True, description="Weight the classes so that each has the same total weight.")
    max_alerts_per_source: int = Field(
        default=100, gt=0, description="N_max: alerts of an object to train on, chosen at random."
    )
    fraction: float = Field(
        default=1, gt=0, le=1, description="Fraction of the training sources of each class that is used."
    )
    corrupt: Literal["kept", "dropped"] = Field(
        default="kept",
        description="Whether to keep training and validation alerts with a cutout whose median is infinite or whose "
        "pixels are all zero or missing. BTSbot drops such alerts from every split; here the test split keeps them, "
        "because the service scores them.",
    )
    frozen_branches: Literal["evaluation", "training"] = Field(
        default="evaluation",
        description="Mode of the frozen branches while the head of a frozen fusion is trained. In training mode, as in "
        "BTSbot, dropout is active and batch normalisation continues to learn means and variances.",
    )


class Hardware(Section):
    """The hardware of a training. Several devices share each step by distributed data parallelism."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    workers: int = Field(default=0, ge=0, description="Worker processes that read and preprocess alerts.")
    threads: int | None = Field(default=None, gt=0, description="Threads of torch on a CPU; absent: torch's default.")


class Encoder(Section):
    """Pre-trained weights with which the encoder is initialised."""

    regimen: str = Field(
        description="Name of the pre-training in the card and in tables, such as imagenet or galaxies."
    )
    source: str = Field(
        description="Source for `broker_filter.importers.encoders`: a file, a folder or a name on the hub."
    )


class Fit(Section):
    """The training of one network, from a data set to a bundle."""

    name: ModelName = Field(description="Name of the bundle, the prefix of its outputs.")
    version: str = "1"
    dataset: Path = Field(description="Directory of a data set that build-dataset wrote.")
    out: Path = Field(description="Directory for checkpoints, logs, the bundle and its predictions.")
    architecture: Architecture = Field(
        description="Architecture without the arguments `labels`, `metadata` and `psf`, which are set here."
    )
    encoder: Encoder | None = Field(default=None, description="Pre-trained encoder; absent: random weights.")
    metadata: tuple[str, ...] = Field(
        default=(),
        description="Metadata columns that the network takes besides the images; -999 replaces missing values.",
    )
    images: ImageInput = PUBLISHED_IMAGES
    psf: PsfInput | None = Field(
        default=None,
        description="PSF images that the network takes as further channels of its images; absent: none. Their size is "
        "that of the images. A pre-trained encoder has no such channels.",
    )
    recipe: Recipe = Recipe()
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)
    licence: str = "unstated"
    citation: str = "none"

    @model_validator(mode="after")
    def _joins_psf_and_images(self) -> Self:
        if self.psf is None:
            return self
        if self.psf.size != self.images.size:
            raise ValueError(
                f"psf.size ({self.psf.size}) must be images.size ({self.images.size}), since PSF images are further "
                f"channels of the images; choose at most {PSF_SIZE} for both"
            )
        if self.encoder is not None:
            raise ValueError("psf cannot be used with encoder: pre-trained weights have no channels for PSF images")
        return self


def read_configuration(kind: type[Configuration], file: Path) -> Configuration:
    """Read a YAML file as a `kind` of configuration. Raises TrainingError with all problems of the file."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise TrainingError(f"{file}: larger than {MAX_FILE_BYTES} bytes, the limit for a configuration")
        return kind.model_validate(yaml.safe_load(file.read_bytes()))
    except yaml.YAMLError as error:
        raise TrainingError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise TrainingError(f"{file}: {describe_problems(error)}") from error


def begin(out: Path, config: Section) -> None:
    """Create the directory of a training, or check that it was started with the same configuration.

    Raises TrainingError if it holds files of a training with another configuration, because resuming would mix the two.
    """
    path = out / CONFIGURATION
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return
        if any(other != path for other in out.iterdir()):
            raise TrainingError(f"{out}: was started with another configuration, see {path}: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode())
