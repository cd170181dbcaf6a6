"""Reference sets: the embeddings of ordinary alerts, in a file of their own, against which others are called strange.

One safetensors file: the arrays of each survey, and in its metadata a card as JSON that says which bundle's embeddings
these are, and the sha256 of the arrays. Surveys are kept apart: an alert is compared with ordinary alerts of its own
survey only, because telescopes differ more than alerts do. A reference made with another bundle is refused: distances
from it would mean nothing. Nothing is ever unpickled, and sizes are checked before anything is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from broker_filter.packets.batch import Survey
from broker_filter.scoring import bundle
from broker_filter.scoring.bundle import WEIGHTS, CardSection, ModelName, Sha256, describe_problems
from broker_filter.scoring.neighbours import Embeddings

MAX_ALERTS = 1_000_000
"""Of a survey in a reference: a night of ZTF."""
MIN_ALERTS = 2
"""Of a survey in a reference, and scores of it: one has no spread."""
MAX_BYTES = 2**33
"""Of the file: MAX_ALERTS with 2,000 dimensions fit."""
MAX_OBJECT_ID_BYTES = 64
"""Surveys' names of objects have 19 at most."""
Measure = Literal["mahalanobis", "neighbours", "centroids"]
"""How far from ordinary alerts is measured: see `anomaly`."""
SurveyKey = Annotated[str, StringConstraints(pattern=f"^({'|'.join(map(str, Survey))})$")]
"""The name of a survey that is known here."""
UNLABELLED = -1
FORMAT: Literal[2] = 2
"""Of the file. In format 1 all surveys had one calibration."""
CARD = "card"
"""Key of the card in the file's metadata."""


class ReferenceSetError(Exception):
    """A reference set that cannot be used or made: which, what is wrong with it, what to do."""


class SurveyCounts(CardSection):
    """What became of the alerts of a survey when a reference was built."""

    read: int = Field(ge=0, description="Alerts that were decoded.")
    passed: int = Field(ge=0, description="Those that the model takes and that passed the filter.")
    kept: int = Field(ge=0, description="Those that are in the reference. 0: alerts of the survey are not judged.")
    held_out: int = Field(ge=0, description="Alerts of other objects, on which the scores are calibrated.")


class ReferenceCard(CardSection):
    """What a reference is of."""

    format: Literal[2]
    bundle: ModelName
    version: str
    weights_sha256: Sha256 = Field(description="Of the bundle: embeddings of other weights cannot be compared.")
    modalities: tuple[ModelName, ...] = Field(default=(), description="M, which each embedding has side by side.")
    where: str | None = Field(default=None, description="The filter that ordinary alerts passed; none: all were taken.")
    measure: Measure = Field(default="mahalanobis", description="What scores by it are of.")
    classes: tuple[ModelName, ...] = Field(default=(), description="C, which labels name; none: nothing is labelled.")
    surveys: dict[SurveyKey, SurveyCounts] = Field(min_length=1, description="Whose alerts it was built from.")
    data_sha256: Sha256 = Field(description="Of the arrays' bytes, by name.")

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_format(cls, card: Any) -> Any:
        if isinstance(card, dict) and card.get("format") != FORMAT:
            raise ValueError(
                f"another version of broker-filter wrote it, in format {card.get('format')!r}: this one reads format "
                f"{FORMAT}, in which each survey has its own alerts and calibration"
            )
        return card


@dataclass(frozen=True, slots=True)
class ReferenceAlerts:
    """K ordinary alerts; `ordinary[rows]` are some of them."""

    embedding: Embeddings  # [K, D]
    alert_id: NDArray[np.int64]  # [K]
    object_id: NDArray[np.str_]  # [K]
    survey: NDArray[np.uint8]  # [K] codes of Survey

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> ReferenceAlerts:
        return ReferenceAlerts(self.embedding[rows], self.alert_id[rows], self.object_id[rows], self.survey[rows])


