"""Fixtures that give the tests real packets, published weights and brokers.

Survey data and weights are in `../shared` beside the checkout, or in `BROKER_FILTER_SHARED`; tests that need them are
skipped if they are missing. The broker is a running cluster (`KAFKA_BOOTSTRAP_SERVERS`); otherwise Apache Kafka,
started from `KAFKA_HOME` or `../shared/kafka`; otherwise the embedded broker. Tests marked `kafka` need Apache Kafka:
without it they are skipped, or fail if `BROKER_FILTER_REQUIRE_KAFKA=1`.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from broker_filter.anomalies.neighbours import normalise
from broker_filter.anomalies.reference import ReferenceAlerts, SurveyCounts, SurveyReference, make_reference
from broker_filter.importers.combine import combine_bundles
from broker_filter.local_kafka import KafkaCluster, embedded_broker, free_ports, kafka_home
from broker_filter.packets.batch import Survey
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.labels import UNLABELLED

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("BROKER_FILTER_SHARED", CHECKOUT.parent / "shared"))
BROKER_ROOMS = ("integration", "kafka")
"""The folders of tests that mostly wait for brokers; other tests need the processor."""
RUNNING_CLUSTER = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
REQUIRE_KAFKA = os.environ.get("BROKER_FILTER_REQUIRE_KAFKA") == "1"

# A test's broker ends before Java's optimising compiler has paid off. Without it, a start takes a third less CPU time.
os.environ.setdefault("KAFKA_OPTS", "-XX:TieredStopAtLevel=1")

# Every run generates the same examples, and a busy machine may be slow to generate them.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def apache_kafka() -> Path | None:
    """Return the Kafka installation from which clusters are started, or None without Kafka or Java."""
    home = kafka_home() or SHARED / "kafka"
    return home if (home / "bin" / "kafka-server-start.sh").exists() and shutil.which("java") else None


def own_lines(stderr: str) -> list[str]:
    """Return the lines of `stderr` without lost connections of Kafka clients that other tests left in this process."""
    return [line for line in stderr.splitlines() if "|FAIL|rdkafka#" not in line and "|ERROR|rdkafka#" not in line]


def destroy_unused_clients() -> None:
    """Destroy the Kafka clients that only reference cycles keep alive, such as the traceback of an expected error.

    They would try to reach their broker for the rest of the run. Commands that call `gc.freeze` hide them from the
    garbage collector.
    """
    gc.unfreeze()
    gc.collect()


NO_KAFKA = "needs an Apache Kafka to start: KAFKA_HOME (or ../shared/kafka) and Java"


def skip_without_kafka(reason: str) -> NoReturn:
    """Skip the test, or fail it if BROKER_FILTER_REQUIRE_KAFKA=1."""
    if REQUIRE_KAFKA:
        pytest.fail(f"BROKER_FILTER_REQUIRE_KAFKA=1, but this test {reason}")
    pytest.skip(reason)


def list_operators_once() -> None:
    """Make each later export to ONNX reuse the list of operators, which takes half a second of CPU to make.

    It only has an effect if a test has imported the exporter, and with the versions that have this function.
    """
    interfaces = sys.modules.get("onnxscript._framework_apis")
    for module in list(vars(interfaces).values()) if interfaces else ():
        listing = getattr(module, "get_torchlib_ops", None)
        if listing is not None and not hasattr(listing, "cache_info"):
            module.get_torchlib_ops = cache(listing)


def pytest_runtest_setup(item: pytest.Item) -> None:
    list_operators_once()
    if item.get_closest_marker("kafka") and not (RUNNING_CLUSTER or apache_kafka()):
        skip_without_kafka(f"{NO_KAFKA}; or KAFKA_BOOTSTRAP_SERVERS")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files of BROKER_ROOMS evenly among the other files, so that no processor idles beside several of them.

    The order within a file, and within the two kinds of files, does not change.
    """
    files = dict.fromkeys(item.path for item in items)
    waiting = [file for file in files if file.parent.name in BROKER_ROOMS]
    others = [file for file in files if file.parent.name not in BROKER_ROOMS]
    place = {file: (n + 0.5) / len(kind) for kind in (waiting, others) for n, file in enumerate(kind)}
    items.sort(key=lambda item: (place[item.path], item.path))


def require(path: Path) -> Path:
    """Return the path if it exists; otherwise skip the test with a message that names the path."""
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real survey data."""
    return require(SHARED / "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of published weights."""
    return require(SHARED / "models")


@pytest.fixture(scope="session")
def ztf_packets(shared_data: Path) -> list[tuple[int, bytes]]:
    """Every shared ZTF packet as (candid, container file)."""
    with tarfile.open(shared_data / "ztf" / "ztf_alerts.tar") as archive:
        return [
            (int(Path(member.name).stem), stream.read())
            for member in archive
            if (stream := archive.extractfile(member)) and member.name.endswith(".avro")
        ]


@pytest.fixture(scope="session")
def lsst_schemas(shared_data: Path) -> Path:
    """The official LSST schemas, as a directory that replaces a schema registry."""
    return shared_data / "lsst" / "schemas"


