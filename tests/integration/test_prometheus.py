"""A real Prometheus scrapes the running service, and evaluates every expression of the dashboards and rules."""

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
from broker_filter.metrics import LossReason, Metrics
from broker_filter.packets.batch import Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.simulate import simulate_night
from broker_filter.streaming.account import Account, AlertSchema
from broker_filter.streaming.drift import Drift
from broker_filter.streaming.filters import FilterState
from broker_filter.streaming.scored import LeftOut
from broker_filter.streaming.shadow import Difference, ShadowOutcome

from .conftest import MakePipeline, Packets, StartService, service_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
JOBS = ".*"
"""The value of the dashboards' variable `job` that stands for all services."""
ALERTS = 300
DAMAGED = 20
PATIENCE_S = 120.0


class Prometheus:
    """A server with the rules of `deploy/`, which scrapes one target every second, or holds recorded samples."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str, time: float | None = None) -> dict[tuple[str, ...], float]:
        """Return the answer to an expression: values by the values of their labels. `time`: Unix seconds, or now."""
        parameters = {"query": expression} | ({} if time is None else {"time": f"{time:.3f}"})
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode(parameters)}"
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
def prometheus(directory: Path, *targets: str) -> Iterator[Prometheus]:
    """Run Debian's Prometheus until the block ends. `directory / "tsdb"` may hold recorded samples."""
    program = shutil.which("prometheus")
    if not program:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    configuration = directory / "prometheus.yaml"
    configuration.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [{"job_name": "broker-filter", "static_configs": [{"targets": list(targets)}]}],
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


def panel_expressions() -> list[str]:
    """Return the expressions of all panels, with their variables replaced."""
    return [
        target["expr"].replace("$__rate_interval", "10s").replace("$job", JOBS)
        for dashboard in DASHBOARDS
        for panel in json.loads(dashboard.read_text())["panels"]
        for target in panel["targets"]
    ]


