"""Output records: the survey's own bytes with one field added.

An alert's Avro body is never decoded and encoded again: it is copied as it came (for `no_cutouts` less the bytes of the
cutouts), the encoded field `broker_filter` is put behind it, and the writer's schema gets that field as its last. So a
reader sees every field exactly as the survey wrote it.
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
from typing import Any, Literal, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from broker_filter import __version__
from broker_filter.packets.batch import AlertBatch, Record, Survey
from broker_filter.packets.defaults import without_invalid_defaults
from broker_filter.packets.ocf import container_header, encode_long
from broker_filter.packets.registry_client import Answer, RegistryClient, RegistryUnavailable, no_beat
from broker_filter.packets.schema import BySchema, WriterSchema, full_name, moved_to, self_contained
from broker_filter.packets.wire import frame
from broker_filter.scoring.anomaly import Reason
from broker_filter.scoring.scores import ModelScores
from broker_filter.streaming.scored import Anomalies, ScoredBatch

Payload = Literal["full", "no_cutouts", "scores"]
SubjectStrategy = Literal["topic", "record", "topic-record"]

FIELD = "broker_filter"
"""The added field, and the namespace of its types. Where the packet has been through broker-filter before and carries
that field already, the new one is `broker_filter_2` (3, ...): the highest number is the newest."""
CUTOUT_FIELDS = frozenset({"cutoutScience", "cutoutTemplate", "cutoutDifference"})
REGISTERED_SCHEMAS = 10_000
"""Ids and refusals that are kept: packets from outside cannot make them grow either."""
FORGET_REFUSAL_S = 60.0
"""How long a refused schema is not offered again: not with every alert, but soon after the registry's rules change."""
REFUSALS = frozenset(
    {
        HTTPStatus.CONFLICT,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.REQUEST_URI_TOO_LONG,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    }
)
"""Answers that are about the schema: it is incompatible, invalid, or too large, and will be tomorrow."""
NOT_WRITABLE = 42205
"""Confluent's error code for a registry that takes no schema at present: a state, and no answer about the schema."""
MAX_SUBJECT_CHARACTERS = 1000
"""A name comes with a packet, and goes into a URL; servers take some thousands of characters there."""
MAX_SCHEMA_ID = 2**32 - 1
"""Wire format has four bytes for it."""
NAMED = ("record", "error", "enum", "fixed")
"""Kinds of types that have names."""


HOP_FORMAT = ("_format", b"avro")
"""The header by which hop-client knows that a message is an Avro object container file (hop.models.AvroBlob)."""

Body = Sequence[bytes | memoryview]
"""An encoded record in pieces, which are joined once, when the whole value is known."""


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """A Kafka record to publish."""

    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class OutputSchema:
    """What output bodies are written by. `sync` derives from the schema, so that equal alerts give equal bytes."""

    text: bytes
    sync: bytes
    header: bytes

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> OutputSchema:
        """From a schema's JSON as Python values."""
        text = json.dumps(definition, separators=(",", ":")).encode()
        sync = hashlib.blake2b(text, digest_size=16).digest()
        return cls(text, sync, container_header(text, sync))


class Framing(Protocol):
    """How a body becomes a record's value."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Kafka headers that say how the value is framed."""
        ...

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """The value to publish to `topic`."""
        ...


class ContainerFraming:
    """An Avro object container file with one record: what `fastavro.reader` reads."""

    headers = (HOP_FORMAT,)

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:  # noqa: ARG002
        """The value to publish, the same for every topic."""
        size = sum(map(len, body))
        return b"".join((schema.header, encode_long(1), encode_long(size), *body, schema.sync))


class RegistryRefusalError(Exception):
    """The schema registry does not accept an output schema. The message says which subject, and what it answered."""


