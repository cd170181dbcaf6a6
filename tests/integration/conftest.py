"""The service as a process of its own, fed and read through a broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Consumer, Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.kill_with_parent import KillWithParent
from broker_filter.local_kafka import free_ports

PATIENCE_S = 120.0
"""For anything to happen at all, on a busy machine."""
QUIET_S = 1.0
"""After so long without another record, none comes."""


class RunningService:
    """`broker-filter run` with a configuration, its log and its HTTP endpoints."""

    def __init__(self, directory: Path, config: Mapping[str, Any], environment: Mapping[str, str] | None) -> None:
        self.log_path = directory / "service.log"
        (self.port,) = free_ports(1)
        path = directory / "service.yaml"
        path.write_text(yaml.safe_dump({**config, "http": {"port": self.port}}))
        command = [sys.executable, "-m", "broker_filter", "run", "--config", str(path)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.guard = KillWithParent(self.process)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, sample: str) -> float:
        """The value of `name` or `name{label="..."}`, 0 where there is none."""
        lines = (line.rpartition(" ") for line in self.get("/metrics")[1].splitlines())
        return next((float(value) for name, _, value in lines if name == f"broker_filter_{sample}"), 0.0)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.get("/readyz")[0] == 200)

    def wait_for_log(self, text: str) -> None:
        self.wait_until(lambda: text in self.log)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(how)
        return self.wait_ended()

    def wait_ended(self) -> int:
        """The exit status, when it has ended by itself."""
        return self.process.wait(PATIENCE_S)


StartService = Callable[..., RunningService]
MakeTopic = Callable[..., str]
ReadCommitted = Callable[..., list[Message]]


def service_config(bootstrap: str, topic: str, prefix: str, **output: Any) -> dict[str, Any]:
    return {
        "input": {"bootstrap_servers": bootstrap, "group_id": prefix, "topics": [topic], "start": "earliest"},
        "output": {"prefix": prefix, "payload": "scores", **output},
        "transaction": {"max_ms": 200},
    }


def headers(message: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers()}


@pytest.fixture
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Starts the service with a configuration (a mapping) and, if wanted, an `environment`; ends it with the test."""
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
    """Makes a topic with messages in it: `make_topic(bootstrap or properties, messages)`; returns its name."""

    def make(
        broker: str | Mapping[str, str],
        messages: Sequence[bytes | None] = (),
        *,
        name: str | None = None,
        partitions: int = 2,
        configuration: Mapping[str, str] | None = None,
    ) -> str:
        properties = {"bootstrap.servers": broker} if isinstance(broker, str) else dict(broker)
        topic = name or unique_name("ztf")
        new = NewTopic(topic, partitions, -1, config=dict(configuration or {}))
        admin = AdminClient(properties)
        admin.create_topics([new])[topic].result()
        send(properties, topic, messages)
        return topic

    return make


def send(properties: Mapping[str, str], topic: str, messages: Sequence[bytes | None], key: bytes | None = None) -> None:
    """Sends messages, spread over the partitions in turn."""
    producer = Producer({**properties, "message.max.bytes": 200_000_000})
    while not (partitions := len(producer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions)):
        time.sleep(0.1)  # the broker has not heard of it yet
    for i, message in enumerate(messages):
        producer.produce(topic, message, key, partition=i % partitions)
        producer.poll(0)
    assert producer.flush(PATIENCE_S) == 0


@pytest.fixture
def read_committed(unique_name: Callable[[str], str]) -> ReadCommitted:
    """Reads topics from their beginning until `expected` records are there and no more come."""

    def read(broker: str | Mapping[str, str], topics: Sequence[str], expected: int) -> list[Message]:
        properties = {"bootstrap.servers": broker} if isinstance(broker, str) else dict(broker)
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
