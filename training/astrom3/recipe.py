"""What AstroM3 is trained with: the published values, by mode, and what a file changes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from broker_filter.config import Section
from training.astrom3.model.network import AstroM3Arguments
from training.astrom3.stars import Subset
from training.recipe import Hardware, Optimisation, Seed

Mode = Literal["clip", "photo", "spectra", "meta", "all"]
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("published.yaml").read_bytes()
)
"""By mode, labels and, with `-clip`, beginning from the pre-trained encoders."""


class Recipe(Optimisation):
    """Adam; a learning rate that rises as a line, and falls by a factor where the validation loss stays."""

    epochs: int = Field(default=50, gt=0)
    batch: int = Field(default=512, gt=1)
    warm_up_epochs: int = Field(default=10, ge=0)
    least: float = Field(default=1e-5, gt=0, le=1, description="Where the rise begins, of the peak.")
    patience: int = Field(default=6, gt=0)
    augment: Literal[False] = False
    plateau_factor: float = Field(gt=0, lt=1, description="What the learning rate is multiplied by.")
    plateau_patience: int = Field(default=3, gt=0, description="Epochs without a lower validation loss before it is.")
    max_gradient_norm: float | None = Field(default=None, gt=0, description="Longer gradients are shortened to it.")
    sampled_keys: bool = Field(default=True, description="Train ProbSparse attention with random keys, as published.")


class AstroM3Run(Section):
    """`ASTROM3.yaml`: a published training, and what is different from it."""

    mode: Mode = Field(description="clip: contrastive pre-training; else what a classifier is shown.")
    subset: Subset = Field(default="full", description="The labels that it is given.")
    pretrained: Path | None = Field(default=None, description="A checkpoint of mode clip; absent: random weights.")
    stars: Path = Field(description="A directory in one of the layouts that `training.astrom3.stars` reads.")
    out: Path
    seed: Seed = Field(default=42, description="Of the split and of the weights; published: 42, 0, 66, 12, 123.")
    recipe: dict[str, Any] = Field(default={}, description="Keys of `Recipe` with other values than published.")
    arguments: dict[str, Any] = Field(default={}, description="Keys of `AstroM3Arguments` with other values.")
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)

    @model_validator(mode="after")
    def _is_published(self) -> Self:
        if self.published not in PUBLISHED:
            raise ValueError(f"{self.published} is no published training; there are {', '.join(PUBLISHED)}")
        _ = self.plan, self.network
        return self

    @property
    def published(self) -> str:
        """The name of the published training."""
        return f"{self.mode}-{self.subset}" + ("-clip" if self.pretrained else "")

    @property
    def plan(self) -> Recipe:
        """How the weights are found."""
        return Recipe(**{**PUBLISHED[self.published]["recipe"], **self.recipe, "seed": self.seed})

    @property
    def network(self) -> AstroM3Arguments:
        """What the network is made with; one of a single modality, with its part of it."""
        arguments = {**PUBLISHED[self.published]["arguments"], **self.arguments}
        return AstroM3Arguments(**arguments, classification=self.mode != "clip")
