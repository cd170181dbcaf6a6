"""Latency of alerts through the service: at a survey's steady rate, and in the burst that follows a visit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from confluent_kafka import KafkaError, Message, Producer

from broker_filter.bench.competitors import ServiceInstances
from broker_filter.bench.measure import BenchmarkError, Spread
from broker_filter.bench.options import Device
from broker_filter.bench.sample import choose_packets
from broker_filter.bench.testbed import Broker, Testbed
from broker_filter.config import Model
from broker_filter.packets.batch import Survey
from broker_filter.simulate import SCHEMAS

RATE = 300
"""Alerts per second: about Rubin's mean rate, 10,000 alerts per visit of about 39 s."""
WARM_UP_S, STEADY_S = 5, 20
"""Alerts of the first WARM_UP_S are not counted, because the broker's JVM still compiles; alerts of STEADY_S are."""
BURST = 10_000
"""Alerts of one visit."""
BURST_DISTINCT = 400
OVERDUE_S = 30.0
"""If no record arrives for so long, an alert was lost."""

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


def measure_burst(broker: Broker, model: str, device: Device, directory: Path) -> dict[str, Spread]:
    """Measure the seconds until the output of one visit of simulated LSST packets, sent together, is committed."""
    packets = choose_packets([], BURST_DISTINCT, Survey.LSST)
    with Testbed(broker, directory) as testbed:
        choice = Model(bundle=model, also=["lsst"])
        with ServiceInstances(testbed, choice, device=device, schema_registry=str(SCHEMAS)) as service:
            service.wait_until_joined()
            began = testbed.send(list(islice(cycle(packets), BURST)))
            *_, last = testbed.progress(service, testbed.alerts)
            rebalances = service.rebalances
        testbed.check_output(service, testbed.alerts)
    return {"burst drained, s": Spread.of([last.time - began]), "burst, rebalances": Spread.of([rebalances])}
