"""Every metric of the service, in one place. Alerts count only once the transaction with their output is committed.

Names follow Prometheus' conventions: base units, `_total` on counters, the prefix `broker_filter_`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from broker_filter import __version__
from broker_filter.packets.batch import Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import Account

STAGE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""From a batch of a few alerts to a stage that is about to be called stuck."""
PRODUCER_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 1800, 7200)
"""From one transaction to a backlog of hours."""
EXPOSURE_SECONDS = (5, 10, 20, 40, 60, 120, 300, 600, 1200, 3600, 7200, 21600, 86400)
"""Around the survey's own time to alert: 60 s for Rubin, some minutes for ZTF."""
BATCH_ALERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# Each counter and histogram would have a series more, `..._created`, which no rule or panel reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class LossReason(StrEnum):
    """Why messages of an input topic are gone before they were read: the closed list of the metric's reasons."""

    EXPIRED = "expired"
    """The topic's retention, or an operator, has deleted them."""
    TRUNCATED = "truncated"
    """An election of a leader that was behind (an unclean one) has cut them off the end of the log."""


class Metrics:
    """The collectors, on a registry of their own unless one is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry or CollectorRegistry()
        self._consistent = threading.Lock()
        ProcessCollector(registry=self._registry)
        self._consumed = self._counter("consumed_alerts", "Alerts read from the input topics.")
        self._scored = self._counter("scored_alerts", "Alerts that at least one model scored, duplicates left out.")
        self._rejected = self._counter("rejected_alerts", "Inputs that could not be scored.", "reason")
        self._duplicates = self._counter("duplicate_alerts", "Alerts whose id was seen before within the window.")
        self._unaccounted = self._gauge(
            "unaccounted_alerts", "Consumed less scored, rejected and duplicate alerts: anything but 0 is a fault."
        )
        self._lost = self._counter(
            "lost_messages",
            "Offsets of the input that were gone before they were read, by reason: they expired, or were truncated.",
            "topic",
            "reason",
        )
        self._judged = self._counter("judged_alerts", "Scored alerts that passed the cut and could be anomalies.")
        self._anomalous = self._counter("anomalous_alerts", "Those of them that were flagged as anomalies.")
        self._unjudged = self._counter(
            "unjudged_alerts",
            "Scored alerts that passed the cut and were not judged: the reference has too few of their survey.",
            "survey",
        )
        self._anomaly_rate = self._gauge(
            "anomaly_rate", "Share of the judged alerts that were flagged since the start."
        )
        self._so_far: Tally[str] = Tally()
        self._published = self._counter("published_records", "Records published.", "topic")
        self._dead_letters = self._counter("dead_letters", "Records published to the dead-letter topic.")
        self._transactions = self._counter("transactions", "Transactions by how they ended.", "outcome")
        self._lag = self._gauge("consumer_lag_messages", "Messages not yet accounted for.", "topic", "partition")
        self._assigned = self._gauge("assigned_partitions", "Input partitions that this instance reads.")
        self.queue_depth = self._gauge("queue_depth_batches", "Batches that wait before a stage.", "stage")
        self.batch_alerts = self._histogram("batch_alerts", "Messages taken from Kafka at a time.", BATCH_ALERTS)
        self._stage = self._histogram("stage_seconds", "Time of one batch in a stage.", STAGE_SECONDS, "stage")
        self._since_producer = self._histogram(
            "producer_latency_seconds",
            "From the input message's Kafka timestamp to the committed output.",
            PRODUCER_SECONDS,
        )
        self._since_exposure = self._histogram(
            "exposure_latency_seconds", "From the exposure to the committed output.", EXPOSURE_SECONDS
        )
        self._model = self._gauge("model_info", "A loaded model: always 1.", "model", "version", "provider")
        self._build = self._gauge("build_info", "The running program: always 1.", "version", "decoder")
        for outcome in ("committed", "aborted"):
            self._transactions.labels(outcome)
        for reason in RejectReason:
            self._rejected.labels(reason.value)
        for survey in Survey:
            self._unjudged.labels(str(survey))

    def expect(self, *, topics: Iterable[str] = (), stages: Iterable[str] = ()) -> None:
        """Lets the series of output topics and of stages begin at 0.

        A series that begins with its first event does so at 1, and `rate()` and `increase()` do not show that event.
        """
        for topic in topics:
            self._published.labels(topic)
        for stage in stages:
            self._stage.labels(stage)

    def describe_build(self, decoder: str) -> None:
        """Says which implementation decodes packets."""
        self._build.labels(__version__, decoder).set(1)

    def describe_model(self, name: str, version: str, provider: str) -> None:
        """Says that a model is loaded, and what really runs it."""
        self._model.labels(name, version, provider).set(1)

    @contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Measures one batch in a stage."""
        with self._stage.labels(stage).time():
            yield

    def set_partitions(self, lags: Mapping[tuple[str, int], int]) -> None:
        """Says which partitions (topic, number) are read now, and how many messages each is behind."""
        with self._consistent:
            self._assigned.set(len(lags))
            self._lag.clear()
            for (topic, partition), lag in lags.items():
                self._lag.labels(topic, str(partition)).set(lag)

    def expect_losses(self, topic: str) -> None:
        """Lets a topic's counters of lost messages start at zero, so that a rate shows the first loss."""
        for reason in LossReason:
            self._lost.labels(topic, reason.value)

    def lose(self, topic: str, reason: LossReason, n: int) -> None:
        """Counts messages of an input topic that were gone before they were read."""
        self._lost.labels(topic, reason.value).inc(n)

    def abort(self) -> None:
        """Counts a transaction that was aborted."""
        self._transactions.labels("aborted").inc()

    def commit(self, accounts: list[Account], published: Tally[str], dead_letter: str) -> None:
        """Counts what a committed transaction held. `published`: its records by topic."""
        now = time.time()
        with self._consistent:
            self._transactions.labels("committed").inc()
            for account in accounts:
                self._consumed.inc(account.consumed)
                self._scored.inc(account.scored)
                self._duplicates.inc(account.duplicates)
                self._judged.inc(account.judged)
                self._anomalous.inc(account.anomalous)
                for survey, n in account.unjudged.items():
                    self._unjudged.labels(str(survey)).inc(n)
                self._so_far.update(judged=account.judged, anomalous=account.anomalous)
                for reason, n in account.rejected.items():
                    self._rejected.labels(reason.value).inc(n)
                rejected = account.rejected.total()
                self._unaccounted.inc(account.consumed - account.scored - account.duplicates - rejected)
            if self._so_far["judged"]:
                self._anomaly_rate.set(self._so_far["anomalous"] / self._so_far["judged"])
            for topic, n in published.items():
                self._published.labels(topic).inc(n)
            self._dead_letters.inc(published[dead_letter])
        for account in accounts:
            for sent in account.sent:
                self._since_producer.observe(max(0.0, now - sent))
            for exposed in account.exposed:
                self._since_exposure.observe(max(0.0, now - exposed))

    def exposition(self) -> bytes:
        """Prometheus' text format; the account in it is of whole transactions."""
        with self._consistent:
            return generate_latest(self._registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"broker_filter_{name}", says, labels, registry=self._registry)

    def _gauge(self, name: str, says: str, *labels: str) -> Gauge:
        return Gauge(f"broker_filter_{name}", says, labels, registry=self._registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"broker_filter_{name}", says, labels, buckets=buckets, registry=self._registry)
