"""For any bytes, the decoder raises no exception and accounts for each packet, and both walkers agree.

The packets are mutants of real packets if the shared data are available, otherwise of simulated ones. The seed is
fixed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from broker_filter.packets import decode, walk
from broker_filter.packets.batch import PLANES, AlertBatch
from broker_filter.packets.compiled import IMPLEMENTATION
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import ocf, wire
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.rejects import Reject
from broker_filter.packets.schemas.registry import SchemaRegistry, open_registry
from broker_filter.packets.walk import walk_python
from broker_filter.simulate import SCHEMAS, simulate_night

SEED = 20260225
BATCH = 64


def flip(data: bytearray, draw: random.Random, begin: int) -> None:
    """Replace some bytes, often by values with a meaning in Avro."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(begin, len(data))] = draw.choice((0, 1, 2, 0x7F, 0x80, 0xFF, draw.randrange(256)))


def cut(data: bytearray, draw: random.Random, begin: int) -> None:
    """Remove the end, or a piece from the middle."""
    start = draw.randrange(begin, len(data))
    del data[start : None if draw.random() < 0.5 else start + draw.randrange(1, 300)]


def insert(data: bytearray, draw: random.Random, begin: int) -> None:
    """Insert random bytes or a very large number."""
    start = draw.randrange(begin, len(data))
    data[start:start] = draw.choice(
        (draw.randbytes(draw.randrange(1, 40)), b"\xff" * 9 + b"\x01", b"\xfe" + b"\xff" * 8 + b"\x01")
    )


def swap(data: bytearray, draw: random.Random, begin: int) -> None:
    """Copy a piece over another one."""
    size = draw.randrange(1, 2000)
    to, origin = draw.randrange(begin, len(data)), draw.randrange(begin, len(data))
    data[to : to + size] = data[origin : origin + size]


MUTATIONS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (flip, cut, insert, swap)


