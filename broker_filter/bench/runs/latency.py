"""Latency of alerts through the service: at a survey's steady rate, and in the burst that follows a visit."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from types import TracebackType

import numpy as np
from confluent_kafka import KafkaError, Message, Producer

from broker_filter.bench.measure import BenchmarkError, Spread, memory_megabytes
from broker_filter.bench.options import VISIT, Device
from broker_filter.bench.runs.competitors import ServiceInstances
from broker_filter.bench.runs.testbed import Broker, Testbed
from broker_filter.bench.sample import choose_packets
from broker_filter.config import Model
from broker_filter.packets.batch import Survey
from broker_filter.simulate import SCHEMAS

RATE = 300
"""Alerts per second: about Rubin's mean rate, 10,000 alerts per visit of about 39 s."""
WARM_UP_S, STEADY_S = 5, 20
"""Alerts of the first WARM_UP_S are not counted, because the broker's JVM still compiles; alerts of STEADY_S are."""
BURST = VISIT
"""Alerts that arrive together."""
BURST_DISTINCT = 400
BURST_RATE = 333
"""Alerts per second while the burst is worked off: 10 million in a night of 8.3 hours, as Rubin expects."""
BEHIND_S = 1
"""The burst is worked off when the output is not further behind the input than this."""
MOST_STEADY_S = 300
"""A service that is slower than BURST_RATE never catches up: no more alerts are sent after this time."""
OVERDUE_S = 30.0
"""If no record arrives for so long, an alert was lost."""
QUEUE_FULL_POLL_S = 0.1
"""Interval between attempts to send while the producer's queue is full."""

Place = tuple[int, int]
"""Partition and offset of an input."""


def measure_latency(
    broker: Broker, packets: Sequence[bytes], model: str, device: Device, directory: Path
) -> dict[str, Spread]:
    """Measure the milliseconds from an input's Kafka timestamp until a read_committed reader has the output."""
    alerts = (WARM_UP_S + STEADY_S) * RATE
    with (
        Testbed(broker, directory) as testbed,
        ServiceInstances(testbed, Model(bundle=model), device=device) as service,
    ):
        service.wait_until_joined()
        reader = testbed.reader(service.output)
        sent: dict[Place, tuple[int, float]] = {}
        sender = threading.Thread(
            target=send_steadily, args=(testbed, islice(cycle(packets), alerts), sent), daemon=True
        )
        sender.start()
        arrived: dict[Place, float] = {}
        while len(arrived) < alerts:
            message = reader.poll(OVERDUE_S)
            if message is None:
                service.check()
                raise BenchmarkError(f"only {len(arrived)} of {alerts} alerts were published, at {RATE} alerts/s")
            if message.error() is None:
                now_ms = time.time_ns() / 1e6
                _, partition, offset = dict(message.headers())["input"].decode().rsplit("/", 2)
                arrived[int(partition), int(offset)] = now_ms
        sender.join()
        reader.close()
        testbed.delete(service.output)
    latencies = [arrived[place] - sent_ms for place, (i, sent_ms) in sent.items() if i >= WARM_UP_S * RATE]
    p50, p99 = np.percentile(latencies, [50, 99]).tolist()
    return {"latency p50, ms": Spread.of([p50]), "latency p99, ms": Spread.of([p99])}


def send_steadily(testbed: Testbed, packets: Iterable[bytes], sent: dict[Place, tuple[int, float]]) -> None:
    """Send packets at RATE. Records in `sent`, by partition and offset, the message's sequence number and Unix ms."""
    # Without linger, because the waiting time of the survey's producer is not part of the service's latency.
    producer = Producer({**testbed.client, "linger.ms": 0, "message.max.bytes": 2**24})
    started = time.monotonic()
    for i, packet in enumerate(packets):

        def note(error: KafkaError | None, message: Message, i: int = i) -> None:
            if error is None:
                sent[message.partition(), message.offset()] = i, message.timestamp()[1]

        while (delay := started + i / RATE - time.monotonic()) > 0:
            producer.poll(delay)
        producer.produce(testbed.topic, packet, partition=i % len(testbed.partitions), on_delivery=note)
    producer.flush()


def measure_burst(
    broker: Broker,
    model: str,
    device: Device,
    directory: Path,
    *,
    visit: int | None = None,
    packets: Sequence[bytes] | None = None,
    schema_registry: str | None = None,
) -> dict[str, Spread]:
    """Measure how the service works off one visit of LSST packets, sent together, while more arrive at BURST_RATE.

    `visit`: alerts of the visit, by default BURST. `packets`: the packets, which repeat; by default simulated ones.
    `schema_registry`: where their schemas are. Returns the seconds until the output of all alerts is committed that
    were sent BEHIND_S ago or earlier, the number of rebalances, the peak memory in megabytes, and the CPU time of the
    service and of the brokers (if their processes are known) per alert, which depends little on other load.
    """
    visit = visit or BURST
    packets = packets or choose_packets([], BURST_DISTINCT, Survey.LSST)
    with Testbed(broker, directory) as testbed:
        choice = Model(bundle=model, also=["lsst"])
        registry = schema_registry or str(SCHEMAS)
        with ServiceInstances(testbed, choice, device=device, schema_registry=registry) as service:
            service.wait_until_joined()
            began = testbed.send(list(islice(cycle(packets), visit)))
            first = testbed.moment(service)
            with SteadySender(testbed, packets) as sender:
                for moment in testbed.progress(service, sys.maxsize):
                    if moment.committed >= visit + sender.sent - BURST_RATE * BEHIND_S:
                        break
            # The marker of the visit's transaction takes one offset in each partition.
            for _ in testbed.progress(service, visit + sender.sent + len(testbed.partitions)):
                pass
            rebalances = service.rebalances
            peak = max(memory_megabytes(process, peak=True) for process in service.processes)
        testbed.check_output(service, visit + sender.sent)
    figures = {
        "burst drained, s": moment.time - began,
        "burst, rebalances": rebalances,
        "burst, peak MB": peak,
        "burst, service's CPU us/alert": (moment.cpu - first.cpu) / moment.committed * 1e6,
    }
    if broker.processes:
        figures["burst, brokers' CPU us/alert"] = (moment.broker_cpu - first.broker_cpu) / moment.committed * 1e6
    return {name: Spread.of([figure]) for name, figure in figures.items()}


class SteadySender:
    """Sends packets at BURST_RATE in a thread, until the `with` block ends or for MOST_STEADY_S.

    `sent`: the number of packets sent so far; at the end at least one for each partition.
    """

    def __init__(self, testbed: Testbed, packets: Sequence[bytes]) -> None:
        self._testbed = testbed
        self._packets = packets
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent = 0

    def __enter__(self) -> SteadySender:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _send(self) -> None:
        producer = Producer({**self._testbed.client, "linger.ms": 5, "message.max.bytes": 2**24})
        partitions = len(self._testbed.partitions)
        started = time.monotonic()
        for i, packet in enumerate(islice(cycle(self._packets), BURST_RATE * MOST_STEADY_S)):
            while (delay := started + i / BURST_RATE - time.monotonic()) > 0:
                producer.poll(delay)
            self._produce(producer, packet, i % partitions)
            self.sent = i + 1
            if self._stop.is_set() and self.sent >= partitions:
                break
        producer.flush()

    def _produce(self, producer: Producer, packet: bytes, partition: int) -> None:
        """Put a packet into the producer's queue; wait while the queue is full, because the brokers are slower."""
        while True:
            try:
                producer.produce(self._testbed.topic, packet, partition=partition)
            except BufferError:
                producer.poll(QUEUE_FULL_POLL_S)
            else:
                return
