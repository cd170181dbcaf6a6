"""A broker, a topic full of packets, and the measurement of a competitor that reads it.

Only committed alerts count. A run ends at the last commit of the competitor's consumer group. It begins at the first
commit, or when the alerts were sent to a competitor that waited for them, so that start-up is not counted.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.bench.measure import BenchmarkError, Run, cpu_seconds, memory_megabytes
from broker_filter.bench.runs.baselines import SILENT
from broker_filter.local_kafka import KafkaCluster, embedded_broker, kafka_home

PARTITIONS = 4
POLL_INTERVAL_S = 0.02
REQUEST_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 120.0
READ_AT_A_TIME = 1000
MISSING_S, SURPLUS_S = 30.0, 1.0
"""How long a reader waits for missing records, and for records beyond the expected number."""
QUEUED = 1000
"""Maximum number of messages in flight to the broker: a night does not fit into librdkafka's queue."""
FILL_TIMEOUT_MS = 600_000
"""Timeout of the transaction that holds all packets of a topic."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A running cluster. `processes`: ids of its broker processes; empty if this process did not start them."""

    name: str
    bootstrap_servers: str
    processes: tuple[int, ...] = ()


@contextmanager
def open_broker(bootstrap_servers: str | None, directory: Path) -> Iterator[Broker]:
    """Yield the given cluster, else an Apache Kafka started from KAFKA_HOME, else the embedded broker."""
    if bootstrap_servers:
        yield Broker(f"cluster {bootstrap_servers}", bootstrap_servers)
    elif home := kafka_home():
        with KafkaCluster(home, directory) as cluster:
            yield Broker(f"Apache Kafka of {home}", cluster.bootstrap_servers, cluster.process_ids)
    else:
        with embedded_broker(directory) as servers:
            yield Broker("embedded broker (no Apache Kafka: set KAFKA_HOME)", servers)


class Moment(NamedTuple):
    """A competitor's progress: committed alerts, monotonic seconds, CPU seconds of it and of the brokers."""

    committed: int
    time: float
    cpu: float
    broker_cpu: float


class Competitor(Protocol):
    """Processes that read one topic as one consumer group, and write another topic."""

    group: str
    output: str

    @property
    def processes(self) -> list[int]:
        """The ids of the processes."""

    def check(self) -> None:
        """Raise BenchmarkError if a process has ended."""