def mutants(packets: list[bytes], count: int, *, reseal: bool) -> Iterator[bytes]:
    """Yield damaged packets. With `reseal`, the damage is inside the record, in a consistent container."""
    draw = random.Random(SEED)
    for k in range(count):
        data = packets[k % len(packets)]
        container = ocf.read_container(data) if data.startswith(ocf.MAGIC) else None
        if not reseal or container is None or not container.blocks:
            mutant = bytearray(data)
            draw.choice(MUTATIONS)(mutant, draw, 0 if draw.random() < 0.3 else len(data) // 3)
            yield bytes(mutant)
            continue
        block = container.blocks[0]
        body = bytearray(block.body)
        # Most bytes of a body are stamps, so the fields before them are damaged more often.
        stop = draw.choice((len(body), 3000, 300))
        field = body[:stop]
        draw.choice(MUTATIONS)(field, draw, 0)
        start = data.rfind(bytes(block.body[:16])) if container.schema else -1
        header = data[: start - len(ocf.encode_long(block.n_records)) - len(ocf.encode_long(len(block.body)))]
        yield header + ocf.encode_block(block.n_records, bytes(field + body[stop:]), header[-ocf.SYNC_BYTES :])


@pytest.fixture(scope="module")
def packets(request: pytest.FixtureRequest) -> list[bytes]:
    """A few packets of each kind."""
    try:
        ztf: list[tuple[int, bytes]] = request.getfixturevalue("ztf_packets")
        lsst: list[tuple[str, bytes]] = request.getfixturevalue("lsst_packets")
        shared: Path = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        return [alert.packet for survey in ("ztf", "lsst") for alert in simulate_night(20, SEED, survey)]
    return [
        *(data for _, data in ztf[::60]),
        *(data for _, data in lsst if wire.is_wire_message(data)),
        *(path.read_bytes() for path in sorted((shared / "lsst" / "ocf").rglob("*.avro"))[::6]),
    ]


@pytest.fixture(scope="module")
def registry(request: pytest.FixtureRequest) -> SchemaRegistry:
    try:
        return open_registry(str(request.getfixturevalue("lsst_schemas")))
    except pytest.skip.Exception:
        return open_registry(str(SCHEMAS))


def account(decoder: Decoder, batch: list[bytes]) -> tuple[AlertBatch, list[Reject]]:
    """Decode packets, and check that each became an alert or a reject, and that the batch is consistent."""
    items = [Packet(data, FilePosition(f"mutant {k}")) for k, data in enumerate(batch)]
    alerts, rejects = decoder.decode(items)
    seen = Counter(items[k].position for k in alerts.packet_index.tolist())
    seen.update(reject.packet.position for reject in rejects)
    assert set(seen) == {item.position for item in items}
    assert all(reject.detail for reject in rejects)
    n = len(alerts)
    assert alerts.light_curves.offsets[-1] == len(alerts.light_curves.mjd)
    assert np.isfinite(alerts.light_curves.flux).all()
    assert np.isfinite(alerts.mjd).all()
    if alerts.usable_planes is not None:
        for plane, slots in enumerate((alerts.variance, alerts.psf)):
            assert slots is not None
            assert (np.isnan(slots).all(axis=(2, 3)) == ~alerts.usable_planes[:, :, plane]).all()
    for i in range(n):
        alerts.identity(i)
        for begin, end in alerts.records[i].cutout_spans:
            assert 0 <= begin < end <= len(alerts.records[i].body)
        for y, x, height, width in alerts.cutout_box[i].tolist():
            assert y + height <= alerts.cutouts.shape[2]
            assert x + width <= alerts.cutouts.shape[3]
    return alerts, rejects


@pytest.mark.parametrize("reseal", [False, True], ids=["anywhere", "in the record"])
def test_every_mutated_packet_becomes_alerts_or_rejects(
    packets: list[bytes], registry: SchemaRegistry, reseal: bool
) -> None:
    decoder = Decoder(registry, planes=PLANES)
    reasons: Counter[str] = Counter()
    batch: list[bytes] = []
    for mutant in mutants(packets, 3000, reseal=reseal):
        batch.append(mutant)
        if len(batch) == BATCH:
            alerts, rejects = account(decoder, batch)
            reasons.update(reject.reason for reject in rejects)
            reasons["decoded"] += len(alerts)
            batch = []
    assert reasons["decoded"] > 100
    assert reasons["truncated"] > 100
    assert reasons["corrupt"] > 100
    assert reasons["bad_cutout"] > 50


@pytest.mark.skipif(IMPLEMENTATION != "c", reason="the compiled walker is not built")
def test_both_walkers_agree_on_every_mutated_packet(
    packets: list[bytes], registry: SchemaRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Counter[str]()

    def both(program, body, start, row, scalars, ids, spans, points, n_points):  # noqa: ANN001, ANN202
        outputs = [(scalars.copy(), ids.copy(), spans.copy(), points.copy()) for _ in range(2)]
        results = [
            walker(program, body, start, row, *mine, n_points)
            for walker, mine in zip((walk.walk, walk_python), outputs, strict=True)
        ]
        assert results[0] == results[1]
        end = results[0][2]
        for c, python, real in zip(*outputs, (scalars, ids, spans, points), strict=True):
            span = slice(n_points, end) if real is points else row
            assert c[span].tobytes() == python[span].tobytes()
            real[span] = c[span]
        compared[walk.Status(results[0][0]).name] += 1
        return results[0]

    monkeypatch.setattr(decode, "walk", both)
    decoder = Decoder(registry)
    everything = [*packets, *mutants(packets, 700, reseal=True)]
    for start in range(0, len(everything), BATCH):
        account(decoder, everything[start : start + BATCH])
    assert compared["DONE"] > 200
    assert compared["TRUNCATED"] > 50
    assert compared["CORRUPT"] > 50
