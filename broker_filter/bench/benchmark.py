"""Runs the requested parts of the benchmark."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

from broker_filter.bench.lens import measure_lens
from broker_filter.bench.lsst import measure_lsst_decoding
from broker_filter.bench.measure import BenchmarkError
from broker_filter.bench.options import OF_BOTH, OF_LSST, THROUGH_BROKER, WITHOUT_NAIVE_LOOP, Options
from broker_filter.bench.report import Report
from broker_filter.bench.rows import measure_rows
from broker_filter.bench.runs.kafka_io import measure_kafka_io
from broker_filter.bench.runs.latency import BURST_DISTINCT, measure_burst, measure_latency
from broker_filter.bench.runs.memory import measure_memory, measure_startup
from broker_filter.bench.runs.testbed import Broker, Testbed, open_broker
from broker_filter.bench.runs.throughput import measure_archive, measure_kafka, measure_scaling
from broker_filter.bench.sample import choose_packets
from broker_filter.bench.sky import measure_sky
from broker_filter.bench.stages import measure_stages
from broker_filter.config import Runtime
from broker_filter.packets.batch import Survey
from broker_filter.scoring.runtimes import available_cores
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import SCHEMAS

DISTINCT_PACKETS = 512
"""Packets before the first one is repeated: 30 MB, too much for a CPU cache, and little enough for memory."""
STAGE_PACKETS = 256
LIBRARIES = ("astropy", "broker-filter", "confluent-kafka", "deflate", "fastavro", "numpy", "onnxruntime", "torch")


def run_benchmark(options: Options, announce: Callable[[str], None]) -> Report:
    """Measure the requested parts. Calls `announce` with the name of each part before it starts.

    Raises BenchmarkError, BrokerError, and the errors of opening a model.
    """
    scorer = open_scorer(options.models, Runtime(device=options.device))
    of_ztf = set(options.parts) - set(OF_LSST)
    if of_ztf - set(WITHOUT_NAIVE_LOOP) and scorer.models[0].part(Survey.ZTF).inputs.metadata:
        raise BenchmarkError(
            f"{options.models[0]} needs more than images, and the naive loop cannot run it: name an image model first"
        )
    packets = choose_packets(options.inputs, min(options.alerts, DISTINCT_PACKETS)) if of_ztf else []
    visit = lsst_packets(options) if set(options.parts) & {*OF_LSST, *OF_BOTH} else []
    report = Report(
        processor=processor(),
        cores=available_cores(),
        python=platform.python_version(),
        libraries={name: version(name) for name in LIBRARIES},
        models={model.name: f"{model.version} on {model.provider}" for model in scorer.models},
        packets=len(packets or visit),
        alerts=options.alerts,
        repetitions=options.repetitions,
    )
    with tempfile.TemporaryDirectory(prefix="broker-filter-bench-") as name:
        directory = Path(name)
        measure_alone(options, packets, visit, directory, report, announce)
        if set(options.parts) & set(THROUGH_BROKER):
            with open_broker(options.bootstrap_servers, directory / "broker") as broker:
                report.broker = broker.name
                measure_through_broker(options, packets, visit, broker, directory, report, announce)
    return report


def measure_alone(
    options: Options,
    packets: Sequence[bytes],
    visit: Sequence[bytes],
    directory: Path,
    report: Report,
    announce: Callable[[str], None],
) -> None:
    """Measure the parts that need no broker. `packets`: of ZTF. `visit`: packets of LSST."""
    models, device, repetitions = options.models, options.device, options.repetitions
    if "stages" in options.parts:
        announce("Stages")
        report.stages |= measure_stages(packets[:STAGE_PACKETS], models, device, repetitions)
    if "lsst" in options.parts:
        announce("Decoding of LSST packets")
        registry = options.schema_registry or str(SCHEMAS)
        scorer = open_scorer(models, Runtime(device=device))
        report.stages |= measure_lsst_decoding(visit[:STAGE_PACKETS], registry, scorer, repetitions)
    if "archive" in options.parts:
        announce("Archive")
        report.wholes |= measure_archive(packets, options.alerts, models[0], device, repetitions, directory)
    if "rows" in options.parts:
        announce("Archives as packets and as rows of Parquet")
        registry = options.schema_registry or str(SCHEMAS)
        of_surveys = {Survey.ZTF: packets, Survey.LSST: visit[:DISTINCT_PACKETS]}
        report.wholes |= measure_rows(of_surveys, registry, models, device, repetitions, directory)
    if "lens" in options.parts:
        announce("A lens on flagged alerts and on every alert")
        contests, quantities = measure_lens(packets, options.alerts, device, repetitions)
        report.wholes |= contests
        report.quantities |= quantities
    if "sky" in options.parts:
        announce("Regions of the sky and lists of targets in filters")
        report.quantities |= measure_sky(directory, repetitions)
    if "memory" in options.parts:
        announce("Memory over a night")
        report.quantities |= measure_memory(packets, models[0], device, directory)


def measure_through_broker(
    options: Options,
    packets: Sequence[bytes],
    visit: Sequence[bytes],
    broker: Broker,
    directory: Path,
    report: Report,
    announce: Callable[[str], None],
) -> None:
    """Measure the parts that read from one topic and write to another. `packets`: of ZTF. `visit`: packets of LSST."""
    models, device, repetitions = options.models, options.device, options.repetitions
    alerts = list(islice(cycle(packets), options.alerts))
    if {"kafka", "startup"} & set(options.parts):
        announce(f"{broker.name}: filling a topic")
        with Testbed(broker, directory) as testbed:
            testbed.send(alerts)
            if "kafka" in options.parts:
                announce("Kafka in, Kafka out")
                report.stages |= measure_kafka_io(testbed, packets, models[0], repetitions)
                announce("Topic to topic")
                report.wholes |= measure_kafka(testbed, packets, models, device, repetitions)
            if "startup" in options.parts:
                announce("Start-up")
                report.quantities |= measure_startup(testbed, packets[0], models[0], device, repetitions)
    if "scaling" in options.parts:
        announce("Partitions and instances")
        report.scaling |= measure_scaling(broker, alerts, models[0], device, repetitions, directory)
    if "latency" in options.parts:
        announce("Latency at a steady rate")
        report.quantities |= measure_latency(broker, packets, models[0], device, directory)
    if "burst" in options.parts:
        announce("Burst")
        report.quantities |= measure_burst(
            broker,
            models[0],
            device,
            directory,
            visit=options.visit,
            packets=visit,
            schema_registry=options.schema_registry,
        )


def lsst_packets(options: Options) -> list[bytes]:
    """Return up to BURST_DISTINCT LSST packets: of the inputs if they have a schema registry, else simulated."""
    inputs = options.inputs if options.schema_registry else []
    return choose_packets(inputs, BURST_DISTINCT, Survey.LSST, options.schema_registry)


def processor() -> str:
    """Return the processor's model name, or the machine type if the system does not give a name."""
    with Path("/proc/cpuinfo").open() as info:
        return next(
            (line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine()
        )
