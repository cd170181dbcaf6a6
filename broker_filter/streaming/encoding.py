"""Encodes output records: the survey's own bytes, with one field added.

An alert's Avro body is never decoded and encoded again. It is copied (for `no_cutouts` without the bytes of the
cutouts), the encoded field `broker_filter` is appended to it, and the writer's schema gets this field as its last one.
So a reader gets every field exactly as the survey wrote it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from broker_filter import __version__
from broker_filter.anomalies.score import Reason
from broker_filter.packets.batch import AlertBatch, Record, Survey
from broker_filter.packets.framing.ocf import container_header, encode_long
from broker_filter.packets.framing.wire import frame
from broker_filter.packets.schemas.defaults import without_invalid_defaults
from broker_filter.packets.schemas.registry_client import Answer, RegistryClient, RegistryUnavailable, no_beat
from broker_filter.packets.schemas.registry_location import RegistryLocation
from broker_filter.packets.schemas.writer_schema import BySchema, WriterSchema, full_name, moved_to, self_contained
from broker_filter.scoring.explanation import Explanation, Feature, Verdict
from broker_filter.scoring.scores import ModelScores
from broker_filter.streaming.scored import Anomalies, FilterOutcome, Match, ScoredBatch

Payload = Literal["full", "no_cutouts", "scores"]
SubjectStrategy = Literal["topic", "record", "topic-record"]

FIELD = "broker_filter"
"""Name of the added field, and namespace of its types. If the packet already has this field from an earlier
broker-filter, the new field is `broker_filter_2` (then 3, ...): the highest number is the newest."""
CUTOUT_FIELDS = frozenset({"cutoutScience", "cutoutTemplate", "cutoutDifference"})
REGISTERED_SCHEMAS = 10_000
"""Largest number of ids and of refusals that are cached: untrusted packets cannot make the caches grow further."""
FORGET_REFUSAL_S = 60.0
"""Time in seconds until a refused schema is sent to the registry again, because the registry's rules may change."""
REFUSALS = frozenset(
    {
        HTTPStatus.CONFLICT,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.REQUEST_URI_TOO_LONG,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    }
)
"""HTTP statuses that say that the schema itself is incompatible, invalid or too large."""
NOT_WRITABLE = 42205
"""Confluent's error code of a registry that accepts no schemas at present. It says nothing about the schema."""
MAX_SUBJECT_CHARACTERS = 1000
"""Largest length of a subject. Names come from untrusted packets and go into a URL, which servers limit to some
thousand characters."""
MAX_SCHEMA_ID = 2**32 - 1
"""The wire format has four bytes for the id."""
MAX_FEATURES = 5
"""Features in a reason, of all lenses together, in the order of the configuration."""
MAX_SOURCES = 5
"""Source tokens of a feature in a reason: the ones with the largest shares."""
NAMED = ("record", "error", "enum", "fixed")
"""Avro types that have names."""


HOP_FORMAT = ("_format", b"avro")
"""The header by which hop-client recognises an Avro object container file (hop.models.AvroBlob)."""

T = TypeVar("T")
Body = Sequence[bytes | memoryview]
"""An encoded record in pieces, which are joined only once to the value of the output record."""


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """A Kafka record to publish."""

    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]
    optional: bool = False
    """Whether the record is left out if its topic does not accept it, while a record that is due rejects its alert."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputSchema:
    """The schema of output bodies. `sync` is computed from the schema, so that equal alerts give equal bytes."""

    text: bytes
    sync: bytes
    header: bytes

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> OutputSchema:
        """Return the output schema for a parsed JSON schema."""
        text = json.dumps(definition, separators=(",", ":")).encode()
        sync = hashlib.blake2b(text, digest_size=16).digest()
        return cls(text, sync, container_header(text, sync))


class Framing(Protocol):
    """Turns a body into the value of an output record."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Kafka headers that state how the value is framed."""
        ...

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """Return the value to publish to `topic`."""
        ...


class ContainerFraming:
    """Frames a body as an Avro object container file with one record, which `fastavro.reader` can read."""

    headers = (HOP_FORMAT,)

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:  # noqa: ARG002
        """Return the value to publish, which is the same for every topic."""
        size = sum(map(len, body))
        return b"".join((schema.header, encode_long(1), encode_long(size), *body, schema.sync))


