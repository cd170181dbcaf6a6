"""Reference sets: embeddings of ordinary alerts in one file, with which other alerts are compared to find anomalies.

A reference is a safetensors file: the arrays of each survey, and in its metadata a card (JSON) that names the bundle
that made the embeddings and the sha256 of the arrays. An alert is compared only with ordinary alerts of its own survey,
because telescopes differ more than alerts do. A reference made with another bundle is refused, because distances
between embeddings of different networks mean nothing. Nothing is ever unpickled, and sizes are checked before arrays
are read.

A set of variable stars has the same format, with STARS in the place of a survey (`python -m training astrom3-embed`).
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

from broker_filter.anomalies.neighbours import Embeddings
from broker_filter.config import Section
from broker_filter.errors import BrokerFilterError
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import Bundle, ModelName, Sha256, describe_problems
from broker_filter.scoring.labels import UNLABELLED

MAX_ALERTS = 1_000_000
"""Alerts per survey in a reference: about a night of ZTF."""
MIN_ALERTS = 2
"""Alerts and scores per survey in a reference: a single one has no spread."""
MAX_BYTES = 2**33
"""Largest file: MAX_ALERTS embeddings of 2,000 dimensions fit."""
MAX_OBJECT_ID_BYTES = 64
"""Length limit of an object id in bytes; the surveys' object ids have at most 19 bytes."""
Measure = Literal["mahalanobis", "neighbours", "centroids"]
"""Measure of the distance from ordinary alerts: see `score`."""
STARS = "stars"
"""The name that stands for a survey in a set of variable stars, which are not alerts."""
NO_SURVEY = 255
"""The code of the survey of a star in `ReferenceAlerts`."""
SurveyKey = Annotated[str, StringConstraints(pattern=f"^({'|'.join((*map(str, Survey), STARS))})$")]
"""The name of a known survey, or STARS."""
FORMAT: Literal[2] = 2
"""Version of the file format. In format 1 all surveys shared one calibration."""
CARD = "card"
"""Key of the card in the file's metadata."""


class ReferenceSetError(BrokerFilterError):
    """A reference set cannot be used or built. The message says which set, what is wrong with it and what to do."""


class SurveyCounts(Section):
    """How many alerts of a survey were read, passed, kept and held out when a reference was built."""

    read: int = Field(ge=0, description="Decoded alerts.")
    passed: int = Field(ge=0, description="Decoded alerts that the model takes and that passed the filter.")
    kept: int = Field(ge=0, description="Alerts in the reference. 0: alerts of this survey are not judged.")
    held_out: int = Field(ge=0, description="Held-out alerts, of other objects, on which the scores are calibrated.")


class ReferenceCard(Section):
    """The description of a reference: bundle, filter, measure, classes, surveys and the sha256 of the arrays."""

    format: Literal[2]
    bundle: ModelName
    version: str
    weights_sha256: Sha256 = Field(
        description="sha256 of the bundle's weights: embeddings of other weights cannot be compared."
    )
    modalities: tuple[ModelName, ...] = Field(
        default=(), description="Names of the M modalities that are concatenated in an embedding."
    )
    where: str | None = Field(default=None, description="Filter that ordinary alerts passed; null: no filter.")
    measure: Measure = Field(default="mahalanobis", description="Measure of distance that anomaly scores are made of.")
    classes: tuple[ModelName, ...] = Field(
        default=(), description="Names of the C classes of the labels; empty: no alert is labelled."
    )
    surveys: dict[SurveyKey, SurveyCounts] = Field(min_length=1, description="Counts of alerts, by survey.")
    data_sha256: Sha256 = Field(description="sha256 of the names and bytes of the arrays, in order of name.")

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_format(cls, card: Any) -> Any:
        if isinstance(card, dict) and card.get("format") != FORMAT:
            raise ValueError(
                f"written by another version of broker-filter in format {card.get('format')!r}; this version reads "
                "format "
                f"{FORMAT}, in which each survey has its own alerts and calibration"
            )
        return card


@dataclass(frozen=True, slots=True)
class ReferenceAlerts:
    """K ordinary alerts, or stars; `alerts[rows]` selects a subset."""

    embedding: Embeddings  # [K, D]
    alert_id: NDArray[np.int64]  # [K]
    object_id: NDArray[np.str_]  # [K]
    survey: NDArray[np.uint8]  # [K] codes of Survey; NO_SURVEY for stars

    def __len__(self) -> int:
        return len(self.alert_id)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> ReferenceAlerts:
        return ReferenceAlerts(self.embedding[rows], self.alert_id[rows], self.object_id[rows], self.survey[rows])


