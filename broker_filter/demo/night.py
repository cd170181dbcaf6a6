"""The demonstration's input: simulated nights, with damaged packets (ZTF) and alerts that are sent twice."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker_filter.demo.results import Survey
from broker_filter.simulate import simulate_night

DAMAGED_EVERY = 100
SENT_TWICE_EVERY = 125
"""Alerts per damaged packet, and per repeated packet: far fewer than in a survey, so that a short night has both."""


@dataclass(frozen=True, slots=True)
class Night:
    """An archive of a survey's night: its file, its number of packets, and the true kind of each alert by alert id."""

    archive: Path
    packets: int
    kinds: dict[int, str]


def write_night(archive: Path, survey: Survey, n: int, seed: int, advance: Callable[[int], None]) -> Night:
    """Simulate `n` alerts and write a tar archive with one member per packet, some repeated.

    Some packets of ZTF are damaged.
    """
    rng = np.random.default_rng(seed)
    kinds: dict[int, str] = {}
    packets = 0
    with tarfile.open(archive, "w") as tar:
        for i, alert in enumerate(simulate_night(n, seed, survey)):
            kinds[alert.alert_id] = alert.kind
            for suffix, data in _members(i, alert.packet, rng if survey == "ztf" else None):
                member = tarfile.TarInfo(f"{alert.alert_id}{suffix}.avro")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                packets += 1
            advance(1)
    return Night(archive, packets, kinds)


def _members(i: int, packet: bytes, rng: np.random.Generator | None) -> Iterator[tuple[str, bytes]]:
    """Yield suffix and bytes of an alert's archive members: the packet, and sometimes a copy or a damaged copy too.

    Without `rng`, no copy is damaged.
    """
    yield "", packet
    if i % SENT_TWICE_EVERY == SENT_TWICE_EVERY - 1:
        yield "-again", packet
    if rng is not None and i % DAMAGED_EVERY == DAMAGED_EVERY // 2:
        damage = (_truncated, _no_alert, _unknown_schema, _broken_stamp)[i // DAMAGED_EVERY % 4]
        yield damage.__name__.replace("_", "-"), damage(packet, rng)


def _truncated(packet: bytes, rng: np.random.Generator) -> bytes:
    return packet[: int(len(packet) * rng.uniform(0.1, 0.9))]


def _no_alert(_packet: bytes, _rng: np.random.Generator) -> bytes:
    return b"HTTP/1.1 502 Bad Gateway\r\n\r\n"


def _unknown_schema(packet: bytes, _rng: np.random.Generator) -> bytes:
    """Return a message in wire format with a schema id that no registry knows."""
    return b"\0" + (12345).to_bytes(4, "big") + packet[-20_000:]


def _broken_stamp(packet: bytes, rng: np.random.Generator) -> bytes:
    """Return the packet with 400 bytes of its first gzip-compressed cutout overwritten with noise."""
    start = packet.index(b"\x1f\x8b\x08") + 200
    return packet[:start] + rng.bytes(400) + packet[start + 400 :]
