"""Throughput of whole runs: from an archive to scores, from topic to topic, and by partitions and instances."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from broker_filter.bench.floors import flops_run, inflate_stamps, network_alone
from broker_filter.bench.measure import (
    FLOPS,
    INFLATE,
    NAIVE,
    NO_WORK,
    RUNTIME,
    SERVICE,
    SERVICE_2_THREADS,
    Contest,
    Run,
    compete,
    timed,
)
from broker_filter.bench.naive import NaiveBroker
from broker_filter.bench.options import Device
from broker_filter.bench.runs.baselines import NAIVE_TRANSACTION
from broker_filter.bench.runs.competitors import ServiceInstances, run_naive_loop, run_no_work_loop, run_service
from broker_filter.bench.runs.testbed import Broker, Testbed
from broker_filter.bench.sample import in_batches, write_night
from broker_filter.bench.stages import BATCH, open_decoder
from broker_filter.config import Model, Runtime
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.runtimes import available_cores
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_stream

NAIVE_SHARE = 8
"""The naive loop processes an eighth of the alerts, which takes about as long as all of them in the service."""
PARTITIONS = INSTANCES = (1, 2, 4)
ARCHIVE = "archive -> scores"


def kafka_whole(model: str) -> str:
    """Return the name of a model's contest from topic to topic."""
    return f"Kafka -> scores -> Kafka: {model}"


def measure_archive(
    packets: Sequence[bytes], alerts: int, model: str, device: Device, repetitions: int, directory: Path
) -> dict[str, Contest]:
    """Measure scoring of an archive of `alerts` alerts, which repeat `packets`. No table is written."""
    night, naive_night = directory / "night.tar", directory / "naive.tar"
    naive_alerts = max(1, alerts // NAIVE_SHARE)
    write_night(night, islice(cycle(packets), alerts))
    write_night(naive_night, islice(cycle(packets), naive_alerts))
    bundle = open_bundle(model).part("ztf")
    broker = NaiveBroker(bundle)
    alone = open_scorer([model], Runtime(device=device, inference_threads=1))
    decoded, _ = open_decoder(alone).decode(in_batches(packets, len(packets))[0])

    def service(threads: int) -> Run:
        scorer = open_scorer([model], Runtime(device=device, inference_threads=threads))
        decoder = scorer.decoder()
        window = DuplicateWindow(alerts)

        def score() -> None:
            for _ in score_stream(read_packets([night]), decoder, scorer, window, batch_size=BATCH, threads=threads):
                pass

        return timed(score, alerts)

    def naive() -> None:
        with tarfile.open(naive_night) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                _, alert = broker.decode(stream.read())
                broker.score(broker.cutouts(alert))

    competitors: dict[str, Callable[[], Run]] = {
        NAIVE: partial(timed, naive, naive_alerts),
        SERVICE: partial(service, 1),
        SERVICE_2_THREADS: partial(service, 2),
        INFLATE: partial(timed, inflate_stamps(packets, broker), len(packets)),
        FLOPS: flops_run(bundle),
        RUNTIME: partial(
            timed, network_alone(alone.models[0].part(Survey.ZTF).network, bundle, decoded, 1), len(packets)
        ),
    }
    return {ARCHIVE: compete(competitors, repetitions)}


def measure_kafka(
    testbed: Testbed, packets: Sequence[bytes], models: Sequence[str], device: Device, repetitions: int
) -> dict[str, Contest]:
    """Measure runs from topic to topic with full payload, on all cores, which the broker shares; a contest per model.

    The contest of the first model includes the naive loop and the floors; the others include only the runtime alone.
    """
    naive_alerts = max(2 * NAIVE_TRANSACTION, testbed.alerts // NAIVE_SHARE)
    scorer = open_scorer(models, Runtime(device=device))
    alerts, _ = open_decoder(scorer).decode(in_batches(packets, len(packets))[0])
    first = scorer.models[0].part(Survey.ZTF).bundle
    others: dict[str, Callable[[], Run]] = {
        NAIVE: partial(run_naive_loop, testbed, models[0], naive_alerts),
        NO_WORK: partial(run_no_work_loop, testbed),
        INFLATE: partial(timed, inflate_stamps(packets, NaiveBroker(first)), len(packets)),
        FLOPS: flops_run(first),
    }
    contests = {}
    for name, model in zip(models, scorer.models, strict=True):
        part = model.part(Survey.ZTF)
        alone = network_alone(part.network, part.bundle, alerts, available_cores())
        competitors: dict[str, Callable[[], Run]] = {
            SERVICE: partial(run_service, testbed, name, device),
            RUNTIME: partial(timed, alone, len(packets)),
        }
        contests[kafka_whole(model.name)] = compete(competitors | others, repetitions)
        others = {}
    return contests


def measure_scaling(
    broker: Broker, alerts: Sequence[bytes], model: str, device: Device, repetitions: int, directory: Path
) -> dict[str, Contest]:
    """Measure throughput by partitions and instances. All instances have joined before the alerts are sent.

    There are never more instances than partitions, because an instance without a partition is idle.
    """

    def run(partitions: int, instances: int) -> Run:
        with Testbed(broker, directory, partitions) as testbed:
            with ServiceInstances(testbed, Model(bundle=model), device=device, instances=instances) as service:
                service.wait_until_joined()
                testbed.send(alerts)
                measured = testbed.watch(service, testbed.alerts, testbed.moment(service))
            testbed.check_output(service, testbed.alerts)
        return measured

    return {
        f"{partitions} partitions": compete(
            {f"{n} instances": partial(run, partitions, n) for n in INSTANCES if n <= partitions}, repetitions
        )
        for partitions in PARTITIONS
    }