@pytest.fixture(scope="session")
def lsst_packets(shared_data: Path) -> list[tuple[str, bytes]]:
    """Every shared LSST packet in Confluent wire format as (file name, message)."""
    return [
        (path.name, path.read_bytes()) for path in sorted((shared_data / "lsst" / "wire").iterdir()) if path.is_file()
    ]


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[..., KafkaCluster]]:
    """Return a function that starts Apache Kafka with the options of KafkaCluster (`nodes`, `secure`, `overrides`).

    The clusters end with the module. Each module has its own brokers, because after many tests a broker's network
    thread was once observed in an endless loop, which would delay the tests of all later modules.
    """
    home = apache_kafka()
    if home is None:
        skip_without_kafka(NO_KAFKA)
    with ExitStack() as stack:

        def start(**options: object) -> KafkaCluster:
            # Not below pytest's own folder, which keeps the files of the last three runs: alerts would fill the disk.
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kafka-", ignore_cleanup_errors=True))
            return stack.enter_context(KafkaCluster(home, Path(directory), **options))  # type: ignore[arg-type]

        yield start
        destroy_unused_clients()


@pytest.fixture(scope="module")
def kafka_cluster(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    """One node of Apache Kafka, shared by the tests of a module; no test may stop it."""
    return start_cluster()


@pytest.fixture(scope="module")
def _cluster_to_stop(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    # A node that was killed waits at its next start until its earlier session has expired, by default for 6 to 9 s.
    return start_cluster(overrides={"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"})


@pytest.fixture
def mortal_cluster(_cluster_to_stop: KafkaCluster) -> KafkaCluster:
    """One node of Apache Kafka that tests may stop, shared by the tests of a module; it runs when a test begins."""
    if not _cluster_to_stop.process_ids:
        _cluster_to_stop.start(1)
    return _cluster_to_stop


@pytest.fixture(scope="module")
def proxied_cluster(start_cluster: Callable[..., KafkaCluster]) -> KafkaCluster:
    """One node of Apache Kafka, shared by the tests of a module; it is reached only while a test runs `toxiproxy`."""
    (port,) = free_ports(1)
    return start_cluster(proxy_port=port)


@pytest.fixture(scope="module")
def kafka_bootstrap(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address `host:port` of a broker; for tests marked `kafka` it is Apache Kafka."""
    if RUNNING_CLUSTER:
        yield RUNNING_CLUSTER
    elif apache_kafka():
        yield request.getfixturevalue("kafka_cluster").bootstrap_servers
    else:
        with tempfile.TemporaryDirectory(prefix="broker-") as directory, embedded_broker(Path(directory)) as bootstrap:
            yield bootstrap


@pytest.fixture(scope="module")
def second_kafka_bootstrap(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address `host:port` of a second cluster, for output that is not written to the cluster of the input."""
    if apache_kafka():
        yield request.getfixturevalue("start_cluster")().bootstrap_servers
    elif RUNNING_CLUSTER:
        skip_without_kafka(f"{NO_KAFKA}, as a second cluster")
    else:
        with tempfile.TemporaryDirectory(prefix="broker-") as directory, embedded_broker(Path(directory)) as bootstrap:
            yield bootstrap


@pytest.fixture
def reference_file(tmp_path: Path) -> Path:
    """A reference set of random embeddings for the bundle `default`: 100 alerts, and the scores of 50 others."""
    rng = np.random.default_rng(0)
    names = np.array([f"ZTF26a{i}" for i in range(100)])
    embedding = normalise(rng.standard_normal((100, 8)))
    alerts = ReferenceAlerts(embedding, np.arange(100), names, np.full(100, Survey.ZTF, np.uint8))
    scores = np.sort(rng.gamma(3, 0.1, 50).astype(np.float32))
    file = tmp_path / "ordinary.safetensors"
    usual, apart = np.array([[0.2, 0.1]], np.float32), np.empty((0, 2), np.float32)
    part = SurveyReference(alerts, scores, usual, apart, np.full(100, UNLABELLED))
    counts = SurveyCounts(read=200, passed=150, kept=100, held_out=50)
    make_reference(open_bundle("default"), None, {Survey.ZTF: part}, {Survey.ZTF: counts}, "mahalanobis").write(file)
    return file


@pytest.fixture(scope="session")
def embedding_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle that gives an embedding of three modalities (`tests/embedding_bundle.py`)."""
    pytest.importorskip("onnx", reason="making a bundle needs the extra `train`")
    from tests.embedding_bundle import write_embedding_bundle

    return write_embedding_bundle(tmp_path_factory.mktemp("bundles") / "looks")


@pytest.fixture(scope="session")
def lsst_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle for LSST alerts (`tests/lsst_network.py`)."""
    pytest.importorskip("onnx", reason="making a bundle needs the extra `train`")
    from tests.lsst_network import write_lsst_network

    return write_lsst_network(tmp_path_factory.mktemp("bundles") / "deep")


@pytest.fixture(scope="session")
def both_surveys(lsst_network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that scores alerts of ZTF by the network of `default` and those of LSST by `lsst_network`."""
    directory = tmp_path_factory.mktemp("bundles") / "both"
    combine_bundles(directory, "both", "3.0", {"ztf": "default", "lsst": lsst_network})
    return directory


@pytest.fixture
def unique_name() -> Callable[[str], str]:
    """Return a function that makes a unique name of a topic, group or prefix: `unique_name("ztf")`."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:12]}"
