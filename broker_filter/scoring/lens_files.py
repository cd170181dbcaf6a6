"""The files of a lens: a directory that describes what the features of one attention layer mean.

`lens.yaml` (the card) names the network by the sha256 of its weights and lists the other files with their sha256:
`cfg.json` and `sae_weights.safetensors` (the sparse dictionary), `features.csv` (names), `statistics.safetensors` (the
features of ordinary alerts), `to_z.onnx` and `from_z.onnx` (the network before and after the layer), and
`test_vector.safetensors` (what these must give for the alerts of the bundle's test vector). Bundles stay as they are.

Nothing in a lens is ever unpickled, sizes are checked before a file is read, and no file outside its directory is read.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from broker_filter.config import Section, SurveyName
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import (
    MAX_CARD_BYTES,
    FileName,
    ModelName,
    Sha256,
    describe_problems,
)
from broker_filter.scoring.sparse_dictionary import (
    CONFIGURATION,
    DICTIONARY_WEIGHTS,
    DictionaryError,
    SparseDictionary,
    read_dictionary,
)

LENS_CARD = "lens.yaml"
FEATURES = "features.csv"
STATISTICS = "statistics.safetensors"
TO_Z = "to_z.onnx"
FROM_Z = "from_z.onnx"
KNOWN = "test_vector.safetensors"
FILES = (CONFIGURATION, DICTIONARY_WEIGHTS, FEATURES, STATISTICS, TO_Z, FROM_Z, KNOWN)
"""The files of a lens besides its card."""

SHIPPED = Path(__file__).parents[1] / "lenses"
MAX_FILE_BYTES = 2**28
"""Largest file of a lens; the largest image network here has 120 MB."""
MAX_NAME = 80
"""Characters of a feature's name; it is repeated in each output record that it explains."""
MAX_CELLS = 4096
"""Source tokens of an image; the networks have at most some hundred."""
ANOMALY_SCORE = "anomaly_score"
"""The value of `effect_on` of a lens whose network gives the embedding that anomalies are found with."""


class LensError(BrokerFilterError):
    """A lens cannot be used. The message says which file, what is wrong with it and what to do."""


class NoLensError(LensError):
    """There is no lens of this name, or in this directory."""

    exit_status = USAGE


class LensBundle(Section):
    """The bundle whose network a lens explains."""

    name: ModelName
    version: str = Field(min_length=1, max_length=MAX_NAME)
    weights_sha256: Sha256 = Field(description="sha256 of the weights of the network.")


class OrdinaryAlerts(Section):
    """The alerts of a survey with which an alert's features are compared."""

    alerts: int = Field(gt=0, description="Number of ordinary alerts.")
    source: str = Field(min_length=1, max_length=200, description="Where they come from, such as simulated.")


class LensCard(Section):
    """The contents of `lens.yaml`."""

    format: Literal[1] = 1
    name: ModelName
    version: str = Field(min_length=1, max_length=MAX_NAME)
    bundle: LensBundle
    site: str = Field(min_length=1, max_length=MAX_NAME, description="Name of the attention layer.")
    modality: ModelName = Field(description="What the layer sees: `light_curve` or `image`.")
    effect_on: ModelName = Field(
        description="What the ablation of a feature is measured on: `anomaly_score`, or a label of the bundle."
    )
    heads: int = Field(gt=0, le=4096)
    d_head: int = Field(gt=0, le=4096)
    cells: tuple[tuple[int, int, int, int], ...] = Field(
        default=(),
        max_length=MAX_CELLS,
        description="For each source token of an image its cell (y0, x0, height, width) in pixels of the stamp; empty "
        "for light curves, whose source tokens are the learnt token and the points.",
    )
    ordinary: dict[SurveyName, OrdinaryAlerts] = Field(
        min_length=1, description="The ordinary alerts by survey. Alerts of other surveys are not explained."
    )
    worth: str = Field(
        min_length=1, max_length=2000, description="How far the lens can be trusted, in a few sentences."
    )
    measures: dict[str, float | int | str] = Field(default={}, description="Measured figures, and how.")
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _files_are_complete(self) -> LensCard:
        if self.files.keys() != set(FILES):
            raise ValueError(f"files: should list {', '.join(FILES)} and no other file")
        return self

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True)
class FeatureName:
    """What a person has called a feature; `stable`: other dictionaries, trained from other seeds, have it too."""

    name: str | None
    note: str
    stable: bool


@dataclass(frozen=True, slots=True)
class OrdinaryFeatures:
    """The features of the N ordinary alerts of a survey. An alert's activation is the largest of its queries."""

    activations: NDArray[np.float32]  # those above 0, feature after feature, ascending within a feature
    offsets: NDArray[np.int64]  # [F + 1] feature f owns activations[offsets[f]:offsets[f + 1]]
    unexplained: NDArray[np.float32]  # [N] ascending: unexplained shares
    mean: NDArray[np.float32]  # [d] mean z of their queries

    def active(self, feature: int) -> NDArray[np.float32]:
        """Return the ascending activations of the alerts in which the feature is active."""
        return self.activations[self.offsets[feature] : self.offsets[feature + 1]]


@dataclass(frozen=True, slots=True)
class LensFiles:
    """An opened lens: every file exists and has the sha256 that the card lists."""

    directory: Path
    card: LensCard
    dictionary: SparseDictionary
    names: Mapping[int, FeatureName]
    ordinary: Mapping[Survey, OrdinaryFeatures]
    known: Mapping[str, NDArray[np.float32]]
    """The test vector: z, pre_activations and output for the alerts of the bundle's test vector."""


