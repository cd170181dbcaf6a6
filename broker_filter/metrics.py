"""Every metric of the service, in one place. An alert is counted once the transaction with its output is committed.

Names follow Prometheus' conventions: base units, `_total` on counters, the prefix `broker_filter_`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

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
from broker_filter.packets.batch import PLANES, Survey
from broker_filter.packets.rejects import RejectReason
from broker_filter.streaming.account import Account, AlertSchema
from broker_filter.streaming.scored import LeftOut

if TYPE_CHECKING:
    from broker_filter.streaming.drift import Drift
    from broker_filter.streaming.filters import FilterState
    from broker_filter.streaming.shadow import ShadowOutcome

STAGE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Bucket limits in seconds: from a batch of a few alerts to a stage that is almost reported as stuck."""
PRODUCER_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 1800, 7200)
"""Bucket limits in seconds: from the time of one transaction to a backlog of hours."""
EXPOSURE_SECONDS = (5, 10, 20, 40, 60, 120, 300, 600, 1200, 3600, 7200, 21600, 86400)
"""Bucket limits in seconds, chosen around the time that a survey takes to send an alert: 60 s for Rubin, minutes for
ZTF."""
OF_SHADOW = ("model", "version", "label")
"""Metric labels of one output of a shadow model."""
BATCH_ALERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

MAX_VERSIONS = 32
"""Most schema versions of a survey that have a series of their own: a survey has had twelve, and packets are untrusted
input."""
OTHER_VERSION = "other"
"""The metric label of all further schema versions, and of those that do not look like one."""
VERSION = re.compile(r"[A-Za-z0-9._-]{1,24}")
MAX_WRITERS = 1000
"""Most writer schemas of a survey that are told apart, which bounds the memory."""

log = logging.getLogger(__name__)

# By default each counter and histogram also has a series `..._created`, which no rule or panel reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class LossReason(StrEnum):
    """Why messages of an input topic were lost before they were read: the values of the metric's label `reason`."""

    EXPIRED = "expired"
    """The topic's retention time, or an operator, deleted the messages."""
    TRUNCATED = "truncated"
    """An unclean leader election (the new leader was behind) cut the messages off the end of the log."""


Network = tuple[str, str, str, str]
"""Name and version of a model, the engine and device that run one of its networks, and the names of the surveys of this
network with commas between them."""


