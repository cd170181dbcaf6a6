"""Throughput through a broker: the service as it runs in production, and the naive loop, each in a process of its own.

What counts is what is committed: a run is measured between the first and the last commit of the consumer group, so that
neither start-up nor a record that no reader may see yet is counted. The broker's own CPU time is nobody's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import yaml
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.bench.measure import Run
from broker_filter.bench.naive import NaiveBroker
from broker_filter.config import SCORED, Transaction
from broker_filter.scoring.bundle import load_bundle

NAIVE_TRANSACTION = 64
"""Alerts to a transaction of the naive loop; transactions of one would measure little but the broker's round trips."""
LEAST_COMMITS = 8
"""Of the service in one run: a short run has smaller transactions, or there would be nothing between two commits."""
POLL_INTERVAL_S = 0.05
REQUEST_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 60
STALL_TIMEOUT_S = 120
SILENT = {"log_level": 0}
"""librdkafka prints what it recovers from by itself: a coordinator that loads, a broker that was stopped in the end."""
MISSING_S, SURPLUS_S = 10.0, 1.0
"""How long a reader waits for records that are missing, and for any beyond what there must be."""


class BenchmarkError(RuntimeError):
    """A contestant that ended, stalled, or lost or repeated an alert: its figure would mean nothing."""


class Moment(NamedTuple):
    """How far a contestant is: alerts committed, seconds by a monotonic clock, seconds of CPU time since it started."""

    committed: int
    time: float
    cpu: float


