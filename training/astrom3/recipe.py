"""Training configurations of AstroM3: the published values for each mode, and the changes that a file makes to them."""

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
"""Published values by mode and label subset. The suffix `-clip` of a mode means a start from the pre-trained
encoders."""


class Recipe(Optimisation):
    """Adam with linear warm-up; the learning rate is reduced by a factor when the validation loss stops improving."""

    epochs: int = Field(default=50, gt=0)
    batch: int = Field(default=512, gt=1)
    warm_up_epochs: int = Field(default=10, ge=0)
    least: float = Field(default=1e-5, gt=0, le=1, description="Initial learning rate, as a fraction of the peak.")
    patience: int = Field(default=6, gt=0)
    augment: Literal[False] = False
    plateau_factor: float = Field(gt=0, lt=1, description="Factor of a reduction of the learning rate.")
    plateau_patience: int = Field(
        default=3, gt=0, description="Epochs without a lower validation loss before a reduction."
    )
    max_gradient_norm: float | None = Field(
        default=None, gt=0, description="Gradients with a larger norm are clipped to this norm."
    )
    sampled_keys: bool = Field(default=True, description="Train ProbSparse attention with random keys, as published.")


class AstroM3Run(Section):
    """The keys of a training's YAML file: a published training, and the values that differ from it."""

    mode: Mode = Field(
        description="clip: contrastive pre-training; any other mode names the modalities of a classifier."
    )
    subset: Subset = Field(default="full", description="Subset of the stars and labels to train on.")
    pretrained: Path | None = Field(
        default=None, description="Checkpoint of mode clip to start from; absent: random weights."
    )
    stars: Path = Field(description="A directory in one of the layouts that `training.astrom3.stars` reads.")
    out: Path
    seed: Seed = Field(default=42, description="Seed of the split and the weights; published: 42, 0, 66, 12, 123.")
    recipe: dict[str, Any] = Field(
        default={}, description="Keys of `Recipe` whose values differ from the published ones."
    )
    arguments: dict[str, Any] = Field(
        default={}, description="Keys of `AstroM3Arguments` whose values differ from the published ones."
    )
    hardware: Hardware = Hardware()
    logs: tuple[Literal["csv", "tensorboard"], ...] = ("csv",)

    @model_validator(mode="after")
    def _is_published(self) -> Self:
        if self.published not in PUBLISHED:
            raise ValueError(f"{self.published} is not a published training; choose one of {', '.join(PUBLISHED)}")
        _ = self.plan, self.network
        return self

    @property
    def published(self) -> str:
        """The name of the published training."""
        return f"{self.mode}-{self.subset}" + ("-clip" if self.pretrained else "")

    @property
    def plan(self) -> Recipe:
        """The hyperparameters of the training."""
        return Recipe(**{**PUBLISHED[self.published]["recipe"], **self.recipe, "seed": self.seed})

    @property
    def network(self) -> AstroM3Arguments:
        """The arguments of the network; a network of a single modality uses its part of them."""
        arguments = {**PUBLISHED[self.published]["arguments"], **self.arguments}
        return AstroM3Arguments(**arguments, classification=self.mode != "clip")
