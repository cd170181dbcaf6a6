"""A real Prometheus scrapes the running service; its values are compared with the records in Kafka."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from broker_filter.local_kafka import free_ports
from broker_filter.simulate import simulate_night

from .conftest import MakePipeline, Packets, StartService, service_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "broker-filter.json"
ALERTS = 300
DAMAGED = 20
PATIENCE_S = 120.0


class Prometheus:
    """A server that scrapes one target every second and has the rules of `deploy/`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Return the answer to an expression: values by the values of their labels."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
        return {tuple(one["metric"].values()): float(one["value"][1]) for one in answer["data"]["result"]}

    def wait_for(self, expression: str) -> None:
        """Wait until the expression has an answer."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if self.query(expression):
                    return
            except OSError:  # the server does not listen yet
                pass
            time.sleep(0.5)
        pytest.fail(f"{expression} had no answer in {PATIENCE_S} s")


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """Run Debian's Prometheus until the block ends."""
    program = shutil.which("prometheus")
    if not program:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    configuration = directory / "prometheus.yaml"
    configuration.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [{"job_name": "broker-filter", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [
        program,
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_no_panel_shows_nan_in_a_night_without_alerts(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(service_config("127.0.0.1:1", "night", "me"))  # no broker listens there, so nothing is read
    service.wait_until(lambda: service.get("/metrics")[0] == 200)
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    with prometheus(f"127.0.0.1:{service.port}", tmp_path) as server:
        server.wait_for("count_over_time(broker_filter_consumed_alerts_total[10s]) > 3")
        answers = [
            server.query(expression.replace("$__rate_interval", "10s").replace("$job", "broker-filter"))
            for expression in expressions
        ]
    assert sum(map(len, answers)) > len(answers) / 2
    assert [
        one for one, answer in zip(expressions, answers, strict=True) if any(map(math.isnan, answer.values()))
    ] == []


@pytest.mark.kafka
def test_prometheus_counts_agree_with_the_records_in_kafka(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path
) -> None:
    packets = [alert.packet for alert in simulate_night(ALERTS, seed=7)]
    packets[:DAMAGED] = [packet[: len(packet) // 2] for packet in packets[:DAMAGED]]
    pipeline = make_pipeline(packets)
    service = pipeline.start()
    with prometheus(f"127.0.0.1:{service.port}", tmp_path) as server:
        records = pipeline.read("scored", "dead-letter", expected=ALERTS)
        held = Counter(record.topic() for record in records)
        server.wait_for(f"sum(broker_filter_consumed_alerts_total) == {ALERTS}")
        server.wait_for("sum(broker_filter_consumer_lag_messages) == 0")

        assert held.total() == ALERTS
        assert held[f"{pipeline.prefix}.dead-letter"] >= DAMAGED
        assert server.query("sum by (topic) (broker_filter_published_records_total)") == {
            (name,): count for name, count in held.items()
        }
        assert server.query("sum(broker_filter_scored_alerts_total)") == {(): held[f"{pipeline.prefix}.scored"]}
        assert server.query("sum(broker_filter_rejected_alerts_total)") == {(): held[f"{pipeline.prefix}.dead-letter"]}
        assert server.query("sum(broker_filter_unaccounted_alerts)") == {(): 0}
        assert server.query('ALERTS{alertstate="firing"}') == {}
