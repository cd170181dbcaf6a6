"""The packets of the benchmark, from files or simulated; every competitor can process them."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from broker_filter.bench.measure import BenchmarkError
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.schemas.registry import open_registry
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.archives import read_packets

SEED = 2026
CHOICE = 4096
"""Packets to sample from: archives are in order of time, and their first alerts are all from one field of the sky."""


def choose_packets(
    inputs: Sequence[Path], n: int, survey: Survey = Survey.ZTF, schema_registry: str | None = None
) -> list[bytes]:
    """Return up to `n` valid packets of one alert each, sampled from `inputs`, or simulated if there are no inputs.

    `schema_registry`: where the schemas of packets in wire format are; by default those of simulated packets. Raises
    BenchmarkError if the inputs hold no such packet.
    """
    decoder = Decoder(open_registry(schema_registry or str(SCHEMAS)))

    def is_fit(data: bytes) -> bool:
        alerts, _ = decoder.decode([Packet(data, FilePosition("bench"))])
        return list(alerts.survey) == [survey]

    found: Iterable[bytes]
    if inputs:
        found = [packet.data for packet in islice(read_packets(inputs), CHOICE)]
        random.Random(SEED).shuffle(found)  # noqa: S311 -- a sample
    else:
        found = (alert.packet for alert in simulate_night(n, SEED, "ztf" if survey is Survey.ZTF else "lsst"))
    chosen = list(islice(filter(is_fit, found), n))
    if not chosen:
        raise BenchmarkError(f"no valid {survey.name} packet in {', '.join(map(str, inputs))}")
    return chosen


def in_batches(packets: Sequence[bytes], size: int) -> list[list[Packet]]:
    """Return the packets in batches of `size`, for a decoder."""
    positioned = [Packet(data, FilePosition("bench", record=i)) for i, data in enumerate(packets)]
    return [positioned[start : start + size] for start in range(0, len(packets), size)]


class NightWriter:
    """Writes a tar archive of packets, as surveys publish a night."""

    def __init__(self, stream: BinaryIO) -> None:
        self._archive = tarfile.open(fileobj=stream, mode="w|")  # noqa: SIM115 -- closed by `close`
        self._n = 0

    def add(self, packet: bytes) -> None:
        """Append a packet."""
        member = tarfile.TarInfo(f"{self._n}.avro")
        member.size = len(packet)
        self._archive.addfile(member, BytesIO(packet))
        self._archive.members.clear()  # type: ignore[attr-defined]  # they would fill a gigabyte in a long night
        self._n += 1

    def close(self) -> None:
        """Write the end of the archive."""
        self._archive.close()


def write_night(path: Path, packets: Iterable[bytes]) -> None:
    """Write a tar archive of packets."""
    with path.open("wb") as file:
        night = NightWriter(file)
        for packet in packets:
            night.add(packet)
        night.close()
