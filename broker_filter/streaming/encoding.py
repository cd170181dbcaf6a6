"""Output records: the survey's own bytes with one field added.

An alert's Avro body is never decoded and encoded again: it is copied as it came (for `no_cutouts` less the bytes of the
cutouts), the encoded field `broker_filter` is put behind it, and the writer's schema gets that field as its last. So a
reader sees every field exactly as the survey wrote it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import struct
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from broker_filter import __version__
from broker_filter.packets.batch import AlertBatch, Record, Survey
from broker_filter.packets.ocf import container_header, encode_long
from broker_filter.packets.registry import RegistryUnavailable, registry_address
from broker_filter.packets.schema import BySchema, WriterSchema, full_name, self_contained
from broker_filter.packets.wire import frame
from broker_filter.scoring.anomaly import Reason
from broker_filter.scoring.scores import ModelScores
from broker_filter.streaming.anomalies import Anomalies
from broker_filter.streaming.filtering import ScoredBatch

Payload = Literal["full", "no_cutouts", "scores"]

FIELD = "broker_filter"
"""The added field, and the namespace of its types. Where the packet has been through broker-filter before and carries
that field already, the new one is `broker_filter_2` (3, ...): the highest number is the newest."""
CUTOUT_FIELDS = frozenset({"cutoutScience", "cutoutTemplate", "cutoutDifference"})
REGISTERED_SCHEMAS = 10_000
"""Ids that are kept: packets from outside cannot make them grow either."""
REGISTRY_TIMEOUT_S = 10.0
NOT_NOW = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
MAX_REGISTRY_ANSWER = 1 << 20
"""Bytes of a registry's answer: an id, or an error message."""
NAMED = ("record", "error", "enum", "fixed")
"""Kinds of types that have names."""


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

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """The value to publish to `topic`."""
        ...


class ContainerFraming:
    """An Avro object container file with one record: what `fastavro.reader` reads."""

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:  # noqa: ARG002
        """The value to publish, the same for every topic."""
        size = sum(map(len, body))
        return b"".join((schema.header, encode_long(1), encode_long(size), *body, schema.sync))


class RegistryRefusalError(Exception):
    """The schema registry does not accept an output schema. The message says which subject, and what it answered."""


class WireFraming:
    """Confluent wire format: each topic's schemas are registered under `<topic>-value` when they are first needed.

    Anonymously, or with the credentials in the registry's URL (`https://user:key@host`).
    """

    def __init__(self, registry_url: str) -> None:
        self._url, credentials = registry_address(registry_url)
        self._headers = {"Content-Type": "application/vnd.schemaregistry.v1+json", **credentials}
        self._ids: dict[tuple[bytes, str], int] = {}  # by what derives from the schema: its object is forgotten

    def frame(self, schema: OutputSchema, body: Body, topic: str) -> bytes:
        """The value to publish. Raises RegistryUnavailable (try again later) and RegistryRefusalError."""
        if (schema.sync, topic) not in self._ids:
            if len(self._ids) >= REGISTERED_SCHEMAS:
                self._ids.clear()
            self._ids[schema.sync, topic] = self._register(schema, f"{topic}-value")
        return frame(self._ids[schema.sync, topic], b"".join(body))

    def _register(self, schema: OutputSchema, subject: str) -> int:
        request = urllib.request.Request(  # noqa: S310 -- the operator's own URL, its scheme checked with the configuration
            f"{self._url}/subjects/{subject}/versions",
            data=json.dumps({"schema": schema.text.decode()}).encode(),
            headers=self._headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=REGISTRY_TIMEOUT_S) as response:  # noqa: S310
                return int(json.loads(response.read(MAX_REGISTRY_ANSWER))["id"])
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {error.read(MAX_REGISTRY_ANSWER).decode(errors='replace')}"
            if error.code >= 500 or error.code in NOT_NOW:
                raise RegistryUnavailable(f"schema registry {self._url}: {answer}") from None
            # Surveys change their schemas without asking whether a registry calls that compatible.
            advice = "; set the subject's compatibility to NONE" if error.code == http.HTTPStatus.CONFLICT else ""
            raise RegistryRefusalError(
                f"schema registry {self._url} refuses subject {subject!r}: {answer}{advice}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise RegistryUnavailable(f"schema registry {self._url}: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryRefusalError(f"schema registry {self._url} gave no id for {subject!r}: {error!r}") from None


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
    """The schema of `payload: scores`: schemas/scored_alert.avsc."""
    return OutputSchema.of(_scored_alert_definition())


def annotated_schema(schema: WriterSchema, cutouts: bool) -> OutputSchema:
    """The writer's schema with the annotation as its last field, with or without the cutouts."""
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
    return OutputSchema.of(definition)


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
