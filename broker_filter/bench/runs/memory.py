"""Measurements of whole processes: the time to the first score, and whether memory stays constant over a night."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO

from broker_filter.bench.measure import BenchmarkError, Spread, memory_megabytes
from broker_filter.bench.options import Device
from broker_filter.bench.runs.competitors import ServiceInstances
from broker_filter.bench.runs.testbed import Testbed
from broker_filter.bench.sample import NightWriter, in_batches
from broker_filter.config import Model
from broker_filter.packets.decode import Decoder
from broker_filter.packets.framing.ocf import encode_long
from broker_filter.packets.schemas.registry import open_registry

EARLY, LATE = 10_000, 300_000
"""Alerts of an archive after which memory is compared: when caches are full, and about a third of a night later."""
WINDOW, SAMPLE = 2000, 50
"""Memory at an alert is the maximum over the WINDOW alerts before it, sampled every SAMPLE alerts."""
ID_STEP = 1_000_003
"""Difference between the alert ids of a repeated packet: larger than the differences within one exposure."""
OPEN_TIMEOUT_S = 60.0


def measure_startup(testbed: Testbed, packet: bytes, model: str, device: Device, repetitions: int) -> dict[str, Spread]:
    """Measure the seconds from the start of a process to one scored archived alert, and to a service's first commit."""
    night, table = testbed.directory / "one.avro", testbed.directory / "one.jsonl"
    night.write_bytes(packet)
    replayed, committed = [], []
    for _ in range(repetitions):
        began = time.monotonic()
        subprocess.run(score_command(night, table, model, device), check=True, capture_output=True)
        replayed.append(time.monotonic() - began)
        began = time.monotonic()
        with ServiceInstances(testbed, Model(bundle=model), device=device) as service:
            committed.append(next(testbed.progress(service, testbed.alerts)).time - began)
        testbed.delete(service.output)
    return {"first score of a replay, s": Spread.of(replayed), "first score of the service, s": Spread.of(committed)}


def measure_memory(packets: Sequence[bytes], model: str, device: Device, directory: Path) -> dict[str, Spread]:
    """Measure the resident memory of `broker-filter score` in megabytes, while it reads a night through a pipe."""
    pipe, table, log = directory / "endless.tar", directory / "endless.parquet", directory / "endless.log"
    os.mkfifo(pipe)
    marks: dict[int, float] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(score_command(pipe, table, model, device), stdout=output, stderr=subprocess.STDOUT)
    try:
        with open_pipe(pipe, process) as stream:
            night = NightWriter(stream)
            for i, packet in enumerate(islice(distinct_alerts(packets), LATE), start=1):
                night.add(packet)
                for mark in (EARLY, LATE):
                    if mark - WINDOW < i <= mark and not i % SAMPLE:
                        marks[mark] = max(marks.get(mark, 0.0), memory_megabytes(process.pid))
            night.close()
        if process.wait():
            raise BrokenPipeError
    except BrokenPipeError:
        raise BenchmarkError(
            f"`broker-filter score` ended with status {process.wait()}: {log.read_text(errors='replace')}"
        ) from None
    finally:
        process.kill()
        process.wait()
    return {resident_at(mark): Spread.of([megabytes]) for mark, megabytes in marks.items()}


def resident_at(alert: int) -> str:
    """Return the name of the figure of resident memory at an alert."""
    return f"resident at alert {alert:,}, MB"


def score_command(source: Path, table: Path, model: str, device: Device) -> list[str]:
    """Return the command line that scores an archive."""
    command = [sys.executable, "-m", "broker_filter", "score", str(source), "--out", str(table)]
    return [*command, "--model", model, "--device", device]


@contextmanager
def open_pipe(pipe: Path, reader: subprocess.Popen[bytes]) -> Iterator[BinaryIO]:
    """Open a named pipe for writing, as soon as `reader` has opened it for reading.

    Raises BrokenPipeError if the reader has ended, or has not opened the pipe within OPEN_TIMEOUT_S.
    """
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or reader.poll() is not None or time.monotonic() > deadline:
                raise BrokenPipeError from error
            time.sleep(0.05)
        else:
            break
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as stream:
        yield stream


def distinct_alerts(packets: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the packets again and again with new alert ids, so that the duplicate window must remember every id."""
    alerts, _ = Decoder(open_registry(None)).decode(in_batches(packets, len(packets))[0])
    ids = alerts.alert_id.tolist()
    for turn in count():
        for packet, alert_id in zip(packets, ids, strict=True):
            # The new id has as many bytes as the old one, so that nothing else in the packet moves.
            yield packet.replace(encode_long(alert_id), encode_long(alert_id + turn * ID_STEP))
