"""The path from packets to scores: nothing is lost, the order is kept, and reading ahead is limited."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from broker_filter.config import Runtime
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import RejectReason
from broker_filter.packets.schemas.registry import RegistryUnavailable, open_registry
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_packets, score_stream
from tests.ztf_network import ZTF_NETWORK


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return open_scorer([ZTF_NETWORK], Runtime())


@pytest.fixture(scope="module")
def packets(ztf_packets: list[tuple[int, bytes]], shared_data: Path) -> list[Packet]:
    """ZTF alerts, one of them twice; LSST alerts, which the bundle does not take; a packet without alert."""
    lsst = [path.read_bytes() for path in sorted((shared_data / "lsst" / "ocf" / "lsst_v7_4").iterdir())[:5]]
    data = [data for _, data in ztf_packets[:60]]
    mixed = [*data[:30], *lsst, b"", data[3], b"Obj\1", *data[30:]]
    return [Packet(one, FilePosition(f"{i}.avro")) for i, one in enumerate(mixed)]


def test_every_packet_is_scored_or_rejected_once(packets: list[Packet], scorer: Scorer) -> None:
    scored = score_packets(packets, Decoder(open_registry(None)), scorer, DuplicateWindow(100))
    accounted = [int(scored.alerts.packet_index[i]) for i in scored.scored]
    accounted += [packets.index(reject.packet) for reject in scored.rejects]
    assert sorted(accounted) == list(range(len(packets)))
    reasons = [reject.reason for reject in scored.rejects]
    assert reasons.count(RejectReason.NO_MODEL_FOR_SURVEY) == 5
    assert {RejectReason.EMPTY, RejectReason.TRUNCATED} < set(reasons)
    [duplicate] = np.flatnonzero(scored.duplicate)
    assert scored.alerts.alert_id[duplicate] == scored.alerts.alert_id[3]


def test_reject_of_an_alert_without_model_has_its_identity_and_schema(packets: list[Packet], scorer: Scorer) -> None:
    scored = score_packets(packets[30:31], Decoder(open_registry(None)), scorer, DuplicateWindow(100))
    [reject] = scored.rejects
    assert reject.reason is RejectReason.NO_MODEL_FOR_SURVEY
    assert reject.detail.startswith("no configured model takes alerts of lsst (default takes ztf): add a bundle")
    assert reject.alert == scored.alerts.identity(0)
    assert reject.schema == scored.alerts.records[0].schema.fingerprint


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_changes_neither_scores_nor_order(
    packets: list[Packet], scorer: Scorer, threads: int
) -> None:
    decoder = Decoder(open_registry(None))
    whole = score_packets(packets, decoder, scorer, DuplicateWindow(100))
    batches = list(score_stream(packets, decoder, scorer, DuplicateWindow(100), batch_size=7, threads=threads))
    assert [packet for batch in batches for packet in batch.packets] == packets
    assert np.concatenate([batch.alerts.alert_id for batch in batches]).tolist() == whole.alerts.alert_id.tolist()
    assert np.concatenate([batch.duplicate for batch in batches]).tolist() == whole.duplicate.tolist()
    scores = np.concatenate([batch.scores.columns()["default.real"] for batch in batches])
    np.testing.assert_allclose(scores, whole.scores.columns()["default.real"], atol=1e-5)


def test_reading_ahead_is_limited_by_the_number_of_threads(packets: list[Packet], scorer: Scorer) -> None:
    read = count()

    def endless() -> Iterator[Packet]:
        while True:
            next(read)
            yield packets[0]

    batches = score_stream(
        endless(), Decoder(open_registry(None)), scorer, DuplicateWindow(100), batch_size=4, threads=2
    )
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert next(read) == 3 * 4


def test_outage_of_the_registry_rejects_no_packet(
    lsst_packets: list[tuple[str, bytes]], scorer: Scorer, tmp_path: Path
) -> None:
    decoder = Decoder(open_registry("http://127.0.0.1:1", tmp_path))
    some = [Packet(data, FilePosition(name)) for name, data in lsst_packets[:2]]
    with pytest.raises(RegistryUnavailable):
        list(score_stream(some, decoder, scorer, DuplicateWindow(100), batch_size=4, threads=2))