@dataclass(frozen=True, slots=True)
class SurveyReference:
    """Ordinary alerts of one survey, and how strange others of it that are as ordinary look beside them."""

    alerts: ReferenceAlerts  # K
    scores: NDArray[np.float32]  # [Q] ascending: of ordinary alerts of other objects
    usual: NDArray[np.float32]  # [1 + M, 2] mean and deviation of their distances, as a whole and in each modality
    apart: NDArray[np.float32]  # [M, 2] the same of how far their modalities are from those of their neighbours
    label: NDArray[np.int64]  # [K] which of the card's classes an alert is of, or UNLABELLED


@dataclass(frozen=True, slots=True)
class Reference:
    """Ordinary alerts of one or more surveys. Alerts of a survey that is not among them cannot be judged."""

    card: ReferenceCard
    surveys: Mapping[Survey, SurveyReference]

    def write(self, file: Path) -> None:
        """Writes the file, which appears only when it is whole."""
        partial = file.with_name(f"{file.name}.partial")
        save_file(_arrays(self.surveys), partial, metadata={CARD: self.card.model_dump_json()})
        partial.replace(file)


def make_reference(
    card: bundle.Card,
    where: str | None,
    surveys: Mapping[Survey, SurveyReference],
    counts: Mapping[Survey, SurveyCounts],
    measure: Measure,
    classes: tuple[str, ...] = (),
) -> Reference:
    """A reference of the embeddings that the bundle with this card gave. `counts`: also of surveys that are not in it,
    because too few of their alerts passed."""
    described = ReferenceCard(
        format=FORMAT,
        bundle=card.name,
        version=card.version,
        weights_sha256=card.files[WEIGHTS],
        modalities=card.outputs.modalities,
        where=where,
        measure=measure,
        classes=classes,
        surveys={str(survey): of_survey for survey, of_survey in counts.items()},
        data_sha256=_sha256(_arrays(surveys)),
    )
    return Reference(described, surveys)


