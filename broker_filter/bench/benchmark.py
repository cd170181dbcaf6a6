"""The whole benchmark: the stages, the whole through an archive, the whole through a broker; and its report."""

from __future__ import annotations

import platform
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from broker_filter.bench.measure import Contest, compete, timed
from broker_filter.bench.naive import NaiveBroker
from broker_filter.bench.stages import BATCH, measure_stages
from broker_filter.bench.throughput import NAIVE_TRANSACTION, Arena
from broker_filter.config import Runtime
from broker_filter.local_kafka import KafkaCluster, embedded_broker, kafka_home
from broker_filter.packets.batch import Survey
from broker_filter.packets.decode import Decoder
from broker_filter.packets.packet import FilePosition, Packet
from broker_filter.packets.registry import open_registry
from broker_filter.scoring.bundle import load_bundle
from broker_filter.scoring.runtimes import available_cores
from broker_filter.scoring.scorer import Scorer, open_scorer
from broker_filter.simulate import simulate_night
from broker_filter.streaming.archives import read_packets
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_stream

DISTINCT_PACKETS = 512
"""Enough that no cache holds a packet until it comes again (40 MB), few enough to keep in memory."""
STAGE_PACKETS = 256
NAIVE_SHARE = 8
"""The naive loop gets an eighth of the alerts, and takes about as long for them as the service for all."""
PARTITIONS = 4
SEED = 2026
LIBRARIES = ("astropy", "broker-filter", "confluent-kafka", "deflate", "fastavro", "numpy", "onnxruntime", "torch")


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the benchmark. `stages` are on one thread, `wholes` on all cores."""

    machine: dict[str, str | int]
    libraries: dict[str, str]
    model: str
    broker: str
    packets: int
    alerts: int
    repetitions: int
    stages: dict[str, Contest]
    wholes: dict[str, Contest]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values, with the ratios, which are what may be compared between machines."""
        contests = self.stages | self.wholes
        ratios = {
            name: {"cpu": contest.cpu_ratio, "throughput": contest.throughput_ratio}
            for name, contest in contests.items()
        }
        return {**asdict(self), "ratios": ratios}


def run_benchmark(
    inputs: Sequence[Path],
    *,
    model: str,
    alerts: int,
    repetitions: int,
    bootstrap_servers: str | None,
    announce: Callable[[str], None],
) -> Report:
    """Measures on ZTF packets of `inputs`, or on simulated ones; `alerts` of them go through archive and broker.

    `model`: a bundle of images alone. `bootstrap_servers`: a running cluster; where absent, Apache Kafka of KAFKA_HOME
    is started, or else the embedded broker. `announce` is told what comes next. Raises BenchmarkError, BrokerError, and
    what opening the model raises.
    """
    announce("Choosing packets")
    scorer = open_scorer([model], Runtime())
    packets = choose_packets(inputs, scorer, min(alerts, DISTINCT_PACKETS))
    stream = list(islice(cycle(packets), alerts))
    announce(f"Stages, {len(packets[:STAGE_PACKETS])} packets")
    stages = measure_stages(packets[:STAGE_PACKETS], model, repetitions)
    with tempfile.TemporaryDirectory(prefix="broker-filter-bench-") as name:
        directory = Path(name)
        announce(f"Archive, {alerts} alerts")
        archive = measure_archive(stream, model, repetitions, directory)
        with open_broker(bootstrap_servers, directory / "broker") as (broker, servers):
            announce(f"{broker}, {alerts} alerts")
            kafka = measure_kafka(stream, model, repetitions, servers, directory)
    return Report(
        machine={"processor": processor(), "cores": available_cores(), "python": platform.python_version()},
        libraries={name: version(name) for name in LIBRARIES},
        model=f"{scorer.models[0].name} {scorer.models[0].version} on {scorer.models[0].provider}",
        broker=broker,
        packets=len(packets),
        alerts=alerts,
        repetitions=repetitions,
        stages=stages,
        wholes={"archive -> scores": archive, "Kafka -> scores -> Kafka": kafka},
    )


def choose_packets(inputs: Sequence[Path], scorer: Scorer, n: int) -> list[bytes]:
    """Up to `n` packets that both contestants take (ZTF, one alert each, decodable): of `inputs`, else simulated.

    Raises ValueError where there is none.
    """
    decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)

    def is_fit(data: bytes) -> bool:
        alerts, _ = decoder.decode([Packet(data, FilePosition("bench"))])
        return list(alerts.survey) == [Survey.ZTF]

    found: Iterable[bytes] = (
        (packet.data for packet in read_packets(inputs))
        if inputs
        else (alert.packet for alert in simulate_night(n, SEED, "ztf"))
    )
    chosen = list(islice(filter(is_fit, found), n))
    if not chosen:
        raise ValueError(f"no ZTF alert that decodes in {', '.join(map(str, inputs))}")
    return chosen


def measure_archive(packets: Sequence[bytes], model: str, repetitions: int, directory: Path) -> Contest:
    """From a night's archive to scores, on all cores. Nothing is written."""
    night, naive_night = directory / "night.tar", directory / "naive.tar"
    naive_packets = packets[: max(1, len(packets) // NAIVE_SHARE)]
    write_archive(night, packets)
    write_archive(naive_night, naive_packets)
    scorer = open_scorer([model], Runtime())
    broker = NaiveBroker(load_bundle(model))

    def service() -> None:
        decoder = Decoder(open_registry(None), cutout_size=scorer.cutout_size, columns=scorer.columns)
        window = DuplicateWindow(len(packets))
        for _ in score_stream(
            read_packets([night]), decoder, scorer, window, batch_size=BATCH, threads=available_cores()
        ):
            pass

    def naive() -> None:
        with tarfile.open(naive_night) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                _, alert = broker.decode(stream.read())
                broker.score(broker.cutouts(alert))

    return compete(partial(timed, naive, len(naive_packets)), partial(timed, service, len(packets)), repetitions)


def measure_kafka(packets: Sequence[bytes], model: str, repetitions: int, servers: str, directory: Path) -> Contest:
    """From topic to topic, full payload, exactly once, on all cores, which the broker shares."""
    with Arena(servers, packets, PARTITIONS, directory) as arena:
        naive_alerts = max(2 * NAIVE_TRANSACTION, len(packets) // NAIVE_SHARE)
        return compete(partial(arena.naive, model, naive_alerts), partial(arena.service, model), repetitions)


def write_archive(path: Path, packets: Sequence[bytes]) -> None:
    """A tar of packets, as surveys publish a night."""
    with tarfile.open(path, "w") as archive:
        for i, packet in enumerate(packets):
            member = tarfile.TarInfo(f"{i}.avro")
            member.size = len(packet)
            archive.addfile(member, BytesIO(packet))


@contextmanager
def open_broker(bootstrap_servers: str | None, directory: Path) -> Iterator[tuple[str, str]]:
    """What the broker is, and its bootstrap servers."""
    if bootstrap_servers:
        yield f"cluster {bootstrap_servers}", bootstrap_servers
    elif home := kafka_home():
        with KafkaCluster(home, directory) as cluster:
            yield f"Apache Kafka of {home}", cluster.bootstrap_servers
    else:
        with embedded_broker(directory) as servers:
            yield "embedded broker (no Apache Kafka: set KAFKA_HOME)", servers


def processor() -> str:
    """The processor's name, where the system says it."""
    with Path("/proc/cpuinfo").open() as info:
        return next(
            (line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine()
        )