@dataclass(frozen=True, slots=True)
class SurveyReference:
    """Ordinary alerts of one survey, and the calibration of its anomaly scores.

    The calibration is made with held-out ordinary alerts of other objects.
    """

    alerts: ReferenceAlerts  # K
    scores: NDArray[np.float32]  # [Q] ascending: scores of the held-out alerts
    usual: NDArray[np.float32]  # [1 + M, 2] mean and std. deviation of their distances: whole, modalities
    apart: NDArray[np.float32]  # [M, 2] mean and std. deviation of each modality's distance from its neighbours
    label: NDArray[np.int64]  # [K] index into the card's classes, or UNLABELLED


@dataclass(frozen=True, slots=True)
class Reference:
    """Ordinary alerts of one or more surveys, or variable stars. Alerts of other surveys cannot be judged."""

    card: ReferenceCard
    surveys: Mapping[Survey, SurveyReference]
    stars: SurveyReference | None = None

    @property
    def parts(self) -> dict[str, SurveyReference]:
        """The parts by the name that they have in the card: that of a survey, or STARS."""
        return _parts(self.surveys, self.stars)

    def write(self, file: Path) -> None:
        """Write the file atomically: it appears under its name only when it is complete."""
        partial = file.with_name(f"{file.name}.partial")
        save_file(_arrays(self.parts), partial, metadata={CARD: self.card.model_dump_json()})
        partial.replace(file)


def make_reference(
    made_with: Bundle,
    where: str | None,
    surveys: Mapping[Survey, SurveyReference],
    counts: Mapping[Survey, SurveyCounts],
    measure: Measure,
    classes: tuple[str, ...] = (),
) -> Reference:
    """Return a reference of embeddings that the bundle `made_with` produced.

    `counts` also covers surveys that are not in `surveys` because too few of their alerts passed the filter.
    """
    described = ReferenceCard(
        format=FORMAT,
        bundle=made_with.card.name,
        version=made_with.card.version,
        weights_sha256=made_with.weights_sha256,
        modalities=made_with.modalities,
        where=where,
        measure=measure,
        classes=classes,
        surveys={str(survey): of_survey for survey, of_survey in counts.items()},
        data_sha256=_sha256(_arrays(_parts(surveys))),
    )
    return Reference(described, surveys)


def make_star_reference(
    network: str,
    version: str,
    weights_sha256: str,
    modalities: tuple[str, ...],
    classes: tuple[str, ...],
    measure: Measure,
    stars: SurveyReference,
) -> Reference:
    """Return a set of the embeddings of variable stars that the `network` with these weights produced."""
    kept = len(stars.alerts)
    described = ReferenceCard(
        format=FORMAT,
        bundle=network,
        version=version,
        weights_sha256=weights_sha256,
        modalities=modalities,
        measure=measure,
        classes=classes,
        surveys={STARS: SurveyCounts(read=kept, passed=kept, kept=kept, held_out=len(stars.scores))},
        data_sha256=_sha256(_arrays(_parts({}, stars))),
    )
    return Reference(described, {}, stars)


def _parts(
    surveys: Mapping[Survey, SurveyReference], stars: SurveyReference | None = None
) -> dict[str, SurveyReference]:
    return {**{str(survey): part for survey, part in surveys.items()}, **({STARS: stars} if stars else {})}