def rule_expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_no_panel_shows_nan_in_a_night_without_alerts(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(service_config("127.0.0.1:1", "night", "me"))  # no broker listens there, so nothing is read
    service.wait_until(lambda: service.get("/metrics")[0] == 200)
    expressions = panel_expressions()
    with prometheus(tmp_path, f"127.0.0.1:{service.port}") as server:
        server.wait_for("count_over_time(broker_filter_consumed_alerts_total[10s]) > 3")
        answers = [server.query(expression) for expression in expressions]
    assert sum(map(len, answers)) > len(answers) / 2
    assert [
        one for one, answer in zip(expressions, answers, strict=True) if any(map(math.isnan, answer.values()))
    ] == []


STEP_S = 120
STEPS = 36
"""Recorded samples of 72 minutes: a rule compares with the time one hour ago."""
NEW_SCHEMA_STEP = 20


def faulty_service() -> Iterator[Metrics]:
    """Yield the metrics of a service, step by step, with every fault that leaves it at work."""
    metrics = Metrics()
    metrics.describe_build("compiled")
    metrics.describe_configuration("0123456789ab")
    metrics.describe_models([("default", "3.1", "onnxruntime/cpu", "ztf")], [("new", "1", "onnxruntime/cpu", "ztf")])
    metrics.expect_shadow("new", "1", ["real"])
    metrics.expect(topics=["me.scored"], stages=["read"], filters=["bright"])
    metrics.expect_losses("ztf")
    metrics.queue_depth.labels("score").set(2)
    for step in range(STEPS):
        version = "99.1" if step >= NEW_SCHEMA_STEP else "11.0"
        account = Account(
            consumed=12,
            scored=10,
            duplicates=1,
            judged=4,
            anomalous=1,
            unjudged=Counter({Survey.LSST: 1}),
            unknown_version=Counter({Survey.LSST: int(step >= NEW_SCHEMA_STEP)}),
            schemas=Counter({AlertSchema(Survey.LSST, version, version): 10}),
            fallbacks=Counter({"psf": 1}),
            rejected=Counter({RejectReason.BAD_CUTOUT: 2}),
            left_out=Counter({LeftOut.TOO_LARGE: 1}),
            passed=Counter({"bright": 9}),
            sent=[time.time() - 500],
            exposed=[time.time() - 900],
        )
        metrics.commit([account], Counter({"me.scored": 10}), "me.dead-letter")
        metrics.abort()
        metrics.lose("ztf", LossReason.EXPIRED, 3)
        metrics.count_reload(failed=True)
        metrics.count_shadow(
            ShadowOutcome("new", "1", scored=9, failed=1, differences=(Difference("real", 9, 0.5, 1),))
        )
        metrics.set_partitions({("ztf", 0): 60_000 + 1000 * step})
        metrics.set_filters([FilterState("bright", rate=0.9, over=True, paused=True)])
        metrics.set_filter_files({"targets.csv": True})
        metrics.set_drift({("ztf", "default"): 5000}, [Drift("ztf", "default", "magpsf", 0.4)])
        metrics.batch_alerts.observe(12)
        with metrics.time_stage("read"):
            pass
        yield metrics


def stuck_service() -> Metrics:
    """Return the metrics of a service that commits nothing, with another configuration."""
    metrics = Metrics()
    metrics.describe_configuration("ba9876543210")
    metrics.set_partitions({("ztf", 0): 5})
    return metrics


def samples(metrics: Metrics, job: str, instance: str, at: float) -> Iterator[str]:
    """Yield all samples as lines of the OpenMetrics format, as Prometheus would record them at the time `at`."""
    target = f'job="{job}",instance="{instance}"'
    for line in metrics.exposition().decode().splitlines():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            yield f"{name}{{{target}{',' if labels else ''}{labels or '}'} {value} {at:.3f}"


def record_samples(directory: Path) -> float:
    """Record the samples of services with every fault as Prometheus' blocks, and return the time of the last ones."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    last = time.time() - 60
    stuck, idle = stuck_service(), Metrics()
    lines: list[str] = []
    for step, faulty in enumerate(faulty_service()):
        at = last - (STEPS - 1 - step) * STEP_S
        lines += samples(faulty, "broker-filter", "a", at)
        lines += samples(stuck, "broker-filter", "b", at)
        lines += samples(stuck, "stuck", "c", at)
        lines += samples(idle, "idle", "d", at)
        lines += [f'up{{job="broker-filter",instance="{name}"}} {up} {at:.3f}' for name, up in (("a", 1), ("b", 0))]
    recorded = directory / "samples.txt"
    recorded.write_text("\n".join([*lines, "# EOF", ""]))
    made = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", recorded, directory / "tsdb"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return last


def test_every_expression_of_the_dashboards_and_rules_returns_data(tmp_path: Path) -> None:
    last = record_samples(tmp_path)
    expressions = [*(one.replace("[10s]", "[5m]") for one in panel_expressions()), *rule_expressions()]
    with prometheus(tmp_path) as server:
        server.wait_for("vector(1)")
        answers = {expression: server.query(expression, last) for expression in expressions}
    assert [expression for expression, answer in answers.items() if not answer] == []
    assert [expression for expression, answer in answers.items() if any(map(math.isnan, answer.values()))] == []


@pytest.mark.kafka
def test_prometheus_counts_agree_with_the_records_in_kafka(
    make_pipeline: MakePipeline, packets: Packets, tmp_path: Path
) -> None:
    packets = [alert.packet for alert in simulate_night(ALERTS, seed=7)]
    packets[:DAMAGED] = [packet[: len(packet) // 2] for packet in packets[:DAMAGED]]
    pipeline = make_pipeline(packets)
    service = pipeline.start()
    with prometheus(tmp_path, f"127.0.0.1:{service.port}") as server:
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
        decoded = server.query("sum by (survey) (broker_filter_decoded_alerts_total)")
        assert decoded == {("ztf",): held[f"{pipeline.prefix}.scored"]}
        assert server.query("broker_filter_drift_window_alerts{survey='ztf'}").popitem()[1] <= decoded["ztf",]
        assert server.query('ALERTS{alertstate="firing"}') == {}