class Arena:
    """A topic full of packets, and a group, topics and a clock for each contestant. Deletes them in the end."""

    def __init__(self, bootstrap_servers: str, packets: Sequence[bytes], partitions: int, directory: Path) -> None:
        """`directory`: for configuration and logs of the contestants."""
        self.bootstrap_servers = bootstrap_servers
        self._client = {"bootstrap.servers": bootstrap_servers, **SILENT}
        self._admin = AdminClient(self._client)
        self.alerts = len(packets)
        self._directory = directory
        self.topic = f"bench-{uuid.uuid4().hex[:8]}"
        self._partitions = [TopicPartition(self.topic, i) for i in range(partitions)]
        self._create(self.topic, partitions)
        producer = Producer({**self._client, "linger.ms": 20, "message.max.bytes": 2**24})
        for i, packet in enumerate(packets):
            while len(producer) > 1000:  # well below librdkafka's queue: a night does not fit in it
                producer.poll(0.1)
            producer.produce(self.topic, packet, partition=i % partitions)
        producer.flush()

    def service(self, model: str) -> Run:
        """A run of `broker-filter run` over the whole topic, exactly once, full payload."""
        name = f"service-{uuid.uuid4().hex[:8]}"
        configuration = self._directory / f"{name}.yaml"
        configuration.write_text(
            yaml.safe_dump(
                {
                    "input": {
                        "bootstrap_servers": self.bootstrap_servers,
                        "group_id": name,
                        "topics": [self.topic],
                        "start": "earliest",
                    },
                    "output": {"prefix": name},
                    "transaction": {"max_alerts": min(Transaction().max_alerts, self.alerts // LEAST_COMMITS)},
                    "models": [str(load_bundle(model).directory.resolve())],
                    "http": {"port": 0},
                }
            )
        )
        command = [sys.executable, "-m", "broker_filter", "run", "--config", str(configuration)]
        log = configuration.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            run = self._watch(name, self.alerts, process.pid, process.poll)
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}; the service says: {log.read_text(errors='replace')[-2000:]}") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._settle(f"{name}.{SCORED}", self.alerts)
        return run

    def naive(self, model: str, alerts: int) -> Run:
        """A run of the naive loop over `alerts` of the topic's alerts."""
        name = f"naive-{uuid.uuid4().hex[:8]}"
        self._create(name, partitions=1)
        loop = multiprocessing.get_context("spawn").Process(
            target=naive_loop, args=(self.bootstrap_servers, self.topic, name, model, alerts)
        )
        loop.start()
        try:
            run = self._watch(name, alerts, loop.pid or 0, lambda: loop.exitcode)
        finally:
            loop.kill()
            loop.join()
        self._settle(name, alerts)
        return run

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete(self.topic)

    def _watch(self, group: str, alerts: int, process: int, exit_status: Callable[[], int | None]) -> Run:
        # A consumer that never subscribes does not join its group: it only asks what the group has committed.
        watcher = Consumer({**self._client, "group.id": group})
        first = last = Moment(0, time.monotonic(), 0.0)
        while last.committed < alerts:
            time.sleep(POLL_INTERVAL_S)
            committed = self._committed(watcher)
            if committed > last.committed:
                last = Moment(committed, time.monotonic(), cpu_seconds(process))
                first = first if first.committed else last
            elif exit_status() is not None:
                raise BenchmarkError(f"{group} ended with {exit_status()} after {last.committed} of {alerts} alerts")
            elif time.monotonic() - last.time > STALL_TIMEOUT_S:
                raise BenchmarkError(f"{group} stalled after {last.committed} of {alerts} alerts")
        watcher.close()
        if first is last:
            raise BenchmarkError(f"{group} committed all {alerts} alerts at once: measure with more")
        done = last.committed - first.committed
        return Run(done / (last.time - first.time), (last.cpu - first.cpu) / done * 1e6)

    def _committed(self, watcher: Consumer) -> int:
        try:
            positions = watcher.committed(self._partitions, timeout=REQUEST_TIMEOUT_S)
        except KafkaException:
            return 0  # a group's coordinator is found, or moves; a cluster that is gone ends as a stall
        return sum(max(position.offset, 0) for position in positions)

    def _settle(self, topic: str, alerts: int) -> None:
        """Counts what a read_committed reader finds, and deletes it."""
        consumer = Consumer(
            {
                **self._client,
                "group.id": f"{topic}-reader",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
            }
        )
        consumer.subscribe([topic])
        found = 0
        while messages := consumer.consume(1000, MISSING_S if found < alerts else SURPLUS_S):
            found += sum(message.error() is None for message in messages)
        consumer.close()
        self._delete(topic)
        if found != alerts:
            raise BenchmarkError(f"{topic} holds {found} committed records for {alerts} alerts")

    def _create(self, topic: str, partitions: int) -> None:
        for future in self._admin.create_topics([NewTopic(topic, partitions)]).values():
            future.result()

    def _delete(self, topic: str) -> None:
        for future in self._admin.delete_topics([topic]).values():
            future.result()


def cpu_seconds(process: int) -> float:
    """CPU time of all threads of a process so far (Linux)."""
    # The name, in parentheses, may hold spaces; utime and stime are the 12th and 13th fields behind it (proc(5)).
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def naive_loop(bootstrap_servers: str, topic: str, name: str, model: str, alerts: int) -> None:
    """Consumes, scores and produces one alert after another, exactly once: a transaction for each few."""
    broker = NaiveBroker(load_bundle(model))
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            **SILENT,
            "group.id": name,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    producer = Producer(
        {"bootstrap.servers": bootstrap_servers, **SILENT, "transactional.id": name, "message.max.bytes": 2**24}
    )
    producer.init_transactions()
    done = 0
    while done < alerts:
        producer.begin_transaction()
        pending = min(NAIVE_TRANSACTION, alerts - done)
        while pending:
            message = consumer.poll(1.0)
            if message is not None and message.error() is None:
                producer.produce(name, broker.process(message.value()))
                pending -= 1
                done += 1
        positions = consumer.position(consumer.assignment())
        producer.send_offsets_to_transaction(positions, consumer.consumer_group_metadata())
        producer.commit_transaction()
    consumer.close()
    signal.pause()  # until it is killed: the CPU time of a process that has ended cannot be read
