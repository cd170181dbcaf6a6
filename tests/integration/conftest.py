"""Fixtures that run the service as a separate process, send messages to it and read its output through a broker."""

from __future__ import annotations

import http.client
import io
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastavro
import pytest
import yaml
from confluent_kafka import Consumer, Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kill_with_parent import KillWithParent
from broker_filter.local_kafka import free_ports
from broker_filter.simulate import simulate_night

from ..conftest import SHARED

PATIENCE_S = 120.0
"""Seconds to wait for an expected event on a busy machine."""
SIMULATED_PACKETS = 640
"""Number of simulated packets; no test sends more."""
QUIET_S = 1.0
"""Seconds without a new record after which a topic is taken as complete."""


class RunningService:
    """A running `broker-filter run` with its configuration, log file and HTTP endpoints."""

    def __init__(self, directory: Path, config: Mapping[str, Any], environment: Mapping[str, str] | None) -> None:
        self.log_path = directory / "service.log"
        (self.port,) = free_ports(1)
        self.path = directory / "service.yaml"
        self.configure(config)
        command = [sys.executable, "-m", "broker_filter", "run", "--config", str(self.path)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.guard = KillWithParent(self.process)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Replace the service file, as a whole."""
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump({**config, "http": {"port": self.port}}))
        new.rename(self.path)

    def reload(self, config: Mapping[str, Any]) -> None:
        """Replace the service file, send SIGHUP, and wait until the service has reloaded it or has refused it."""
        before = self.reloads
        self.configure(config)
        self.process.send_signal(signal.SIGHUP)
        self.wait_until(lambda: self.reloads > before)

    @property
    def reloads(self) -> float:
        """The number of reloads, also of those that failed."""
        return sum(self.metric(f'reloads_total{{outcome="{outcome}"}}') for outcome in ("succeeded", "failed"))

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET request; status 0 and an empty body if nothing listens, or if the service
        ends while it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""

    def metric(self, sample: str) -> float:
        """Return the value of the sample `name` or `name{label="..."}`; 0 if it does not exist."""
        lines = (line.rpartition(" ") for line in self.get("/metrics")[1].splitlines())
        return next((float(value) for name, _, value in lines if name == f"broker_filter_{sample}"), 0.0)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true; fail if the process ends or PATIENCE_S pass before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait_consumed(self, n: int) -> None:
        """Wait until the output of `n` alerts, counted from the start of this instance, is committed."""
        self.wait_until(lambda: self.metric("consumed_alerts_total") == n)

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.get("/readyz")[0] == 200)

    def wait_for_log(self, text: str) -> None:
        self.wait_until(lambda: text in self.log)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait until the process has ended, and return the exit status."""
        self.process.send_signal(how)
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Wait until the process has ended without a signal, and return the exit status."""
        return self.process.wait(PATIENCE_S)


Packets = list[bytes]
Cluster = str | Mapping[str, str]
"""Address of a cluster: `host:port`, or the properties of a librdkafka client."""
StartService = Callable[..., RunningService]
MakeTopic = Callable[..., str]
ReadCommitted = Callable[..., list[Message]]
MakePipeline = Callable[..., "Pipeline"]


@dataclass
class Pipeline:
    """An input topic, a service that reads it, and the topics `<prefix>.<name>` that the service writes."""

    topic: str
    prefix: str
    """The prefix of the output topics, and the consumer group of the service."""
    config: dict[str, Any]
    """The configuration of the service; a test may change it before each start."""
    source: Mapping[str, str]
    """Client properties for the cluster of the input."""
    target: Mapping[str, str]
    """Client properties for the cluster of the output."""
    start_service: StartService
    read_committed: ReadCommitted

    def start(self, environment: Mapping[str, str] | None = None, **sections: Any) -> RunningService:
        """Start an instance of the service, in which `sections` replace those of `config`."""
        return self.start_service(self.config | sections, environment)

    def send(self, messages: Sequence[bytes | None]) -> None:
        """Send messages to the input topic, spread over its partitions in turn."""
        send(self.source, self.topic, messages)

    def read(self, *names: str, expected: int) -> list[Message]:
        """Read the committed records of the topics `<prefix>.<name>`, until `expected` are there and no more come."""
        return self.read_committed(self.target, [f"{self.prefix}.{name}" for name in names], expected)


def client_properties(cluster: Cluster) -> dict[str, str]:
    """Return the properties of a librdkafka client of the cluster."""
    return {"bootstrap.servers": cluster} if isinstance(cluster, str) else dict(cluster)


def service_config(bootstrap: str, topic: str, prefix: str, **output: Any) -> dict[str, Any]:
    return {
        "input": {"bootstrap_servers": bootstrap, "group_id": prefix, "topics": [topic], "start": "earliest"},
        "output": {"prefix": prefix, "payload": "scores", **output},
        "transaction": {"max_ms": 200},
    }


def headers(message: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers()}


def inputs(records: Sequence[Message]) -> Counter[str]:
    """Return the number of output records for each input position (`topic/partition/offset`)."""
    return Counter(headers(record)["input"].partition("/")[2] for record in records)


def alert(value: bytes) -> dict[str, Any]:
    """Decode the single alert of an output record with fastavro, as other clients do."""
    (record,) = fastavro.reader(io.BytesIO(value))
    assert isinstance(record, dict)
    return record


@pytest.fixture(scope="session")
def packets(request: pytest.FixtureRequest) -> Packets:
    """All shared ZTF packets; simulated packets if this machine has no survey data."""
    if (SHARED / "data").exists():
        return [packet for _, packet in request.getfixturevalue("ztf_packets")]
    return [alert.packet for alert in simulate_night(SIMULATED_PACKETS, seed=1, survey="ztf")]


@pytest.fixture(params=["one cluster", "two clusters"])
def output_bootstrap(request: pytest.FixtureRequest, kafka_bootstrap: str) -> str:
    """Address of the output cluster: the cluster of the input, or a second cluster."""
    if request.param == "one cluster":
        return kafka_bootstrap
    other: str = request.getfixturevalue("second_kafka_bootstrap")
    return other


@pytest.fixture
def make_pipeline(
    request: pytest.FixtureRequest,
    make_topic: MakeTopic,
    start_service: StartService,
    read_committed: ReadCommitted,
    unique_name: Callable[[str], str],
) -> MakePipeline:
    """Return a function that creates an input topic with messages and the configuration of a service that reads it."""

    def make(
        messages: Sequence[bytes | None] = (),
        *,
        topic: str | None = None,
        partitions: int = 2,
        source: Cluster | None = None,
        target: Cluster | None = None,
        **output: Any,
    ) -> Pipeline:
        """Return a new pipeline; `output` holds further keys of the section `output` of the configuration.

        `topic`: name of a topic that the test itself creates. `source`: cluster of the input, `kafka_bootstrap` by
        default. `target`: cluster of the output; by default, the configuration names no output cluster.
        """
        source_properties = client_properties(source or request.getfixturevalue("kafka_bootstrap"))
        target_properties = client_properties(target) if target else source_properties
        if target:
            output["bootstrap_servers"] = target_properties["bootstrap.servers"]
        name, prefix = topic or make_topic(source_properties, messages, partitions=partitions), unique_name("filter")
        config = service_config(source_properties["bootstrap.servers"], name, prefix, **output)
        return Pipeline(name, prefix, config, source_properties, target_properties, start_service, read_committed)

    return make


@pytest.fixture
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Return a function that starts the service with a configuration and an optional `environment`.

    Every service that it started is killed at the end of the test.
    """
    started = []

    def start(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> RunningService:
        started.append(RunningService(tmp_path_factory.mktemp("service"), config, environment))
        return started[-1]

    yield start
    for service in started:
        service.guard.release()
        if service.process.poll() is None:
            service.end(signal.SIGKILL)


@pytest.fixture
def make_topic(unique_name: Callable[[str], str]) -> MakeTopic:
    """Return a function that creates a topic, sends messages to it and returns the topic's name."""

    def make(
        cluster: Cluster,
        messages: Sequence[bytes | None] = (),
        *,
        name: str | None = None,
        partitions: int = 2,
        configuration: Mapping[str, str] | None = None,
    ) -> str:
        properties = client_properties(cluster)
        topic = name or unique_name("ztf")
        new = NewTopic(topic, partitions, -1, config=dict(configuration or {}))
        admin = AdminClient(properties)
        admin.create_topics([new])[topic].result()
        send(properties, topic, messages)
        return topic

    return make


def send(properties: Mapping[str, str], topic: str, messages: Sequence[bytes | None], key: bytes | None = None) -> None:
    """Send messages, spread over the partitions in turn."""
    producer = Producer({**properties, "message.max.bytes": 200_000_000})
    while not (partitions := len(producer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions)):
        time.sleep(0.1)  # the broker does not know the topic yet
    for i, message in enumerate(messages):
        producer.produce(topic, message, key, partition=i % partitions)
        producer.poll(0)
    assert producer.flush(PATIENCE_S) == 0


@pytest.fixture
def read_committed(unique_name: Callable[[str], str]) -> ReadCommitted:
    """Return a function that reads topics from the beginning, with `isolation.level=read_committed`.

    It reads until `expected` records are there and no more arrive for QUIET_S.
    """

    def read(cluster: Cluster, topics: Sequence[str], expected: int) -> list[Message]:
        properties = client_properties(cluster)
        consumer = Consumer(
            {
                **properties,
                "group.id": unique_name("reader"),
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "topic.metadata.refresh.interval.ms": 500,
                "receive.message.max.bytes": 256 * 2**20,
            }
        )
        consumer.subscribe(list(topics))
        records: list[Message] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(records) < expected and time.monotonic() < deadline:
            records += [message for message in consumer.consume(500, 1.0) if message.error() is None]
        records += [message for message in consumer.consume(500, QUIET_S) if message.error() is None]
        consumer.close()
        return records

    return read
