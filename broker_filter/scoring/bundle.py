"""Model bundles: a directory that says everything about a model, and holds it.

`bundle.yaml` (the card) names the other files with their sha256: `weights.safetensors` (the network's parameters, for
torch), `model.onnx` (the same network, for onnxruntime) and `test_vector.safetensors` (raw inputs with the outputs that
they must give). Nothing in a bundle is ever unpickled or run as code, and no file outside its directory is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from broker_filter.config import SurveyName
from broker_filter.packets.batch import BANDS, LightCurves, Measurement
from broker_filter.scoring.alerts import RawAlerts

CARD = "bundle.yaml"
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"
TEST_VECTOR = "test_vector.safetensors"

SHIPPED = Path(__file__).parents[1] / "bundles"
MAX_CARD_BYTES = 2**20
MAX_FILE_BYTES = 2**31
"""What an ONNX file can hold at most (protobuf's limit); no network that keeps up with a stream comes near it."""
MAX_CUTOUT_SIZE = 512
"""Pixels a side. The largest stamps published have 102; the bound keeps a bad card from asking for gigabytes."""
MAX_TEST_ALERTS = 64
PROBABILITIES = "probabilities"
"""The first of a network's outputs."""
MAX_TOLERANCE = 0.1
"""Of log-odds, 2.5 % of a probability at most: a network that rounding moves further is of no use."""
POINTS = "light_curves."
"""Prefix of what `LightCurves` holds, in a test vector."""
POINT_COLUMNS: dict[str, type[np.generic]] = {
    "mjd": np.float64,
    "band": np.uint8,
    "flux": np.float32,
    "flux_err": np.float32,
    "kind": np.uint8,
}
LIGHT_CURVE_FEATURES = 3 + len(BANDS) + len(Measurement)
"""Of a point, in this order: time before the alert, flux and error, scaled; the band, of BANDS, and the kind of
measurement, each as a row of a unit matrix; zeros for a band that is not known."""
MAX_POINTS = 1024
"""Of a light curve: attention looks from each at each, and the bound keeps a bad card from asking for gigabytes."""

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
"""An identifier: output columns of tables (`d6_m7__real`) and names in filters (`d6_m7.real`) begin with it."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""A file beside the card: no separators, no leading dot, so that no name leads out of the bundle."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class BundleError(Exception):
    """A bundle that cannot be used: which file, what is wrong with it, what to do."""


class NoBundleError(BundleError):
    """A bundle that is not there."""

    exit_status = 2


class CardSection(BaseModel):
    """A mapping of the card: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageInput(CardSection):
    """What the network sees of the cutouts: float32 `images` of shape [N, len(order), size, size]."""

    size: int = Field(gt=0, le=MAX_CUTOUT_SIZE, description="Pixels a side.")
    order: tuple[Literal["science", "template", "difference"], ...] = Field(min_length=1)
    normalisation: Literal["l2_row", "l2_image"] = Field(
        description="Every image row, or the whole image, divided by its L2 norm."
    )
    padding: float = Field(description="Value outside the real pixels, set after normalisation.")
    resize: Literal["centre"] = Field(
        default="centre", description="Larger stamps are cropped about their centre pixel."
    )


class MetadataColumn(CardSection):
    """A metadata column as the network was trained on it."""

    name: str
    fill: float = Field(
        description="The constant that stands for a missing value: one that no value has, such as -999, or any where a "
        "`flag` tells the network that the value is missing."
    )
    flag: bool = Field(
        default=False,
        description="The network takes another column, 1 where the value is missing and 0 where it is not.",
    )


class LightCurveInput(CardSection):
    """What the network sees of the light curve: float32 `light_curve` [N, points, features] and `light_curve_mask`
    [N, points], 1 where there is a point and 0 where there is none. See LIGHT_CURVE_FEATURES."""

    points: int = Field(gt=0, le=MAX_POINTS, description="How many are kept, the latest; none is after the alert.")
    flux_scale: float = Field(gt=0, description="nJy; fluxes are linear below it and logarithmic beyond (asinh).")
    time_scale: float = Field(gt=0, description="Days before the alert; likewise (log1p).")


class Inputs(CardSection):
    """What the network takes."""

    images: ImageInput
    metadata: tuple[MetadataColumn, ...] = Field(
        default=(),
        description="The columns of the float32 input `metadata` [N, F], in order, and after them their flags, in the "
        "same order; none: there is no such input.",
    )
    light_curve: LightCurveInput | None = Field(default=None, description="None: there are no such inputs.")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an alert's inputs, by name, in the order in which the network takes them."""
        shapes: dict[str, tuple[int, ...]] = {"images": (len(self.images.order), self.images.size, self.images.size)}
        if self.metadata:
            shapes["metadata"] = (len(self.metadata) + sum(column.flag for column in self.metadata),)
        if self.light_curve is not None:
            shapes["light_curve"] = (self.light_curve.points, LIGHT_CURVE_FEATURES)
            shapes["light_curve_mask"] = (self.light_curve.points,)
        return shapes


class Outputs(CardSection):
    """What the network gives: float32 `probabilities` [N, C] and, where a size is named, `embedding` [N, D].

    Where modalities are named, also `modalities` [N, M, D / M]: what the embedding has side by side, a vector of length
    1 for each, zeros where the alert lacks it. The embedding then has length 1, too.
    """

    labels: tuple[ModelName, ...] = Field(min_length=1)
    activation: Literal["sigmoid", "softmax"]
    surveys: dict[str, tuple[SurveyName, ...]] = Field(
        default={},
        description="By label, the surveys for which this output was trained, where the network takes the alerts of "
        "more. The output is null for the alerts of the others.",
    )
    thresholds: dict[str, float] = Field(default={}, description="Recommended cuts by label.")
    embedding: int | None = Field(default=None, gt=0)
    modalities: tuple[ModelName, ...] = Field(default=(), description="In order: image, light_curve, ...")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an alert's outputs, by name, in the order in which the network gives them."""
        shapes: dict[str, tuple[int, ...]] = {PROBABILITIES: (len(self.labels),)}
        if self.embedding is not None:
            shapes["embedding"] = (self.embedding,)
            if self.modalities:
                shapes["modalities"] = (len(self.modalities), self.embedding // len(self.modalities))
        return shapes

    @model_validator(mode="after")
    def _modalities_are_side_by_side(self) -> Outputs:
        if self.modalities and (self.embedding is None or self.embedding % len(self.modalities)):
            raise ValueError(f"{len(self.modalities)} modalities of one size make no embedding of {self.embedding}")
        return self

    @model_validator(mode="after")
    def _thresholds_and_surveys_are_of_labels(self) -> Outputs:
        for what, by_label in (("thresholds", self.thresholds), ("surveys", self.surveys)):
            if unknown := by_label.keys() - set(self.labels):
                raise ValueError(f"{what} for labels that do not exist: {', '.join(sorted(unknown))}")
        return self


class Architecture(CardSection):
    """A network of `scoring/networks` and the arguments of its constructor."""

    name: str
    arguments: dict[str, int | float | str | tuple[int, ...]] = Field(default={})


class Training(CardSection):
    """How the model came to be, for people who must decide whether to trust it."""

    method: str
    data: str
    evaluation: dict[str, float | int | str] = Field(default={}, description="Figures as measured, and how.")


class Description(CardSection):
    """What a person or a program must know of a model, whatever its files are."""

    name: ModelName
    version: str = Field(min_length=1)
    task: str
    surveys: tuple[SurveyName, ...] = Field(
        min_length=1, description="Whose alerts the model was trained for; `outputs.surveys` names outputs of fewer."
    )
    inputs: Inputs
    outputs: Outputs
    architecture: Architecture
    licence: str
    source: str
    citation: str
    training: Training

    def surveys_of(self, label: str) -> tuple[SurveyName, ...]:
        """The surveys for which the output `label` was trained."""
        return self.outputs.surveys.get(label, self.surveys)

    @model_validator(mode="after")
    def _outputs_are_of_its_surveys(self) -> Description:
        for label, surveys in self.outputs.surveys.items():
            if unknown := set(surveys) - set(self.surveys):
                raise ValueError(
                    f"outputs.surveys: {label} is of {', '.join(sorted(unknown))}, which `surveys` does not name"
                )
        return self


class Card(Description):
    """`bundle.yaml`: the description, and the files that it is of."""

    format: Literal[1] = 1
    tolerances: dict[str, Annotated[float, Field(ge=0, le=MAX_TOLERANCE)]] = Field(
        default={},
        description="By output, how far float32 arithmetic may put it from the test vector, beyond what is allowed of "
        "every network (`runtimes.TOLERANCES`): `probabilities` in log-odds, the others as a share of the largest "
        "value. From a run of the network in float64; absent in bundles that were made before there was one.",
    )
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _files_are_complete(self) -> Card:
        if missing := {WEIGHTS, ONNX, TEST_VECTOR} - self.files.keys():
            raise ValueError(f"files: {', '.join(sorted(missing))} not listed")
        return self


@dataclass(frozen=True, slots=True)
class KnownAnswers(RawAlerts):
    """K alerts with the metadata columns of the card, and what the model says of them."""

    outputs: Mapping[str, NDArray[np.float32]] = field(kw_only=True)  # as the network gives them, over K


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are all there and are the ones that its card names."""

    directory: Path
    card: Card

    def test_vector(self) -> KnownAnswers:
        """The stored inputs and expected outputs. Raises BundleError where they do not fit the card."""
        path, inputs, outputs = self.directory / TEST_VECTOR, self.card.inputs, self.card.outputs
        try:
            tensors = load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            raise BundleError(f"{path}: not a safetensors file: {error}") from error
        k, size = len(tensors.get("cutouts", ())), inputs.images.size
        answers: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            name: ((k, *shape), np.float32) for name, shape in outputs.shapes().items()
        }
        expected = answers | {
            "cutouts": ((k, 3, size, size), np.float32),
            "cutout_box": ((k, 3, 4), np.int16),
            "metadata": ((k, len(inputs.metadata)), np.float64),
        }
        if inputs.light_curve is not None:
            points = tensors.get(f"{POINTS}mjd", np.empty(0)).shape
            expected |= {"mjd": ((k,), np.float64), f"{POINTS}offsets": ((k + 1,), np.int64)}
            expected |= {f"{POINTS}{name}": (points, kind) for name, kind in POINT_COLUMNS.items()}
        found = {name: (tensor.shape, tensor.dtype.type) for name, tensor in tensors.items()}
        if found != expected or not 0 < k <= MAX_TEST_ALERTS:
            raise BundleError(f"{path}: holds {found}; the card asks for {expected}; make the bundle anew")
        return KnownAnswers(
            cutouts=tensors["cutouts"],
            cutout_box=tensors["cutout_box"],
            metadata=tensors["metadata"],
            columns=tuple(column.name for column in inputs.metadata),
            mjd=tensors.get("mjd"),
            light_curves=None if inputs.light_curve is None else _light_curves(path, tensors),
            outputs={name: tensors[name] for name in answers},
        )


def _light_curves(path: Path, tensors: Mapping[str, NDArray[Any]]) -> LightCurves:
    columns = {name: tensors[f"{POINTS}{name}"] for name in ("offsets", *POINT_COLUMNS)}
    offsets = columns["offsets"]
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or columns["mjd"].shape != (offsets[-1],):
        raise BundleError(f"{path}: its light curves' offsets {offsets} are none of its points; make the bundle anew")
    return LightCurves(**columns)


def load_bundle(name_or_directory: str | Path) -> Bundle:
    """Opens a bundle and checks every file's sha256.

    `name_or_directory`: the name of a bundle that ships (`default`), else a directory (`./default` is always one).
    Raises BundleError, which names the file that is missing, altered or malformed.
    """
    shipped = str(name_or_directory) in shipped_bundles()
    directory = SHIPPED / name_or_directory if shipped else Path(name_or_directory)
    card = _read_card(directory)
    for name, sha256 in card.files.items():
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the whole bundle again")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no bundle's file may be")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise BundleError(f"{path}: corrupted: sha256 is {found}, {CARD} says {sha256}; copy the bundle again")
    return Bundle(directory, card)


def shipped_bundles() -> list[str]:
    """Names of the bundles that come with the package."""
    return sorted(card.parent.name for card in SHIPPED.glob(f"*/{CARD}"))


def _read_card(directory: Path) -> Card:
    path = directory / CARD
    if not path.is_file():
        shipped = shipped_bundles()
        close = get_close_matches(str(directory), shipped, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        ships = f"nor is it the name of one that ships ({', '.join(shipped)})"
        raise NoBundleError(f"{directory}: no bundle: no {CARD} there, {ships}{hint}")
    if path.stat().st_size > MAX_CARD_BYTES:
        raise BundleError(f"{path}: larger than {MAX_CARD_BYTES} bytes, which no card is")
    try:
        return Card.model_validate(yaml.safe_load(path.read_bytes()))
    except yaml.YAMLError as error:
        raise BundleError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {describe_problems(error)}") from error


def describe_problems(error: ValidationError) -> str:
    """All that is wrong with a card, in one line, without repeating its values."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        for problem in error.errors()
    )
