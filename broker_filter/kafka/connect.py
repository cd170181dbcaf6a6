"""Connects the service to the clusters of input and output, creates the output topics, and joins the consumer group."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.config import DEAD_LETTER, POSITIONS, REDRIVEN, Output, Service
from broker_filter.health import Health
from broker_filter.kafka.checkpoint import Checkpoint, GroupCheckpoint, PositionsCheckpoint, PositionsTopic
from broker_filter.kafka.client import (
    MAX_RECORD_BYTES,
    KafkaSetupError,
    RecordLimits,
    ThrottledErrorLog,
    admin_client,
    client_properties,
    ensure_topics,
    missing_on_topics,
    output_section,
    require_compaction,
    topic_names,
    wait_for_cluster,
)
from broker_filter.kafka.rights import ClusterAccount, account_of
from broker_filter.kafka.sink import KafkaSink
from broker_filter.kafka.source import KafkaSource, group_observer
from broker_filter.kafka.transactions import GRACE_S, Claim, Refusals, Writer
from broker_filter.kafka.watchdog import Stage
from broker_filter.kafka.window import Window
from broker_filter.metrics import Metrics

ALERT_BYTES = 32 * 2**20
"""Largest record in bytes of the alert topics that are created: twice the largest packet that is decoded."""
DEAD_LETTER_BYTES = 128 * 2**20
"""Largest record in bytes of the dead-letter topic. A dead letter holds a whole input message, which may have 100
MiB."""
TABLE_CONFIG = {"cleanup.policy": "compact", "segment.bytes": str(16 * 2**20), "min.cleanable.dirty.ratio": "0.1"}
"""Small segments that are compacted early, because the whole topic is read at every start."""
DRAIN_TIMEOUT_S = 30.0
"""Time to commit the output of a partition before it is revoked. The new owner repeats the work that is not
committed."""

log = logging.getLogger(__name__)


OUTPUT_RIGHTS = ("Write", "Describe", "DescribeConfigs")
"""Operations on each topic that alerts are written to."""


class OutputTopics:
    """The topics that alerts are written to. A running service can add topics."""

    def __init__(self, admin: AdminClient, account: ClusterAccount, limits: RecordLimits, read: Sequence[str]) -> None:
        """`account`: the service's account. `limits`: learns the limits of added topics.

        `read`: templates of the names of the topics that the service reads from the same cluster.
        """
        self._admin = admin
        self._account = account
        self._limits = limits
        self._templates = read

    def add(self, output: Output, names: Sequence[str]) -> None:
        """Create the topics `names` that do not exist, and check the rights on them.

        Raises KafkaSetupError if a topic cannot be written, and KafkaException if the cluster does not answer.
        """
        refuse_loops(names, self._templates)
        ensure_topics(self._admin, output_topics(output, names, separate_clusters=False), self._account)
        self._limits.add(names)
        if missing := missing_on_topics(self._admin, dict.fromkeys(names, OUTPUT_RIGHTS)):
            raise KafkaSetupError("; ".join(map(self._account.lacks, missing)))


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The connected input and output of the service."""

    source: KafkaSource
    sink: KafkaSink
    topics: OutputTopics
    separate_clusters: bool
    """Whether input and output are on two clusters, so that positions are not stored in the input's group."""

    def report_positions(self, *, wait: bool = False) -> None:
        """Commit the positions to the input's group too, for tools that show the lag. The service never reads them."""
        if self.separate_clusters:
            self.source.report_positions(wait=wait)


