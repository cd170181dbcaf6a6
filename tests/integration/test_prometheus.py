"""A real Prometheus scrapes the running service, and its answers are what Kafka holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.local_kafka import free_ports
from broker_filter.simulate import simulate_night

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules.yaml"
ALERTS = 300
DAMAGED = 20
PATIENCE_S = 120.0


@contextmanager
def running(command: Sequence[object], log: Path) -> Iterator[None]:
    """A program that is ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def committed_records(bootstrap: str, topics: list[str], expected: int) -> Counter[str]:
    """How many records a read_committed reader finds in each topic, once there are `expected` in all."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"{topics[0]}-reader",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "topic.metadata.refresh.interval.ms": 500,
        }
    )
    consumer.subscribe(topics)
    found: Counter[str] = Counter()
    deadline = time.monotonic() + PATIENCE_S
    while found.total() < expected and time.monotonic() < deadline:
        found.update(message.topic() for message in consumer.consume(500, 1.0) if message.error() is None)
    found.update(message.topic() for message in consumer.consume(500, 2.0) if message.error() is None)
    consumer.close()
    return found


def query(server: str, expression: str) -> dict[tuple[str, ...], float]:
    """Prometheus' answer: values by the values of their labels."""
    url = f"http://{server}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as response:
        answer = json.load(response)
    return {tuple(one["metric"].values()): float(one["value"][1]) for one in answer["data"]["result"]}


def wait_for(server: str, expression: str) -> None:
    """Waits until the expression has an answer."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if query(server, expression):
                return
        except OSError:  # not listening yet
            pass
        time.sleep(0.5)
    pytest.fail(f"{expression} had no answer in {PATIENCE_S} s")


@pytest.mark.kafka
def test_prometheus_counts_what_kafka_holds(
    kafka_bootstrap: str, unique_name: Callable[[str], str], tmp_path: Path
) -> None:
    prometheus = shutil.which("prometheus")
    if not prometheus:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    topic, prefix = unique_name("ztf"), unique_name("filter")
    packets = [alert.packet for alert in simulate_night(ALERTS, seed=7)]
    packets[:DAMAGED] = [packet[: len(packet) // 2] for packet in packets[:DAMAGED]]
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    for future in admin.create_topics([NewTopic(topic, 3)]).values():
        future.result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for packet in packets:
        producer.produce(topic, packet)
    producer.flush()

    service_port, prometheus_port = free_ports(2)
    service_file = tmp_path / "service.yaml"
    service_file.write_text(
        yaml.safe_dump(
            {
                "input": {
                    "bootstrap_servers": kafka_bootstrap,
                    "group_id": prefix,
                    "topics": [topic],
                    "start": "earliest",
                },
                "output": {"prefix": prefix},
                "http": {"port": service_port},
            }
        )
    )
    scraping = tmp_path / "prometheus.yaml"
    scraping.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [
                    {"job_name": "broker-filter", "static_configs": [{"targets": [f"127.0.0.1:{service_port}"]}]}
                ],
            }
        )
    )
    server = f"127.0.0.1:{prometheus_port}"
    service_command = [sys.executable, "-m", "broker_filter", "run", "--config", service_file]
    prometheus_command = [
        prometheus,
        f"--config.file={scraping}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address={server}",
    ]
    with (
        running(service_command, tmp_path / "service.log"),
        running(prometheus_command, tmp_path / "prometheus.log"),
    ):
        held = committed_records(kafka_bootstrap, [f"{prefix}.scored", f"{prefix}.dead-letter"], ALERTS)
        wait_for(server, f"sum(broker_filter_consumed_alerts_total) == {ALERTS}")
        wait_for(server, "sum(broker_filter_consumer_lag_messages) == 0")

        assert held[f"{prefix}.dead-letter"] >= DAMAGED
        assert query(server, "sum by (topic) (broker_filter_published_records_total)") == {
            (name,): count for name, count in held.items()
        }
        assert query(server, "sum(broker_filter_scored_alerts_total)") == {(): held[f"{prefix}.scored"]}
        assert query(server, "sum(broker_filter_rejected_alerts_total)") == {(): held[f"{prefix}.dead-letter"]}
        assert query(server, "sum(broker_filter_unaccounted_alerts)") == {(): 0}
        assert query(server, 'ALERTS{alertstate="firing"}') == {}
