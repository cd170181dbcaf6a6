"""Turns packets into the facts and the bytes that the store keeps. With a scorer, it scores alerts first."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from broker_filter.packets.batch import AlertBatch, AlertIdentity
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.rejects import Reject
from broker_filter.packets.schemas.registry import SchemaRegistry
from broker_filter.scoring.scorer import Scorer
from broker_filter.streaming.annotations import MAX_ITEMS, MAX_TEXT, read_annotation, read_scores_record
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import ContainerFraming, Encoder
from broker_filter.streaming.filtering import DUPLICATE_WINDOW, score_alerts
from broker_filter.streaming.judge import AnomalyJudge
from broker_filter.watch.store import Content, Facts

TINY = 8
"""Cutout size in pixels while alerts are listed: their pixels are decoded when a person looks at them."""
MAGNITUDE = "magpsf"


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores alerts before they are shown. `judge`: gives anomaly scores, if there is one."""

    scorer: Scorer
    judge: AnomalyJudge | None = None


class AlertReader:
    """Reads packets: output records of the service with any payload, and packets of surveys."""

    def __init__(self, registry: SchemaRegistry, scoring: Scoring | None = None) -> None:
        """`registry`: gives the schemas of packets in Confluent wire format."""
        self._registry = registry
        self._decoder = Decoder(registry, cutout_size=TINY, columns=(MAGNITUDE,), require_cutouts=False)
        self._scoring = scoring
        self._encoder = Encoder("full")
        self._framing = ContainerFraming()
        self._window = DuplicateWindow(DUPLICATE_WINDOW)
        if scoring:
            columns = scoring.judge.columns if scoring.judge else ()
            self._scoring_decoder = scoring.scorer.decoder(registry, columns=columns)

    @property
    def fields(self) -> frozenset[str]:
        """The dotted paths of the fields that are read of rows of Parquet files."""
        return self._decoder.fields

    def read(self, packets: Sequence[Packet]) -> Iterator[tuple[Facts, Content] | Reject]:
        """Yield each alert of the packets, and a Reject for each packet that cannot be shown.

        Raises RegistryUnavailable if a schema is needed and the registry does not answer.
        """
        if self._scoring:
            packets = self._scored(packets, self._scoring)
        alerts, rejects = self._decoder.decode(packets)
        magnitude = alerts.column(MAGNITUDE).tolist()
        has_cutouts = (alerts.cutout_box[:, :, 2].sum(axis=1) > 0).tolist()
        for row, record in enumerate(alerts.records):
            annotation = read_annotation(record.body, record.schema)
            facts = facts_of(alerts.identity(row), annotation, magnitude[row], has_cutouts=has_cutouts[row])
            yield facts, Content(bytes(record.body), record.schema)
        for reject in rejects:
            found = read_scores_record(reject.packet, self._registry)
            if found is None:
                yield reject
            else:
                identity, annotation = found
                yield facts_of(identity, annotation, None), Content(json.dumps(annotation).encode(), None)

    def _scored(self, packets: Sequence[Packet], scoring: Scoring) -> list[Packet]:
        """Return the packets as output records; packets that no model scores come first, as they are."""
        alerts, rejects = self._scoring_decoder.decode(packets)
        scored = score_alerts(alerts, rejects, scoring.scorer, self._window, scoring.judge)
        unscored = {reject.packet_index: reject.packet for reject in scored.rejects}
        encoded = self._encoder.encode(scored, round(1000 * time.time()))
        records = [self._framing.frame(schema, body, "") for schema, body in encoded]
        places = [_place(scored.alerts, row) for row in scored.scored.tolist()]
        return [
            *unscored.values(),
            *(Packet(record, packet.position) for record, packet in zip(records, places, strict=True)),
        ]


def _place(alerts: AlertBatch, row: int) -> Packet:
    return alerts.packets[int(alerts.packet_index[row])]


def facts_of(
    identity: AlertIdentity, annotation: Mapping[str, Any], magnitude: float | None, *, has_cutouts: bool = False
) -> Facts:
    """Return the facts of an alert whose id, survey, time and position are known."""
    anomaly = _record(annotation.get("anomaly"))
    score = anomaly.get("score")
    return Facts(
        alert_id=identity.alert_id or 0,
        object_id=(identity.object_id or "")[:MAX_TEXT],
        survey=str(identity.survey),
        schema_version=(identity.schema_version or "")[:MAX_TEXT],
        mjd=identity.mjd or 0.0,
        ra=identity.ra or 0.0,
        dec=identity.dec or 0.0,
        band=identity.band,
        magnitude=None if magnitude is None or not np.isfinite(magnitude) else magnitude,
        scores=scores_of(annotation),
        anomaly=score if isinstance(score, float) else None,
        flagged=anomaly.get("flag") is True,
        passed=tuple(str(one.get("name")) for one in _records(annotation.get("filters")) if one.get("passed") is True),
        reason=_reason(_record(anomaly.get("reason"))),
        has_cutouts=has_cutouts,
    )


def scores_of(annotation: Mapping[str, Any]) -> dict[str, float]:
    """Return the models' outputs of an annotation by name, `<model>.<label>`: at most MAX_ITEMS, and no NaN."""
    named = (
        (f"{model.get('model')}.{label}", value)
        for model in _records(annotation.get("models"))
        if model.get("shadow") is not True
        for label, value in _record(model.get("outputs")).items()
        if isinstance(value, float)
    )
    return dict(islice(named, MAX_ITEMS))


def _reason(reason: Mapping[str, Any]) -> str:
    """Return in a few words why an alert was flagged."""
    says = [str(one["says"]) for one in _records(reason.get("lenses")) if isinstance(one.get("says"), str)]
    unlike = reason.get("most_unlike")
    return "; ".join(([f"unlike in {unlike}"] if isinstance(unlike, str) else []) + says[:1])[:MAX_TEXT]


def _record(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