class Metrics:
    """The service's metrics. They are registered in `registry`, or in a new registry if it is None."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry or CollectorRegistry()
        self._consistent = threading.Lock()
        ProcessCollector(registry=self._registry)
        self._consumed = self._counter("consumed_alerts", "Alerts that were read from the input topics.")
        self._scored = self._counter("scored_alerts", "Alerts that at least one model scored, without duplicates.")
        self._rejected = self._counter("rejected_alerts", "Inputs that could not be scored, by reason.", "reason")
        self._duplicates = self._counter(
            "duplicate_alerts", "Scored alerts whose id this instance has seen before (see `duplicate_window`)."
        )
        self._unaccounted = self._gauge(
            "unaccounted_alerts",
            "Consumed minus scored, rejected and duplicate alerts. Any value but 0 is a fault of the program.",
        )
        self._lost = self._counter(
            "lost_messages",
            "Input offsets that the brokers no longer held when the service was to read them, by reason: `expired` "
            "(deleted by retention or by an operator) or `truncated` (cut off by an unclean leader election).",
            "topic",
            "reason",
        )
        self._fallbacks = self._counter(
            "plane_fallback_alerts",
            "Scored alerts for which a model used a fallback, by plane: `variance` (it estimated the noise from the "
            "pixels) or `psf` (it used a Gaussian). Their survey publishes the plane, but it is absent or unusable.",
            "plane",
        )
        self._judged = self._counter(
            "judged_alerts", "Scored alerts that passed the cut and were compared with the reference."
        )
        self._anomalous = self._counter("anomalous_alerts", "Judged alerts that were flagged as anomalies.")
        self._unjudged = self._counter(
            "unjudged_alerts",
            "Scored alerts that passed the cut but were not judged: the reference has too few alerts of the survey.",
            "survey",
        )
        self._unknown_version = self._counter(
            "unknown_version_alerts",
            "Decoded alerts whose schema version this program does not know. They are decoded by their own schema.",
            "survey",
        )
        self._decoded = self._counter(
            "decoded_alerts",
            "Decoded alerts by survey and by the version of the schema that they were written with. Versions beyond "
            f"the first {MAX_VERSIONS} of a survey are counted as `{OTHER_VERSION}`.",
            "survey",
            "schema_version",
        )
        self._writers = self._gauge(
            "writer_schemas",
            "Number of different schemas that the decoded alerts of a survey were written with, since the start of "
            "the process. Two schemas with the same version number that differ in a field count as two.",
            "survey",
        )
        self._known_writers: dict[Survey, set[str]] = {survey: set() for survey in Survey}
        self._known_versions: dict[Survey, set[str]] = {survey: set() for survey in Survey}
        self._drift = self._gauge(
            "drift_psi",
            "Population stability index: distance between the distribution of a quantity over the scored alerts of the "
            "last day and the one that the model's bundle records. The quantity is an output, `<model>.<label>`, or a "
            "metadata column. Absent with fewer than 1000 alerts. Above 0.25 the difference is large.",
            "survey",
            "model",
            "quantity",
        )
        self._drift_alerts = self._gauge(
            "drift_window_alerts",
            "Scored alerts of the last day, without duplicates, that the drift of a model is computed from.",
            "survey",
            "model",
        )
        self._anomaly_rate = self._gauge(
            "anomaly_rate", "Fraction of the judged alerts that were flagged, since the start of the process."
        )
        self._passed = self._counter(
            "filter_passed_alerts",
            "Scored alerts, without duplicates, that passed a filter, also while its topic is paused.",
            "filter",
        )
        self._filter_rate = self._gauge(
            "filter_rate",
            "Fraction of the scored alerts of the last minutes (`max_rate_minutes`) that passed a filter.",
            "filter",
        )
        self._filter_over_rate = self._gauge(
            "filter_over_rate", "1 while a filter passes more than its `max_rate`, otherwise 0.", "filter"
        )
        self._filter_paused = self._gauge(
            "filter_paused",
            "1 while the topic of a filter is paused because the filter passes more than its `max_rate`, otherwise 0.",
            "filter",
        )
        self._so_far: Tally[str] = Tally()
        self._published = self._counter(
            "published_records", "Records published in committed transactions, by topic.", "topic"
        )
        self._dead_letters = self._counter(
            "dead_letters", "Records published to the dead-letter topic in committed transactions."
        )
        self._transactions = self._counter(
            "transactions", "Transactions by outcome: `committed` or `aborted`.", "outcome"
        )
        self._lag = self._gauge(
            "consumer_lag_messages",
            "Messages between the committed position and the end of an input partition.",
            "topic",
            "partition",
        )
        self._assigned = self._gauge("assigned_partitions", "Input partitions that this instance reads.")
        self.queue_depth = self._gauge("queue_depth_batches", "Batches in the queue before a stage.", "stage")
        self.batch_alerts = self._histogram("batch_alerts", "Messages in one batch read from Kafka.", BATCH_ALERTS)
        self._stage = self._histogram(
            "stage_seconds", "Processing time of one batch in a stage.", STAGE_SECONDS, "stage"
        )
        self._since_producer = self._histogram(
            "producer_latency_seconds",
            "Time from the Kafka timestamp of the input message to the commit of the output.",
            PRODUCER_SECONDS,
        )
        self._since_exposure = self._histogram(
            "exposure_latency_seconds", "Time from the exposure to the commit of the output.", EXPOSURE_SECONDS
        )
        self._model = self._gauge(
            "model_info",
            "Always 1; the labels name a network of a loaded model, and the surveys whose alerts it scores.",
            "model",
            "version",
            "provider",
            "surveys",
        )
        self._shadow_model = self._gauge(
            "shadow_model_info",
            "Always 1; the labels name a network of a loaded shadow model, and the surveys whose alerts it scores.",
            "model",
            "version",
            "provider",
            "surveys",
        )
        self._shadow_scored = self._counter(
            "shadow_scored_alerts",
            "Scored alerts, without duplicates, that a shadow model scored too. They are counted when they are scored.",
            "model",
            "version",
        )
        self._shadow_failed = self._counter(
            "shadow_failed_alerts",
            "Alerts of the batches on which a shadow model raised an error. Their records are without its outputs.",
            "model",
            "version",
        )
        self._shadow_compared = self._counter(
            "shadow_compared_alerts",
            "Alerts, without duplicates, for which a shadow model and the serving model that it is compared with both "
            "gave the output `label`.",
            *OF_SHADOW,
        )
        self._shadow_difference = self._counter(
            "shadow_absolute_difference",
            "Sum of the absolute differences between the output `label` of a shadow model and that of the serving "
            "model that it is compared with. Divided by the compared alerts, it is their mean.",
            *OF_SHADOW,
        )
        self._shadow_disagreeing = self._counter(
            "shadow_disagreeing_alerts",
            "Compared alerts to which only one of the two models, the shadow or the serving one, gave an output "
            "`label` of at least 0.5.",
            *OF_SHADOW,
        )
        self._shadow_left_out = self._counter(
            "shadow_left_out_records",
            "Records of the shadow topic that were left out, by reason: `schema_refused` or `registry_unavailable` "
            "(by the schema registry) or `too_large` (for the topic). Their alerts are published to all other topics.",
            "reason",
        )
        self._reloads = self._counter(
            "reloads", "Reloads of the configuration by outcome: `succeeded`, or `failed` (nothing changed).", "outcome"
        )
        self._reload_failed = self._gauge(
            "last_reload_failed",
            "1 if the last reload of the configuration failed, so that an earlier configuration is in service; else 0.",
        )
        self._build = self._gauge(
            "build_info", "Always 1; the labels describe the running program.", "version", "decoder"
        )
        self._configuration = self._gauge(
            "configuration_info",
            "Always 1; the label is the revision of the configuration that scores alerts. Each record states it.",
            "revision",
        )
        self._filter_files = self._gauge(
            "filter_file_failed",
            "1 if a file that a filter reads has changed on disk and could not be used, so that the filter uses its "
            "earlier content; else 0.",
            "file",
        )
        for outcome in ("committed", "aborted"):
            self._transactions.labels(outcome)
        for outcome in ("succeeded", "failed"):
            self._reloads.labels(outcome)
        for reason in RejectReason:
            self._rejected.labels(reason.value)
        for left_out in LeftOut:
            self._shadow_left_out.labels(left_out.value)
        for plane in PLANES:
            self._fallbacks.labels(plane)
        for survey in Survey:
            self._writers.labels(str(survey))
            self._unjudged.labels(str(survey))
            self._unknown_version.labels(str(survey))

    def expect(self, *, topics: Iterable[str] = (), stages: Iterable[str] = (), filters: Iterable[str] = ()) -> None:
        """Create the series of output topics, of stages and of filters with the value 0.

        A series that appears with its first event starts at 1, so `rate()` and `increase()` do not show that event.
        """
        for topic in topics:
            self._published.labels(topic)
        for stage in stages:
            self._stage.labels(stage)
        for name in filters:
            self._passed.labels(name)

    def describe_build(self, decoder: str) -> None:
        """Set the metric of the program's version. `decoder`: the implementation that decodes packets."""
        self._build.labels(__version__, decoder).set(1)

    def describe_configuration(self, revision: str) -> None:
        """Set the metric of the configuration by which alerts are scored from now on."""
        with self._consistent:
            self._configuration.clear()
            self._configuration.labels(revision).set(1)

    def describe_models(self, served: Iterable[Network], shadows: Iterable[Network]) -> None:
        """Replace the metrics of the networks of the serving models and of the shadow models."""
        with self._consistent:
            for gauge, networks in ((self._model, served), (self._shadow_model, shadows)):
                gauge.clear()
                for labels in networks:
                    gauge.labels(*labels).set(1)

    def set_filter_files(self, failed: Mapping[str, bool]) -> None:
        """Replace the files that the filters read. `failed`: whether each file on disk, by path, cannot be used."""
        with self._consistent:
            self._filter_files.clear()
            for file, value in failed.items():
                self._filter_files.labels(file).set(value)

    def expect_shadow(self, name: str, version: str, labels: Iterable[str]) -> None:
        """Create the counters of a shadow model with the value 0.

        `labels`: the outputs that are compared with a serving model.
        """
        self._shadow_scored.labels(name, version)
        self._shadow_failed.labels(name, version)
        for label in labels:
            for counter in (self._shadow_compared, self._shadow_difference, self._shadow_disagreeing):
                counter.labels(name, version, label)

    def count_shadow(self, outcome: ShadowOutcome) -> None:
        """Count what a shadow model made of one batch."""
        name, version = outcome.model, outcome.version
        self._shadow_scored.labels(name, version).inc(outcome.scored)
        self._shadow_failed.labels(name, version).inc(outcome.failed)
        for one in outcome.differences:
            self._shadow_compared.labels(name, version, one.label).inc(one.compared)
            self._shadow_difference.labels(name, version, one.label).inc(one.absolute)
            self._shadow_disagreeing.labels(name, version, one.label).inc(one.disagreeing)

    def count_reload(self, *, failed: bool) -> None:
        """Count one reload of the configuration."""
        self._reloads.labels("failed" if failed else "succeeded").inc()
        self._reload_failed.set(failed)

    @contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Observe the time that the block takes as the time of one batch in a stage."""
        with self._stage.labels(stage).time():
            yield

    def set_partitions(self, lags: Mapping[tuple[str, int], int]) -> None:
        """Replace the partitions that are read. `lags`: messages that each (topic, partition) is behind."""
        with self._consistent:
            self._assigned.set(len(lags))
            self._lag.clear()
            for (topic, partition), lag in lags.items():
                self._lag.labels(topic, str(partition)).set(lag)

    def set_filters(self, states: Iterable[FilterState]) -> None:
        """Replace the rates of the filters."""
        with self._consistent:
            for gauge in (self._filter_rate, self._filter_over_rate, self._filter_paused):
                gauge.clear()
            for state in states:
                self._filter_rate.labels(state.name).set(state.rate)
                self._filter_over_rate.labels(state.name).set(state.over)
                self._filter_paused.labels(state.name).set(state.paused)

    def set_drift(self, windows: Mapping[tuple[str, str], int], drifts: Iterable[Drift]) -> None:
        """Replace the drifts. `windows`: number of alerts in the window of each (survey, model)."""
        with self._consistent:
            self._drift_alerts.clear()
            self._drift.clear()
            for of, alerts in windows.items():
                self._drift_alerts.labels(*of).set(alerts)
            for drift in drifts:
                self._drift.labels(drift.survey, drift.model, drift.quantity).set(drift.psi)

    def expect_losses(self, topic: str) -> None:
        """Create a topic's counters of lost messages with the value 0, so that `increase()` shows the first loss."""
        for reason in LossReason:
            self._lost.labels(topic, reason.value)

    def lose(self, topic: str, reason: LossReason, n: int) -> None:
        """Count `n` messages of an input topic as lost before they were read."""
        self._lost.labels(topic, reason.value).inc(n)

    def abort(self) -> None:
        """Count one aborted transaction."""
        self._transactions.labels("aborted").inc()

    def commit(self, accounts: list[Account], published: Tally[str], dead_letter: str) -> None:
        """Count the content of one committed transaction.

        `accounts`: one for each packet. `published`: number of records by topic. `dead_letter`: the topic whose
        records are counted as dead letters.
        """
        now = time.time()
        schemas: Tally[AlertSchema] = Tally()
        with self._consistent:
            self._transactions.labels("committed").inc()
            for account in accounts:
                schemas.update(account.schemas)
                self._consumed.inc(account.consumed)
                self._scored.inc(account.scored)
                self._duplicates.inc(account.duplicates)
                self._judged.inc(account.judged)
                self._anomalous.inc(account.anomalous)
                for left_out, n in account.left_out.items():
                    self._shadow_left_out.labels(left_out.value).inc(n)
                for name, n in account.passed.items():
                    self._passed.labels(name).inc(n)
                for plane, n in account.fallbacks.items():
                    self._fallbacks.labels(plane).inc(n)
                for survey, n in account.unjudged.items():
                    self._unjudged.labels(str(survey)).inc(n)
                for survey, n in account.unknown_version.items():
                    self._unknown_version.labels(str(survey)).inc(n)
                self._so_far.update(judged=account.judged, anomalous=account.anomalous)
                for reason, n in account.rejected.items():
                    self._rejected.labels(reason.value).inc(n)
                rejected = account.rejected.total()
                self._unaccounted.inc(account.consumed - account.scored - account.duplicates - rejected)
            for schema, n in schemas.items():
                self._count_schema(schema, n)
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

    def _count_schema(self, schema: AlertSchema, n: int) -> None:
        """Count `n` alerts that were written with a schema. The first alert of a schema is logged."""
        survey, version, fingerprint = schema
        writers, versions = self._known_writers[survey], self._known_versions[survey]
        if fingerprint not in writers and len(writers) < MAX_WRITERS:
            writers.add(fingerprint)
            self._writers.labels(str(survey)).set(len(writers))
            log.info("first alerts of %s with schema version %.24r, fingerprint %s", survey, version, fingerprint)
        if version not in versions:
            if len(versions) < MAX_VERSIONS and VERSION.fullmatch(version):
                versions.add(version)
            else:
                version = OTHER_VERSION
        self._decoded.labels(str(survey), version).inc(n)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format. A transaction is counted in it as a whole or not at all."""
        with self._consistent:
            return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"broker_filter_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"broker_filter_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"broker_filter_{name}", text, labels, buckets=buckets, registry=self._registry)
