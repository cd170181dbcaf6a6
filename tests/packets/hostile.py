"""Hostile packets that are made to cost as much as possible, and a measurement of their cost: time, memory, output.

    python tests/packets/hostile.py [number of packets, by default 2000] [seed]

The packets are random combinations of content that is expensive for its size: schemas that are long, deeply nested or
have types without bytes, blocks and records without bytes, long histories, nested compression, FITS headers with false
sizes, and stamps that need the slow path. Each packet is decoded, scored by the default bundle and encoded as output
records. The script prints the most expensive packets, and exits non-zero if the cost of one exceeds its bound.
"""

from __future__ import annotations

import ctypes
import gc
import gzip
import io
import json
import logging
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from broker_filter.config import Runtime
from broker_filter.packets.batch import PLANES
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing import ocf
from broker_filter.packets.framing.ocf import GREATEST_RATIO, MAX_CONTAINER_BYTES
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.account import account_batch
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import ContainerFraming, Encoder
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.routing import Router

SEED = 20261127
SYNC = b"hostile packets!"
CARD = 80

Type = Any  # an Avro schema as JSON

# -- the parts of packets


def card(keyword: str, value: object) -> bytes:
    return f"{keyword:<8}= {value!s:>20}".ljust(CARD).encode()


def header(*cards: bytes, end: bool = True) -> bytes:
    content = b"".join(cards) + (b"END".ljust(CARD) if end else b"")
    return content.ljust(-(-len(content) // 2880) * 2880)


def plain_stamp(side: int = 1, more: tuple[bytes, ...] = (), bitpix: int = -32) -> bytes:
    size = [card("SIMPLE", "T"), card("BITPIX", bitpix), card("NAXIS", 2), card("NAXIS1", side), card("NAXIS2", side)]
    pixels = bytes(abs(bitpix) // 8 * side * side)
    return header(*size, *more) + pixels.ljust(-(-len(pixels) // 2880) * 2880, b"\0")


def with_planes(side: int = 1, more: tuple[bytes, ...] = (), bitpix: int = 16, names: tuple[str, ...] = ()) -> bytes:
    """Return a stamp whose extensions have these names, the further cards `more`, and numbers of this type."""
    parts = [plain_stamp(side)]
    for name in names or ("MASK", "MASK", "UNCERT  ", "PSFIMAGE"):
        size = [card("BITPIX", bitpix), card("NAXIS", 2), card("NAXIS1", side), card("NAXIS2", side)]
        about = [card("EXTNAME", f"'{name}'"), card("UTYPE", "'VarianceUncertainty'"), *more]
        pixels = bytes(abs(bitpix) // 8 * side * side)
        parts.append(header(b"XTENSION= 'IMAGE   '".ljust(CARD), *size, *about))
        parts.append(pixels.ljust(-(-len(pixels) // 2880) * 2880, b"\0"))
    return b"".join(parts)


TINY_STAMP = gzip.compress(plain_stamp())


def fits_file(hdu: Any) -> bytes:
    file = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(file)
    return file.getvalue()


def number(draw: random.Random) -> int:
    return draw.choice((0, 1, -1, 2, 63, 999, 10**9, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30))


def any_header(draw: random.Random) -> bytes:
    """Return a FITS header of mandatory cards with impossible values, and further cards."""
    cards = [
        card("SIMPLE", draw.choice("TTTF")),
        card("BITPIX", draw.choice((8, 16, 32, 64, -32, -64, 0, 7, number(draw)))),
        card("NAXIS", draw.choice((0, 1, 2, 2, 2, 3, 999, number(draw)))),
        card("NAXIS1", draw.choice((1, 63, number(draw)))),
        card("NAXIS2", draw.choice((1, 63, number(draw)))),
        card(draw.choice(("PCOUNT", "GCOUNT", "BLANK", "NAXIS3")), number(draw)),
        card(draw.choice(("BSCALE", "BZERO", "TFIELDS")), draw.choice((number(draw), "1D308", "1E999", "NAN", "'x'"))),
        card(draw.choice(("EXTEND", "GROUPS", "ZIMAGE")), "T"),
    ]
    return header(*cards) + bytes(draw.choice((0, 2880, 28800)))


def stamp(draw: random.Random) -> bytes:
    """Return a stamp, valid or not, that is expensive to read for its size."""
    many = draw.choice((10, 1000, 1151, 5000, 50_000))
    continued = b"".join([b"CONTINUE  'x&'".ljust(CARD)] * (many - 1))
    kinds: tuple[Callable[[], bytes], ...] = (
        plain_stamp,
        lambda: plain_stamp(draw.choice((63, 102, 1000))),
        lambda: plain_stamp(63, (card("BSCALE", 2.0), card("BLANK", 0)), draw.choice((8, 16, 32, 64))),
        lambda: plain_stamp(2, tuple(card(f"K{k}", k) for k in range(many))),
        lambda: plain_stamp(2, (b"HIERARCH " + b"A " * 35 + b"= 1", card("BSCALE", 1.5))),
        lambda: plain_stamp(2, (b"LONGCARD= 'x&'".ljust(CARD), continued)),
        lambda: header(card("SIMPLE", "T"), *[b" " * CARD] * many, end=False),
        lambda: any_header(draw),
        lambda: fits_file(fits.CompImageHDU(np.zeros((63, 63), np.float32))),
        lambda: fits_file(fits.BinTableHDU.from_columns([fits.Column("a", "D", array=np.zeros(3))])),
        lambda: bytes(draw.choice((1, 2880, 4 << 20))),
        lambda: plain_stamp(draw.choice((500, 1023))),
        lambda: with_planes(draw.choice((1, 63, 300)), bitpix=draw.choice((8, 16, -32, -64))),
        lambda: with_planes(1, tuple(card(f"K{k}", k) for k in range(min(many, 1143)))),
        lambda: with_planes(1, names=("UNCERT",) * draw.choice((10, 500))),
    )
    data = draw.choice(kinds)()
    match draw.randrange(6):
        case 0:
            return data
        case 1:
            return gzip.compress(data) + bytes(draw.choice((1, 3, 8, 4096)))
        case 2:
            return gzip.compress(data)[:-4] + draw.choice((2880, len(data) + 1, 4 << 20)).to_bytes(4, "little")
        case _:
            return gzip.compress(data, draw.choice((1, 9)))


def long_text(draw: random.Random) -> str:
    return draw.choice(("", "d" * 100_000, "\N{SNOWMAN}" * 300_000, "d" * 1_900_000))


def schema(rows: list[dict[str, Type]], more: list[dict[str, Type]], **about: Type) -> dict[str, Type]:
    """Return a schema recognised as ZTF's, with these fields in a history row, and further top-level fields."""
    cutout = {
        "type": "record",
        "name": "cutout",
        "fields": [{"name": "fileName", "type": "string"}, {"name": "stampData", "type": "bytes"}],
    }
    names = ("jd", "fid", "rcid", "ra", "dec", "magpsf", "sigmapsf")
    candidate = {"type": "record", "name": "c", "fields": [{"name": name, "type": "double"} for name in names]}
    history = {"type": "array", "items": {"type": "record", "name": "row", "fields": rows}}
    fields = [
        {"name": "objectId", "type": "string"},
        {"name": "candid", "type": "long"},
        {"name": "candidate", "type": candidate},
        {"name": "prv_candidates", "type": history},
        {"name": "cutoutScience", "type": cutout},
        {"name": "cutoutTemplate", "type": "cutout"},
        {"name": "cutoutDifference", "type": "cutout"},
        *more,
    ]
    return {"type": "record", "name": "alert", "namespace": "ztf", **about, "fields": fields}


def rows(draw: random.Random) -> tuple[list[dict[str, Type]], bytes]:
    """Return the fields of a history row, and an encoded row."""
    return draw.choice(
        (
            ([{"name": "jd", "type": "null"}], b""),
            ([{"name": "jd", "type": {"type": "fixed", "name": "none", "size": 0}}], b""),
            ([], b""),
            ([{"name": "jd", "type": "boolean"}], b"\1"),
            ([{"name": "jd", "type": "double"}, {"name": "magpsf", "type": "float"}], bytes(12)),
        )
    )


def field(draw: random.Random) -> tuple[list[dict[str, Type]], bytes]:
    """Return fields that are expensive to decode for their size, and their encoded values."""
    many = draw.choice((1, 1000, 100_000, 1_000_000))
    of_arrays = {"type": "array", "items": {"type": "array", "items": "null"}}
    of_maps = {"type": "map", "values": {"type": "map", "values": "null"}}
    symbols = [f"s{k}" for k in range(draw.choice((10, 200_000)))]
    kinds: tuple[Callable[[], tuple[list[dict[str, Type]], bytes]], ...] = (
        lambda: ([], b""),
        lambda: ([{"name": "x", "type": of_arrays}], ocf.encode_long(many) + bytes(many + 1)),
        lambda: ([{"name": "x", "type": of_arrays}], b"\2" + (ocf.encode_long(1 << 62) * many) + b"\0\0"),
        lambda: ([{"name": "x", "type": of_maps}], ocf.encode_long(many) + bytes(2 * many + 1)),
        lambda: ([{"name": f"n{k}", "type": "null"} for k in range(draw.choice((10, 12_000, 70_000)))], b""),
        lambda: ([{"name": f"broker_filter_{k}", "type": "null"} for k in range(50_000)], b""),
        lambda: ([{"name": "e", "type": {"type": "enum", "name": "e", "symbols": symbols}}], b"\0"),
        lambda: ([{"name": "d", "type": "null", "default": nested(draw.choice((50, 250, 300, 900)))}], b""),
        lambda: ([{"name": "deep", "type": deep(draw.choice((10, 60, 70)))}], b""),
        lambda: ([{"name": "wide", "type": doubling(draw.choice((5, 10, 13, 14, 30)))}], b""),
    )
    return draw.choice(kinds)()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def deep(depth: int) -> Type:
    inner: Type = "null"
    for k in range(depth):
        inner = {"type": "record", "name": f"deep{k}", "fields": [{"name": "f", "type": inner}]}
    return inner


def doubling(depth: int) -> Type:
    """Return types whose number doubles at each level once names are resolved."""
    inner: Type = {"type": "record", "name": "two0", "fields": [{"name": "a", "type": "null"}]}
    for k in range(1, depth):
        fields = [{"name": "a", "type": inner}, {"name": "b", "type": f"two{k - 1}"}]
        inner = {"type": "record", "name": f"two{k}", "fields": fields}
    return inner


NUMBERS = np.array([2460000.5, 1, 2, 10.0, 10.0, 18.0, 0.1]).tobytes()
"""The candidate of a valid alert."""
NO_ROWS = b"\0"


def history(row: bytes, count: int) -> bytes:
    """Return an encoded history of `count` rows."""
    return ocf.encode_long(count) + row * count + NO_ROWS if count else NO_ROWS


def alert(candid: int, stamps: list[bytes], rows: bytes = NO_ROWS, more: bytes = b"", name: bytes = b"ZTF1") -> bytes:
    """Return an encoded record of `schema`."""
    parts = [ocf.encode_long(len(name)), name, ocf.encode_long(candid), NUMBERS, rows]
    for one in stamps:
        parts += [b"\0", ocf.encode_long(len(one)), one]
    return b"".join((*parts, more))


def container(
    definition: dict[str, Type],
    blocks: list[tuple[int, bytes]],
    codec: str = "deflate",
    more: dict[bytes, bytes] | None = None,
) -> bytes:
    """Return a container file of blocks, each given as its claimed number of records and its bytes."""
    metadata = {b"avro.schema": json.dumps(definition).encode(), b"avro.codec": codec.encode(), **(more or {})}
    pieces = [ocf.MAGIC, ocf.encode_long(len(metadata))]
    for pair in metadata.items():
        pieces += [part for text in pair for part in (ocf.encode_long(len(text)), text)]
    pieces += [b"\0", SYNC]
    packed: dict[tuple[int, bytes], bytes] = {}
    for count, body in blocks:
        if (count, body) not in packed:
            packed[count, body] = ocf.encode_block(count, compressed(body, codec), SYNC)
        pieces.append(packed[count, body])
    return b"".join(pieces)


def any_container(draw: random.Random) -> bytes:
    """Return a container file with a random mixture of expensive content; most of its claims are true."""
    row_fields, row = rows(draw)
    more, more_value = field(draw) if draw.random() < 0.5 else ([], b"")
    doc = draw.choice(("", "", "", "d" * 100_000, "\N{SNOWMAN}" * 300_000, "d" * 1_900_000))
    of_history = history(row, draw.choice((0, 0, 0, 5, 1000, 99_999, 200_000, 5_000_000)))
    one = stamp(draw)
    stamps = draw.choice(([one] * 3, [one] * 3, [one, one, stamp(draw)], [TINY_STAMP] * 3, [b""] * 3))
    count = draw.choice((1, 1, 3, 100, 2000, 12_000))
    limit = draw.choice((1 << 16, 1 << 20, (16 << 20) - 1))
    name = b"ZTF" * draw.choice((1, 1, 1, 1_000_000))
    records = [alert(0, stamps, of_history, more_value, name)]
    while len(records) < min(count, limit // len(records[0])):
        records.append(alert(len(records), stamps, of_history, more_value, name))
    if draw.random() < 0.1:
        records = draw.choice(([b""] * 12_000, [], [records[0][:-1]]))
    of_a_block = draw.choice((1, len(records), len(records))) or 1
    bodies = [records[k : k + of_a_block] for k in range(0, len(records), of_a_block)]
    bodies += [[]] * draw.choice((0, 0, 0, 9_000, 300_000))
    blocks = [(len(body), b"".join(body)) for body in bodies]
    if blocks and draw.random() < 0.1:
        blocks[0] = draw.choice((1, blocks[0][0] + 1, 1 << 40)), blocks[0][1]
    entries = {b"m%d" % k: b"" for k in range(draw.choice((0, 0, 0, 0, 0, 0, 900, 300_000)))}
    codec = draw.choice(("null", "deflate", "deflate", "deflate"))
    return container(schema(row_fields, more, doc=doc), blocks, codec, entries)


def compressed(data: bytes, codec: str) -> bytes:
    if codec == "null":
        return data
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def packets(count: int, seed: int = SEED) -> Iterator[bytes]:
    """Yield `count` hostile packets; the same seed gives the same packets."""
    draw = random.Random(seed)
    for _ in range(count):
        yield any_container(draw)


# -- their cost


LEAST_BYTES = 2 << 20
SECONDS_A_BYTE = 200e-9
MEMORY_A_BYTE = 12
OUTPUT_A_BYTE = 8
"""The maximum cost of a packet of n bytes (CPU time, memory, bytes to each topic), per byte of min(GREATEST_RATIO x n,
max_packet_bytes). The cost for LEAST_BYTES is always allowed, because the stamps of one alert may take 12 MB. The most
expensive of 500 such packets took 37 ns, 6.5 bytes of memory and 4 bytes of output per byte."""


@dataclass(frozen=True)
class Cost:
    """The measured cost of a packet of `n_bytes`: CPU seconds, peak bytes of memory, bytes of output to each topic."""

    n_bytes: int
    seconds: float
    memory: int
    output: int
    outcome: dict[str, int]
    """The number of scored alerts, and of rejected ones by reason."""

    @property
    def shares(self) -> dict[str, float]:
        """Each cost as a fraction of its bound; more than 1 is too much."""
        size = max(LEAST_BYTES, min(GREATEST_RATIO * self.n_bytes, MAX_CONTAINER_BYTES))
        return {
            "time": self.seconds / (SECONDS_A_BYTE * size),
            "memory": self.memory / (MEMORY_A_BYTE * size),
            "output": self.output / max(OUTPUT_A_BYTE * size, self.n_bytes),  # a dead letter contains the packet
        }


class Measure:
    """Measures the whole processing of a packet on one thread."""

    def __init__(self) -> None:
        self.scorer = open_scorer(["default"], Runtime())
        self.router = Router(
            "hostile",
            models=[("default", "1")],
            encoder=Encoder("full"),
            framing=ContainerFraming(),
        )

    def decoder(self) -> Decoder:
        """Return a decoder of everything that a model can use, without any cached schema."""
        scorer = self.scorer
        return Decoder(open_registry(None), columns=scorer.columns, cutout_size=scorer.cutout_size, planes=PLANES)

    def forget_peak(self) -> None:
        """Reset the memory peak of this process, and return its free memory to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def cost(self, data: bytes) -> Cost:
        """Return the cost of one packet, without cached schemas."""
        decoder = self.decoder()
        self.forget_peak()
        before, start = memory("VmRSS"), time.process_time()
        scored = score_packets([Packet(data, FilePosition("hostile"))], decoder, self.scorer, DuplicateWindow(1000))
        routed = self.router.route(scored)
        seconds = time.process_time() - start
        output = sum(len(each.value) + len(each.key or b"") for each in routed.records)
        account = account_batch(scored.less(routed.refused))
        outcome = {"scored": account.scored, **{reason.value: n for reason, n in account.rejected.items()}}
        return Cost(len(data), seconds, max(0, memory("VmHWM") - before), output, outcome)


def memory(name: str) -> int:
    """Return a memory value of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main(count: int, seed: int) -> None:
    """Measure `count` packets, print the most expensive ones, and exit non-zero if one exceeds its bound."""
    logging.disable()
    measure = Measure()
    measure.cost(b"nothing has to be loaded any more")
    dearest: dict[str, tuple[float, int, Cost]] = {}
    outcomes: Counter[str] = Counter()
    for k, data in enumerate(packets(count, seed)):
        cost = measure.cost(data)
        outcomes.update(cost.outcome)
        for kind, share in cost.shares.items():
            dearest[kind] = max(dearest.get(kind, (0.0, k, cost)), (share, k, cost), key=lambda one: one[0])
    for kind, (share, k, cost) in dearest.items():
        print(f"{kind}: {share:.2f} of the bound by packet {k}: {cost}")  # noqa: T201
    print(f"{count} packets: {dict(outcomes)}")  # noqa: T201
    if max(share for share, _, _ in dearest.values()) > 1:
        raise SystemExit("a packet costs more than its bytes allow")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else SEED)
