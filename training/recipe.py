"""What a network is trained with: every value, in a file. A misspelt key is an error.

Defaults are the published ones of Rehemtulla et al. 2025 (arXiv:2512.11957), fine-tuning ConvNeXt:
`train_configs/convnext.json` and `btsbot/train.py` of https://github.com/nabeelre/BTSbot. Where a default is not, the
key's description gives the published value: `least_improvement`, `frozen_branches` and `corrupt`. Other differences:

- Which alerts: BTSbot keeps positive differences in g and r with a Pan-STARRS source, here `build-dataset --where
  'isdiffpos and band in ("g", "r") and (sgscore1 >= 0 or sgscore2 >= 0)'`.
- The split is by source there too, but not within each class; see `SplitRule`.
- Of variable stars and known junk BTSbot takes the latest N_max alerts of a source, in every split; here N_max are
  drawn at random, of the split to train on alone, as it does for all other sources.
- Its frozen fusion has ReLU in the metadata branch and in the head over both, whatever the image network has: here
  `activation: relu` in the arguments.
- What `fit` does after training (`vision/calibrate.py`): BTSbot's probabilities keep the shift of the class weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from broker_filter.config import Section
from broker_filter.scoring.bundle import Architecture, ImageInput, ModelName, describe_problems
from training.atomic_write import write_whole
from training.errors import TrainingError

MAX_FILE_BYTES = 2**20
"""A file of configuration has some dozens of lines; anything near this is another file, named by mistake."""

PUBLISHED_IMAGES = ImageInput(
    size=63, order=("science", "template", "difference"), normalisation="l2_image", padding=1e-9
)
"""`make_triplet` in BTSbot's `alert_utils.py`."""

CONFIGURATION = "configuration.yaml"
"""What a directory was begun with."""
ENCODER_CARD = "encoder.yaml"
"""Beside the weights that `pretrain` writes: what they come from."""

Rate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Learners multiply it by 2^20, and torch takes 64 bits."""
Configuration = TypeVar("Configuration", bound=Section)


class Optimisation(Section):
    """How weights are found: AdamW, a learning rate that rises as a line and falls as a cosine, early stopping."""

    epochs: int = Field(default=25, gt=0)
    batch: int = Field(default=64, gt=1, description="Images a step, on each device.")
    learning_rate: float = Field(default=5e-6, gt=0, description="At its peak; made for pre-trained weights.")
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.999), description="Of AdamW's two moments.")
    weight_decay: float = Field(default=0.01, ge=0, description="torch's default, as published.")
    warm_up_epochs: int = Field(default=2, ge=0, description="In which the learning rate rises.")
    least: float = Field(default=0.01, gt=0, le=1, description="Where the rise begins and the fall ends, of the peak.")
    patience: int = Field(default=5, gt=0, description="Epochs without a lower validation loss before training stops.")
    least_improvement: Rate = Field(
        default=0,
        description="By which share the validation loss must be below the lowest of all earlier epochs for an epoch to "
        "count as better: else its weights are not kept, and patience runs out. BTSbot's code has 0.005.",
    )
    augment: bool = Field(default=True, description="Flip and turn every image at random, by right angles.")
    seed: Seed = 2

    @model_validator(mode="after")
    def _ends_after_warming_up(self) -> Self:
        if self.warm_up_epochs >= self.epochs:
            raise ValueError(f"warm_up_epochs: {self.warm_up_epochs} of {self.epochs} epochs leave none to train in")
        return self


class Recipe(Optimisation):
    """How a classifier is trained, and on which of a data set's alerts."""

    balance: bool = Field(default=True, description="Weigh the classes as if they had as many alerts each.")
    max_alerts_per_source: int = Field(default=100, gt=0, description="N_max: of an object's, chosen at random.")
    fraction: float = Field(default=1, gt=0, le=1, description="Of the training sources of each class.")
    corrupt: Literal["kept", "dropped"] = Field(
        default="kept",
        description="Alerts to train on and to stop by with a cutout whose median is infinite or whose pixels are all "
        "zero or missing. BTSbot drops such alerts from every split; here the test split keeps them, because the "
        "service scores them.",
    )
    frozen_branches: Literal["evaluation", "training"] = Field(
        default="evaluation",
        description="The mode of the branches under frozen fusion while the head is trained. In training mode, which "
        "BTSbot leaves them in, dropout is active and batch normalisation goes on learning means and variances.",
    )


class Hardware(Section):
    """What trains. Several devices share each step, by distributed data parallelism."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    workers: int = Field(default=0, ge=0, description="Processes that read and prepare alerts.")
    threads: int | None = Field(default=None, gt=0, description="torch's, on a CPU; its own choice where absent.")


class Encoder(Section):
    """Weights that the encoder begins with, instead of random ones."""

    regimen: str = Field(description="What to call the pre-training, in the card and in tables: imagenet, galaxies.")
    source: str = Field(description="What `broker_filter.importers.encoders` reads: a file, a folder or a hub's name.")


class Fit(Section):
    """A network to train, from the data set to the bundle."""

    name: ModelName = Field(description="The bundle's name, which prefixes its outputs.")
    version: str = "1"
    dataset: Path = Field(description="What build-dataset wrote.")
    out: Path = Field(description="Checkpoints, logs, the bundle and its predictions go here.")
    architecture: Architecture = Field(description="Without `labels` and `metadata`, which are counted here.")
    encoder: Encoder | None = Field(default=None, description="Absent: random weights.")
    metadata: tuple[str, ...] = Field(
        default=(), description="Columns that the network takes besides the images; a missing value is -999."
    )
    images: ImageInput = PUBLISHED_IMAGES
    recipe: Recipe = Recipe()
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)
    licence: str = "unstated"
    citation: str = "none"


def read_configuration(kind: type[Configuration], file: Path) -> Configuration:
    """The YAML file as a `kind`. Raises TrainingError with everything that is wrong with it."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise TrainingError(f"{file}: larger than {MAX_FILE_BYTES} bytes, which no configuration is")
        return kind.model_validate(yaml.safe_load(file.read_bytes()))
    except yaml.YAMLError as error:
        raise TrainingError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise TrainingError(f"{file}: {describe_problems(error)}") from error


def begin(out: Path, config: Section) -> None:
    """Makes the directory of a training, or checks that it was made with the same configuration.

    Raises TrainingError where it was another and left anything: that would be gone on with as if it were this one's.
    """
    path = out / CONFIGURATION
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return
        if any(other != path for other in out.iterdir()):
            raise TrainingError(f"{out}: was begun with another configuration, see {path}: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode())