def shipped_lenses() -> list[str]:
    """Return the names of the lenses that ship with the package, sorted."""
    return sorted(card.parent.name for card in SHIPPED.glob(f"*/{LENS_CARD}"))


def lens_directory(name_or_directory: str | Path) -> Path:
    """Return the directory of a lens that ships with the package under this name, else the given directory."""
    return SHIPPED / name_or_directory if str(name_or_directory) in shipped_lenses() else Path(name_or_directory)


def open_files(name_or_directory: str | Path) -> LensFiles:
    """Open a lens and check the sha256 of every file.

    `name_or_directory`: the name of a lens that ships with the package (`embedder`), else a directory.

    Raises NoLensError if there is no lens, and LensError, which names the file that is missing, altered or malformed.
    """
    directory = lens_directory(name_or_directory)
    card = _read_card(directory)
    for name, sha256 in card.files.items():
        data = _read(directory / name, MAX_FILE_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise LensError(
                f"{directory / name}: corrupted: its sha256 is {found}, but {LENS_CARD} lists {sha256}; copy the lens "
                "again"
            )
    try:
        dictionary, about = read_dictionary(directory)
    except DictionaryError as error:
        raise LensError(str(error)) from error
    made = about.metadata.weights_sha256, about.metadata.site, about.metadata.heads, about.metadata.d_head
    if made != (card.bundle.weights_sha256, card.site, card.heads, card.d_head):
        raise LensError(f"{directory / CONFIGURATION}: of another network or layer than {LENS_CARD}; export it again")
    features = len(dictionary.threshold)
    return LensFiles(
        directory,
        card,
        dictionary,
        _read_names(directory / FEATURES, features),
        _read_statistics(directory / STATISTICS, card, features),
        _arrays(directory / KNOWN),
    )


def _read_card(directory: Path) -> LensCard:
    path = directory / LENS_CARD
    if not path.is_file():
        half = [name for name in FILES if (directory / name).is_file()]
        if half:
            raise LensError(f"{directory}: half-written: it has {half[0]}, but no {LENS_CARD}; export the lens again")
        raise NoLensError(
            f"{directory}: not a lens: there is no {LENS_CARD} in it, and it is not the name of a shipped lens "
            f"({', '.join(shipped_lenses())})"
        )
    try:
        return LensCard.model_validate(yaml.safe_load(_read(path, MAX_CARD_BYTES)))
    except yaml.YAMLError as error:
        raise LensError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise LensError(f"{path}: {describe_problems(error)}") from error


def _read(path: Path, limit: int) -> bytes:
    """Return the bytes of a file. Raises LensError if it is missing, or has more than `limit` bytes."""
    if not path.is_file():
        raise LensError(f"{path}: missing; copy the whole lens again")
    if path.stat().st_size > limit:
        raise LensError(f"{path}: larger than {limit} bytes, the limit for this file of a lens")
    return path.read_bytes()


def _read_names(path: Path, features: int) -> dict[int, FeatureName]:
    """Return the names of features by id. Raises LensError if the table has other columns, or rows of no feature."""
    names = {}
    try:
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            feature = int(row["id"])
            if not 0 <= feature < features:
                raise LensError(f"{path}: there is no feature {feature}; the dictionary has {features}")
            name, note = printable(row["name"], MAX_NAME), printable(row["note"], 10 * MAX_NAME)
            names[feature] = FeatureName(name or None, note, row["stable"] == "true")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise LensError(f"{path}: not a table with the columns id, name, note, stable: {error}") from error
    return names


def printable(text: str, limit: int) -> str:
    """Return the first `limit` characters of a text, stripped, with "?" for characters that cannot be printed."""
    return "".join(character if character.isprintable() else "?" for character in text.strip()[:limit])


def _read_statistics(path: Path, card: LensCard, features: int) -> dict[Survey, OrdinaryFeatures]:
    """Return the statistics of each survey of the card. Raises LensError if arrays are missing or malformed."""
    arrays = _arrays(path)
    ordinary = {}
    for survey, alerts in card.ordinary.items():
        try:
            own = OrdinaryFeatures(
                arrays[f"{survey}.activations"].astype(np.float32),
                arrays[f"{survey}.offsets"].astype(np.int64),
                arrays[f"{survey}.unexplained"].astype(np.float32),
                arrays[f"{survey}.mean"].astype(np.float32),
            )
        except KeyError as error:
            raise LensError(f"{path}: the array {error} is missing; export the lens again") from error
        shapes = own.offsets.shape, own.unexplained.shape, own.mean.shape
        if shapes != ((features + 1,), (alerts.alerts,), (card.heads * card.d_head,)):
            raise LensError(f"{path}: the arrays of {survey} do not fit {LENS_CARD}; export the lens again")
        inside = own.offsets[0] == 0 and own.offsets[-1] == len(own.activations) and (np.diff(own.offsets) >= 0).all()
        ascending = all((np.diff(own.active(f)) >= 0).all() for f in range(features)) if inside else False
        if not (ascending and (np.diff(own.unexplained) >= 0).all() and np.isfinite(own.mean).all()):
            raise LensError(f"{path}: the arrays of {survey} are not in order; export the lens again")
        ordinary[Survey[survey.upper()]] = own
    return ordinary


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise LensError(f"{path}: not a safetensors file: {error}; export the lens again") from error


def sorted_activations(strongest: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return `activations` and `offsets` of OrdinaryFeatures for activations float32[N, F] of N ordinary alerts."""
    columns: Sequence[NDArray[np.float32]] = [np.sort(column[column > 0]) for column in strongest.T]
    offsets = np.concatenate([[0], np.cumsum([len(column) for column in columns])]).astype(np.int64)
    return np.concatenate(columns), offsets
