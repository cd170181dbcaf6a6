"""Batches with chosen contents, for cases that do not occur in the real packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from broker_filter.packets.batch import AlertBatch, LightCurves, Record
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.schemas.writer_schema import parse_schema
from broker_filter.scoring.scores import ModelScores, Scores
from broker_filter.streaming.scored import ScoredBatch

SCHEMA = parse_schema('{"type": "record", "name": "alert", "fields": [{"name": "candid", "type": "long"}]}')
EMPTY = np.empty(0)
IDENTITY: dict[str, Any] = {"survey": 0, "object_id": None, "ra": 150.0, "band": None}


def alert_batch(alert_id: Sequence[int], *, offset: int = 0, partition: int = 0, **values: Any) -> AlertBatch:
    """Return alerts without pixels, each in a Kafka message from `offset` on. `values`: fields and columns."""
    n = len(alert_id)
    given = {name: values.pop(name, default) for name, default in IDENTITY.items()}
    packets = [Packet(b"bytes", KafkaPosition("cluster", "ztf", partition, offset + i)) for i in range(n)]
    return AlertBatch(
        packets=packets,
        packet_index=np.arange(n, dtype=np.int32),
        record_index=np.zeros(n, dtype=np.int32),
        records=[Record(memoryview(b"\2"), SCHEMA, ())] * n,
        survey=np.full(n, given["survey"], dtype=np.uint8),
        schema_version=["4.02"] * n,
        alert_id=np.array(alert_id, dtype=np.int64),
        object_id=given["object_id"] or [f"ZTF26a{i}" for i in range(n)],
        mjd=np.full(n, 61096.25),
        ra=np.full(n, given["ra"], dtype=np.float64),
        dec=np.full(n, -5.5),
        band=np.array(given["band"] or [1] * n, dtype=np.uint8),
        cutouts=np.zeros((n, 3, 1, 1), dtype=np.float32),
        cutout_box=np.zeros((n, 3, 4), dtype=np.int16),
        columns=tuple(values),
        metadata=np.array(list(values.values()), dtype=np.float64).reshape(len(values), n).T,
        light_curves=LightCurves(np.zeros(n + 1, dtype=np.int64), EMPTY, EMPTY, EMPTY, EMPTY, EMPTY),  # type: ignore[arg-type]
    )


def scored_batch(alerts: AlertBatch, models: dict[str, Sequence[float]]) -> ScoredBatch:
    """Return scored alerts with the given values of `<model>.real`; NaN: the model does not take the alert."""
    scores = []
    for name, real in models.items():
        probabilities = np.array(real, dtype=np.float32).reshape(-1, 1)
        scores.append(ModelScores(name, "1", ("real",), probabilities, None, ~np.isnan(probabilities[:, 0])))
    taken = np.logical_or.reduce([one.taken for one in scores])
    return ScoredBatch(alerts.packets, alerts, Scores(tuple(scores), taken), np.zeros(len(alerts), dtype=np.bool_), [])


@pytest.fixture
def make_alerts() -> Callable[..., AlertBatch]:
    return alert_batch


@pytest.fixture
def make_scored() -> Callable[..., ScoredBatch]:
    return scored_batch
