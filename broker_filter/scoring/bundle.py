"""Model bundles: a directory that describes a model completely and contains its files.

`bundle.yaml` (the card) lists the other files with their sha256: `weights.safetensors` (the network's parameters, for
torch), `model.onnx` (the same network, for onnxruntime) and `test_vector.safetensors` (raw inputs with the expected
outputs). Some bundles also have a `distribution.yaml`, which `distribution` describes. A bundle may also consist of
several networks, each for its surveys: its card names a subfolder for each survey, and each subfolder is a complete
bundle of one network. Nothing in a bundle is ever unpickled or executed, and no file outside its directory is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from broker_filter.config import Section, SurveyName
from broker_filter.errors import USAGE, BrokerFilterError
from broker_filter.packets.batch import BANDS, CUTOUTS, PSF_SIZE, LightCurves, Measurement, Plane
from broker_filter.scoring.alerts import RawAlerts
from broker_filter.scoring.distribution import DISTRIBUTION, MAX_DISTRIBUTION_BYTES, Distribution, SurveyDistribution
from broker_filter.scoring.scores import output_name

CARD = "bundle.yaml"
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"
TEST_VECTOR = "test_vector.safetensors"

SHIPPED = Path(__file__).parents[1] / "bundles"
MAX_CARD_BYTES = 2**20
PARSED_CARDS = 16
"""Cards that stay in memory after they are parsed, which takes 0.03 s. A check of a configuration, the start that
follows and a reload open the same bundles."""
MAX_FILE_BYTES = 2**31
"""Largest size of an ONNX file (protobuf's limit); no network that is fast enough for a stream comes near it."""
MAX_CUTOUT_SIZE = 512
"""Pixels per side. The largest published stamps have 102; the limit keeps a bad card from requesting gigabytes."""
MAX_TEST_ALERTS = 64
PROBABILITIES = "probabilities"
"""Name of a network's first output."""
MAX_TOLERANCE = 0.1
"""Largest tolerance in log-odds; it is at most 0.025 in a probability. A network whose rounding errors are larger is of
no use."""
POINTS = "light_curves."
"""Prefix of the arrays of `LightCurves` in a test vector."""
POINT_COLUMNS: dict[str, type[np.generic]] = {
    "mjd": np.float64,
    "band": np.uint8,
    "flux": np.float32,
    "flux_err": np.float32,
    "kind": np.uint8,
}
LIGHT_CURVE_FEATURES = 3 + len(BANDS) + len(Measurement)
"""Features of a light-curve point, in this order: scaled time before the alert, scaled flux, scaled flux error; the
band, one-hot over BANDS (all zeros for an unknown band); the kind of measurement, one-hot over `Measurement`."""
MAX_POINTS = 1024
"""Points per light curve. Attention compares all pairs; the limit keeps a bad card from requesting gigabytes."""

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
"""An identifier: column names in tables (`d6_m7__real`) and names in filters (`d6_m7.real`) begin with it."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""A file beside the card: without separators and leading dot, so that no name points outside the bundle."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class BundleError(BrokerFilterError):
    """A bundle cannot be used. The message says which file, what is wrong with it and what to do."""


class NoBundleError(BundleError):
    """There is no bundle of this name, or in this directory."""

    exit_status = USAGE


class ImageInput(Section):
    """The network's image input: float32 `images` of shape [N, len(order), size, size]."""

    size: int = Field(gt=0, le=MAX_CUTOUT_SIZE, description="Pixels per side.")
    order: tuple[Literal["science", "template", "difference"], ...] = Field(min_length=1)
    normalisation: Literal["l2_row", "l2_image", "snr"] = Field(
        description="`l2_row`, `l2_image`: each image row, or the whole image, is divided by its L2 norm. `snr`: the "
        "background is subtracted from science and template images, each pixel is divided by its noise, and the ratio "
        "is compressed with arcsinh; missing pixels are 0. The noise is the square root of the survey's variance "
        "plane, or 1.4826 x the MAD of the stamp where there is none (ZTF)."
    )
    padding: float = Field(description="Value of pixels outside the stamp, set after normalisation.")
    resize: Literal["centre"] = Field(
        default="centre", description="Larger stamps are cropped about their centre pixel."
    )


class PsfInput(Section):
    """The network's PSF input: float32 `psf` of shape [N, len(order), size, size].

    It holds the survey's images of the point spread function, with the centre at pixel size // 2.
    """

    size: int = Field(gt=0, le=PSF_SIZE, description="Pixels per side.")
    order: tuple[Literal["science", "template", "difference"], ...] = Field(
        min_length=1, description="The cutouts whose PSF images the network takes, in order."
    )
    normalisation: Literal["sum", "peak"] = Field(description="Each image is divided by its sum, or by its maximum.")
    fallback_fwhm: dict[SurveyName, Annotated[float, Field(gt=0, le=MAX_CUTOUT_SIZE)]] = Field(
        min_length=1,
        description="For each survey, the full width at half maximum in pixels of the Gaussian that replaces a PSF "
        "image that is absent or unusable. A survey that is not listed has that of the first one.",
    )


class MetadataColumn(Section):
    """A metadata column, as the network was trained on it."""

    name: str
    fill: float = Field(
        description="The constant that replaces a missing value. Without `flag`, choose one that never occurs, such as "
        "-999."
    )
    flag: bool = Field(
        default=False,
        description="The network takes an additional column: 1 where the value is missing, else 0.",
    )
    surveys: tuple[SurveyName, ...] | None = Field(
        default=None,
        min_length=1,
        description="The surveys whose values the network was trained with: for alerts of other surveys the value "
        "counts as missing. null: the values of every survey.",
    )


class LightCurveInput(Section):
    """The network's light-curve inputs: float32 `light_curve` of shape [N, points, LIGHT_CURVE_FEATURES], and a mask.

    The mask is float32 `light_curve_mask` of shape [N, points]: 1 for a point and 0 for padding.
    """

    points: int = Field(
        gt=0, le=MAX_POINTS, description="Number of points: the latest ones up to the time of the alert are kept."
    )
    flux_scale: float = Field(gt=0, description="Flux scale in nJy: the feature is asinh(flux / flux_scale).")
    time_scale: float = Field(
        gt=0, description="Time scale in days: the feature is log1p(days before the alert / time_scale)."
    )
    least_detections: int = Field(
        default=0,
        ge=0,
        le=MAX_POINTS,
        description="The probabilities are null for alerts with fewer detections than this among these points, the "
        "alert itself included.",
    )


class Inputs(Section):
    """The network's inputs."""

    images: ImageInput
    metadata: tuple[MetadataColumn, ...] = Field(
        default=(),
        description="Columns of the float32 input `metadata` [N, F], in order; the flags follow in the same order. "
        "Empty: "
        "the network has no metadata input.",
    )
    light_curve: LightCurveInput | None = Field(
        default=None, description="null: the network has no light-curve inputs."
    )
    psf: PsfInput | None = Field(default=None, description="null: the network has no PSF input.")

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes that must be decoded besides the cutouts."""
        variance: tuple[Plane, ...] = ("variance",) if self.images.normalisation == "snr" else ()
        return (*variance, "psf") if self.psf is not None else variance

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one alert's inputs by name, in the order in which the network takes them."""
        shapes: dict[str, tuple[int, ...]] = {"images": (len(self.images.order), self.images.size, self.images.size)}
        if self.metadata:
            shapes["metadata"] = (len(self.metadata) + sum(column.flag for column in self.metadata),)
        if self.light_curve is not None:
            shapes["light_curve"] = (self.light_curve.points, LIGHT_CURVE_FEATURES)
            shapes["light_curve_mask"] = (self.light_curve.points,)
        if self.psf is not None:
            shapes["psf"] = (len(self.psf.order), self.psf.size, self.psf.size)
        return shapes


class Outputs(Section):
    """The network's outputs: float32 `probabilities` of shape [N, C], and perhaps an embedding.

    If `embedding` gives a size D, the network also returns float32 `embedding` [N, D]. With M `modalities`, the network
    also returns `modalities` [N, M, D / M]: one vector of length 1 per modality, all zeros if the alert lacks that
    modality. The embedding is their concatenation, scaled to length 1.
    """

    labels: tuple[ModelName, ...] = Field(min_length=1)
    activation: Literal["sigmoid", "softmax"]
    surveys: dict[str, tuple[SurveyName, ...]] = Field(
        default={},
        description="For each label listed, the surveys for which this output was trained, if these are fewer than the "
        "bundle's `surveys`. The output is null for alerts of other surveys.",
    )
    thresholds: dict[str, float] = Field(default={}, description="Recommended threshold of the probability, by label.")
    embedding: int | None = Field(default=None, gt=0)
    modalities: tuple[ModelName, ...] = Field(
        default=(), description="Modalities in the order of the output, such as image, light_curve."
    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one alert's outputs by name, in the order in which the network returns them."""
        shapes: dict[str, tuple[int, ...]] = {PROBABILITIES: (len(self.labels),)}
        if self.embedding is not None:
            shapes["embedding"] = (self.embedding,)
            if self.modalities:
                shapes["modalities"] = (len(self.modalities), self.embedding // len(self.modalities))
        return shapes

    @model_validator(mode="after")
    def _modalities_are_side_by_side(self) -> Outputs:
        if self.modalities and (self.embedding is None or self.embedding % len(self.modalities)):
            raise ValueError(
                f"embedding has size {self.embedding}, which is not a multiple of its number of modalities, "
                f"{len(self.modalities)}"
            )
        return self

    @model_validator(mode="after")
    def _thresholds_and_surveys_are_of_labels(self) -> Outputs:
        for what, by_label in (("thresholds", self.thresholds), ("surveys", self.surveys)):
            if unknown := by_label.keys() - set(self.labels):
                raise ValueError(f"{what} for labels that do not exist: {', '.join(sorted(unknown))}")
        return self


class Architecture(Section):
    """A network of `scoring/networks`, and the arguments of its constructor."""

    name: str
    arguments: dict[str, int | float | str | tuple[int, ...]] = Field(default={})


class Training(Section):
    """How the model was trained, so that a person can decide whether to trust it."""

    method: str
    data: str
    evaluation: dict[str, float | int | str] = Field(
        default={}, description="Measured figures, and how they were measured."
    )


class Identity(Section):
    """The name and the purpose of a bundle."""

    name: ModelName
    version: str = Field(min_length=1)
    task: str

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"


class Description(Identity):
    """Everything about a model of one network except its files."""

    surveys: tuple[SurveyName, ...] = Field(
        min_length=1, description="Surveys for which the model was trained; `outputs.surveys` restricts single outputs."
    )
    inputs: Inputs
    outputs: Outputs
    architecture: Architecture
    licence: str
    source: str
    citation: str
    training: Training

    def surveys_of(self, label: str) -> tuple[SurveyName, ...]:
        """Return the surveys for which the output `label` was trained."""
        return self.outputs.surveys.get(label, self.surveys)

    @model_validator(mode="after")
    def _outputs_are_of_its_surveys(self) -> Description:
        for label, surveys in self.outputs.surveys.items():
            if unknown := set(surveys) - set(self.surveys):
                raise ValueError(
                    f"outputs.surveys: {label} lists {', '.join(sorted(unknown))}, which `surveys` does not list"
                )
        return self


class Card(Description):
    """The contents of `bundle.yaml` for one network: the description of the model, and the sha256 of its files."""

    format: Literal[1] = 1
    tolerances: dict[str, Annotated[float, Field(ge=0, le=MAX_TOLERANCE)]] = Field(
        default={},
        description="For each output, the allowed deviation from the test vector in float32 arithmetic, in addition to "
        "`runtimes.TOLERANCES`: in log-odds for `probabilities`, as a fraction of the largest absolute value for other "
        "outputs. Measured by a run of the network in float64; older bundles lack it.",
    )
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _files_are_complete(self) -> Card:
        if missing := {WEIGHTS, ONNX, TEST_VECTOR} - self.files.keys():
            raise ValueError(f"files: {', '.join(sorted(missing))} not listed")
        return self


class Route(Section):
    """The network that scores the alerts of one survey."""

    folder: FileName = Field(description="Subfolder of the bundle: a complete bundle of one network.")
    card_sha256: Sha256 = Field(description="sha256 of the card in this folder, which lists those of the other files.")


class RoutedOutputs(Section):
    """The outputs of a bundle of several networks."""

    labels: tuple[ModelName, ...] = Field(
        min_length=1, description="Labels that every network gives. A network may have more; they are not served."
    )


class RoutingCard(Identity):
    """The contents of `bundle.yaml` for several networks: which network scores the alerts of which survey."""

    networks: dict[SurveyName, Route] = Field(min_length=1)
    outputs: RoutedOutputs
    format: Literal[2] = 2

    @property
    def surveys(self) -> tuple[SurveyName, ...]:
        """Surveys whose alerts one of the networks scores."""
        return tuple(self.networks)

    @model_validator(mode="after")
    def _folders_have_one_card(self) -> RoutingCard:
        if len({(route.folder, route.card_sha256) for route in self.networks.values()}) != len(self.folders):
            raise ValueError("networks: one folder is listed with two values of card_sha256")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the networks, without repetition."""
        return tuple(dict.fromkeys(route.folder for route in self.networks.values()))


@dataclass(frozen=True, slots=True)
class KnownAnswers(RawAlerts):
    """K alerts with the metadata columns of the card, and the outputs that the model must give for them."""

    outputs: Mapping[str, NDArray[np.float32]] = field(kw_only=True)  # by name, [K, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a bundle. Its files all exist and have the sha256 that its card lists."""

    directory: Path
    card: Card
    surveys: tuple[SurveyName, ...]
    """The surveys whose alerts this network scores in the bundle."""

    def distribution(self) -> Distribution | None:
        """Return the recorded distribution of outputs and metadata; None if the bundle has none.

        Raises BundleError if the file is malformed.
        """
        path = self.directory / DISTRIBUTION
        if DISTRIBUTION not in self.card.files:
            return None
        if path.stat().st_size > MAX_DISTRIBUTION_BYTES:
            raise BundleError(f"{path}: larger than {MAX_DISTRIBUTION_BYTES} bytes, the limit for a distribution")
        try:
            return Distribution.model_validate(yaml.safe_load(path.read_bytes()))
        except yaml.YAMLError as error:
            raise BundleError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            raise BundleError(f"{path}: {describe_problems(error)}; record the distribution again") from error

    def test_vector(self) -> KnownAnswers:
        """Return the stored inputs and expected outputs. Raises BundleError if they do not fit the card."""
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
        if "variance" in inputs.planes:
            expected["variance"] = (k, len(CUTOUTS), size, size), np.float32
        if "psf" in inputs.planes:
            expected |= {"psf": ((k, len(CUTOUTS), PSF_SIZE, PSF_SIZE), np.float32), "survey": ((k,), np.uint8)}
        found = {name: (tensor.shape, tensor.dtype.type) for name, tensor in tensors.items()}
        if found != expected or not 0 < k <= MAX_TEST_ALERTS:
            raise BundleError(f"{path}: holds {found}; the card requires {expected}; make the bundle again")
        return KnownAnswers(
            cutouts=tensors["cutouts"],
            cutout_box=tensors["cutout_box"],
            metadata=tensors["metadata"],
            columns=tuple(column.name for column in inputs.metadata),
            mjd=tensors.get("mjd"),
            light_curves=None if inputs.light_curve is None else _light_curves(path, tensors),
            variance=tensors.get("variance"),
            psf=tensors.get("psf"),
            survey=tensors.get("survey"),
            outputs={name: tensors[name] for name in answers},
        )


def _light_curves(path: Path, tensors: Mapping[str, NDArray[Any]]) -> LightCurves:
    columns = {name: tensors[f"{POINTS}{name}"] for name in ("offsets", *POINT_COLUMNS)}
    offsets = columns["offsets"]
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or columns["mjd"].shape != (offsets[-1],):
        raise BundleError(
            f"{path}: light_curves.offsets {offsets} do not fit the number of points; make the bundle again"
        )
    return LightCurves(**columns)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model with one network, or with several networks that each score the alerts of their surveys."""

    directory: Path
    card: Card | RoutingCard
    parts: tuple[Part, ...]
    """The networks. No two of them score the same survey."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the output columns, `<model>.<label>`, in the order of the labels."""
        return tuple(output_name(self.card.name, label) for label in self.card.outputs.labels)

    @property
    def surveys(self) -> tuple[SurveyName, ...]:
        """Surveys for which the bundle has a network."""
        return self.card.surveys

    def part(self, survey: SurveyName) -> Part:
        """Return the network for alerts of `survey`. Raises BundleError if the bundle has none."""
        for part in self.parts:
            if survey in part.surveys:
                return part
        raise BundleError(
            f"{self.directory}: {self.card.name} has no network for {survey}, only for {', '.join(self.surveys)}; "
            "choose a bundle for this survey (`broker-filter models list`)"
        )

    def surveys_of(self, label: str) -> tuple[SurveyName, ...]:
        """Return the surveys for which the output `label` was trained."""
        return tuple(survey for part in self.parts for survey in part.surveys if survey in part.card.surveys_of(label))

    def thresholds_of(self, label: str) -> dict[SurveyName, float]:
        """Return the recommended threshold of the probability of `label` for each survey that has one."""
        return {
            survey: part.card.outputs.thresholds[label]
            for part in self.parts
            if label in part.card.outputs.thresholds
            for survey in part.surveys
            if survey in part.card.surveys_of(label)
        }

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one alert's outputs by name.

        Several networks give an embedding only if they agree on its size and modalities.
        """
        outputs = {(part.card.outputs.embedding, part.card.outputs.modalities) for part in self.parts}
        shapes = self.parts[0].card.outputs.shapes() if len(outputs) == 1 else {}
        return shapes | {PROBABILITIES: (len(self.card.outputs.labels),)}

    @property
    def embedding(self) -> int | None:
        """Size D of the embedding; None if the bundle gives none."""
        shape = self.output_shapes().get("embedding")
        return None if shape is None else shape[0]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that are concatenated in the embedding; empty if there are none."""
        return self.parts[0].card.outputs.modalities if self.embedding is not None else ()

    @property
    def weights_sha256(self) -> str:
        """The sha256 of the weights. For several networks: of the sorted lines `<survey> <sha256>`, one a survey."""
        if isinstance(self.card, Card):
            return self.card.files[WEIGHTS]
        lines = sorted(f"{survey} {part.card.files[WEIGHTS]}\n" for part in self.parts for survey in part.surveys)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_bundle(name_or_directory: str | Path) -> Bundle:
    """Open a bundle and check the sha256 of every file.

    `name_or_directory`: the name of a bundle that ships with the package (`default`), else a directory (`./default` is
    always a directory).

    Raises BundleError, which names the missing, altered or malformed file; NoBundleError if there is no bundle.

    >>> from broker_filter import open_bundle
    >>> bundle = open_bundle("default")
    >>> bundle.output_names, bundle.thresholds_of("real")["ztf"]
    (('default.real',), 0.5)
    """
    shipped = str(name_or_directory) in shipped_bundles()
    directory = SHIPPED / name_or_directory if shipped else Path(name_or_directory)
    card = _parse_card(directory, _read_card(directory))
    if isinstance(card, Card):
        _check_files(directory, card)
        return Bundle(directory, card, (Part(directory, card, card.surveys),))
    return Bundle(directory, card, tuple(_open_part(directory, card, folder) for folder in card.folders))


def _open_part(directory: Path, routing: RoutingCard, folder: str) -> Part:
    """Open one network of a bundle of several. Raises BundleError if it is not the network that `routing` describes."""
    routes = {survey: route for survey, route in routing.networks.items() if route.folder == folder}
    inner = directory / folder
    if inner.is_symlink() or not inner.is_dir():
        raise BundleError(f"{inner}: not a folder, but {CARD} lists it as one; copy the whole bundle again")
    data = _read_card(inner)
    sha256 = next(iter(routes.values())).card_sha256
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise BundleError(
            f"{inner / CARD}: not the card of this bundle: its sha256 is {found}, but {directory / CARD} lists "
            f"{sha256}; copy the bundle again"
        )
    card = _parse_card(inner, data)
    if not isinstance(card, Card):
        raise BundleError(f"{inner / CARD}: has several networks itself; a network of a bundle must be a single one")
    if problem := unserved(card, routes, routing.outputs.labels):
        raise BundleError(f"{inner / CARD}: {problem}; make {directory} again")
    _check_files(inner, card)
    return Part(inner, card, tuple(routes))


def unserved(card: Card, surveys: Iterable[SurveyName], labels: Iterable[str]) -> str | None:
    """Return why the network of the card does not give a label for a survey, as text; None if it gives all of them."""
    for label in labels:
        if label not in card.outputs.labels:
            return f"{card.title} has no label {label}, only {', '.join(card.outputs.labels)}"
        trained_for = card.surveys_of(label)
        if missing := [survey for survey in surveys if survey not in trained_for]:
            return (
                f"{label} of {card.title} was not trained for {', '.join(missing)}, only for {', '.join(trained_for)}"
            )
    return None


def _check_files(directory: Path, card: Card) -> None:
    """Raise BundleError if a file of a network is missing, too large, or has another sha256 than the card lists."""
    for name, sha256 in card.files.items():
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the whole bundle again")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{path}: larger than {MAX_FILE_BYTES} bytes, the limit for a file of a bundle")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise BundleError(
                f"{path}: corrupted: its sha256 is {found}, but {CARD} lists {sha256}; copy the bundle again"
            )


def write_card(directory: Path, card: Card | RoutingCard) -> None:
    """Write the card of the bundle in `directory`, atomically, in place of the card that it has."""
    text = yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    unfinished = directory / f".{CARD}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(directory / CARD)


def copy_bundle(bundle: Bundle, directory: Path) -> None:
    """Copy the cards of a bundle and the files that they list into the new `directory`."""
    directory.mkdir()
    shutil.copyfile(bundle.directory / CARD, directory / CARD)
    for part in bundle.parts:
        copy_network(part, directory / part.directory.relative_to(bundle.directory))


def copy_network(part: Part, folder: Path) -> None:
    """Copy the card of a network and the files that it lists into `folder`, which is made if it is absent."""
    folder.mkdir(exist_ok=True)
    for name in (CARD, *part.card.files):
        shutil.copyfile(part.directory / name, folder / name)


def add_distribution(directory: Path, of: str, surveys: Mapping[SurveyName, SurveyDistribution]) -> None:
    """Add the distributions of surveys to the bundle in `directory`, and their sha256 to its cards.

    `of`: the alerts, as text. The scores of the bundle stay as they are. The files are written one after the other, so
    use this for a bundle that nothing else reads yet. Raises BundleError if the bundle cannot be opened.
    """
    bundle = open_bundle(directory.absolute())
    for part in bundle.parts:
        if own := {survey: surveys[survey] for survey in part.surveys if survey in surveys}:
            file = part.directory / DISTRIBUTION
            Distribution(of=of, surveys=own).write(file)
            files = part.card.files | {DISTRIBUTION: hashlib.sha256(file.read_bytes()).hexdigest()}
            write_card(part.directory, part.card.model_copy(update={"files": files}))
    if isinstance(bundle.card, RoutingCard):
        networks = {survey: make_route(directory, route.folder) for survey, route in bundle.card.networks.items()}
        write_card(directory, bundle.card.model_copy(update={"networks": networks}))


def make_route(directory: Path, folder: str) -> Route:
    """Return the route to the network in a folder of the bundle in `directory`."""
    card = (directory / folder / CARD).read_bytes()
    return Route(folder=folder, card_sha256=hashlib.sha256(card).hexdigest())


def shipped_bundles() -> list[str]:
    """Return the names of the bundles that ship with the package, sorted."""
    return sorted(card.parent.name for card in SHIPPED.glob(f"*/{CARD}"))


def _read_card(directory: Path) -> bytes:
    """Return the bytes of a card. Raises NoBundleError if there is none, and BundleError if it is too large."""
    path = directory / CARD
    if not path.is_file():
        shipped = shipped_bundles()
        close = get_close_matches(str(directory), shipped, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        ships = f"and it is not the name of a shipped bundle ({', '.join(shipped)})"
        raise NoBundleError(f"{directory}: not a bundle: there is no {CARD} in it, {ships}{hint}")
    if path.stat().st_size > MAX_CARD_BYTES:
        raise BundleError(f"{path}: larger than {MAX_CARD_BYTES} bytes, the limit for a card")
    return path.read_bytes()


@lru_cache(maxsize=PARSED_CARDS)
def _parse_card(directory: Path, data: bytes) -> Card | RoutingCard:
    """Return a card of either format. Raises BundleError if it is malformed, or of a format of a later version."""
    path = directory / CARD
    try:
        content = yaml.safe_load(data)
        form = content.get("format", 1) if isinstance(content, dict) else 1
        if not isinstance(form, int) or form not in FORMATS:
            raise BundleError(
                f"{path}: of format {form!r}, and this version reads the formats {', '.join(map(str, FORMATS))}; "
                "install a later version of broker-filter"
            )
        return FORMATS[form].model_validate(content)
    except yaml.YAMLError as error:
        raise BundleError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {describe_problems(error)}") from error


FORMATS: dict[int, type[Card | RoutingCard]] = {1: Card, 2: RoutingCard}
"""The formats of cards: of one network, and of several. Programs older than format 2 refuse its cards."""


def describe_problems(error: ValidationError) -> str:
    """Return all problems of a card in one line, without repeating its values."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        for problem in error.errors()
    )
