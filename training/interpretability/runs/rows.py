"""A run: the directory with everything that is known of one attention layer, from activations to named features.

    RUN/run.yaml            the card, written last: without it the run is incomplete
    RUN/alerts/             the data set of the real and simulated alerts, unless another run's is used
    RUN/rows.safetensors    the activations: one row a query token of an alert
    RUN/sae/SEED/           the dictionary of each seed, in SAELens's format
    RUN/features.csv        the features, with names that a person gives; RUN/measures.json: the figures of the site

`collect` and `train_run` write it, and every other command of the lens reads it through `open_run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_weights
from torch import nn

from broker_filter.config import Section, SurveyName
from broker_filter.scoring.bundle import (
    MAX_CARD_BYTES,
    WEIGHTS,
    ModelName,
    Part,
    Sha256,
    describe_problems,
    open_bundle,
)
from broker_filter.scoring.networks import load_network
from broker_filter.scoring.sparse_dictionary import DictionarySource, SparseDictionary, read_dictionary
from training.atomic_write import write_whole
from training.data.datasets import SPLITS, Dataset, sha256_of
from training.errors import LensError
from training.interpretability.sites.open_site import Site, open_site
from training.interpretability.train_autoencoder import Recipe

RUN_CARD = "run.yaml"
ROWS = "rows.safetensors"
ALERTS = "alerts"
DICTIONARIES = "sae"
FEATURES = "features.csv"
MEASURES = "measures.json"
TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")
MAX_ROWS_BYTES = 2**33
"""Largest file of rows: 10 million rows of 200 dimensions."""


class RunCard(Section):
    """The contents of `run.yaml`."""

    format: Literal[1] = 1
    bundle: str = Field(description="Name of a shipped bundle, or the directory of another.")
    name: ModelName
    version: str
    weights_sha256: Sha256 = Field(description="sha256 of the weights of the network.")
    survey: SurveyName = Field(description="A survey that the network scores: it names the network in its bundle.")
    site: str
    heads: int = Field(gt=0)
    d_head: int = Field(gt=0)
    alerts: str = Field(description="Directory of the data set, relative to the run if it lies in it.")
    dataset_sha256: Sha256
    rows_sha256: Sha256 = Field(description="sha256 of the arrays of rows.")
    most_rows: int = Field(gt=0, description="Largest number of rows of one alert; more are drawn from at random.")
    split: str = Field(description="The rule of the split, and the alerts that dictionaries are trained on.")
    recipe: Recipe | None = Field(default=None, description="How the dictionaries were trained; null: not yet.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="Seeds of finished dictionaries.")


@dataclass(frozen=True, slots=True)
class CollectedRows:
    """The activations of N alerts at a site: T rows."""

    z: NDArray[np.float32]  # [T, d]
    alert: NDArray[np.int64]  # [T] position of the row's alert in the data set, ascending
    query: NDArray[np.int64]  # [T] query token of the row within its alert
    is_real: NDArray[np.bool_]  # [N]
    split: NDArray[np.int64]  # [N] index into SPLITS

    @property
    def sha256(self) -> str:
        """The sha256 of the arrays."""
        return sha256_of(self.z, self.alert, self.query, self.is_real, self.split)

    @property
    def training(self) -> NDArray[np.float32]:
        """The rows that dictionaries are trained on, float32[., d]: those of alerts of the split `train`."""
        chosen: NDArray[np.bool_] = self.split[self.alert] == TRAIN
        return self.z[chosen]


@dataclass(frozen=True)
class Run:
    """An open run. Arrays, data set and network are read when they are first used."""

    directory: Path
    card: RunCard

    @cached_property
    def rows(self) -> CollectedRows:
        """The activations. Raises LensError if the file is damaged, or of another run."""
        file = self.directory / ROWS
        try:
            if (size := file.stat().st_size) > MAX_ROWS_BYTES:
                raise LensError(f"{file}: has {size} bytes; rows may have at most {MAX_ROWS_BYTES}")
            arrays = load_file(file)
            rows = CollectedRows(**arrays)
        except (OSError, SafetensorError, TypeError) as error:
            raise LensError(f"{file}: cannot be read as rows ({error}): collect the run again") from error
        if rows.sha256 != self.card.rows_sha256:
            raise LensError(f"{file}: its sha256 is not the one in {RUN_CARD}: collect the run again")
        return rows

    @cached_property
    def alerts(self) -> Dataset:
        """The data set. Raises DatasetError if it is absent, and LensError if it is not the one of the rows."""
        dataset = Dataset.open(self.directory / self.card.alerts)
        if dataset.card.sha256 != self.card.dataset_sha256:
            raise LensError(f"{dataset.directory}: not the data set that {self.directory} was collected from")
        return dataset

    @cached_property
    def part(self) -> Part:
        """The network's files. Raises BundleError if there is no such bundle, and LensError if its weights differ."""
        part = open_bundle(self.card.bundle).part(self.card.survey)
        if part.card.files[WEIGHTS] != self.card.weights_sha256:
            raise LensError(
                f"{self.directory}: was collected from {self.card.name} {self.card.version} with other weights than "
                f"those of {self.card.bundle} now: collect a run of the present bundle"
            )
        return part

    @cached_property
    def network(self) -> nn.Module:
        """The network in torch, in evaluation mode, with its own outputs (logits, embedding, modalities)."""
        return load_network(self.part.card.architecture, load_weights(self.part.directory / WEIGHTS))

    @cached_property
    def site(self) -> Site:
        """The attention layer."""
        return open_site(self.network, self.card.site)

    @cached_property
    def dictionaries(self) -> list[SparseDictionary]:
        """The dictionaries in the order of `card.seeds`. Raises LensError if none was trained."""
        if not self.card.seeds:
            raise LensError(f"{self.directory}: has no dictionary yet: run `python -m training sae train` on it")
        return [self._dictionary(seed) for seed in self.card.seeds]

    @property
    def source(self) -> DictionarySource:
        """What the cards of the dictionaries say of their activations."""
        card = self.card
        return DictionarySource(
            bundle=card.name,
            version=card.version,
            weights_sha256=card.weights_sha256,
            site=card.site,
            heads=card.heads,
            d_head=card.d_head,
            split=card.split,
        )

    def _dictionary(self, seed: int) -> SparseDictionary:
        directory = self.directory / DICTIONARIES / str(seed)
        dictionary, card = read_dictionary(directory)
        if card.metadata != self.source:
            raise LensError(f"{directory}: was trained on other activations than those of {self.directory}")
        return dictionary