def read_card(file: Path) -> ReferenceCard:
    """What a reference is of, without reading it. Raises ReferenceSetError where the file is none."""
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ReferenceSetError(f"{file}: {size} bytes: no reference has more than {MAX_BYTES}")
        with safe_open(file, framework="numpy") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
    except OSError as error:
        raise ReferenceSetError(f"{file}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ReferenceSetError(f"{file}: not a safetensors file: {error}; build the reference again") from error
    if CARD not in metadata:
        raise ReferenceSetError(f"{file}: no reference set: `broker-filter reference build` writes one")
    try:
        return ReferenceCard.model_validate_json(metadata[CARD])
    except ValidationError as error:
        raise ReferenceSetError(f"{file}: {describe_problems(error)}; build the reference again") from error


def read_reference(file: Path) -> Reference:
    """Reads a reference into memory. Raises ReferenceSetError where the file is none, or is damaged."""
    card = read_card(file)
    with safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    surveys = [Survey[name.upper()] for name, counts in card.surveys.items() if counts.kept]
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for survey in surveys:
        try:
            ((k, d), _), ((q,), _) = found[f"{survey}.embedding"], found[f"{survey}.scores"]
        except (KeyError, ValueError):
            raise ReferenceSetError(f"{file}: holds {', '.join(sorted(found))}; build the reference again") from None
        if not all(MIN_ALERTS <= n <= MAX_ALERTS for n in (k, q)):
            raise ReferenceSetError(
                f"{file}: holds {k} alerts and {q} scores of {survey}, and between {MIN_ALERTS} and {MAX_ALERTS} of "
                "each are allowed; build the reference again"
            )
        shapes = {
            "embedding": ((k, d), "F32"),
            "alert_id": ((k,), "I64"),
            "object_id": ((k, MAX_OBJECT_ID_BYTES), "U8"),
            "scores": ((q,), "F32"),
            "usual": ((1 + len(card.modalities), 2), "F32"),
            "apart": ((len(card.modalities), 2), "F32"),
            "label": ((k,), "I64"),
        }
        expected |= {f"{survey}.{name}": shape for name, shape in shapes.items()}
    if found != expected:
        raise ReferenceSetError(f"{file}: holds {found}, its card asks for {expected}; build the reference again")
    arrays = load_file(file)
    if _sha256(arrays) != card.data_sha256:
        raise ReferenceSetError(f"{file}: its arrays are not the ones that its card names; build the reference again")
    return Reference(card, {survey: _of_survey(file, survey, arrays, len(card.classes)) for survey in surveys})


def _of_survey(file: Path, survey: Survey, arrays: Mapping[str, NDArray[Any]], classes: int) -> SurveyReference:
    """The arrays of one survey. Raises ReferenceSetError where alerts cannot be judged by them."""
    own = {name.removeprefix(f"{survey}."): array for name, array in arrays.items() if name.startswith(f"{survey}.")}
    if problem := _unusable(own, classes):
        raise ReferenceSetError(f"{file}: of {survey}, {problem}; build the reference again")
    names = own["object_id"].view(f"S{MAX_OBJECT_ID_BYTES}")[:, 0]
    try:
        object_id = np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
        raise ReferenceSetError(f"{file}: a name of an object is no UTF-8; build the reference again") from error
    alerts = ReferenceAlerts(own["embedding"], own["alert_id"], object_id, np.full(len(names), survey, np.uint8))
    return SurveyReference(alerts, own["scores"], own["usual"], own["apart"], own["label"])


def check_made_with(file: Path, reference: ReferenceCard, cards: Sequence[bundle.Card]) -> None:
    """Raises ReferenceSetError unless the embeddings in the reference are those of one of the bundles with these
    cards."""
    card = next((card for card in cards if card.name == reference.bundle), None)
    if card is None:
        raise ReferenceSetError(
            f"{file}: made with the bundle {reference.bundle}, which is none of the models "
            f"({', '.join(card.name for card in cards)}): add it, or build a reference with one of them"
        )
    made = (reference.version, reference.weights_sha256, reference.modalities)
    if made != (card.version, card.files[WEIGHTS], card.outputs.modalities):
        raise ReferenceSetError(
            f"{file}: made with the bundle {reference.bundle} {reference.version} (weights "
            f"{reference.weights_sha256[:12]}), and {card.name} {card.version} ({card.files[WEIGHTS][:12]}) is what "
            "would be compared with it; build the reference again with `broker-filter reference build`"
        )


def _arrays(surveys: Mapping[Survey, SurveyReference]) -> dict[str, NDArray[Any]]:
    """A reference's arrays as they stand in its file."""
    arrays: dict[str, NDArray[Any]] = {}
    for survey, part in surveys.items():
        names = np.char.encode(part.alerts.object_id, "utf-8").astype(f"S{MAX_OBJECT_ID_BYTES}")
        own: dict[str, NDArray[Any]] = {
            "embedding": np.ascontiguousarray(part.alerts.embedding),
            "alert_id": part.alerts.alert_id,
            "object_id": names[:, None].view(np.uint8),
            "scores": part.scores,
            "usual": part.usual,
            "apart": part.apart,
            "label": part.label,
        }
        arrays |= {f"{survey}.{name}": array for name, array in own.items()}
    return arrays


def _unusable(arrays: Mapping[str, NDArray[Any]], classes: int) -> str | None:
    """What keeps alerts from being scored, or the scores from being flagged, by a survey's arrays."""
    if bad := [name for name in ("embedding", "scores", "usual", "apart") if not np.isfinite(arrays[name]).all()]:
        return f"its {bad[0]} holds NaN or infinite numbers"
    if (np.diff(arrays["scores"]) < 0).any() or arrays["scores"][0] == arrays["scores"][-1]:
        return "its scores do not ascend"
    if bad := [name for name in ("usual", "apart") if not (arrays[name][:, 1] > 0).all()]:
        return f"its {bad[0]} deviations are not above 0"
    if not ((arrays["label"] >= UNLABELLED) & (arrays["label"] < classes)).all():
        return "its label names a class that its card does not"
    return None


def _sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
