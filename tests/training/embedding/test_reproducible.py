"""The embedding of an alert does not depend on the program that computes it, or on the rest of the batch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path

import fastavro
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from broker_filter.cli import main
from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.bundle import open_bundle, shipped_bundles
from broker_filter.scoring.scorer import open_model, open_scorer
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import ContainerFraming, Encoder
from broker_filter.streaming.filtering import score_packets
from training.bundles.train_default import SPLIT_SEED, TEST_FRACTION, data_sha256
from training.data.datasets import SPLITS, Dataset, held_out, load_alerts
from training.evaluation.evaluate import predict

MODEL = "embedder"
Embeddings = dict[int, NDArray[np.float32]]
"""Embeddings by alert id."""


def by_service(packets: list[Packet], batch: int, engine: str = "onnxruntime") -> Embeddings:
    """Return embeddings in the records that the service sends."""
    scorer = open_scorer([MODEL], Runtime.model_validate({"engine": engine, "device": "cpu"}))
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)
    window = DuplicateWindow(1000)
    embeddings: Embeddings = {}
    for start in range(0, len(packets), batch):
        scored = score_packets(packets[start : start + batch], decoder, scorer, window)
        for schema, body in Encoder("full").encode(scored, 0):
            [record] = fastavro.reader(io.BytesIO(ContainerFraming().frame(schema, body, "t")))
            assert isinstance(record, dict)
            [model] = record["broker_filter"]["models"]
            embeddings[record["candid"]] = np.array(model["embedding"], np.float32)
    return embeddings


def by_score(folder: Path, table: Path) -> Embeddings:
    """Return embeddings that `broker-filter score` writes."""
    assert main(["score", str(folder), "--model", MODEL, "--device", "cpu", "--out", str(table)]) == 0
    return by_table(pq.read_table(table, columns=["alert_id", f"{MODEL}__embedding"]).to_pydict().values())


def by_evaluate(dataset: Dataset, directory: Path) -> Embeddings:
    """Return embeddings that `training evaluate` writes, for every split."""
    model = open_model(MODEL, Runtime(engine="onnxruntime", device="cpu"))
    embeddings: Embeddings = {}
    for split in SPLITS:
        predict(model, dataset, split).write(directory / f"{split}.parquet")
        table = pq.read_table(directory / f"{split}.parquet", columns=["alert_id", "embedding"])
        embeddings |= by_table(table.to_pydict().values())
    return embeddings


def by_table(columns: Iterable[list[object]]) -> Embeddings:
    alerts, vectors = columns
    return {int(str(alert)): np.array(vector, np.float32) for alert, vector in zip(alerts, vectors, strict=True)}


@pytest.fixture(scope="module")
def expected(night_packets: Path) -> Embeddings:
    return by_service(list(read_packets([night_packets])), 64)


def assert_same(found: Embeddings, expected: Embeddings) -> None:
    assert found.keys() == expected.keys()
    for alert, embedding in expected.items():
        np.testing.assert_allclose(found[alert], embedding, rtol=0, atol=1e-5)


def test_service_score_and_evaluate_give_the_same_embedding(
    expected: Embeddings, night_packets: Path, night_dataset: Dataset, tmp_path: Path
) -> None:
    assert len({embedding.tobytes() for embedding in expected.values()}) == 60
    assert_same(by_score(night_packets, tmp_path / "night.parquet"), expected)
    assert_same(by_evaluate(night_dataset, tmp_path), expected)


@pytest.mark.parametrize(("batch", "engine"), [(1, "onnxruntime"), (23, "onnxruntime"), (23, "torch")])
def test_batch_order_and_engine_have_no_influence(
    expected: Embeddings, night_packets: Path, batch: int, engine: str
) -> None:
    packets = list(read_packets([night_packets]))
    np.random.default_rng(batch).shuffle(packets)
    assert_same(by_service(packets, batch, engine), expected)


@pytest.mark.parametrize("bundle", shipped_bundles())
def test_every_card_names_its_training_data(bundle: str) -> None:
    assert re.fullmatch("[0-9a-f]{64}", str(open_bundle(bundle).parts[0].card.training.evaluation["dataset_sha256"]))


@pytest.mark.shared
def test_the_default_bundle_was_trained_on_the_shared_data(shared_data: Path) -> None:
    alerts = load_alerts([shared_data / "ztf" / "ztf_alerts.tar", shared_data / "ztf" / "archives"], 63, ("drb",))
    train = alerts[~held_out(alerts.object_id, TEST_FRACTION, SPLIT_SEED)]
    assert data_sha256(train) == open_bundle("default").part("ztf").card.training.evaluation["dataset_sha256"]