def connect(
    config: Service,
    metrics: Metrics,
    health: Health,
    committing: Stage,
    stop: threading.Event,
) -> Endpoints | None:
    """Wait for the clusters, create the output topics and join the group. Returns None once `stop` is set.

    Raises PropertyError or SecretError if the configuration cannot be used, and KafkaSetupError if a cluster does not
    allow what the service needs.
    """
    output, topics = output_section(config.input, config.output), config.output_topics
    in_properties, out_properties = client_properties(config.input), client_properties(output)
    account = account_of(output)
    in_error_log = ThrottledErrorLog(
        f"input brokers {config.input.bootstrap_servers}", account=account_of(config.input)
    )
    out_error_log = ThrottledErrorLog(f"output brokers {output.bootstrap_servers}", account=account)
    with _waiting(health, in_error_log):
        in_cluster = wait_for_cluster(in_properties, in_error_log, stop)
    with _waiting(health, out_error_log):
        out_cluster = wait_for_cluster(out_properties, out_error_log, stop)
    if in_cluster is None or out_cluster is None:
        return None

    separate_clusters = in_cluster.id != out_cluster.id
    read = [] if separate_clusters else config.input.topics
    refuse_loops(topics, read)
    admin = admin_client(out_properties, out_error_log)
    positions = [f"{output.prefix}.{POSITIONS}"] if separate_clusters else []
    ensure_topics(admin, output_topics(output, topics, separate_clusters=separate_clusters), account)
    for topic in positions:
        require_compaction(admin, topic, account)
    dead_letter = f"{output.prefix}.{DEAD_LETTER}"
    largest = min(MAX_RECORD_BYTES, int(str(out_properties.get("message.max.bytes", MAX_RECORD_BYTES))))
    limits = RecordLimits(admin, topics, dead_letter, largest, account, positions)
    open_s = config.transaction.max_ms / 1000
    properties = {"transaction.timeout.ms": int(1000 * (open_s + GRACE_S)), **out_properties}
    refusals: Refusals = {}
    window = Window(float(str(properties["transaction.timeout.ms"])) / 1000 - open_s)
    open_writer = partial(
        Writer, properties, limits, metrics, out_error_log, committing, window=window, stop=stop, refusals=refusals
    )

    sink = KafkaSink(config.transaction, dead_letter, metrics, committing, refusals)

    def drain(claims: Collection[Claim]) -> None:
        if not sink.drain(claims, DRAIN_TIMEOUT_S):
            pending = ", ".join(str(claim) for claim in claims if not claim.drained)
            log.warning(
                "partitions were revoked before all messages in flight were committed; "
                "the next owner reads them again: %s",
                pending,
            )

    source = KafkaSource(config.input, in_properties, in_cluster, in_error_log, drain, metrics)
    checkpoint: Checkpoint
    if separate_clusters:
        positions_topic = PositionsTopic(positions[0], out_properties, admin, out_error_log)
        checkpoint = PositionsCheckpoint(
            positions_topic, open_writer, output.prefix, config.input.group_id, in_cluster.id
        )
    else:
        # With `group.instance.id`, a restarted instance ends its own old transaction and continues at once.
        instance = str(in_properties.get("group.instance.id", uuid.uuid4().hex))
        transactional_id = f"{output.prefix}/{config.input.group_id}/{instance}"
        checkpoint = GroupCheckpoint(
            source.consumer, open_writer, transactional_id, group_observer(in_properties, config.input.group_id)
        )
    source.subscribe(checkpoint)
    return Endpoints(source, sink, OutputTopics(admin, account, limits, read), separate_clusters)


@contextmanager
def _waiting(health: Health, error_log: ThrottledErrorLog) -> Iterator[None]:
    health.set(error_log.cluster, "not reached yet")
    yield
    health.set(error_log.cluster, None)


def refuse_loops(written: Collection[str], templates: Sequence[str]) -> None:
    """Raise KafkaSetupError if a topic would be read and written.

    The check of the service file cannot find this if two addresses lead to the same cluster. `templates`: templates of
    the names of the topics that are read.
    """
    if loops := sorted(set(written).intersection(topic_names(templates, datetime.now(UTC)))):
        raise KafkaSetupError(f"{', '.join(loops)} would be read and written; choose another output.prefix")


def output_topics(output: Output, names: Sequence[str], *, separate_clusters: bool) -> list[NewTopic]:
    """Return the topics to create: `names` and, if `separate_clusters`, the topic of the positions."""
    dead_letter = f"{output.prefix}.{DEAD_LETTER}"
    sizes = {name: DEAD_LETTER_BYTES if name == dead_letter else ALERT_BYTES for name in names}
    alerts = [_topic(output, name, output.partitions, {"max.message.bytes": str(size)}) for name, size in sizes.items()]
    return [*alerts, _topic(output, f"{output.prefix}.{POSITIONS}", 1, TABLE_CONFIG)] if separate_clusters else alerts


def redriven_topic(output: Output) -> NewTopic:
    """Return the topic in which `redrive` stores which dead letters are done, to be created."""
    return _topic(output, f"{output.prefix}.{REDRIVEN}", 1, TABLE_CONFIG)


def _topic(output: Output, name: str, partitions: int, configuration: Mapping[str, str]) -> NewTopic:
    return NewTopic(name, partitions, output.replication_factor, config=dict(configuration))