class WireFraming:
    """Confluent wire format: schemas are registered when they are first needed, under a subject for each `strategy`.

    `topic` (Confluent's TopicNameStrategy): `<topic>-value`. `record` (RecordNameStrategy): the record's full name.
    `topic-record` (TopicRecordNameStrategy): `<topic>-<full name>`. Many versions of a survey's schema share one full
    name and are not compatible with each other. Where the registry refuses one for that, it is registered under a
    name of its own: `name_of_its_own`.

    `waiting`: see RegistryClient.
    """

    headers = ()

    def __init__(
        self,
        registry_url: str,
        strategy: SubjectStrategy = "topic-record",
        waiting: Callable[[], None] = no_beat,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = RegistryClient(registry_url, waiting)
        self._strategy = strategy
        self._clock = clock
        # By what derives from the schema, and by topic: the schema's object is forgotten.
        self._ids: dict[tuple[bytes, str], int] = {}
        self._refusals: dict[tuple[bytes, str], tuple[float, RegistryRefusalError]] = {}  # when, and what it answered

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """The value to publish. Raises RegistryUnavailable (try again later) and RegistryRefusalError."""
        schema_id = self._ids.get((schema.sync, topic))
        if schema_id is None:
            schema_id = self._registered(schema, topic)
        return frame(schema_id, b"".join(body))

    def _registered(self, schema: OutputSchema, topic: str) -> int:
        key = schema.sync, topic
        refused, refusal = self._refusals.get(key, (-math.inf, None))
        if refusal is not None and self._clock() - refused < FORGET_REFUSAL_S:
            raise refusal.with_traceback(None)  # it would grow with every time that it is raised
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
            raise RegistryRefusalError(f"the name of a schema has {len(subject)} characters: {subject[:80]!r}...")
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
    """A record's schema in a namespace that no other schema has: `ztf.alert` becomes `ztf.v1a2b3c4d5e6f7081.alert`.

    Avro matches a reader's record with a writer's by the name without its namespace, and bodies hold no names. So
    readers and bytes are the same as without it. `sync`: what derives from the schema.
    """
    space = full_name(definition, "").rpartition(".")[0]
    moved: dict[str, Any] = moved_to(f"{space}.v{sync.hex()[:16]}".lstrip("."), space, definition)
    return moved


class Encoder:
    """Bodies of output records for one kind of payload."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload

    def encode(self, scored: ScoredBatch, scored_at_ms: int) -> list[tuple[OutputSchema, Body]]:
        """Schema and body of each alert in `scored.scored`, in that order. `scored_at_ms`: Unix milliseconds."""
        rows = scored.scored.tolist()
        annotations = encode_annotations(scored, scored_at_ms)
        if self._payload == "scores":
            schema = scored_alert_schema()
            return [(schema, (encode_identity(scored.alerts, i), annotations[i])) for i in rows]
        cutouts = self._payload == "full"
        records = scored.alerts.records
        return [
            (annotated_schema(records[i].schema, cutouts), (*_kept(records[i], cutouts), annotations[i])) for i in rows
        ]


def _kept(record: Record, cutouts: bool) -> list[memoryview]:
    """The pieces of an alert's body that travel on."""
    if cutouts:
        return [record.body]
    starts = [0, *(end for _, end in record.cutout_spans)]
    ends = [*(start for start, _ in record.cutout_spans), len(record.body)]
    return [record.body[start:end] for start, end in zip(starts, ends, strict=True)]


def encode_annotations(scored: ScoredBatch, scored_at_ms: int) -> list[bytes]:
    """The field `broker_filter` of every alert of the batch, as Avro."""
    head = _string(__version__) + encode_long(scored_at_ms)
    duplicate = [b"\1" if seen else b"\0" for seen in scored.duplicate.tolist()]
    anomaly = _encode_anomalies(scored.anomalies) if scored.anomalies else [NULL] * len(duplicate)
    models = [(model.taken.tolist(), _encode_model(model)) for model in scored.scores.models]
    annotations = []
    for i in range(len(duplicate)):
        taking = [encoded[i] for taken, encoded in models if taken[i]]
        annotations.append(b"".join((head, duplicate[i], anomaly[i], *_array(taking))))
    return annotations


def encode_identity(alerts: AlertBatch, i: int) -> bytes:
    """The fields of scored_alert.avsc before `broker_filter`, of alert i."""
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
"""Union branches 0 and 1, as zigzag integers; `null` stands first in all unions of ours."""
FLOAT_BYTES = 4
END = b"\0"
"""Ends the blocks of an array or map."""


def _string(text: str) -> bytes:
    data = text.encode()
    return encode_long(len(data)) + data


def _array(items: Sequence[bytes]) -> tuple[bytes, ...]:
    return (encode_long(len(items)), *items, END) if items else (END,)


def _encode_anomalies(anomalies: Anomalies) -> list[bytes]:
    """A null or an Anomaly record for each of the N rows; few of them have a reason."""
    scores, thresholds = (values.astype("<f4").tobytes() for values in (anomalies.score, anomalies.threshold))
    model = SECOND_BRANCH + _string(anomalies.model) + SECOND_BRANCH
    encoded = []
    for i, (judged, flag) in enumerate(zip(anomalies.judged.tolist(), anomalies.flag.tolist(), strict=True)):
        if not judged:
            encoded.append(NULL)
            continue
        value = slice(FLOAT_BYTES * i, FLOAT_BYTES * (i + 1))
        flagged = b"\1" if flag else b"\0"
        reason = _encode_reason(anomalies.reasons[i]) if i in anomalies.reasons else NULL
        encoded.append(b"".join((SECOND_BRANCH, scores[value], flagged, model, thresholds[value], reason)))
    return encoded


def _encode_reason(reason: Reason) -> bytes:
    neighbours = [
        encode_long(one.alert_id) + _string(one.object_id) + struct.pack("<f", one.distance)
        for one in reason.neighbours
    ]
    modalities = [_string(name) + struct.pack("<f", distance) for name, distance in reason.modalities.items()]
    most = NULL if reason.most_unlike is None else SECOND_BRANCH + _string(reason.most_unlike)
    return b"".join((SECOND_BRANCH, *_array(neighbours), *_array(modalities), most))


def _encode_model(scores: ModelScores) -> list[bytes]:
    """A ModelScores record for each of the N rows: all have one length, so all are filled in at once."""
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
    rows = np.tile(np.frombuffer(template, dtype=np.uint8), (len(scores.taken), 1))
    for start, values in floats:
        encoded = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
        rows[:, start : start + encoded.shape[1]] = encoded
    return [row.tobytes() for row in rows]


@cache
def _scored_alert_definition() -> dict[str, Any]:
    definition: dict[str, Any] = json.loads(files("broker_filter.schemas").joinpath("scored_alert.avsc").read_bytes())
    return definition


@cache
def scored_alert_schema() -> OutputSchema:
    """The schema of `payload: scores`: schemas/scored_alert.avsc without its documentation.

    A container file repeats the schema with every record, and the documentation is half of its text.
    """
    return OutputSchema.of(_undocumented(_scored_alert_definition()))


def _undocumented(part: Any) -> Any:
    if isinstance(part, list):
        return [_undocumented(each) for each in part]
    if isinstance(part, dict):
        return {key: _undocumented(value) for key, value in part.items() if key != "doc"}
    return part


def annotated_schema(schema: WriterSchema, cutouts: bool) -> OutputSchema:
    """The writer's schema with the annotation as its last field, with or without cutouts, and no invalid defaults."""
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
    """Names that the new field and its namespace must not have."""
    fields = {field["name"] for field in schema.definition["fields"]}
    return fields | {name.partition(".")[0] for name in definitions}


def _named_types(type_: Any, namespace: str = "") -> dict[str, Any]:
    """All named types that a schema defines, by full name."""
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