def read_card(file: Path) -> ReferenceCard:
    """Read the card of a reference without its arrays. Raises ReferenceSetError if the file is not a reference."""
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ReferenceSetError(f"{file}: has {size} bytes; a reference may have at most {MAX_BYTES}")
        with safe_open(file, framework="numpy") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
    except OSError as error:
        raise ReferenceSetError(f"{file}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ReferenceSetError(f"{file}: not a safetensors file: {error}; build the reference again") from error
    if CARD not in metadata:
        raise ReferenceSetError(f"{file}: not a reference set; `broker-filter reference build` writes one")
    try:
        return ReferenceCard.model_validate_json(metadata[CARD])
    except ValidationError as error:
        raise ReferenceSetError(f"{file}: {describe_problems(error)}; build the reference again") from error


def read_reference(file: Path) -> Reference:
    """Read a reference into memory. Raises ReferenceSetError if the file is not a reference or is damaged."""
    card = read_card(file)
    with safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    surveys = [name for name, counts in card.surveys.items() if counts.kept]
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for survey in surveys:
        try:
            ((k, d), _), ((q,), _) = found[f"{survey}.embedding"], found[f"{survey}.scores"]
        except (KeyError, ValueError):
            raise ReferenceSetError(
                f"{file}: the embeddings or scores of {survey} are missing or have a wrong shape; "
                "build the reference again"
            ) from None
        if not all(MIN_ALERTS <= n <= MAX_ALERTS for n in (k, q)):
            raise ReferenceSetError(
                f"{file}: holds {k} alerts and {q} scores of {survey}; each must be between {MIN_ALERTS} and "
                f"{MAX_ALERTS}; "
                "build the reference again"
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
        raise ReferenceSetError(f"{file}: holds {found}, but its card requires {expected}; build the reference again")
    arrays = load_file(file)
    if _sha256(arrays) != card.data_sha256:
        raise ReferenceSetError(
            f"{file}: corrupted: the sha256 of its arrays is not the one in its card; build the reference again"
        )
    parts = {survey: _of_survey(file, survey, arrays, len(card.classes)) for survey in surveys}
    stars = parts.pop(STARS, None)
    return Reference(card, {Survey[name.upper()]: part for name, part in parts.items()}, stars)


def _of_survey(file: Path, survey: str, arrays: Mapping[str, NDArray[Any]], classes: int) -> SurveyReference:
    """Return the part of one survey, or of the stars. Raises ReferenceSetError if its arrays cannot be used."""
    own = {name.removeprefix(f"{survey}."): array for name, array in arrays.items() if name.startswith(f"{survey}.")}
    if problem := _unusable(own, classes):
        raise ReferenceSetError(f"{file}: survey {survey}: {problem}; build the reference again")
    names = own["object_id"].view(f"S{MAX_OBJECT_ID_BYTES}")[:, 0]
    try:
        object_id = np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
        raise ReferenceSetError(f"{file}: an object id is not UTF-8; build the reference again") from error
    code = NO_SURVEY if survey == STARS else Survey[survey.upper()]
    alerts = ReferenceAlerts(own["embedding"], own["alert_id"], object_id, np.full(len(names), code, np.uint8))
    return SurveyReference(alerts, own["scores"], own["usual"], own["apart"], own["label"])


def check_made_with(file: Path, reference: ReferenceCard, bundles: Sequence[Bundle]) -> None:
    """Raise ReferenceSetError unless one of the bundles produced the embeddings of the reference."""
    bundle = next((bundle for bundle in bundles if bundle.card.name == reference.bundle), None)
    if bundle is None:
        raise ReferenceSetError(
            f"{file}: made with the bundle {reference.bundle}, which is not among the configured models "
            f"({', '.join(bundle.card.name for bundle in bundles)}): add it, or build a reference with one of them"
        )
    made = (reference.version, reference.weights_sha256, reference.modalities)
    if made != (bundle.card.version, bundle.weights_sha256, bundle.modalities):
        raise ReferenceSetError(
            f"{file}: made with the bundle {reference.bundle} {reference.version} (weights "
            f"{reference.weights_sha256[:12]}), but the model is {bundle.card.name} {bundle.card.version} "
            f"({bundle.weights_sha256[:12]}); build the reference again with `broker-filter reference build`"
        )


def _arrays(parts: Mapping[str, SurveyReference]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a reference by the names that they have in its file."""
    arrays: dict[str, NDArray[Any]] = {}
    for survey, part in parts.items():
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
    """Return why a survey's arrays cannot be used to score alerts or to set a threshold; None if they can."""
    if bad := [name for name in ("embedding", "scores", "usual", "apart") if not np.isfinite(arrays[name]).all()]:
        return f"the array {bad[0]} holds NaN or infinite numbers"
    if (np.diff(arrays["scores"]) < 0).any() or arrays["scores"][0] == arrays["scores"][-1]:
        return "the scores are not ascending, or are all equal"
    if bad := [name for name in ("usual", "apart") if not (arrays[name][:, 1] > 0).all()]:
        return f"a standard deviation in the array {bad[0]} is not positive"
    if not ((arrays["label"] >= UNLABELLED) & (arrays["label"] < classes)).all():
        return "the array label holds an index that is not of a class in the card"
    return None


def _sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