def open_run(directory: Path) -> Run:
    """Open a run. Raises LensError if it is absent, incomplete or damaged."""
    file = directory / RUN_CARD
    if not file.is_file():
        half = any((directory / name).exists() for name in (ALERTS, f"{ALERTS}.unfinished", ROWS))
        why = f"incomplete: it has no {RUN_CARD} yet" if half else f"not a run: there is no {RUN_CARD}"
        raise LensError(f"{directory}: {why}; `python -m training sae collect` writes one")
    try:
        if (size := file.stat().st_size) > MAX_CARD_BYTES:
            raise LensError(f"{file}: has {size} bytes; a card may have at most {MAX_CARD_BYTES}")
        content: Any = yaml.safe_load(file.read_bytes())
        return Run(directory, RunCard.model_validate(content))
    except yaml.YAMLError as error:
        raise LensError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise LensError(f"{file}: {describe_problems(error)}") from error


def write_rows(directory: Path, rows: CollectedRows) -> None:
    """Write the rows of a run atomically."""
    arrays = {name: getattr(rows, name) for name in ("z", "alert", "query", "is_real", "split")}
    write_whole(directory / ROWS, lambda path: save_file(arrays, path))


def write_card(directory: Path, card: RunCard) -> None:
    """Write the card of a run atomically."""
    text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    write_whole(directory / RUN_CARD, text.encode())