class RegistryRefusalError(Exception):
    """The schema registry does not accept an output schema. The message names the subject and the registry's answer."""


class WireFraming:
    """Frames a body in Confluent wire format. A schema is registered when it is first needed.

    `strategy` chooses the subject. `topic` (Confluent's TopicNameStrategy): `<topic>-value`. `record`
    (RecordNameStrategy): the record's full name. `topic-record` (TopicRecordNameStrategy): `<topic>-<full name>`. Many
    versions of a survey's schema have the same full name and are not compatible with each other. If the registry
    refuses a version for that reason, it is registered under a unique name: see `name_of_its_own`.

    `registry`, `waiting`: see RegistryClient. `clock`: returns monotonic seconds.
    """

    headers = ()

    def __init__(
        self,
        registry: RegistryLocation | str,
        strategy: SubjectStrategy = "topic-record",
        waiting: Callable[[], None] = no_beat,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = RegistryClient(registry, waiting)
        self._strategy = strategy
        self._clock = clock
        # The keys are `sync` and topic, so that the caches keep no schema objects alive.
        self._ids: dict[tuple[bytes, str], int] = {}
        self._refusals: dict[tuple[bytes, str], tuple[float, RegistryRefusalError]] = {}  # time, error

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """Return the value to publish to `topic`.

        Raises RegistryUnavailable if the registry does not answer (a later call may succeed), and RegistryRefusalError
        if it refuses the schema.
        """
        schema_id = self._ids.get((schema.sync, topic))
        if schema_id is None:
            schema_id = self._registered(schema, topic)
        return frame(schema_id, b"".join(body))

    def _registered(self, schema: OutputSchema, topic: str) -> int:
        key = schema.sync, topic
        refused, refusal = self._refusals.get(key, (-math.inf, None))
        if refusal is not None and self._clock() - refused < FORGET_REFUSAL_S:
            raise refusal.with_traceback(None)  # otherwise its traceback would grow each time
        for cached in (self._ids, self._refusals):
            if len(cached) >= REGISTERED_SCHEMAS:
                cached.clear()
        try:
            self._ids[key] = self._register(schema, topic)
        except RegistryRefusalError as error:
            self._refusals[key] = self._clock(), error
            raise
        return self._ids[key]

    def _register(self, schema: OutputSchema, topic: str) -> int:
        definition = json.loads(schema.text)
        answer = self._ask(definition, topic)
        if answer.status == HTTPStatus.CONFLICT and self._strategy != "topic":
            definition = name_of_its_own(definition, schema.sync)
            answer = self._ask(definition, topic)
        subject = self._subject(definition, topic)
        if answer.status == HTTPStatus.OK and isinstance(answer.content, dict):
            schema_id = answer.content.get("id")
            if isinstance(schema_id, int) and 0 <= schema_id <= MAX_SCHEMA_ID:
                return schema_id
        if answer.status in REFUSALS and answer.error_code != NOT_WRITABLE:
            raise RegistryRefusalError(f"schema registry {self._client.url} refuses subject {subject!r}: {answer}")
        raise RegistryUnavailable(f"schema registry {self._client.url} gives no id for {subject!r}: {answer}")

    def _ask(self, definition: dict[str, Any], topic: str) -> Answer:
        subject = self._subject(definition, topic)
        if len(subject) > MAX_SUBJECT_CHARACTERS:
            raise RegistryRefusalError(
                f"the subject {subject[:80]!r}... has {len(subject)} characters, more than {MAX_SUBJECT_CHARACTERS}"
            )
        document = {"schema": json.dumps(definition, separators=(",", ":"))}
        return self._client.ask(f"/subjects/{quote(subject, safe='')}/versions", document)

    def _subject(self, definition: dict[str, Any], topic: str) -> str:
        match self._strategy:
            case "topic":
                return f"{topic}-value"
            case "record":
                return full_name(definition, "")
            case "topic-record":
                return f"{topic}-{full_name(definition, '')}"


def name_of_its_own(definition: dict[str, Any], sync: bytes) -> dict[str, Any]:
    """Return a record's schema in a unique namespace: `ztf.alert` becomes `ztf.v1a2b3c4d5e6f7081.alert`.

    Avro compares the records of reader and writer by name without namespace, and bodies contain no names. So neither
    the bytes nor the readers change. `sync`: the sync marker of the schema, from which the namespace is made.
    """
    space = full_name(definition, "").rpartition(".")[0]
    moved: dict[str, Any] = moved_to(f"{space}.v{sync.hex()[:16]}".lstrip("."), space, definition)
    return moved


class Encoder:
    """Encodes the bodies of output records for one kind of payload."""

    def __init__(self, payload: Payload, configuration: str = "") -> None:
        """Prepare to encode. `configuration`: revision of the configuration, which each record states."""
        self._payload = payload
        self._configuration = configuration

    def encode(self, scored: ScoredBatch, scored_at_ms: int) -> list[tuple[OutputSchema, Body]]:
        """Return schema and body of each alert in `scored.scored`, in this order.

        `scored_at_ms`: Unix milliseconds.
        """
        return self._records(scored, scored.scored.tolist(), scored_at_ms, ())

    def encode_on_trial(self, scored: ScoredBatch, scored_at_ms: int) -> dict[int, tuple[OutputSchema, Body]]:
        """Return schema and body, with the outputs of the shadow models, of each alert in `scored.on_trial`, by row."""
        if not scored.shadows:
            return {}
        rows = scored.on_trial.tolist()
        return dict(zip(rows, self._records(scored, rows, scored_at_ms, scored.shadows), strict=True))

    def _records(
        self, scored: ScoredBatch, rows: Sequence[int], scored_at_ms: int, shadows: Sequence[ModelScores]
    ) -> list[tuple[OutputSchema, Body]]:
        annotations = encode_annotations(scored, scored_at_ms, self._configuration, shadows)
        if self._payload == "scores":
            schema = scored_alert_schema()
            return [(schema, (encode_identity(scored.alerts, i), annotations[i])) for i in rows]
        cutouts = self._payload == "full"
        records = scored.alerts.records
        return [
            (annotated_schema(records[i].schema, cutouts), (*_kept(records[i], cutouts), annotations[i])) for i in rows
        ]


def _kept(record: Record, cutouts: bool) -> list[memoryview]:
    """Return the pieces of an alert's body that are copied to the output."""
    if cutouts:
        return [record.body]
    starts = [0, *(end for _, end in record.cutout_spans)]
    ends = [*(start for start, _ in record.cutout_spans), len(record.body)]
    return [record.body[start:end] for start, end in zip(starts, ends, strict=True)]


def encode_annotations(
    scored: ScoredBatch, scored_at_ms: int, configuration: str, shadows: Sequence[ModelScores] = ()
) -> list[bytes]:
    """Return the Avro encoding of the field `broker_filter` for each of the batch's N alerts.

    `scored_at_ms`: Unix milliseconds. `configuration`: revision of the configuration. `shadows`: outputs of shadow
    models, which follow those of the serving models.
    """
    head = _string(__version__) + encode_long(scored_at_ms)
    duplicate = [TRUE if seen else FALSE for seen in scored.duplicate.tolist()]
    anomaly = _encode_anomalies(scored.anomalies) if scored.anomalies else [NULL] * len(duplicate)
    serving = [(model.taken.tolist(), _encode_model(model, shadow=False)) for model in scored.scores.models]
    models = [*serving, *((model.taken.tolist(), _encode_model(model, shadow=True)) for model in shadows)]
    filters = _encode_filters(scored.filters, len(duplicate))
    revision, not_redriven = _string(configuration), encode_long(0)
    matches = {i: b"".join(_array([_encode_match(one) for one in near])) for i, near in scored.matches.items()}
    tries = {k: encode_long(packet.redriven.tries) for k, packet in enumerate(scored.packets) if packet.redriven}
    redriven = [tries.get(k, not_redriven) for k in scored.alerts.packet_index.tolist()]
    annotations = []
    for i in range(len(duplicate)):
        taking = _array([encoded[i] for taken, encoded in models if taken[i]])
        tail = (filters[i], revision, matches.get(i, END), redriven[i])
        annotations.append(b"".join((head, duplicate[i], anomaly[i], *taking, *tail)))
    return annotations


def encode_identity(alerts: AlertBatch, i: int) -> bytes:
    """Return the Avro encoding of the fields of scored_alert.avsc before `broker_filter`, for alert `i`."""
    band = alerts.identity(i).band
    return b"".join(
        (
            encode_long(int(alerts.alert_id[i])),
            _string(alerts.object_id[i]),
            _string(str(Survey(alerts.survey[i]))),
            _string(alerts.schema_version[i]),
            struct.pack("<3d", alerts.mjd[i], alerts.ra[i], alerts.dec[i]),
            NULL if band is None else SECOND_BRANCH + _string(band),
        )
    )


NULL = b"\0"
SECOND_BRANCH = b"\2"
"""NULL and SECOND_BRANCH are union branches 0 and 1 as zigzag integers. `null` is the first branch of all unions
here."""
FALSE, TRUE = b"\0", b"\1"
FLOAT_BYTES = 4
END = b"\0"
"""The end of the blocks of an array or map."""


def _string(text: str) -> bytes:
    data = text.encode()
    return encode_long(len(data)) + data


def _float(value: float) -> bytes:
    return struct.pack("<f", value)


def _double(value: float) -> bytes:
    return struct.pack("<d", value)


def _optional(value: T | None, encode: Callable[[T], bytes]) -> bytes:
    """Return the encoding of a union of null and another type."""
    return NULL if value is None else SECOND_BRANCH + encode(value)


def _array(items: Sequence[bytes]) -> tuple[bytes, ...]:
    return (encode_long(len(items)), *items, END) if items else (END,)


def _encode_anomalies(anomalies: Anomalies) -> list[bytes]:
    """Return an encoded null or Anomaly record for each of the N rows."""
    scores, thresholds = (values.astype("<f4").tobytes() for values in (anomalies.score, anomalies.threshold))
    model = SECOND_BRANCH + _string(anomalies.model) + SECOND_BRANCH
    encoded = []
    for i, (judged, flag) in enumerate(zip(anomalies.judged.tolist(), anomalies.flag.tolist(), strict=True)):
        if not judged:
            encoded.append(NULL)
            continue
        value = slice(FLOAT_BYTES * i, FLOAT_BYTES * (i + 1))
        flagged = TRUE if flag else FALSE
        reason = _encode_reason(anomalies.reasons[i]) if i in anomalies.reasons else NULL
        encoded.append(b"".join((SECOND_BRANCH, scores[value], flagged, model, thresholds[value], reason)))
    return encoded


def _encode_reason(reason: Reason) -> bytes:
    neighbours = [
        encode_long(one.alert_id) + _string(one.object_id) + _float(one.distance) for one in reason.neighbours
    ]
    modalities = [_string(name) + _float(distance) for name, distance in reason.modalities.items()]
    most = _optional(reason.most_unlike, _string)
    features = [
        _encode_feature(one.lens, feature)
        for one in reason.explanations
        if one.verdict is Verdict.EXPLAINED
        for feature in one.features
    ][:MAX_FEATURES]
    lenses = [_encode_verdict(one) for one in reason.explanations]
    return b"".join((SECOND_BRANCH, *_array(neighbours), *_array(modalities), most, *_array(features), *_array(lenses)))


def _encode_feature(lens: str, feature: Feature) -> bytes:
    sources = [
        _optional(source.mjd, _double)
        + _optional(source.band, _string)
        + b"".join(_array([encode_long(edge) for edge in source.box or ()]))
        + _float(source.share)
        for source in feature.sources[:MAX_SOURCES]
    ]
    return b"".join(
        (
            _string(lens),
            encode_long(feature.id),
            _optional(feature.name, _string),
            TRUE if feature.stable else FALSE,
            _float(feature.activation),
            _float(feature.rarity),
            _optional(feature.effect, _float),
            *_array(sources),
            *_array([_float(share) for share in feature.heads]),
        )
    )


def _encode_verdict(one: Explanation) -> bytes:
    texts = (one.lens, one.version, one.site, one.effect_on, str(one.verdict))
    numbers = (one.unexplained, one.percentile)
    return b"".join((*map(_string, texts), *(_optional(number, _float) for number in numbers)))


def _encode_model(scores: ModelScores, *, shadow: bool) -> list[bytes]:
    """Return an encoded ModelScores record for each of N rows.

    All have the same length and are filled in one array.
    """
    template = bytearray(_string(scores.model) + _string(scores.version))
    floats: list[tuple[int, NDArray[np.float32]]] = []

    def leave_room(values: NDArray[np.float32]) -> None:
        floats.append((len(template), values))
        template.extend(bytes(4 * values.shape[1]))

    if scores.labels:
        template += encode_long(len(scores.labels))
    for c, label in enumerate(scores.labels):
        template += _string(label)
        leave_room(scores.probabilities[:, c : c + 1])
    template += END
    if scores.embedding is None:
        template += NULL
    else:
        template += SECOND_BRANCH + encode_long(scores.embedding.shape[1])
        leave_room(scores.embedding)
        template += END
    template += TRUE if shadow else FALSE
    rows = np.tile(np.frombuffer(template, dtype=np.uint8), (len(scores.taken), 1))
    for start, values in floats:
        encoded = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
        rows[:, start : start + encoded.shape[1]] = encoded
    return [row.tobytes() for row in rows]


def _encode_filters(outcomes: Sequence[FilterOutcome], n: int) -> list[bytes]:
    """Return an encoded array of FilterResult records for each of N rows.

    All have the same length and are filled in one array.
    """
    if not outcomes:
        return [END] * n
    template = bytearray(encode_long(len(outcomes)))
    results = []
    for one in outcomes:
        template += _string(one.name) + _string(one.revision)
        results.append(len(template))
        template += FALSE + (TRUE if one.paused else FALSE)
    template += END
    rows = np.tile(np.frombuffer(template, dtype=np.uint8), (n, 1))
    for place, one in zip(results, outcomes, strict=True):
        rows[:, place] = one.passed  # False and True as FALSE and TRUE
    return [row.tobytes() for row in rows]


def _encode_match(match: Match) -> bytes:
    return _string(match.list) + _string(match.name) + _float(match.separation)


@cache
def _scored_alert_definition() -> dict[str, Any]:
    definition: dict[str, Any] = json.loads(files("broker_filter.schemas").joinpath("scored_alert.avsc").read_bytes())
    return definition


@cache
def scored_alert_schema() -> OutputSchema:
    """Return the schema of `payload: scores`: schemas/scored_alert.avsc without its documentation.

    The schema is repeated in each container file, and the documentation would double its size.
    """
    return OutputSchema.of(_undocumented(_scored_alert_definition()))


def _undocumented(part: Any) -> Any:
    if isinstance(part, list):
        return [_undocumented(each) for each in part]
    if isinstance(part, dict):
        return {key: _undocumented(value) for key, value in part.items() if key != "doc"}
    return part


def annotated_schema(schema: WriterSchema, cutouts: bool) -> OutputSchema:
    """Return the writer's schema with the added field at its end, without invalid defaults.

    `cutouts`: whether the schema keeps the cutout fields.
    """
    return _with_cutouts(schema) if cutouts else _without_cutouts(schema)


def _annotate(schema: WriterSchema, cutouts: bool) -> OutputSchema:
    definitions = _named_types(schema.definition)
    taken = _taken_names(schema, definitions)
    number = 1
    while (field := FIELD if number == 1 else f"{FIELD}_{number}") in taken:
        number += 1
    definition = dict(schema.definition)
    if not cutouts:
        definition["fields"] = [f for f in definition["fields"] if f["name"] not in CUTOUT_FIELDS]
    definition = self_contained(definition, "", definitions, set())
    annotation = dict(_scored_alert_definition()["fields"][-1])
    annotation["type"] = annotation["type"] | {"namespace": field}
    definition["fields"].append(annotation | {"name": field})
    return OutputSchema.of(without_invalid_defaults(definition))


_with_cutouts = BySchema(partial(_annotate, cutouts=True))
_without_cutouts = BySchema(partial(_annotate, cutouts=False))


def _taken_names(schema: WriterSchema, definitions: Mapping[str, Any]) -> set[str]:
    """Return the names that the added field and its namespace must not have."""
    fields = {field["name"] for field in schema.definition["fields"]}
    return fields | {name.partition(".")[0] for name in definitions}


def _named_types(type_: Any, namespace: str = "") -> dict[str, Any]:
    """Return all named types that a schema defines, by full name."""
    if isinstance(type_, list):
        return {name: found for branch in type_ for name, found in _named_types(branch, namespace).items()}
    if not isinstance(type_, dict):
        return {}
    named = {}
    if type_["type"] in NAMED:
        name = full_name(type_, namespace)
        namespace = name.rpartition(".")[0]
        named[name] = type_
    inner = [field["type"] for field in type_.get("fields", ())]
    inner += [type_[key] for key in ("items", "values", "type") if key in type_]
    for part in inner:
        named |= _named_types(part, namespace)
    return named