class Testbed:
    """A topic, and the measurement of a competitor that reads it. Leaving the `with` block deletes the topic."""

    def __init__(self, broker: Broker, directory: Path, partitions: int = PARTITIONS) -> None:
        """`directory`: for the configuration and the logs of the competitors."""
        self.broker = broker
        self.directory = directory
        self.topic = f"bench-{uuid.uuid4().hex[:8]}"
        self.partitions = [TopicPartition(self.topic, i) for i in range(partitions)]
        self.alerts = 0
        """Number of alerts that were sent. An offset of a partition is the number of its alerts before that offset."""
        self.client: Mapping[str, object] = {"bootstrap.servers": broker.bootstrap_servers, **SILENT}
        self.admin = AdminClient(dict(self.client))
        self.create(self.topic, partitions)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.delete(self.topic)

    def send(self, packets: Sequence[bytes]) -> float:
        """Fill the topic in one transaction, so that all packets become visible together. Call it only once.

        Returns the time of the commit in monotonic seconds.
        """
        producer = Producer(
            {
                **self.client,
                "transactional.id": f"{self.topic}-fill",
                "transaction.timeout.ms": FILL_TIMEOUT_MS,
                "linger.ms": 20,
                "message.max.bytes": 2**24,
            }
        )
        producer.init_transactions()
        producer.begin_transaction()
        for i, packet in enumerate(packets):
            while len(producer) > QUEUED:
                producer.poll(0.1)
            producer.produce(self.topic, packet, partition=i % len(self.partitions))
        producer.commit_transaction()
        self.alerts = len(packets)
        return time.monotonic()

    def watch(self, competitor: Competitor, alerts: int, began: Moment | None = None) -> Run:
        """Measure a competitor until it has committed `alerts` alerts.

        The run begins at `began`, if it is given, else at the competitor's first commit. If all alerts were committed
        between two polls, the run begins at the earlier poll.
        """
        moments = list(self.progress(competitor, alerts))
        first, last = began or (moments[0] if len(moments) > 1 else self._nothing_yet), moments[-1]
        done = last.committed - first.committed
        return Run(
            done / (last.time - first.time),
            (last.cpu - first.cpu) / done * 1e6,
            (last.broker_cpu - first.broker_cpu) / done * 1e6 if self.broker.processes else None,
            max(memory_megabytes(process, peak=True) for process in competitor.processes),
        )

    def progress(self, competitor: Competitor, alerts: int) -> Iterator[Moment]:
        """Yield a Moment each time that more alerts are committed, until `alerts` are.

        Raises BenchmarkError if the competitor has ended, or has committed nothing for STALL_TIMEOUT_S.
        """
        # A consumer that never subscribes does not join its group: it only reads the group's positions.
        # read_committed would wait for a moment without an open transaction, which may never come.
        watcher = Consumer({**self.client, "group.id": competitor.group, "isolation.level": "read_uncommitted"})
        committed, since = 0, time.monotonic()
        while committed < alerts:
            if not committed:
                self._nothing_yet = self.moment(competitor)
            time.sleep(POLL_INTERVAL_S)
            competitor.check()
            now = min(
                self._committed(watcher), alerts
            )  # a position may be beyond the transaction marker after the last alert
            if now > committed:
                committed, since = now, time.monotonic()
                yield self.moment(competitor, committed)
            elif time.monotonic() - since > STALL_TIMEOUT_S:
                raise BenchmarkError(f"{competitor.group} stalled after {committed} of {alerts} alerts")
        watcher.close()

    def moment(self, competitor: Competitor, committed: int = 0) -> Moment:
        """Return the competitor's progress now."""
        cpu, broker_cpu = cpu_seconds(competitor.processes), cpu_seconds(self.broker.processes)
        return Moment(committed, time.monotonic(), cpu, broker_cpu)

    def check_output(self, competitor: Competitor, expected: int) -> None:
        """Count the committed records of a competitor's output, and delete its topic.

        Raises BenchmarkError if there are not `expected` records.
        """
        consumer = self.reader(competitor.output)
        found = 0
        # Reads no more than `expected` first: waiting for a surplus has a shorter timeout.
        while found < expected and (messages := consumer.consume(min(READ_AT_A_TIME, expected - found), MISSING_S)):
            found += sum(message.error() is None for message in messages)
        found += sum(message.error() is None for message in consumer.consume(READ_AT_A_TIME, SURPLUS_S))
        consumer.close()
        self.delete(competitor.output)
        if found != expected:
            raise BenchmarkError(f"{competitor.output} holds {found} committed records for {expected} alerts")

    def reader(self, topic: str) -> Consumer:
        """Return a read_committed consumer of all partitions of a topic, at their beginning."""
        consumer = Consumer(
            {
                **self.client,
                "group.id": f"{topic}-reader",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
            }
        )
        partitions = self.admin.list_topics(topic, timeout=REQUEST_TIMEOUT_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        return consumer

    def create(self, topic: str, partitions: int) -> None:
        """Create a topic."""
        for future in self.admin.create_topics([NewTopic(topic, partitions)]).values():
            future.result()

    def delete(self, topic: str) -> None:
        """Delete a topic."""
        for future in self.admin.delete_topics([topic]).values():
            future.result()

    def _committed(self, watcher: Consumer) -> int:
        try:
            positions = watcher.committed(self.partitions, timeout=REQUEST_TIMEOUT_S)
        except KafkaException:
            return 0  # the group's coordinator is not known yet, or moves; a cluster that has ended shows as a stall
        return sum(max(position.offset, 0) for position in positions)
