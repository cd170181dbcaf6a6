"""The cost of a hostile packet (time, memory, output) is bounded by its bytes, alone and in a batch.

`python tests/packets/hostile.py` (`make fuzz`) measures more packets.
"""

from __future__ import annotations

import gzip
import io
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import pytest

from broker_filter.packets.decode import (
    BATCH_BYTES_PER_PACKET,
    MAX_POINTS,
    MAX_RECORDS,
    MAX_UNPACKING,
    Decoder,
)
from broker_filter.packets.framing import ocf
from broker_filter.packets.framing.ocf import MAX_BLOCKS, MAX_CONTAINER_BYTES
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import MAX_DETAIL_CHARACTERS, Reject, RejectReason
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.service import SCORED_BATCHES
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_stream
from broker_filter.streaming.routing import Routed
from tests.packets import hostile

BOOLEAN_ROW = [{"name": "jd", "type": "boolean"}]
NULL_ROW = [{"name": "jd", "type": "null"}]
POD_BYTES = 2 << 30
"""The memory limit of a pod in deploy/kubernetes, in bytes."""
STAMPS = [hostile.TINY_STAMP] * 3
PLAIN = hostile.schema(BOOLEAN_ROW, [])
BOMB = gzip.compress(hostile.plain_stamp(1023))
LONG_HEADER = gzip.compress(hostile.plain_stamp(2, tuple(hostile.card(f"K{k}", k) for k in range(1000))))
SLOW = gzip.compress(hostile.plain_stamp(63, (hostile.card("BSCALE", 2),), 64))
SLOW_PLANES = gzip.compress(hostile.with_planes(2, tuple(hostile.card(f"K{k}", k) for k in range(1000))))
MANY_EXTENSIONS = gzip.compress(hostile.with_planes(names=("MASK",) * 500))


def alerts(count: int, stamps: list[bytes] = STAMPS, rows: bytes = hostile.NO_ROWS) -> tuple[int, bytes]:
    return count, b"".join(hostile.alert(k, stamps, rows) for k in range(count))


HOLLOW = {
    "type": "record",
    "name": "alert",
    "fields": [
        {"name": "objectId", "type": "null"},
        {
            "name": "candidate",
            "type": {
                "type": "record",
                "name": "c",
                "fields": [{"name": name, "type": "null"} for name in ("jd", "fid", "rcid", "ra", "dec", "magpsf")],
            },
        },
    ],
}
"""A schema of ZTF alerts whose encoding takes no bytes."""

CASES: dict[str, Callable[[], bytes]] = {
    "rows without bytes": lambda: hostile.container(
        hostile.schema(NULL_ROW, []), [alerts(1000, rows=hostile.history(b"", 100_000))]
    ),
    "many rows": lambda: hostile.container(PLAIN, [alerts(100, rows=hostile.history(b"\1", MAX_POINTS))]),
    "records without bytes": lambda: hostile.container(HOLLOW, [(1 << 40, b"")] * MAX_BLOCKS),
    "many alerts": lambda: hostile.container(PLAIN, [alerts(MAX_RECORDS + 1)]),
    "alerts with a long schema": lambda: hostile.container(
        hostile.schema(BOOLEAN_ROW, [], doc="d" * 1_900_000), [alerts(MAX_RECORDS)]
    ),
    "bombs in a bomb": lambda: hostile.container(PLAIN, [alerts(2000, [BOMB] * 3)]),
    "bombs that fail at their end": lambda: hostile.container(PLAIN, [alerts(2000, [BOMB[:-8] + b"12345678"] * 3)]),
    "long FITS headers": lambda: hostile.container(PLAIN, [alerts(2000, [LONG_HEADER] * 3)]),
    "stamps that go the slow way": lambda: hostile.container(PLAIN, [alerts(2000, [SLOW] * 3)]),
    "planes that go the slow way": lambda: hostile.container(PLAIN, [alerts(200, [SLOW_PLANES] * 3)]),
    "many extensions": lambda: hostile.container(PLAIN, [alerts(200, [MANY_EXTENSIONS] * 3)]),
    "many blocks": lambda: hostile.container(PLAIN, [alerts(1)] * 200_000, "null"),
    "many metadata": lambda: hostile.container(PLAIN, [], more={b"m%d" % k: b"" for k in range(50_000)}),
    "names that mean more names": lambda: hostile.container(
        hostile.schema(BOOLEAN_ROW, [{"name": "wide", "type": hostile.doubling(30)}]), [alerts(1)]
    ),
    "names that are taken": lambda: hostile.container(
        hostile.schema(BOOLEAN_ROW, [{"name": f"broker_filter_{k}", "type": "null"} for k in range(50_000)]),
        [(2, alerts(2)[1])],
    ),
    "deep defaults": lambda: hostile.container(
        hostile.schema(BOOLEAN_ROW, [{"name": "d", "type": "null", "default": hostile.nested(900)}]), [alerts(1)]
    ),
}
"""Packets that each abuse one weakness as much as possible."""


@pytest.fixture(scope="module")
def measure() -> hostile.Measure:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads the memory of the process from /proc, which only Linux has")
    measure = hostile.Measure()
    measure.cost(b"nothing has to be loaded any more")
    return measure


@pytest.mark.parametrize("name", CASES)
def test_cost_of_a_packet_is_bounded_by_its_bytes(measure: hostile.Measure, name: str) -> None:
    cost = measure.cost(CASES[name]())
    assert max(cost.shares.values()) < 1, cost


def test_cost_of_random_hostile_packets_is_bounded_by_their_bytes(measure: hostile.Measure) -> None:
    for data in hostile.packets(20):
        cost = measure.cost(data)
        assert max(cost.shares.values()) < 1, cost


