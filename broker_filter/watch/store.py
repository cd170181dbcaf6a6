"""Keeps the newest alerts: their facts in memory, their packets in temporary files that no other process can open.

The number of alerts is bounded. When it is reached, the oldest alerts are dropped and counted.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import IO

from broker_filter.packets.schemas.writer_schema import WriterSchema

SEGMENT_ALERTS = 1_000
"""Alerts of one temporary file. A file is deleted when its last alert is dropped."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an alert without its packet.

    `survey`: `ztf` or `lsst`. `magnitude`: AB magnitude of the difference; None if unknown, as for `payload: scores`.
    `scores`: the models' outputs by name, `<model>.<label>`. `anomaly`: the anomaly score; None if it was not judged.
    `passed`: names of the filters that the alert passed. `reason`: why it was flagged, in a few words.
    `has_cutouts`: whether the record holds a usable cutout.
    """

    alert_id: int
    object_id: str
    survey: str
    schema_version: str
    mjd: float
    ra: float
    dec: float
    band: str | None
    magnitude: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    anomaly: float | None = None
    flagged: bool = False
    passed: tuple[str, ...] = ()
    reason: str = ""
    has_cutouts: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of an alert: an encoded record of `schema`; without a schema, the annotation alone, as JSON."""

    body: bytes
    schema: WriterSchema | None


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert in the store. `number`: counts the alerts in the order in which they arrived, from 1."""

    number: int
    facts: Facts
    segment: _Segment
    start: int
    length: int
    schema: WriterSchema | None


class _Segment:
    """A temporary file with the bytes of several alerts."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="broker-filter-watch-")  # noqa: SIM115 - closed when empty
        self.size = 0
        self.written = 0
        self.kept = 0


class AlertStore:
    """The newest alerts, each alert id once: an alert that arrives again replaces the earlier one. Thread-safe."""

    def __init__(self, keep: int) -> None:
        """`keep`: the most alerts that are kept."""
        self._keep = keep
        self._lock = Lock()
        self._alerts: dict[int, Alert] = {}  # by alert id, the oldest first
        self._segment: _Segment | None = None
        self._number = 0
        self.dropped = 0

    @property
    def newest(self) -> int:
        """The number of the newest alert; 0 without alerts."""
        return self._number

    def __len__(self) -> int:
        return len(self._alerts)

    def add(self, facts: Facts, content: Content) -> None:
        """Keep an alert, and drop the oldest one if there are too many."""
        with self._lock:
            segment = self._segment
            if segment is None or segment.written == SEGMENT_ALERTS:
                segment = self._segment = _Segment()
            segment.file.seek(segment.size)
            segment.file.write(content.body)
            segment.file.flush()
            self._number += 1
            alert = Alert(self._number, facts, segment, segment.size, len(content.body), content.schema)
            segment.size += len(content.body)
            segment.written += 1
            segment.kept += 1
            if (earlier := self._alerts.pop(facts.alert_id, None)) is not None:
                self._forget(earlier)
            self._alerts[facts.alert_id] = alert
            if len(self._alerts) > self._keep:
                self._forget(self._alerts.pop(next(iter(self._alerts))))
                self.dropped += 1

    def _forget(self, alert: Alert) -> None:
        alert.segment.kept -= 1
        if not alert.segment.kept and alert.segment is not self._segment:
            alert.segment.file.close()

    def close(self) -> None:
        """Close the temporary files, which deletes them; the store is empty afterwards."""
        with self._lock:
            for segment in {alert.segment for alert in self._alerts.values()} | {self._segment}:
                if segment is not None:
                    segment.file.close()
            self._alerts.clear()
            self._segment = None

    def alerts(self) -> list[Alert]:
        """Return all alerts, in the order of their arrival."""
        with self._lock:
            return list(self._alerts.values())

    def get(self, alert_id: int) -> tuple[Alert, Content] | None:
        """Return an alert and its bytes; None if the store does not have it."""
        with self._lock:
            alert = self._alerts.get(alert_id)
            if alert is None:
                return None
            body = os.pread(alert.segment.file.fileno(), alert.length, alert.start)
        return alert, Content(body, alert.schema)
