"""Batches with chosen contents, for cases that do not occur in the real packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_filter.anomalies.neighbours import Embeddings, normalise
from broker_filter.anomalies.reference import Reference
from broker_filter.config import Runtime
from broker_filter.packets.batch import AlertBatch, LightCurves, Record, Survey
from broker_filter.packets.packet import KafkaPosition, Packet
from broker_filter.packets.rejects import Reject, RejectReason
from broker_filter.packets.schemas.writer_schema import parse_schema
from broker_filter.scoring.scorer import Model, open_model
from broker_filter.scoring.scores import ModelScores, Scores
from broker_filter.streaming.build_reference import build_reference
from broker_filter.streaming.expressions import FIELDS, compile_filter
from broker_filter.streaming.scored import ScoredBatch

SCHEMA = parse_schema('{"type": "record", "name": "alert", "fields": [{"name": "candid", "type": "long"}]}')
EMPTY = np.empty(0)
PASSES = compile_filter("default.real > 0.5 and magpsf < 20", FIELDS, ["default.real"])
"""Selects the alerts of a reference."""
Scored = Callable[..., ScoredBatch]
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


@pytest.fixture
def four_packets() -> ScoredBatch:
    """Four packets: scored, a duplicate, rejected because no model takes it, and scored."""
    batch = scored_batch(alert_batch([1, 2, 3, 4]), {"default": [0.1, 0.2, np.nan, 0.4]})
    reject = Reject(batch.packets[2], 2, RejectReason.NO_MODEL_FOR_SURVEY, "none")
    return replace(batch, duplicate=np.array([False, True, False, False]), rejects=[reject])


def ordinary(n: int, seed: int) -> Embeddings:
    """Return embeddings near one direction."""
    return normalise(np.eye(1, 8) + 0.2 * np.random.default_rng(seed).standard_normal((n, 8)))


def of_lsst(n: int, seed: int) -> Embeddings:
    """Return embeddings near another direction and with a larger scatter, as of another telescope."""
    return normalise(np.roll(np.eye(1, 8), 4) + 0.4 * np.random.default_rng(seed).standard_normal((n, 8)))


def two_surveys(make_embedded: Scored, seed: int, n_ztf: int, n_lsst: int) -> ScoredBatch:
    return make_embedded(
        np.concatenate([ordinary(n_ztf, seed), of_lsst(n_lsst, seed)]),
        survey=[Survey.ZTF] * n_ztf + [Survey.LSST] * n_lsst,
        first_id=seed * (n_ztf + n_lsst),
    )


@pytest.fixture
def make_embedded() -> Scored:
    """Scored alerts with these embeddings [N, D]; each pair of consecutive alerts has the same object."""

    def make(
        embedding: NDArray[np.float32], real: list[float] | None = None, first_id: int = 0, **fields: object
    ) -> ScoredBatch:
        n = len(embedding)
        ids = list(range(first_id, first_id + n))
        values = {"magpsf": [18.0] * n, "object_id": [f"ZTF{i // 2}" for i in ids]} | fields
        scored = scored_batch(alert_batch(ids, **values), {"default": real or [0.9] * n})
        [model] = scored.scores.models
        model = replace(model, embedding=embedding)
        return replace(scored, scores=replace(scored.scores, models=(model,)))

    return make


@pytest.fixture(scope="module")
def default_model() -> Model:
    return open_model("default", Runtime())


@pytest.fixture
def reference(make_embedded: Scored, default_model: Model) -> Reference:
    batches = [make_embedded(ordinary(100, seed), first_id=100 * seed) for seed in range(20)]
    return build_reference(batches, default_model, PASSES, limit=1500)


@pytest.fixture
def model_of_both(default_model: Model) -> Model:
    return replace(default_model, also=(Survey.LSST,))
