"""The whole benchmark, in the parts that were asked for."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

from broker_filter.bench.kafka_io import measure_ends
from broker_filter.bench.latency import measure_burst, measure_latency
from broker_filter.bench.measure import BenchmarkError
from broker_filter.bench.memory import measure_memory, measure_startup
from broker_filter.bench.options import THROUGH_BROKER, Request
from broker_filter.bench.report import Report
from broker_filter.bench.sample import choose_packets
from broker_filter.bench.stages import measure_stages
from broker_filter.bench.testbed import Arena, Broker, open_broker
from broker_filter.bench.throughput import measure_archive, measure_kafka, measure_scaling
from broker_filter.config import Runtime
from broker_filter.scoring.runtimes import available_cores
from broker_filter.scoring.scorer import open_scorer

DISTINCT_PACKETS = 512
"""Enough that no cache holds a packet until it comes again (30 MB), few enough to keep in memory."""
STAGE_PACKETS = 256
LIBRARIES = ("astropy", "broker-filter", "confluent-kafka", "deflate", "fastavro", "numpy", "onnxruntime", "torch")


def run_benchmark(request: Request, announce: Callable[[str], None]) -> Report:
    """Measures the parts that are asked for. `announce` is told what comes next.

    Raises BenchmarkError, BrokerError, and what opening the models raises.
    """
    scorer = open_scorer(request.models, Runtime(device=request.device))
    if scorer.models[0].columns:
        raise BenchmarkError(f"{request.models[0]} takes more than images; name one first that the naive loop runs too")
    packets = choose_packets(request.inputs, min(request.alerts, DISTINCT_PACKETS))
    report = Report(
        processor=processor(),
        cores=available_cores(),
        python=platform.python_version(),
        libraries={name: version(name) for name in LIBRARIES},
        models={model.name: f"{model.version} on {model.provider}" for model in scorer.models},
        packets=len(packets),
        alerts=request.alerts,
        repetitions=request.repetitions,
    )
    with tempfile.TemporaryDirectory(prefix="broker-filter-bench-") as name:
        directory = Path(name)
        measure_alone(request, packets, directory, report, announce)
        if set(request.parts) & set(THROUGH_BROKER):
            with open_broker(request.bootstrap_servers, directory / "broker") as broker:
                report.broker = broker.name
                measure_through_broker(request, packets, broker, directory, report, announce)
    return report


def measure_alone(
    request: Request, packets: Sequence[bytes], directory: Path, report: Report, announce: Callable[[str], None]
) -> None:
    """What needs no broker."""
    models, device, repetitions = request.models, request.device, request.repetitions
    if "stages" in request.parts:
        announce("Stages")
        report.stages |= measure_stages(packets[:STAGE_PACKETS], models, device, repetitions)
    if "archive" in request.parts:
        announce("Archive")
        report.wholes |= measure_archive(packets, request.alerts, models[0], device, repetitions, directory)
    if "memory" in request.parts:
        announce("Memory over a night")
        report.quantities |= measure_memory(packets, models[0], device, directory)


def measure_through_broker(
    request: Request,
    packets: Sequence[bytes],
    broker: Broker,
    directory: Path,
    report: Report,
    announce: Callable[[str], None],
) -> None:
    """What goes from topic to topic."""
    models, device, repetitions = request.models, request.device, request.repetitions
    alerts = list(islice(cycle(packets), request.alerts))
    if {"kafka", "startup"} & set(request.parts):
        announce(f"{broker.name}: filling a topic")
        with Arena(broker, directory) as arena:
            arena.send(alerts)
            if "kafka" in request.parts:
                announce("Kafka in, Kafka out")
                report.stages |= measure_ends(arena, packets, models[0], repetitions)
                announce("Topic to topic")
                report.wholes |= measure_kafka(arena, packets, models, device, repetitions)
            if "startup" in request.parts:
                announce("Start-up")
                report.quantities |= measure_startup(arena, packets[0], models[0], device, repetitions)
    if "scaling" in request.parts:
        announce("Partitions and instances")
        report.scaling |= measure_scaling(broker, alerts, models[0], device, repetitions, directory)
    if "latency" in request.parts:
        announce("Latency at a steady rate")
        report.quantities |= measure_latency(broker, packets, models[0], device, directory)
    if "burst" in request.parts:
        announce("Burst")
        report.quantities |= measure_burst(broker, models[0], device, directory)


def processor() -> str:
    """The processor's name, where the system says it."""
    with Path("/proc/cpuinfo").open() as info:
        return next(
            (line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine()
        )
