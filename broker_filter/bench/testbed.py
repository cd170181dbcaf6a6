"""A broker, a topic full of packets, and a clock for whoever reads it.

What counts is what is committed: a run is measured up to the last commit of the consumer group, from its first one or
from when the alerts came to a competitor that waited for them, so that neither start-up nor a record that no reader may
see yet is counted.
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

from broker_filter.bench.baselines import SILENT
from broker_filter.bench.measure import BenchmarkError, Run, cpu_seconds, memory_megabytes
from broker_filter.local_kafka import KafkaCluster, embedded_broker, kafka_home

PARTITIONS = 4
POLL_INTERVAL_S = 0.02
REQUEST_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 120.0
READ_AT_A_TIME = 1000
MISSING_S, SURPLUS_S = 30.0, 1.0
"""How long a reader waits for records that are missing, and for any beyond what there must be."""
QUEUED = 1000
"""Messages on their way to the broker at most: a night does not fit into librdkafka's queue."""
FILL_TIMEOUT_MS = 600_000
"""Of a transaction that holds a whole burst."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A running cluster. `processes`: where they are ours to look at."""

    name: str
    bootstrap_servers: str
    processes: tuple[int, ...] = ()


@contextmanager
def open_broker(bootstrap_servers: str | None, directory: Path) -> Iterator[Broker]:
    """The cluster that is given, else Apache Kafka of KAFKA_HOME, else the embedded broker."""
    if bootstrap_servers:
        yield Broker(f"cluster {bootstrap_servers}", bootstrap_servers)
    elif home := kafka_home():
        with KafkaCluster(home, directory) as cluster:
            yield Broker(f"Apache Kafka of {home}", cluster.bootstrap_servers, cluster.process_ids)
    else:
        with embedded_broker(directory) as servers:
            yield Broker("embedded broker (no Apache Kafka: set KAFKA_HOME)", servers)


class Moment(NamedTuple):
    """How far a competitor is: alerts committed, seconds by a monotonic clock, CPU seconds of it and of the brokers."""

    committed: int
    time: float
    cpu: float
    broker_cpu: float


class Competitor(Protocol):
    """Processes that read a topic as one consumer group, and write another."""

    group: str
    output: str

    @property
    def processes(self) -> list[int]:
        """Their ids."""

    def check(self) -> None:
        """Raises BenchmarkError where one has ended."""


class Testbed:
    """A topic, and a clock for whoever reads it. Deletes the topic in the end."""

    def __init__(self, broker: Broker, directory: Path, partitions: int = PARTITIONS) -> None:
        """`directory`: for configuration and logs of the competitors."""
        self.broker = broker
        self.directory = directory
        self.topic = f"bench-{uuid.uuid4().hex[:8]}"
        self.partitions = [TopicPartition(self.topic, i) for i in range(partitions)]
        self.alerts = 0
        """How many were sent. Then, a partition's offset is the number of its alerts before it."""
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
        """Fills the topic, once, all at once: no reader sees the first packet before the last is there. Says when that
        was (monotonic seconds)."""
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
        """Measures a competitor until it has committed so many: from when it `began`, else from its first commit, or,
        where nobody looked between that and the last one, from the look before them."""
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
        """Each moment at which more is found to be committed, up to `alerts`."""
        # A consumer that never subscribes does not join its group: it only asks what the group has committed.
        # Uncommitted: else it would wait for a moment without an open transaction, and there may be none.
        watcher = Consumer({**self.client, "group.id": competitor.group, "isolation.level": "read_uncommitted"})
        committed, since = 0, time.monotonic()
        while committed < alerts:
            if not committed:
                self._nothing_yet = self.moment(competitor)
            time.sleep(POLL_INTERVAL_S)
            competitor.check()
            now = min(self._committed(watcher), alerts)  # a position may be past the marker behind the last alert
            if now > committed:
                committed, since = now, time.monotonic()
                yield self.moment(competitor, committed)
            elif time.monotonic() - since > STALL_TIMEOUT_S:
                raise BenchmarkError(f"{competitor.group} stalled after {committed} of {alerts} alerts")
        watcher.close()

    def moment(self, competitor: Competitor, committed: int = 0) -> Moment:
        """Now."""
        cpu, broker_cpu = cpu_seconds(competitor.processes), cpu_seconds(self.broker.processes)
        return Moment(committed, time.monotonic(), cpu, broker_cpu)

    def check_output(self, competitor: Competitor, expected: int) -> None:
        """Counts what a read_committed reader finds of a competitor's output, and deletes it."""
        consumer = self.reader(competitor.output)
        found = 0
        # No more than there must be: for a surplus it would wait as long as for what is missing.
        while found < expected and (messages := consumer.consume(min(READ_AT_A_TIME, expected - found), MISSING_S)):
            found += sum(message.error() is None for message in messages)
        found += sum(message.error() is None for message in consumer.consume(READ_AT_A_TIME, SURPLUS_S))
        consumer.close()
        self.delete(competitor.output)
        if found != expected:
            raise BenchmarkError(f"{competitor.output} holds {found} committed records for {expected} alerts")

    def reader(self, topic: str) -> Consumer:
        """A read_committed reader of all of a topic, from its beginning."""
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
        """Makes a topic."""
        for future in self.admin.create_topics([NewTopic(topic, partitions)]).values():
            future.result()

    def delete(self, topic: str) -> None:
        """Deletes a topic."""
        for future in self.admin.delete_topics([topic]).values():
            future.result()

    def _committed(self, watcher: Consumer) -> int:
        try:
            positions = watcher.committed(self.partitions, timeout=REQUEST_TIMEOUT_S)
        except KafkaException:
            return 0  # a group's coordinator is found, or moves; a cluster that is gone ends as a stall
        return sum(max(position.offset, 0) for position in positions)
