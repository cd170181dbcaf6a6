"""CPU time to consume messages and to publish records, without the decoding and scoring in between.

The CPU time is that of this process, including librdkafka's threads, and excluding the broker's process.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from broker_filter.bench.measure import NAIVE, SERVICE, Contest, Run, Stopwatch, compete
from broker_filter.bench.naive import NaiveBroker
from broker_filter.bench.runs.baselines import NAIVE_TRANSACTION, WAIT_S, naive_consumer, naive_producer
from broker_filter.bench.runs.testbed import Testbed
from broker_filter.bench.stages import open_decoder
from broker_filter.config import Batch, Input, Output, Runtime, Service
from broker_filter.health import Health
from broker_filter.kafka.connect import Endpoints, connect
from broker_filter.kafka.sink import divide
from broker_filter.kafka.source import Delivery
from broker_filter.kafka.transactions import Work
from broker_filter.kafka.watchdog import Stage
from broker_filter.metrics import Metrics
from broker_filter.scoring.bundle import open_bundle
from broker_filter.scoring.scorer import open_scorer
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.resolved import resolve
from broker_filter.streaming.routing import Router, open_router

PUBLISHED = 1024
"""Alerts that are published; they are decoded, scored, encoded and held in memory before the clock starts."""


def measure_kafka_io(testbed: Testbed, packets: Sequence[bytes], model: str, repetitions: int) -> dict[str, Contest]:
    """Measure consuming and publishing. `packets`: the distinct packets among the testbed's alerts."""
    naive, service = NaiveKafkaIO(testbed, packets, model), ServiceKafkaIO(testbed, model)
    return {
        "Kafka in": compete({NAIVE: naive.take, SERVICE: service.take}, repetitions),
        "Kafka out": compete({NAIVE: naive.publish, SERVICE: service.publish}, repetitions),
    }


class NaiveKafkaIO:
    """Consumes and publishes one message at a time, as the naive loop does."""

    def __init__(self, testbed: Testbed, packets: Sequence[bytes], model: str) -> None:
        self._testbed = testbed
        broker = NaiveBroker(open_bundle(model).part("ztf"))
        self._records = [broker.process(packet) for packet in packets]

    def take(self) -> Run:
        """Measure consuming all of the testbed's alerts."""
        watch, taken = Stopwatch(), 0
        consumer = naive_consumer(self._testbed.broker.bootstrap_servers, self._testbed.topic, _name("naive"))
        while taken < self._testbed.alerts:
            message = consumer.poll(WAIT_S)
            taken += message is not None and message.error() is None
        run = watch.run(taken)
        consumer.close()
        return run

    def publish(self) -> Run:
        """Measure publishing one record for each distinct packet."""
        name = _name("naive")
        self._testbed.create(name, partitions=1)
        producer = naive_producer(self._testbed.broker.bootstrap_servers, name)
        watch = Stopwatch()
        for start in range(0, len(self._records), NAIVE_TRANSACTION):
            producer.begin_transaction()
            for record in self._records[start : start + NAIVE_TRANSACTION]:
                producer.produce(name, record)
            producer.commit_transaction()
        run = watch.run(len(self._records))
        self._testbed.delete(name)
        return run


class ServiceKafkaIO:
    """The service's source and sink, connected to the broker as in the service."""

    def __init__(self, testbed: Testbed, model: str) -> None:
        self._testbed = testbed
        self._scorer = open_scorer([model], Runtime())
        self._decoder = open_decoder(self._scorer)

    def take(self) -> Run:
        """Measure consuming all of the testbed's alerts."""
        watch = Stopwatch()
        with self._joined(_name("service")) as (endpoints, _):
            taken = sum(len(delivery.packets) for delivery in _deliveries(endpoints, self._testbed.alerts))
            return watch.run(taken)

    def publish(self) -> Run:
        """Measure publishing up to PUBLISHED alerts in the service's transactions."""
        window = DuplicateWindow(PUBLISHED)
        with self._joined(_name("service")) as (endpoints, router):
            works: list[list[Work]] = []
            for delivery in _deliveries(endpoints, min(PUBLISHED, self._testbed.alerts)):
                scored = score_packets(delivery.packets, self._decoder, self._scorer, window)
                works.append(divide(delivery, scored, router.route(scored)))
            watch = Stopwatch()
            for each in works:
                endpoints.sink.put(each)
                endpoints.sink.commit(idle=False)
            endpoints.sink.commit_everything()
            return watch.run(sum(len(work.packets) for each in works for work in each))

    @contextmanager
    def _joined(self, name: str) -> Iterator[tuple[Endpoints, Router]]:
        metrics = Metrics()
        servers = self._testbed.broker.bootstrap_servers
        source = Input(bootstrap_servers=servers, group_id=name, topics=[self._testbed.topic], start="earliest")
        config = Service(input=source, output=Output(prefix=name))
        router = open_router(resolve(config))
        endpoints = connect(config, metrics, Health(), Stage("commit", metrics), threading.Event())
        assert endpoints is not None  # `connect` returns None only if the stop event is set
        try:
            yield endpoints, router
        finally:
            endpoints.sink.close()
            endpoints.source.close()
            for topic in config.output_topics:
                self._testbed.delete(topic)


def _deliveries(endpoints: Endpoints, alerts: int) -> Iterator[Delivery]:
    taken, batch = 0, Batch()
    while taken < alerts:
        if delivery := endpoints.source.take(batch.max_size, batch.max_wait_ms / 1000):
            delivery.set_out()
            taken += len(delivery.packets)
            yield delivery


def _name(competitor: str) -> str:
    return f"{competitor}-ends-{uuid.uuid4().hex[:8]}"
