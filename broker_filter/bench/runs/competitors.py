"""Readers of a testbed's topic, in their own processes: the service as it runs in production, and the baseline loops.

Their processes end with the `with` block, and with this process, even if it is killed.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
import uuid
from functools import partial
from types import TracebackType
from typing import Any

import yaml
from confluent_kafka import ConsumerGroupState, KafkaException

from broker_filter.bench.measure import BenchmarkError, Run
from broker_filter.bench.runs.baselines import LEAST_COMMITS, Loop, naive_loop, no_work_loop
from broker_filter.bench.runs.testbed import PARTITIONS, REQUEST_TIMEOUT_S, Testbed
from broker_filter.config import SCORED, Model, Transaction
from broker_filter.kill_with_parent import KillWithParent
from broker_filter.scoring.bundle import open_bundle

JOIN_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
LOOK_INTERVAL_S = 0.1
LOG_TAIL = 2000
"""Number of characters at the end of a log that an error message shows."""


class ServiceInstances:
    """`broker-filter run` with full payload, in `instances` processes of one consumer group."""

    def __init__(
        self,
        testbed: Testbed,
        model: Model,
        *,
        device: str,
        instances: int = 1,
        schema_registry: str | None = None,
    ) -> None:
        self.group = f"service-{uuid.uuid4().hex[:8]}"
        self.output = f"{self.group}.{SCORED}"
        self._testbed = testbed
        self._instances = instances
        most = Transaction().max_alerts
        bundle = str(open_bundle(model.bundle).directory.resolve())
        service = {
            "input": {
                "bootstrap_servers": testbed.broker.bootstrap_servers,
                "group_id": self.group,
                "topics": [testbed.topic],
                "start": "earliest",
                "schema_registry": schema_registry,
            },
            "output": {"prefix": self.group},
            "transaction": {"max_alerts": min(most, testbed.alerts // LEAST_COMMITS or most)},
            "models": [{"bundle": bundle, "also": model.also}],
            "runtime": {"device": device},
            "http": {"port": 0},
        }
        self._configuration = testbed.directory / f"{self.group}.yaml"
        self._configuration.write_text(yaml.safe_dump(service))
        self._logs = [testbed.directory / f"{self.group}-{i}.log" for i in range(instances)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._guards: list[KillWithParent] = []

    @property
    def processes(self) -> list[int]:
        """The process ids of the instances."""
        return [process.pid for process in self._running]

    @property
    def rebalances(self) -> int:
        """How often a partition was claimed again after its first claim, counted in the logs of the instances."""
        claims = sum(log.read_text().count(f"reading {self._testbed.topic}/") for log in self._logs)
        return claims - len(self._testbed.partitions)

    def __enter__(self) -> ServiceInstances:
        command = [sys.executable, "-m", "broker_filter", "run", "--config", str(self._configuration)]
        for log in self._logs:
            with log.open("wb") as output:
                self._running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
            self._guards.append(KillWithParent(self._running[-1]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for process in self._running:
                    process.terminate()
                for process in self._running:
                    process.wait(STOP_TIMEOUT_S)
        finally:
            for guard in self._guards:
                guard.release()
            for process in self._running:
                process.kill()
                process.wait()

    def check(self) -> None:
        """Raise BenchmarkError if an instance has ended."""
        for process, log in zip(self._running, self._logs, strict=True):
            if process.poll() is not None:
                raise BenchmarkError(
                    f"the service ended with status {process.returncode}; its log ends:\n"
                    f"{log.read_text(errors='replace')[-LOG_TAIL:]}"
                )

    def wait_until_joined(self) -> None:
        """Return when all instances have joined the group and every partition is assigned.

        Raises BenchmarkError if an instance has ended, or after JOIN_TIMEOUT_S.
        """
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not self._joined():
            self.check()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.group} has not joined its group within {JOIN_TIMEOUT_S:.0f} s")
            time.sleep(LOOK_INTERVAL_S)

    def _joined(self) -> bool:
        described = self._testbed.admin.describe_consumer_groups([self.group], request_timeout=REQUEST_TIMEOUT_S)
        try:
            group = described[self.group].result()
        except KafkaException:
            return False  # the group's coordinator is not known yet, or is loading
        assigned = sum(len(member.assignment.topic_partitions) for member in group.members)
        return (group.state, len(group.members), assigned) == (
            ConsumerGroupState.STABLE,
            self._instances,
            len(self._testbed.partitions),
        )


class LoopProcess:
    """A loop of `baselines` over `alerts` of the topic's alerts; its output topic has the name of its group."""

    def __init__(self, testbed: Testbed, loop: Loop, alerts: int, partitions: int) -> None:
        self.group = self.output = f"loop-{uuid.uuid4().hex[:8]}"
        testbed.create(self.output, partitions)
        arguments = (testbed.broker.bootstrap_servers, testbed.topic, self.group, alerts)
        # Spawned, because a forked process would inherit librdkafka's state without its threads.
        self._process: Any = multiprocessing.get_context("spawn").Process(target=loop, args=arguments)

    @property
    def processes(self) -> list[int]:
        """The process id of the loop."""
        return [self._process.pid]

    def __enter__(self) -> LoopProcess:
        self._process.start()
        self._guard = KillWithParent(self._process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.release()
        self._process.kill()
        self._process.join()

    def check(self) -> None:
        """Raise BenchmarkError if the loop has ended."""
        if self._process.exitcode is not None:
            raise BenchmarkError(f"{self.group} ended early with status {self._process.exitcode}")


def run_service(testbed: Testbed, model: str, device: str) -> Run:
    """Measure the service over the whole topic."""
    with ServiceInstances(testbed, Model(bundle=model), device=device) as service:
        run = testbed.watch(service, testbed.alerts)
    testbed.check_output(service, testbed.alerts)
    return run


def run_naive_loop(testbed: Testbed, model: str, alerts: int) -> Run:
    """Measure the naive loop over `alerts` alerts of the topic."""
    return _run_loop(testbed, partial(naive_loop, model=model), alerts, partitions=1)


def run_no_work_loop(testbed: Testbed) -> Run:
    """Measure the copying loop over the whole topic, into as many partitions as the service writes to."""
    return _run_loop(testbed, no_work_loop, testbed.alerts, PARTITIONS)


def _run_loop(testbed: Testbed, loop: Loop, alerts: int, partitions: int) -> Run:
    with LoopProcess(testbed, loop, alerts, partitions) as process:
        run = testbed.watch(process, alerts)
    testbed.check_output(process, alerts)
    return run