def test_hostile_packets_in_several_threads_stay_within_the_memory_of_a_pod(measure: hostile.Measure) -> None:
    kinds = ("many alerts", "alerts with a long schema", "many rows", "bombs in a bomb")
    packets = [Packet(CASES[name](), FilePosition(name)) for name in kinds] * 3
    in_flight: deque[Routed] = deque(maxlen=SCORED_BATCHES + 1)
    measure.forget_peak()
    before = hostile.memory("VmRSS")
    for scored in score_stream(packets, measure.decoder(), measure.scorer, DuplicateWindow(1), batch_size=4, threads=4):
        in_flight.append(measure.router.route(scored))
    assert sum(sum(routed.published.values()) for routed in in_flight) > 100
    # The other half of the memory is for models, libraries and the queues of Kafka clients.
    assert hostile.memory("VmHWM") - before < POD_BYTES / 2


def decoded(data: bytes) -> tuple[int, Counter[RejectReason]]:
    """Return the number of alerts in a packet, and of rejected ones by reason."""
    batch, rejects = Decoder(open_registry(None)).decode([Packet(data, FilePosition("one"))])
    return len(batch), Counter(reject.reason for reject in rejects)


def test_a_history_of_rows_without_bytes_is_rejected() -> None:
    assert decoded(CASES["rows without bytes"]()) == (0, {RejectReason.CORRUPT: 1})
    no_rows = hostile.container(hostile.schema(NULL_ROW, []), [alerts(3)])
    assert decoded(no_rows) == (3, {})  # a column of nulls counts as a table without rows


def test_history_rows_are_bounded_per_packet_and_not_per_alert() -> None:
    rows = hostile.history(b"\1", MAX_POINTS // 10)
    assert decoded(hostile.container(PLAIN, [alerts(10, rows=rows)], "null")) == (10, {})
    assert decoded(hostile.container(PLAIN, [alerts(12, rows=rows)], "null")) == (10, {RejectReason.TOO_LARGE: 1})


def test_a_record_without_bytes_ends_its_block() -> None:
    assert decoded(hostile.container(HOLLOW, [(1 << 40, b"")])) == (0, {RejectReason.MISSING_FIELD: 1})


def test_alerts_beyond_the_memory_limit_of_their_packet_are_too_large() -> None:
    long = hostile.schema(BOOLEAN_ROW, [], doc="d" * 1_000_000)
    held, rejects = decoded(hostile.container(long, [alerts(200)]))
    assert 50 < held <= MAX_UNPACKING * MAX_CONTAINER_BYTES // 1_000_000
    assert rejects == {RejectReason.TOO_LARGE: 200 - held}
    assert decoded(hostile.container(PLAIN, [alerts(200)], "null")) == (200, {})


def test_a_batch_of_hostile_packets_is_decoded_in_parts_that_fit_into_memory() -> None:
    data = hostile.container(PLAIN, [alerts(200)], "null")
    packets = [Packet(data, FilePosition(f"{k}")) for k in range(8)]
    decoder = Decoder(open_registry(None))
    whole, _ = decoder.decode(packets)
    parts, left = [], packets
    while left:
        batch, _ = decoder.decode_some(left)
        assert batch.cutouts.nbytes <= max(BATCH_BYTES_PER_PACKET * len(left), 200 * batch.cutouts[0].nbytes)
        parts.append(batch)
        left = left[len(batch.packets) :]
    assert len(parts) == 8
    assert [packet for batch in parts for packet in batch.packets] == packets
    assert sum(map(len, parts)) == len(whole) == 8 * 200
    assert [len(batch) for batch, _ in decoder.decode_stream(iter(packets), 3)] == [200] * 8
    assert [int(alert_id) for batch in parts for alert_id in batch.alert_id] == whole.alert_id.tolist()


def test_survey_packets_are_decoded_in_one_batch(
    ztf_packets: list[tuple[int, bytes]], lsst_packets: list[tuple[str, bytes]], lsst_schemas: Path
) -> None:
    packets = [Packet(data, FilePosition("one")) for _, data in (*ztf_packets[:128], *lsst_packets)]
    batch, _ = Decoder(open_registry(str(lsst_schemas))).decode_some(packets)
    assert len(batch.packets) == len(packets)


def test_splitting_a_file_of_empty_blocks_does_not_repeat_the_header_for_each() -> None:
    long = hostile.schema(BOOLEAN_ROW, [], doc="d" * 1_000_000)
    count = 3
    blocks = [(0, b"")] * 5_000 + [(1, hostile.alert(k, STAMPS)) for k in range(count)]
    pieces = list(ocf.split_container(io.BytesIO(hostile.container(long, blocks, "null"))))
    assert sum(map(len, pieces)) < 20_000_000
    assert sum(map(ocf.count_records, pieces)) == count
    assert sum(decoded(piece)[0] for piece in pieces) == count


def test_detail_of_a_reject_is_bounded() -> None:
    packet = Packet(b"", FilePosition("one"))
    assert len(Reject(packet, 0, RejectReason.BAD_SCHEMA, "x" * 1_000_000).detail) <= MAX_DETAIL_CHARACTERS + 3
    named = hostile.schema(BOOLEAN_ROW, [{"name": "y", "type": "y" * 1_000_000}])
    _, (reject,) = Decoder(open_registry(None)).decode(
        [Packet(hostile.container(named, [alerts(1)]), FilePosition("a"))]
    )
    assert "yyy" in reject.detail
    assert len(reject.detail) <= MAX_DETAIL_CHARACTERS + 3
