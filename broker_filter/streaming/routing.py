"""Chooses the topics of each alert, and turns a scored batch into output records. It does not use Kafka.

An alert that a model scored goes to `<prefix>.scored`, to `<prefix>.anomalies` if it is flagged as an anomaly, and to
`<prefix>.<name>` of each filter that it passes, unless this topic is paused. If a shadow model scored it too, it also
goes to `<prefix>.shadow`. A message with a rejected alert goes to `<prefix>.dead-letter` once, with its original bytes.
It goes there only once even if several of its alerts are rejected, so that output cannot multiply input.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from broker_filter.config import ANOMALIES, DEAD_LETTER, SCORED, SHADOW, RecordKey
from broker_filter.packets.batch import AlertBatch
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.registry_client import RegistryUnavailable, no_beat
from broker_filter.packets.surveys import DESIGNATION
from broker_filter.streaming.dead_letters import (
    INPUT,
    REASON,
    RECORD,
    REDRIVEN,
    REJECTED,
    Header,
    letter_headers,
    scored_rows,
)
from broker_filter.streaming.encoding import (
    Body,
    ContainerFraming,
    Encoder,
    Framing,
    OutputRecord,
    OutputSchema,
    RegistryRefusalError,
    WireFraming,
)
from broker_filter.streaming.resolved import ResolvedService
from broker_filter.streaming.scored import LeftOut, ScoredBatch

MAX_DETAIL_BYTES = 500
"""Largest size of a dead letter's header `detail`, which may contain text from a packet."""
REGISTRY_REST_S = 60.0
"""Time in seconds without records of the shadow topic after the schema registry gave no answer for it. A request may
take 10 s, during which no alert is routed."""
SAY_AGAIN_S = 60.0
"""Time in seconds until the next record of the shadow topic that is left out is logged, because each one may be."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Routed:
    """The output records of a batch. Record k was made from the packet `packet_index[k]` of the batch.

    `refused`: rejects by row, for the scored rows whose output schema the schema registry refused. `left_out`: for each
    record of the shadow topic that was left out, the index of its packet and the reason.
    """

    refused: Mapping[int, Reject] = field(default_factory=dict)
    left_out: list[tuple[int, LeftOut]] = field(default_factory=list)
    records: list[OutputRecord] = field(default_factory=list)
    packet_index: list[int] = field(default_factory=list)
    published: Counter[str] = field(default_factory=Counter)  # records by topic

    def add(self, record: OutputRecord, packet_index: int) -> None:
        """Append a record that was made from the packet `packet_index` of the batch."""
        self.records.append(record)
        self.packet_index.append(packet_index)
        self.published[record.topic] += 1


class Router:
    """Turns scored batches into output records. Its only state are caches of encoded schemas."""

    def __init__(
        self,
        prefix: str,
        *,
        models: Sequence[tuple[str, str]],
        shadows: Sequence[tuple[str, str]] = (),
        encoder: Encoder,
        framing: Framing,
        drop_duplicates: bool = False,
        key: RecordKey = "object",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`models`: name and version of each model, for the header `models`. `shadows`: the same of the shadow models.

        `key`: what the key of an output record is. `clock`: returns Unix seconds, for the field `scored_at`.
        """
        self._prefix = prefix
        self._scored = f"{prefix}.{SCORED}"
        self._anomalous = f"{prefix}.{ANOMALIES}"
        self._dead_letter = f"{prefix}.{DEAD_LETTER}"
        self._shadow = f"{prefix}.{SHADOW}"
        self._models = _models_header(models)
        self._models_and_shadows = _models_header([*models, *shadows])
        self._registry_rests_until = -math.inf
        self._said = -math.inf
        self._encoder = encoder
        self._framing = framing
        self._drop_duplicates = drop_duplicates
        self._by_designation = key == "designation"
        self._clock = clock

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata columns that the keys are made of, and that must be decoded."""
        return (DESIGNATION.name, "sso") if self._by_designation else ()

    def route(self, scored: ScoredBatch) -> Routed:
        """Return the output records of a batch. Raises RegistryUnavailable if the schema registry does not answer."""
        alerts, rows = scored.alerts, scored.scored
        chosen = [(self._scored, np.ones(len(alerts), dtype=np.bool_))]
        if scored.anomalies:
            chosen.append((self._anomalous, scored.anomalies.flag))
        chosen += [(f"{self._prefix}.{one.name}", one.passed) for one in scored.filters if not one.paused]
        keys = self._keys(alerts)
        now_ms = int(self._clock() * 1000)
        encoded = self._encoder.encode(scored, now_ms)
        on_trial = self._encoder.encode_on_trial(scored, now_ms)
        published: list[tuple[OutputRecord, int]] = []
        refused: dict[int, Reject] = {}
        left_out: list[tuple[int, LeftOut]] = []
        for i, (schema, body) in zip(rows.tolist(), encoded, strict=True):
            if self._drop_duplicates and scored.duplicate[i]:
                continue
            packet_index = int(alerts.packet_index[i])
            packet = scored.packets[packet_index]
            headers = self._headers(packet, int(alerts.record_index[i]))
            if packet.redriven:
                headers.append((REDRIVEN, str(packet.redriven.tries).encode()))
            headers += [("schema", alerts.records[i].schema.fingerprint.encode()), *self._framing.headers]
            key = keys[i].encode()
            try:  # an alert goes to all of its topics or to none, because it is counted once
                values = [(topic, self._framing.frame(schema, body, topic)) for topic, takes in chosen if takes[i]]
            except RegistryRefusalError as error:
                refused[i] = _refused(scored, i, str(error))
                continue
            published += [(OutputRecord(topic, key, value, headers), packet_index) for topic, value in values]
            if i in on_trial:
                framed = self._frame_on_trial(*on_trial[i])
                if isinstance(framed, LeftOut):
                    left_out.append((packet_index, framed))
                else:
                    headers = [self._models_and_shadows if header is self._models else header for header in headers]
                    published.append((OutputRecord(self._shadow, key, framed, headers, optional=True), packet_index))
        scored = scored.less(refused)
        routed = Routed(refused, left_out)
        for record, packet_index in published:
            routed.add(record, packet_index)
        rejects: dict[int, list[Reject]] = {}
        for reject in scored.rejects:
            rejects.setdefault(reject.packet_index, []).append(reject)
        done = scored_rows(scored, rejects)
        for packet_index, of_packet in rejects.items():
            routed.add(self._dead_letter_record(of_packet, done[packet_index]), packet_index)
        return routed

    def _keys(self, alerts: AlertBatch) -> Sequence[str]:
        """Return the keys of the records of N alerts, as text."""
        if not self._by_designation:
            return alerts.object_id
        assert alerts.designation is not None, "the decoder must be given the `columns` of the router"
        # ZTF also names objects that only pass near the alert; `sso` is 1 if the object is the source.
        is_source = (alerts.column("sso") == 1).tolist()
        named = zip(alerts.designation, is_source, alerts.object_id, strict=True)
        return [designation if designation and own else object_id for designation, own, object_id in named]

    def _frame_on_trial(self, schema: OutputSchema, body: Body) -> bytes | LeftOut:
        """Return the value for the shadow topic, or why there is none: no trouble of this topic stops the stream."""
        if self._clock() < self._registry_rests_until:
            return LeftOut.REGISTRY_UNAVAILABLE
        try:
            return self._framing.frame(schema, body, self._shadow)
        except RegistryRefusalError as error:
            reason, trouble = LeftOut.SCHEMA_REFUSED, str(error)
        except RegistryUnavailable as error:
            self._registry_rests_until = self._clock() + REGISTRY_REST_S
            reason, trouble = LeftOut.REGISTRY_UNAVAILABLE, str(error)
        if self._clock() - self._said >= SAY_AGAIN_S:
            self._said = self._clock()
            log.warning("%s: records are left out: %s", self._shadow, trouble)
        return reason

    def _dead_letter_record(self, rejects: Sequence[Reject], scored: Sequence[int]) -> OutputRecord:
        """Return the dead letter of a packet with these `rejects`. `scored`: indices of its scored alerts.

        Its headers state the first reject and the counts.
        """
        first = min(rejects, key=lambda reject: reject.record)
        object_id = first.alert.object_id if first.alert else None
        headers = [
            *self._headers(first.packet, first.record),
            ("schema", (first.schema or "").encode()),
            (REASON, first.reason.encode()),
            ("detail", _bounded(first.detail)),
            *letter_headers(first.packet, scored),
        ]
        if len(rejects) > 1:
            counts = Counter(reject.reason.value for reject in rejects)
            headers.append((REJECTED, ",".join(f"{reason}={n}" for reason, n in sorted(counts.items())).encode()))
        return OutputRecord(self._dead_letter, object_id.encode() if object_id else None, first.packet.data, headers)

    def _headers(self, packet: Packet, record: int) -> list[Header]:
        """Return the headers that all output records have. The header `record` is left out for the first alert."""
        which = [(RECORD, str(record).encode())] if record else []
        first_read = packet.redriven.input if packet.redriven else str(packet.position)
        return [(INPUT, first_read.encode()), *which, self._models]


def _models_header(models: Iterable[tuple[str, str]]) -> Header:
    return "models", ",".join(f"{name}={version}" for name, version in models).encode()


def _refused(scored: ScoredBatch, i: int, detail: str) -> Reject:
    alerts = scored.alerts
    return Reject(
        packet=scored.packets[alerts.packet_index[i]],
        packet_index=int(alerts.packet_index[i]),
        reason=RejectReason.SCHEMA_REFUSED,
        detail=detail,
        record=int(alerts.record_index[i]),
        alert=alerts.identity(i),
        schema=alerts.records[i].schema.fingerprint,
    )


def _bounded(detail: str) -> bytes:
    cut = detail.encode(errors="replace")[:MAX_DETAIL_BYTES]
    return cut.decode(errors="ignore").encode()  # drops an incomplete character at the end


def open_router(service: ResolvedService, waiting: Callable[[], None] = no_beat) -> Router:
    """Return the router that a service file describes. `waiting`: see RegistryClient."""
    config = service.config
    registry = config.output.schema_registry
    framing = WireFraming(registry.location(), config.output.subject, waiting) if registry else ContainerFraming()
    return Router(
        config.output.prefix,
        models=[(bundle.card.name, bundle.card.version) for bundle in service.bundles],
        shadows=[(bundle.card.name, bundle.card.version) for bundle in service.shadows],
        encoder=Encoder(config.output.payload, service.revision),
        framing=framing,
        drop_duplicates=config.duplicates == "drop",
        key=config.output.key,
    )
